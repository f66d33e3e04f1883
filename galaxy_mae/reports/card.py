"""Model cards: the README.md in the folder of an encoder or a classifier, which the Hugging Face Hub shows.

A card says what is known from the files of a run or an evaluation, and nothing else. It is the same in whichever
session it is written, so it names neither times nor the number of sessions. Its figures lie beside it. The prose is in
`templates/encoder_card.md` and `templates/classifier_card.md`; here are the numbers and the sentences that depend on
them.
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

from galaxy_mae import figures, provenance
from galaxy_mae.data.download import GALAXY10
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.methods import BY_NAME, Method
from galaxy_mae.evaluation.results import Result, is_finished, read_config, read_result
from galaxy_mae.evaluation.scores import Estimate, all_scores, percent, wilson
from galaxy_mae.files import move_files, read_json, remove_leftovers, temporary_folder
from galaxy_mae.reports.document import TEMPLATES, Bullets, Table, as_percent, render_markdown
from galaxy_mae.reports.report import describe_leakage

_GALAXY10_COPIES = ("matthieulel/galaxy10_decals", "MultimodalUniverse/gz10")  # on the Hub
_TAGS = ["vision", "astronomy", "galaxies", "galaxy-morphology"]
_PROBES = {"Linear probe": "eval_linear_probe_accuracy", "k-NN": "eval_knn_accuracy"}


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
    metrics = read_json(run_folder / "eval_results.json", fix, ("eval_loss",))
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
    of = BY_NAME[method]
    if of.classifier != "fine_tune" or of.network is not None or not is_finished(results_folder, method):
        return
    config = read_config(results_folder)
    result = read_result(results_folder, method, config)
    names = config["class_names"]
    for position, seed in enumerate(result.about["seeds"]):
        folder = results_folder / method / f"seed_{seed}"
        if not (folder / "config.json").is_file():  # deleted, to save space
            continue
        predictions = result.predictions
        scores = all_scores(predictions.label, predictions.predicted[[position]], tuple(names))
        with _into(folder) as staging:
            title = f"{of.title}, seed {seed}: {scores['test_images']:,} test galaxies"
            counts = np.array(scores["confusion_matrix"])
            figures.confusion_matrix(staging / "confusion_matrix.png", counts, names, title)
            text = _classifier_card(config, of, result, position, scores)
            (staging / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def _into(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `folder` when all are on the disk."""
    remove_leftovers(folder)
    with temporary_folder(folder) as staging:
        yield staging
        move_files(staging, folder)


# --------------------------------------------------------------------------------------------------------- the encoder


def _encoder_card(name: str, parameters: int, pretraining: provenance.Pretraining, metrics: dict[str, float]) -> str:
    recipe = pretraining.recipe
    data = _describe_data(recipe["dataset"], recipe["data"], provenance.hub_id(recipe["dataset"]))
    parts = pretraining.galaxies["split"].to_pylist()
    counts = {part: parts.count(part) for part in ("train", "validation")}
    located = bool(np.isfinite(pretraining.galaxies["ra"].to_numpy()).all())
    probes = {title: metrics[key] for title, key in _PROBES.items() if key in metrics}
    results = [data.result("validation", "accuracy", x, f"{title} accuracy") for title, x in probes.items()]
    count = int(metrics.get("eval_num_validation_images", 0))
    rows = [(title, percent(Estimate(x, *wilson(x, count)))) for title, x in probes.items()]
    return _render(
        "encoder_card.md",
        ModelCardData(
            **_metadata("image-feature-extraction", data, ["masked-autoencoder", "self-supervised-learning", *_TAGS]),
            model_name=name,
            metrics=["accuracy"] if probes else None,
            eval_results=results or None,
        ),
        data,
        recipe["image_size"],
        title=_plain(name),
        parameters=f"{parameters / 1e6:.1f}",
        mask_ratio=as_percent(recipe["mask_ratio"]),
        recipe=recipe,
        counts=counts,
        split=_describe_split(counts, located),
        located=located,
        transformer=_describe_transformer(recipe),
        optimization=_optimization_rows(recipe),
        code=_describe_code(pretraining.sessions),
        metrics=metrics,
        probes=Table(("Classifier", "Validation accuracy"), rows),
    )


