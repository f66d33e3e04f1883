"""Model cards: the README.md in the folder of an encoder or a classifier, which the Hugging Face Hub shows.

A card says what is known from the files of a run or an evaluation, and nothing else. It is the same in whichever
session it is written, so it names neither times nor the number of sessions. Its figures lie beside it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import load_file

from galaxy_mae import provenance
from galaxy_mae.data.download import GALAXY10
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.methods import ARRAY_METHODS
from galaxy_mae.evaluation.results import Result, is_finished, read_config, read_result
from galaxy_mae.evaluation.scores import Estimate, all_scores, percent, wilson
from galaxy_mae.figures import confusion_matrix
from galaxy_mae.files import move_files, read_json, remove_leftovers, temporary_folder
from galaxy_mae.reports.report import TITLES, describe_leakage, markdown_table

_GALAXY10_COPIES = ("matthieulel/galaxy10_decals", "MultimodalUniverse/gz10")  # on the Hub
_TAGS = ["vision", "astronomy", "galaxies", "galaxy-morphology"]
_PROBES = {"Linear probe": "eval_linear_probe_accuracy", "k-NN": "eval_knn_accuracy"}
_NO_TEST_SET = "Validation accuracies may have served to choose among runs, so they are no test accuracies."

_HE_2022 = r"""@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\'a}r, Piotr and Girshick, Ross},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages     = {16000--16009},
  year      = {2022}
}"""
_WALMSLEY_2022 = r"""@article{walmsley2022galaxy,
  title   = {Galaxy Zoo DECaLS: Detailed visual morphology measurements from volunteers and deep learning
             for 314 000 galaxies},
  author  = {Walmsley, Mike and Lintott, Chris and G{\'e}ron, Tobias and Kruk, Sandor and others},
  journal = {Monthly Notices of the Royal Astronomical Society},
  volume  = {509},
  number  = {3},
  pages   = {3966--3988},
  year    = {2022}
}"""

_USE_ENCODER = """```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name = "."  # this folder, or its id on the Hub
processor = AutoImageProcessor.from_pretrained(name, backend="pil")
encoder = AutoModel.from_pretrained(name, add_pooling_layer=False)
pixels = processor(Image.open("galaxy.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
features = encoder(pixels).last_hidden_state[:, 1:].mean(dim=1)  # mean of the patch tokens: (1, HIDDEN_SIZE)
```"""
_USE_CLASSIFIER = """```python
from PIL import Image
from transformers import AutoImageProcessor, pipeline

name = "."  # this folder, or its id on the Hub
processor = AutoImageProcessor.from_pretrained(name, backend="pil")
classify = pipeline("image-classification", model=name, image_processor=processor)
predictions = classify(Image.open("galaxy.jpg").convert("RGB"), top_k=3)  # classes and their probabilities
```"""


# --------------------------------------------------------------------------------------------------- what is written


def write_encoder_card(run_folder: Path) -> None:
    """Write `README.md` and its figure into `encoder/` of a run; older ones are replaced.

    Args:
        run_folder: of a pre-training whose `encoder/` and `eval_results.json` are written.

    Raises:
        UserError: no run there, or a file of it that is damaged.
    """
    folder, fix = run_folder / "encoder", f"delete {run_folder} and train again"
    pretraining = provenance.read_pretraining(str(folder))
    if pretraining is None:
        raise UserError(f"{folder}: no encoder of main.py there; {fix}")
    metrics = read_json(run_folder / "eval_results.json", fix, {"eval_loss": float})
    with _into(folder) as staging:
        shutil.copyfile(run_folder / "reconstruction_example.png", staging / "reconstruction_example.png")
        name = run_folder.resolve().name
        parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        text = _encoder_card(name, parameters, pretraining, metrics)
        (staging / "README.md").write_text(text, encoding="utf-8")


def write_classifier_cards(results_folder: Path, method: str) -> None:
    """Write `README.md` and its figure into the folder of each classifier of a method; older ones are replaced.

    Args:
        results_folder: of an evaluation.
        method: nothing is written for one that fine-tunes nothing or is not finished.

    Raises:
        UserError: a result is damaged or of another evaluation.
    """
    if method not in [x.name for x in ARRAY_METHODS if x.trained_on == "images"] or not is_finished(
        results_folder, method
    ):
        return
    config = read_config(results_folder)
    result = read_result(results_folder, method, config)
    for position, seed in enumerate(result.about["seeds"]):
        folder = results_folder / method / f"seed_{seed}"
        if not (folder / "config.json").is_file():  # deleted, to save space
            continue
        scores = all_scores(
            result.predictions.label, result.predictions.predicted[[position]], tuple(config["class_names"])
        )
        with _into(folder) as staging:
            title = f"{TITLES[method]}, seed {seed}: {scores['test_images']:,} test galaxies"
            counts = np.array(scores["confusion_matrix"])
            confusion_matrix(staging / "confusion_matrix.png", counts, config["class_names"], title)
            text = _classifier_card(config, result, position, scores)
            (staging / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def _into(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `folder` when all are on the disk."""
    remove_leftovers(folder)
    with temporary_folder(folder) as staging:
        yield staging
        move_files(staging, folder)


def _write_out(data: ModelCardData, title: str, sections: dict[str, list[str]]) -> str:
    """The text of a card: metadata, title, what comes before the first heading (key ""), and the other sections."""
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", ""]
    for heading, paragraphs in sections.items():
        lines += [f"## {heading}", ""] if heading else []
        lines += ["\n\n".join(paragraphs), ""]
    return str(ModelCard("\n".join(lines)))


# --------------------------------------------------------------------------------------------------------- the encoder


def _encoder_card(name: str, parameters: int, pretraining: provenance.Pretraining, metrics: dict[str, float]) -> str:
    recipe = pretraining.recipe
    data = _describe_data(recipe["dataset"], recipe["data"], provenance.hub_id(recipe["dataset"]))
    parts = pretraining.galaxies["split"].to_pylist()
    counts = {part: parts.count(part) for part in ("train", "validation")}
    located = bool(np.isfinite(pretraining.galaxies["ra"].to_numpy()).all())
    probes = {title: metrics[key] for title, key in _PROBES.items() if key in metrics}
    size, hidden = recipe["image_size"], recipe["hidden_size"]
    introduction = (
        f"A vision transformer ({parameters / 1e6:.1f} M parameters) that turns a galaxy image of {size} x {size} "
        f"pixels into {hidden} features, for linear probes, similarity search and fine-tuning. It was pre-trained "
        f"without labels on {counts['train']:,} images of {data.title}: {recipe['mask_ratio']:.0%} of an image's "
        "patches were masked, and the network learned to reconstruct them "
        "([He et al. 2022](https://arxiv.org/abs/2111.06377))."
    )
    figure = (
        "![Galaxies, their visible patches, and the reconstructions](reconstruction_example.png)\n\n*Validation "
        "galaxies, reconstructed by the complete autoencoder, whose encoder this is.*"
    )
    seen = (
        f"`pretraining_galaxies.parquet` lists these galaxies ({'position, ' * located}hashes of the image), so that "
        "an evaluation can leave out those that this encoder has seen."
    )
    loss = f"Mean squared error of the masked patches on the {counts['validation']:,} validation galaxies: "
    loss += f"{metrics['eval_loss']:.4f}, for pixels "
    loss += "normalized per patch." if recipe["norm_pix_loss"] else "in units of their channel's std."
    return _write_out(
        ModelCardData(
            **_metadata("image-feature-extraction", data, ["masked-autoencoder", "self-supervised-learning", *_TAGS]),
            model_name=name,
            metrics=["accuracy"] if probes else None,
            eval_results=[data.result("validation", "accuracy", x, f"{title} accuracy") for title, x in probes.items()]
            or None,
        ),
        f"{_plain(name)}: encoder of a masked autoencoder for galaxy images",
        {
            "": [introduction, figure],
            "Use": [_USE_ENCODER.replace("HIDDEN_SIZE", str(hidden)), _describe_processor(size)],
            "Training data": [
                data.text,
                f"{_describe_split(counts, located)} The test galaxies of this split were not used.",
                seen,
            ],
            "Training": [_table(("Setting", "Value"), _pretraining_rows(recipe)), _describe_code(pretraining.sessions)],
            "Results": [loss, *_describe_probes(probes, metrics)],
            "Limits": [_list([*_limits_of_images(data, size), _NO_TEST_SET])],
            **_closing(data),
        },
    )


def _describe_probes(probes: dict[str, float], metrics: dict[str, float]) -> list[str]:
    if not probes:
        return []
    count = int(metrics["eval_num_validation_images"])
    rows = [(title, percent(Estimate(value, *wilson(value, count)))) for title, value in probes.items()]
    return [
        f"Classifiers of the frozen features, on {count:,} validation galaxies (95 % intervals):",
        _table(("Classifier", "Validation accuracy"), rows),
    ]


def _pretraining_rows(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Encoder", _describe_transformer(recipe)),
        ("Decoder", f"hidden size {recipe['decoder_hidden_size']}, layers: {recipe['decoder_num_hidden_layers']}"),
        ("Mask ratio, target", f"{recipe['mask_ratio']:g}, pixels{' normalized per patch' * recipe['norm_pix_loss']}"),
        ("Augmentation", f"crops of {recipe['min_crop_scale']:g} to 1 of the area, flips and rotations"),
        *_optimization_rows(recipe),
    ]


# ------------------------------------------------------------------------------------------------------ the classifier


def _classifier_card(config: dict[str, Any], result: Result, position: int, scores: dict[str, Any]) -> str:
    about, seed = result.about, result.about["seeds"][position]
    best_params, pretrained = about["best_params"][str(seed)], result.name.startswith("ssl")
    data = _describe_data(config["dataset_name"], config["dataset"], config["hub_ids"]["dataset"])
    encoder, size, classes = _encoder_name(config), config["model"]["image_size"], config["class_names"]
    name = f"{Path(encoder).name}-{result.name}-seed-{seed}".replace("_", "-")
    start = f"the pre-trained encoder {_code(encoder)}" if pretrained else "random weights"
    introduction = (
        f"{_kind(config)} ({config['model']['num_parameters'] / 1e6:.1f} M parameters) that sorts galaxy images of "
        f"{size} x {size} pixels into {len(classes)} classes, with calibrated probabilities. It was fine-tuned on "
        f"{data.title} from {start}, and classifies {percent(Estimate(scores['accuracy'], *scores['interval']))} of "
        f"{scores['test_images']:,} test galaxies correctly (95 % interval)."
    )
    if not pretrained:
        introduction += f" It is the baseline of the one that starts from the encoder {_code(encoder)}."
    figure = "![Confusion matrix of the test galaxies](confusion_matrix.png)"
    split = _describe_split(config["split_sizes"], bool(np.isfinite(result.predictions.position).all()))
    start += _describe_pretraining(config) if pretrained else ""
    return _write_out(
        ModelCardData(
            **_metadata("image-classification", data, [*_TAGS, "masked-autoencoder"] if pretrained else _TAGS),
            model_name=name,
            metrics=["accuracy", "f1"],
            base_model=config["hub_ids"]["encoder"] if pretrained else None,
            eval_results=[
                data.result("test", "accuracy", scores["accuracy"], "Accuracy"),
                data.result("test", "balanced_accuracy", scores["balanced_accuracy"], "Balanced accuracy"),
                data.result("test", "f1", scores["macro_f1"], "Macro-F1", {"average": "macro"}),
            ],
        ),
        f"{_plain(name)}: classifier of galaxy images",
        {
            "": [introduction],
            "Use": [_USE_CLASSIFIER, f"{_describe_processor(size)} The classes: {', '.join(map(_plain, classes))}."],
            "Training data": [data.text, split, *([describe_leakage(config)] if pretrained else [])],
            "Training": [
                _table(("Setting", "Value"), _fine_tuning_rows(config, best_params, start)),
                _describe_code([about]),
            ],
            "Results": [*_describe_scores(about, scores, seed), figure],
            "Calibration": [_describe_calibration(about["calibration"], position, best_params["temperature"])],
            "Limits": [_list([*_limits_of_images(data, size), *_limits_of_classes(scores)])],
            **_closing(data),
        },
    )


def _describe_scores(about: dict[str, Any], scores: dict[str, Any], seed: int) -> list[str]:
    seeds, tests = len(about["seeds"]), scores["test_images"]
    columns = {f"Seed {seed}, this classifier": scores, f"Mean of {seeds} seeds": about}
    if seeds == 1:
        columns.popitem()
    rows = [
        ("Accuracy", *(percent(Estimate(x["accuracy"], *x["interval"])) for x in columns.values())),
        ("Balanced accuracy", *(f"{100 * x['balanced_accuracy']:.2f} %" for x in columns.values())),
        ("Macro-F1", *(f"{x['macro_f1']:.3f}" for x in columns.values())),
    ]
    of_class = _of_test_set(scores)
    frequent = max(of_class, key=lambda name: of_class[name]["test_images"])
    share = of_class[frequent]["test_images"] / tests
    text = f"On {tests:,} test galaxies, which nothing was selected on; in brackets 95 % intervals, "
    text += "for the size of the test set" + ", and of the mean also for the spread between seeds" * (seeds > 1)
    text += f". Always predicting {_plain(frequent)} gives {100 * share:.1f} %."
    each = [
        (_plain(name), str(x["test_images"]), *(f"{100 * x[key]:.0f} %" for key in ("precision", "recall", "f1")))
        for name, x in of_class.items()
    ]
    return [text, _table(("", *columns), rows), _table(("Class", "Test galaxies", "Precision", "Recall", "F1"), each)]


def _describe_calibration(scores: dict[str, Any], position: int, temperature: float) -> str:
    return (
        "Of the galaxies that the classifier gives a probability of 80 %, about 80 % should be in the class. To this "
        f"end the weights of the head were divided by a temperature of {temperature:.3f}, fitted to the validation "
        "galaxies (Guo et al. 2017). On the test galaxies the expected calibration error is "
        f"{100 * scores['ece_per_seed'][position]:.1f} %; without the temperature it is "
        f"{100 * scores['before']['ece_per_seed'][position]:.1f} %. On so few galaxies it is not 0 for a calibrated "
        f"classifier either: 95 % of those stay below {100 * scores['ece_if_calibrated']:.1f} %. Other data, or other "
        "fractions of the classes, need another temperature."
    )


def _fine_tuning_rows(config: dict[str, Any], best_params: dict[str, Any], start: str) -> list[tuple[str, str]]:
    recipe = config["recipe"]
    augmentation = f"crops of {recipe['min_crop_scale']:g} to 1 of the area, flips and rotations, "
    augmentation += f"mixup {recipe['mixup']:g}, label smoothing {recipe['label_smoothing']:g}"
    head = "; mean of the patch tokens, LayerNorm, linear head" if config["architecture"] == "vit" else ""
    best = f"{best_params['best_epoch']}, by the accuracy on the validation set "
    best += f"({100 * best_params['validation_accuracy']:.1f} %)"
    return [
        ("Model", _describe_transformer(config["model"]) + head),
        ("Start", start),
        ("Augmentation", augmentation),
        ("Layer-wise decay of the learning rate", f"{recipe['layer_decay']:g}"),
        *_optimization_rows(recipe),
        ("Epoch that was kept", best),
    ]


def _kind(config: dict[str, Any]) -> str:
    kind = config["architecture"]
    return "A vision transformer" if kind == "vit" else f"A network of the architecture {kind}"


def _encoder_name(config: dict[str, Any]) -> str:
    """The Hub id of an evaluation's encoder, or the name of its run's folder."""
    path = Path(config["encoder_name"]).expanduser().resolve()
    return config["hub_ids"]["encoder"] or (path.parent.name if path.name == "encoder" else path.name)


def _describe_pretraining(config: dict[str, Any]) -> str:
    recipe = config["pretraining"]
    if recipe is None:
        return " (how it was pre-trained is not known)"
    which = "the same" if recipe["data"] == config["dataset"] else "another"
    length = provenance.training_length(recipe)
    return f" ({length} on {which} data set, mask ratio {recipe['mask_ratio']:g})"


def _limits_of_classes(scores: dict[str, Any]) -> list[str]:
    of_class = _of_test_set(scores)
    counts = {name: x["test_images"] for name, x in of_class.items()}
    rare, frequent = min(counts, key=counts.get), max(counts, key=counts.get)
    hard = min(of_class, key=lambda name: of_class[name]["recall"])
    limits = [
        "The list of classes is closed: a star, an artifact or a galaxy of another kind gets one of these classes, "
        "and the probabilities do not tell.",
        f"Recall is lowest for {_plain(hard)}: {100 * of_class[hard]['recall']:.0f} % of {counts[hard]:,} galaxies.",
    ]
    if counts[rare] < counts[frequent]:
        limits.append(
            f"The classes are imbalanced: {counts[frequent]:,} test galaxies are {_plain(frequent)}, and "
            f"{counts[rare]:,} {_plain(rare)}. Where the fractions differ, so do accuracy and calibration."
        )
    return limits


def _of_test_set(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The scores of the classes that the test set has galaxies of."""
    return {name: x for name, x in scores["per_class"].items() if x["test_images"]}


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class _Data:
    """What a card says about a data set.

    Attributes:
        name: of the data set, without the path of a file.
        title: how sentences call it.
        text: what is known about its images and labels.
        hub_id: its id on the Hub, or None.
        reference: a BibTeX entry, or None.
    """

    name: str
    title: str
    text: str
    hub_id: str | None
    reference: str | None = None

    def result(self, split: str, metric: str, value: float, title: str, args: dict | None = None) -> EvalResult:
        """A result on this data set, for the metadata."""
        return EvalResult(
            task_type="image-classification",
            dataset_type=self.hub_id or self.name,
            dataset_name=self.name,
            dataset_split=split,
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 4),
            metric_args=args,
        )


def _describe_data(source: str, fingerprint: str, hub_id: str | None) -> _Data:
    """What is known about a data set from its `--dataset` and its SHA-256."""
    if source == "galaxy10" or fingerprint == GALAXY10.sha256 or hub_id in _GALAXY10_COPIES:
        text = (
            "[Galaxy10 DECaLS](https://github.com/henrysky/Galaxy10): 17,736 color images (g, r, z) from the DESI "
            "Legacy Imaging Surveys, 256 x 256 pixels of 0.262 to 0.524 arcsec, in ten classes. The labels come from "
            "votes of Galaxy Zoo's volunteers (Walmsley et al. 2022). Known defects: 59 objects are there twice, with "
            "two different labels, and 303 pairs of images, these among them, may overlap on the sky."
        )
        if hub_id:
            text += f" The copy that was used: [{hub_id}](https://huggingface.co/datasets/{hub_id})."
        return _Data("Galaxy10 DECaLS", "Galaxy10 DECaLS", text, hub_id, _WALMSLEY_2022)
    if source.split(":")[0] == "synthetic":
        text = (
            "Synthetic galaxies, rendered from Sersic profiles, exponential disks, bars, spiral arms and tides, with "
            "stars, seeing and white noise. The label is the class that an image was rendered as. These are no images "
            "of the sky: arms are smoother and of higher contrast than real ones, and the noise is simpler. Accuracies "
            "on them say nothing about real galaxies."
        )
        return _Data("synthetic galaxies", "synthetic galaxies", text, None)
    name = hub_id or Path(source).name
    shown = f"[{name}](https://huggingface.co/datasets/{name})" if hub_id else _code(name)
    text = (
        f"{shown}, SHA-256 `{fingerprint[:12]}`. From which survey the images are, in which filters, how deep, at "
        "which pixel scale, and where the labels come from, was not recorded: add it before you publish this card."
    )
    return _Data(name, shown, text, hub_id)


def _describe_split(counts: dict[str, int], located: bool) -> str:
    parts = [f"{counts[part]:,} {part.replace('train', 'training')}" for part in counts if part != "dropped"]
    text = f"{', '.join(parts[:-1])} and {parts[-1]} galaxies. "
    if located:
        text += "Images that are identical or may overlap on the sky are in the same split. "
    else:
        text += "Identical images are in the same split; images that overlap on the sky may not be, because positions "
        text += "are not known. "
    dropped = f" ({counts['dropped']:,})" if "dropped" in counts else ""
    return text + f"Blank images, and objects that are there under two labels, were left out{dropped}."


def _limits_of_images(data: _Data, size: int) -> list[str]:
    return [
        f"The numbers hold for images of {data.title}. For other surveys, filters, depths, pixel scales and color "
        "stretches nothing has been measured.",
        f"It takes square color images with the galaxy in the center, at {size} x {size} pixels; finer detail is lost.",
    ]


# ----------------------------------------------------------------------------------------------------- what both share


def _metadata(pipeline_tag: str, data: _Data, tags: list[str]) -> dict[str, Any]:
    return {
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag,
        "license": "mit",
        "tags": tags,
        "datasets": [data.hub_id] if data.hub_id else None,
    }


def _describe_transformer(sizes: dict[str, Any]) -> str:
    if "num_attention_heads" not in sizes or "patch_size" not in sizes:  # not a plain transformer
        return f"features: {sizes['hidden_size']}, image size {sizes['image_size']}"
    return (
        f"ViT: hidden size {sizes['hidden_size']}, layers: {sizes['num_hidden_layers']}, heads: "
        f"{sizes['num_attention_heads']}, patch size {sizes['patch_size']}, image size {sizes['image_size']}"
    )


def _optimization_rows(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    betas = f"betas {recipe['adam_beta1']:g} and {recipe['adam_beta2']:g}"
    warmup = recipe["warmup_steps"]
    warmup = f"{warmup:.0%} of the steps" if warmup < 1 else f"{warmup:g} steps"
    return [
        ("Length", f"{provenance.training_length(recipe)}, batch size {recipe['batch_size']}"),
        ("Optimizer", f"{recipe['optim']}, {betas}, weight decay {recipe['weight_decay']:g}"),
        ("Learning rate", f"{recipe['learning_rate']:.3g}, {recipe['lr_scheduler_type']}, warm-up {warmup}"),
    ]


def _describe_code(sessions: list[dict[str, Any]]) -> str:
    """Commit, device and versions, each of them once."""
    commits = sorted({provenance.short_commit(session) for session in sessions})
    devices = sorted({session["device"] for session in sessions})
    names = ("torch", "transformers")
    versions = sorted({", ".join(f"{name} {session['versions'][name]}" for name in names) for session in sessions})
    return f"Commit of galaxy_mae: {', '.join(commits)}. Device: {'; '.join(devices)}. Versions: {'; '.join(versions)}."


def _describe_processor(size: int) -> str:
    return (
        f"The processor averages larger images over areas to {size} x {size} pixels, as in training, and normalizes "
        'the colors. `backend="pil"` is for environments with torchvision, which has no such average.'
    )


def _closing(data: _Data) -> dict[str, list[str]]:
    """The last sections."""
    return {
        "Citation": [f"```bibtex\n{entry}\n```" for entry in (_HE_2022, data.reference) if entry],
        "Upload": ["`hf upload USER/NAME FOLDER` publishes this folder, with this card, on the Hugging Face Hub."],
    }


def _plain(text: str) -> str:
    """A name from the data on one line, without Markdown's meaning."""
    escaped = "".join(f"\\{character}" if character in "\\`*_[]<>#" else character for character in text)
    return " ".join(escaped.split())


def _code(text: str) -> str:
    """A name from the data as code."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(markdown_table(header, rows))


def _list(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
