"""Model cards: the README.md in the folder of an encoder or a classifier, which the Hugging Face Hub shows.

A card says what is known from the files of a run or an evaluation, and nothing else. It is the same in whichever
session it is written, so it names neither times nor the number of sessions. Its figures lie beside it. All prose is in
`templates/card.md` and in `encoder_card.md` and `classifier_card.md`, which fill its blocks.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from safetensors.torch import load_file

from galaxy_mae import figures, provenance
from galaxy_mae.data.download import GALAXY10
from galaxy_mae.data.seen import frame_of
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.methods import BY_NAME
from galaxy_mae.evaluation.results import is_finished, read_config, read_result
from galaxy_mae.evaluation.scores import Estimate, all_scores, percent, wilson
from galaxy_mae.files import move_files, read_json, temporary_folder
from galaxy_mae.model.saved_model import TRAINING_IMAGES
from galaxy_mae.reports.document import Table, as_percent, render_markdown
from galaxy_mae.reports.report import describe_leakage

_GALAXY10_COPIES = ("matthieulel/galaxy10_decals", "MultimodalUniverse/gz10")  # on the Hub
_TAGS = ["vision", "astronomy", "galaxies", "galaxy-morphology"]
_PROBES = {"Linear probe": "eval_linear_probe_accuracy", "k-NN": "eval_knn_accuracy"}


def write_encoder_card(run_folder: Path) -> None:
    """Write `README.md` and its figure into `encoder/` of a finished run; older ones are replaced.

    Raises:
        UserError: no run there, or a file of it that is damaged.
    """
    folder, fix = run_folder / "encoder", f"delete {run_folder} and train again"
    pretraining = provenance.read_pretraining(str(folder))
    if pretraining is None:
        raise UserError(f"{folder}: no encoder of main.py there; {fix}")
    metrics = read_json(run_folder / "eval_results.json", fix, ("eval_loss",))
    recipe, parts = pretraining.recipe, pretraining.galaxies["split"].to_pylist()
    probes = {title: metrics[key] for title, key in _PROBES.items() if key in metrics}
    count = int(metrics.get("eval_num_validation_images", 0))
    rows = [(title, percent(Estimate(x, *wilson(x, count)))) for title, x in probes.items()]
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    with temporary_folder(folder) as staging:
        if (figure := run_folder / "reconstruction_example.png").exists():  # a student has no decoder
            shutil.copyfile(figure, staging / figure.name)
        _write(
            staging,
            "encoder_card.md",
            run_folder.resolve().name,
            (recipe["dataset"], recipe["data"], provenance.hub_id(recipe["dataset"])),
            "validation",
            [("accuracy", x, f"{title} accuracy", None) for title, x in probes.items()],
            {
                "pipeline_tag": "image-feature-extraction",
                "tags": ["masked-autoencoder", "self-supervised-learning", *_TAGS],
                "metrics": ["accuracy"] if probes else None,
                "base_model": provenance.hub_id(recipe.get("init_from") or ""),
            },
            recipe,
            pretraining.sessions,
            counts={part: parts.count(part) for part in ("train", "validation")},
            located=bool(np.isfinite(pretraining.galaxies["ra"].to_numpy()).all()),
            parameters=f"{parameters / 1e6:.1f}",
            sizes=recipe,
            metrics=metrics,
            probes=Table(("Classifier", "Validation accuracy"), rows),
            fit=_fit(folder),
        )
        move_files(staging, folder)


def write_classifier_cards(results_folder: Path, method: str) -> None:
    """Write `README.md` and its figure into the folder of each classifier of a method; older ones are replaced.

    Nothing is written for a method that fine-tunes nothing or is not finished.

    Raises:
        UserError: a result is damaged or of another evaluation.
    """
    of = BY_NAME[method]
    if of.classifier != "fine_tune" or of.network is not None or not is_finished(results_folder, method):
        return
    config = read_config(results_folder)
    result = read_result(results_folder, method, config)
    about, model, pretrained = result.about, config["model"], of.initialization == "ssl"
    path = Path(config["encoder_name"]).expanduser().resolve()
    encoder = config["hub_ids"]["encoder"] or (path.parent.name if path.name == "encoder" else path.name)
    names, predictions = config["class_names"], result.predictions
    for position, seed in enumerate(about["seeds"]):
        folder = results_folder / method / f"seed_{seed}"
        if not (folder / "config.json").is_file():  # deleted, to save space
            continue
        scores = all_scores(predictions.label, predictions.predicted[[position]], tuple(names))
        of_class = {name: x for name, x in scores["per_class"].items() if x["test_images"]}
        columns = {f"Seed {seed}, this classifier": scores}
        if len(about["seeds"]) > 1:
            columns[f"Mean of {len(about['seeds'])} seeds"] = about
        score_rows = [
            ("Accuracy", *(percent(Estimate(x["accuracy"], *x["interval"])) for x in columns.values())),
            ("Balanced accuracy", *(as_percent(x["balanced_accuracy"], 2) for x in columns.values())),
            ("Macro-F1", *(f"{x['macro_f1']:.3f}" for x in columns.values())),
        ]
        class_rows = [
            (name, str(x["test_images"]), *(as_percent(x[key]) for key in ("precision", "recall", "f1")))
            for name, x in of_class.items()
        ]
        with temporary_folder(folder) as staging:
            title = f"{of.title}, seed {seed}: {scores['test_images']:,} test galaxies"
            counts = np.array(scores["confusion_matrix"])
            figures.confusion_matrix(staging / "confusion_matrix.png", counts, names, title)
            _write(
                staging,
                "classifier_card.md",
                f"{Path(encoder).name}-{method}-seed-{seed}".replace("_", "-"),
                (config["dataset_name"], config["dataset"], config["hub_ids"]["dataset"]),
                "test",
                [
                    ("accuracy", scores["accuracy"], "Accuracy", None),
                    ("balanced_accuracy", scores["balanced_accuracy"], "Balanced accuracy", None),
                    ("f1", scores["macro_f1"], "Macro-F1", {"average": "macro"}),
                ],
                {
                    "pipeline_tag": "image-classification",
                    "tags": [*_TAGS, "masked-autoencoder"] if pretrained else _TAGS,
                    "metrics": ["accuracy", "f1"],
                    "base_model": config["hub_ids"]["encoder"] if pretrained else None,
                },
                config["recipe"],
                [about],
                counts=config["split_sizes"],
                located=bool(np.isfinite(predictions.position).all()),
                parameters=f"{model['num_parameters'] / 1e6:.1f}",
                sizes=model,
                config=config,
                pretrained=pretrained,
                start=f"the pre-trained encoder {_code(encoder)}" if pretrained else "random weights",
                pretraining_length=config["pretraining"] and provenance.training_length(config["pretraining"]),
                encoder=_code(encoder),
                leakage=describe_leakage(config),
                scores=scores,
                accuracy=percent(Estimate(scores["accuracy"], *scores["interval"])),
                best_params=about["best_params"][str(seed)],
                calibration=about["calibration"],
                position=position,
                num_seeds=len(about["seeds"]),
                frequent=max(of_class, key=lambda name: of_class[name]["test_images"]),
                rare=min(of_class, key=lambda name: of_class[name]["test_images"]),
                hard=min(of_class, key=lambda name: of_class[name]["recall"]),
                score_table=Table(("", *columns), score_rows),
                class_table=Table(("Class", "Test galaxies", "Precision", "Recall", "F1"), class_rows),
                fit=_fit(folder),
            )
            move_files(staging, folder)


def _fit(folder: Path) -> str:
    """The `--fit` of the images that a model was trained on."""
    path = folder / TRAINING_IMAGES
    return frame_of(read_json(path, "copy the model again") if path.exists() else None).fit


def _write(
    folder: Path,
    template: str,
    name: str,
    dataset: tuple[str, str, str | None],
    split: str,
    results: list[tuple[str, float, str, dict | None]],
    metadata: dict[str, Any],
    recipe: dict[str, Any],
    sessions: list[dict[str, Any]],
    *,
    counts: dict[str, int],
    **content: Any,
) -> None:
    """Write the card of a model of some name into a folder; `content` goes to the template.

    It was trained on the `--dataset`, its SHA-256, and its id on the Hub or None, with so many galaxies in each split.
    `results` are type, value, title and arguments of metrics on the galaxies of a `split`. The Hub reads `metadata`.
    """
    source, fingerprint, hub_id = dataset
    if source == "galaxy10" or fingerprint == GALAXY10.sha256 or hub_id in _GALAXY10_COPIES:
        kind, data, data_name = "galaxy10", "Galaxy10 DECaLS", "Galaxy10 DECaLS"
    elif source.split(":")[0] == "synthetic":
        kind, data, data_name = "synthetic", "synthetic galaxies", "synthetic galaxies"
    else:
        kind, data_name = "other", hub_id or Path(source).name
        data = f"[{hub_id}](https://huggingface.co/datasets/{hub_id})" if hub_id else _code(data_name)
    card_data = ModelCardData(
        library_name="transformers",
        license="mit",
        datasets=[hub_id] if hub_id else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=hub_id or data_name,
                dataset_name=data_name,
                dataset_split=split,
                metric_type=metric,
                metric_name=title,
                metric_value=round(value, 4),
                metric_args=arguments,
            )
            for metric, value, title, arguments in results
        ]
        or None,
        **metadata,
    )
    sizes = [f"{count:,} {part.replace('train', 'training')}" for part, count in counts.items() if part != "dropped"]
    packages = ("torch", "transformers")
    text = render_markdown(
        template,
        card_data=card_data.to_yaml(),
        name=name,
        kind=kind,
        data=data,
        hub_id=hub_id,
        fingerprint=fingerprint,
        split=f"{', '.join(sizes[:-1])} and {sizes[-1]}",
        dropped=counts.get("dropped"),
        counts=counts,
        recipe=recipe,
        length=provenance.training_length(recipe),
        commits=sorted({provenance.short_commit(session) for session in sessions}),
        devices=sorted({session["device"] for session in sessions}),
        versions=sorted({", ".join(f"{x} {session['versions'][x]}" for x in packages) for session in sessions}),
        **content,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _code(text: str) -> str:
    """A name from the data as code."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"