# ------------------------------------------------------------------------------------------------------ the classifier


def _classifier_card(
    config: dict[str, Any], method: Method, result: Result, position: int, scores: dict[str, Any]
) -> str:
    about, pretrained = result.about, method.initialization == "ssl"
    seed, calibration, of_class = about["seeds"][position], about["calibration"], _of_test_set(scores)
    best_params = about["best_params"][str(seed)]
    data = _describe_data(config["dataset_name"], config["dataset"], config["hub_ids"]["dataset"])
    encoder, classes = _encoder_name(config), config["class_names"]
    name = f"{Path(encoder).name}-{method.name}-seed-{seed}".replace("_", "-")
    start = f"the pre-trained encoder {_code(encoder)}" if pretrained else "random weights"
    located = bool(np.isfinite(result.predictions.position).all())
    counts = {key: x["test_images"] for key, x in of_class.items()}
    rare, frequent = min(counts, key=counts.get), max(counts, key=counts.get)
    hard = min(of_class, key=lambda key: of_class[key]["recall"])
    imbalanced = f"{counts[frequent]:,} test galaxies are {_plain(frequent)}, and {counts[rare]:,} {_plain(rare)}"
    return _render(
        "classifier_card.md",
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
        data,
        config["model"]["image_size"],
        title=_plain(name),
        architecture=config["architecture"],
        parameters=f"{config['model']['num_parameters'] / 1e6:.1f}",
        num_classes=len(classes),
        classes=", ".join(map(_plain, classes)),
        pretrained=pretrained,
        start=start,
        encoder=_code(encoder),
        scores=scores,
        accuracy=percent(Estimate(scores["accuracy"], *scores["interval"])),
        split=_describe_split(config["split_sizes"], located),
        leakage=describe_leakage(config),
        transformer=_describe_transformer(config["model"]),
        pretraining=_describe_pretraining(config),
        recipe=config["recipe"],
        optimization=_optimization_rows(config["recipe"]),
        best_params=best_params,
        validation_accuracy=as_percent(best_params["validation_accuracy"], 1),
        code=_describe_code([about]),
        num_seeds=len(about["seeds"]),
        frequent=_plain(frequent),
        frequent_fraction=as_percent(counts[frequent] / scores["test_images"], 1),
        score_table=_score_table(about, scores, seed),
        class_table=_class_table(of_class),
        ece=as_percent(calibration["ece_per_seed"][position], 1),
        ece_before=as_percent(calibration["before"]["ece_per_seed"][position], 1),
        ece_if_calibrated=as_percent(calibration["ece_if_calibrated"], 1),
        hard=f"{_plain(hard)}: {as_percent(of_class[hard]['recall'])} of {counts[hard]:,} galaxies",
        imbalanced=imbalanced if counts[rare] < counts[frequent] else "",
    )


def _of_test_set(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The scores of the classes that the test set has galaxies of."""
    return {name: x for name, x in scores["per_class"].items() if x["test_images"]}


def _score_table(about: dict[str, Any], scores: dict[str, Any], seed: int) -> Table:
    columns = {f"Seed {seed}, this classifier": scores}
    if len(about["seeds"]) > 1:
        columns[f"Mean of {len(about['seeds'])} seeds"] = about
    rows = [
        ("Accuracy", *(percent(Estimate(x["accuracy"], *x["interval"])) for x in columns.values())),
        ("Balanced accuracy", *(as_percent(x["balanced_accuracy"], 2) for x in columns.values())),
        ("Macro-F1", *(f"{x['macro_f1']:.3f}" for x in columns.values())),
    ]
    return Table(("", *columns), rows)


def _class_table(of_class: dict[str, dict[str, float]]) -> Table:
    rows = [
        (_plain(name), str(x["test_images"]), *(as_percent(x[key]) for key in ("precision", "recall", "f1")))
        for name, x in of_class.items()
    ]
    return Table(("Class", "Test galaxies", "Precision", "Recall", "F1"), rows)


def _describe_pretraining(config: dict[str, Any]) -> str:
    recipe = config["pretraining"]
    if recipe is None:
        return "how it was pre-trained is not known"
    which = "the same" if recipe["data"] == config["dataset"] else "another"
    return f"{provenance.training_length(recipe)} on {which} data set, mask ratio {recipe['mask_ratio']:g}"


def _encoder_name(config: dict[str, Any]) -> str:
    """The Hub id of an evaluation's encoder, or the name of its run's folder."""
    path = Path(config["encoder_name"]).expanduser().resolve()
    return config["hub_ids"]["encoder"] or (path.parent.name if path.name == "encoder" else path.name)


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class _Data:
    """What a card says about a data set.

    Attributes:
        name: of the data set, without the path of a file.
        title: how sentences call it.
        text: what is known about its images and labels.
        hub_id: its id on the Hub, or None.
        is_galaxy10: whether it is Galaxy10 DECaLS.
    """

    name: str
    title: str
    text: str
    hub_id: str | None
    is_galaxy10: bool = False

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
        return _Data("Galaxy10 DECaLS", "Galaxy10 DECaLS", text, hub_id, is_galaxy10=True)
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


# ----------------------------------------------------------------------------------------------------- what both share


def _render(template: str, metadata: ModelCardData, data: _Data, size: int, **content: Any) -> str:
    """The text of a card.

    Args:
        template: its name.
        metadata: which the Hub reads.
        data: the model was trained on.
        size: width and height of the images in pixels.
        content: the template's other variables; names are already without Markdown's meaning.
    """
    limits = [
        f"The numbers hold for images of {data.title}. For other surveys, filters, depths, pixel scales and color "
        "stretches nothing has been measured.",
        f"It takes square color images with the galaxy in the center, at {size} x {size} pixels; finer detail is lost.",
    ]
    processor = (
        f"The processor averages larger images over areas to {size} x {size} pixels, as in training, and normalizes "
        'the colors. `backend="pil"` is for environments with torchvision, which has no such average.'
    )
    closing = render_markdown("card_closing.md", cites_galaxy10=data.is_galaxy10)
    content |= {"data": data, "size": size, "processor": processor, "limits": Bullets(limits), "closing": closing}
    return str(ModelCard.from_template(metadata, template_path=str(TEMPLATES / template), **content))


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


def _optimization_rows(recipe: dict[str, Any]) -> str:
    """Lines of the table of settings."""
    warmup = recipe["warmup_steps"]
    warmup = f"{as_percent(warmup)} of the steps" if warmup < 1 else f"{warmup:g} steps"
    return (
        f"| Length | {provenance.training_length(recipe)}, batch size {recipe['batch_size']} |\n"
        f"| Optimizer | {recipe['optim']}, betas {recipe['adam_beta1']:g} and {recipe['adam_beta2']:g}, weight decay "
        f"{recipe['weight_decay']:g} |\n"
        f"| Learning rate | {recipe['learning_rate']:.3g}, {recipe['lr_scheduler_type']}, warm-up {warmup} |"
    )


def _describe_code(sessions: list[dict[str, Any]]) -> str:
    """Commit, device and versions, each of them once."""
    commits = sorted({provenance.short_commit(session) for session in sessions})
    devices = sorted({session["device"] for session in sessions})
    names = ("torch", "transformers")
    versions = sorted({", ".join(f"{name} {session['versions'][name]}" for name in names) for session in sessions})
    return f"Commit of galaxy_mae: {', '.join(commits)}. Device: {'; '.join(devices)}. Versions: {'; '.join(versions)}."


def _plain(text: str) -> str:
    """A name from the data on one line, without Markdown's meaning."""
    escaped = "".join(f"\\{character}" if character in "\\`*_[]<>#" else character for character in text)
    return " ".join(escaped.split())


def _code(text: str) -> str:
    """A name from the data as code."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"
