"""The page of an evaluation: `report.html`, the numbers of `report.md` with the galaxies behind them.

It shows what there is. The results folder alone is enough for the numbers. The images, the encoder and the history of
its pre-training are read where the evaluation read them; if they are gone, a line says so.
"""

import contextlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from bokeh.models import Model
from PIL import Image
from transformers import ViTModel

from galaxy_mae import provenance
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.download import cache_folder, has_galaxy10
from galaxy_mae.data.split import split_fingerprint, split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import encode, frozen_features, mean_pool
from galaxy_mae.evaluation.results import METHODS
from galaxy_mae.files import read_json
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder
from galaxy_mae.predictions.neighbors import knn_distance, neighbors, whiten
from galaxy_mae.predictions.schema import entropy
from galaxy_mae.reports import plots as page_plots
from galaxy_mae.reports.document import Thumbnails, data_uri, write_page
from galaxy_mae.reports.report import (
    LEGEND,
    PER_CLASS_NOTE,
    TITLES,
    Bullets,
    Plot,
    Report,
    Table,
    describe,
    describe_leakage,
)
from galaxy_mae.reports.sections import (
    LISTED,
    MAX_GALAXIES,
    NEIGHBORS,
    Mapped,
    confusion_matrix,
    confusion_section,
    galaxies_section,
    listed_galaxies,
    map_section,
    page_content,
    sample,
    section,
    spread_evenly,
    table,
)
from galaxy_mae.training.recipe import EvaluationRecipe, to_flags

_MAX_TRAINING = 1000  # training galaxies on the map
_MAX_FRAMES, _FRAME_WIDTH = 12, 1100  # of the reconstructions over the epochs
_ATTENTION_SIZE = 128  # pixels


@dataclass
class _Sources:
    """What the page shows besides the results; None where it is not there, and a sentence why."""

    galaxies: Galaxies | None = None
    split: dict[str, np.ndarray] | None = None
    encoder: Encoder | None = None
    missing: list[str] = field(default_factory=list)


@dataclass
class _Embedded:
    """Test galaxies and training galaxies in the feature space of the encoder.

    Attributes:
        test: (M, D) float32, of all shown test galaxies.
        train: (T, D) float32.
        train_rows: (T,) int64, rows of the data set.
    """

    test: np.ndarray
    train: np.ndarray
    train_rows: np.ndarray


@dataclass
class _Shown:
    """The M test galaxies that the page shows, with what the best method says about them.

    Attributes:
        title: of the method.
        class_names: of the classes.
        rows: (M,) int64, of the data set.
        label: (M,) int64.
        predicted: (M,) int64.
        probabilities: (M, classes) float64.
        number: of the thumbnail, by position in the test set, in the order of the galaxies.
        embedded: None without images or encoder.
        sources: what else is there.
        thumbnails: all galaxies of the page.
    """

    title: str
    class_names: list[str]
    rows: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    number: dict[int, int]
    embedded: _Embedded | None
    sources: _Sources
    thumbnails: Thumbnails

    def add_training(self, row: int) -> int:
        """The thumbnail of a training galaxy."""
        lines = [_name(self.sources, row), f"class: {self.class_names[self.sources.galaxies.label[row]]}"]
        return self.thumbnails.add(row, [*lines, "training set"])


def write_evaluation_page(report: Report, recipe: EvaluationRecipe) -> Path:
    """Write `report.html` into the folder of the results.

    Args:
        report: what `report.md` was written from.
        recipe: says where galaxies and encoder are, if they are no longer where the evaluation found them.

    Returns:
        The path of the page.
    """
    sources, plots = _open(report.config, recipe), {}
    thumbnails = Thumbnails(sources.galaxies and sources.galaxies.pixels)
    sections, alerts = [_results_section(report, plots)], []
    shown = _shown(report, sources, thumbnails, recipe.training.bf16, alerts) if report.best else None
    if shown:
        if shown.embedded:
            part, plots["map"] = _map(shown)
            sections.append(part)
        sections += [_confusion(report, shown.number), _galaxies(shown)]
    for i, part in enumerate(report.sections):
        sections.append(section(f"section-{i}", part.title, blocks=[_block(block, plots) for block in part.blocks]))
    sections += _pretraining(sources, plots)
    if shown and (attention := _attention(shown)):
        sections.append(attention)
    sections.append(_foot(report))
    about, leakage = [describe(report.config, report.results), *_when(report)], describe_leakage(report.config)
    (alerts if leakage.startswith("**") else about).append(leakage.strip("*"))
    path, title = report.folder / "report.html", f"Evaluation of {report.config['encoder_name']}"
    write_page(path, plots, thumbnails, **page_content(title, about, alerts + sources.missing, sections))
    print(f"page: {path}")
    return path


# --------------------------------------------------------------------------------------------- what the page is made of


def _open(config: dict, recipe: EvaluationRecipe) -> _Sources:
    """Open the galaxies and the encoder of an evaluation, if they are there and still the same."""
    found, size = _Sources(), config["model"]["image_size"]
    given = recipe.evaluation.dataset if "dataset" in recipe.explicitly_set else config["dataset_name"]
    try:
        here = any(cache_folder().glob(f"{config['dataset'][:16]}_*")) and (given != "galaxy10" or has_galaxy10())
        if not (Path(given).exists() or here):
            raise UserError(f"--dataset {given}: not in the cache")  # a report downloads nothing
        galaxies = open_galaxies(given, size, stretch=recipe.evaluation.stretch)
        if galaxies.fingerprint != config["dataset"]:
            raise UserError(f"--dataset {given}: not the data set of the evaluation")
        split = split_galaxies(galaxies, config["recipe"]["split_seed"])
        if split_fingerprint(split) != config["split"]:
            raise UserError(f"--dataset {given}: another split than that of the evaluation")
        found.galaxies, found.split = galaxies, split
    except UserError as error:
        found.missing.append(f"Without images: {error}.")
    name = recipe.evaluation.encoder or config["encoder_name"]
    try:
        if not (Path(name).exists() or provenance.hub_id(name)):
            raise UserError(f"--encoder {name}: no such folder")
        encoder = load_encoder(name)
        fingerprint = encoder_fingerprint(encoder.model, encoder.mean, encoder.std, encoder.image_size)
        if fingerprint != config["encoder"]:
            raise UserError(f"--encoder {name}: not the encoder of the evaluation")
        found.encoder = encoder
    except UserError as error:
        found.missing.append(f"Without map, neighbors and attention: {error}.")
    return found


def _shown(report: Report, sources: _Sources, thumbnails: Thumbnails, bf16: bool, alerts: list[str]) -> _Shown:
    """The test galaxies, or a sample of them, which is added to the alerts."""
    best, names, number = report.results[report.best], report.config["class_names"], {}
    positions = sample(len(best.label), MAX_GALAXIES)
    if len(positions) < len(best.label):
        alerts.append(
            f"The page shows a random sample of {len(positions):,} of the {len(best.label):,} test galaxies; all "
            "numbers are of all test galaxies."
        )
    rows, label, probabilities = best.rows[positions], best.label[positions], best.probabilities[positions]
    predicted = probabilities.argmax(axis=1)
    for i, position in enumerate(positions.tolist()):
        lines = [_name(sources, rows[i]), f"class: {names[label[i]]}"]
        lines.append(f"predicted: {names[predicted[i]]}, {probabilities[i, predicted[i]]:.0%}")
        number[position] = thumbnails.add(rows[i], lines)
    return _Shown(
        title=TITLES[best.name],
        class_names=names,
        rows=rows,
        label=label,
        predicted=predicted,
        probabilities=probabilities,
        number=number,
        embedded=_embed(sources, rows, bf16),
        sources=sources,
        thumbnails=thumbnails,
    )


def _name(sources: _Sources, row: int) -> str:
    ids = None if sources.galaxies is None else sources.galaxies.object_id
    return f"row {row}" if ids is None else str(ids[row])


def _embed(sources: _Sources, test: np.ndarray, bf16: bool) -> _Embedded | None:
    """Features of the shown test galaxies, and of the training galaxies or a sample of them.

    If the evaluation left the features of all galaxies in the cache, they are used.
    """
    if not (sources.galaxies and sources.encoder):
        return None
    galaxies, encoder, train = sources.galaxies, sources.encoder, sources.split["train"]
    batches = _batches(sources)
    name = encoder_fingerprint(encoder.model, encoder.mean, encoder.std, encoder.image_size)[:16]
    folder = cache_folder() / galaxies.fingerprint[:16] / "features"
    for path in (folder / f"{name}_{precision}.npz" for precision in ("float32", "bfloat16")):
        if path.is_file():
            mean = frozen_features(encoder.model, batches, path, path.stem.endswith("bfloat16")).mean
            return _Embedded(mean[test], mean[train], train)
    train = train[sample(len(train), _MAX_TRAINING)]
    rows = np.concatenate([test, train])
    mean = np.concatenate([mean_pool(last) for *_, last in encode(encoder.model, batches, rows, bf16)])
    return _Embedded(mean[: len(test)], mean[len(test) :], train)


def _batches(sources: _Sources) -> GalaxyBatches:
    encoder = sources.encoder
    return GalaxyBatches(sources.galaxies.pixels, encoder.mean, encoder.std, encoder.image_size, "cpu")


def _block(block: str | Table | Bullets | Plot, plots: dict[str, Model]) -> dict[str, Any]:
    """A block of the report for the template; its plots are added to `plots`."""
    match block:
        case Table():
            return table(block.header, block.rows)
        case Bullets():
            return {"kind": "bullets", "items": block.items}
        case Plot():
            models = getattr(page_plots, block.kind)(*block.arguments)
            names = [f"{block.name}-{i}" for i in range(len(models))]
            plots.update(zip(names, models, strict=True))
            return {"kind": "plot", "text": block.text, "plots": names}
    return {"kind": "text", "text": block.strip("*")}


# --------------------------------------------------------------------------------------------------------- the sections


def _results_section(report: Report, plots: dict[str, Model]) -> dict[str, Any]:
    blocks = [report.table, LEGEND, report.accuracies, Bullets(report.findings)]
    return section("results", "Results", blocks=[_block(block, plots) for block in blocks])


def _when(report: Report) -> list[str]:
    dates = sorted(result.about["started"] for result in report.results.values() if "started" in result.about)
    times = [date[:16].replace("T", " ") for date in dates]
    return [f"Computed {times[0]} to {times[-1]} UTC."] if times else []


def _map(shown: _Shown) -> tuple[dict[str, Any], Model]:
    embedded, tests = shown.embedded, len(shown.rows)
    picked = sample(len(embedded.train), _MAX_TRAINING)
    train_rows = embedded.train_rows[picked]
    mapped = Mapped(
        embedding=np.concatenate([embedded.test, embedded.train[picked]]),
        number=[*shown.number.values(), *(shown.add_training(row) for row in train_rows)],
        judged=np.arange(tests + len(picked)) < tests,
        class_names=shown.class_names,
        label=np.concatenate([shown.label, shown.sources.galaxies.label[train_rows]]),
        predicted=np.concatenate([shown.predicted, np.full(len(picked), -1)]),
    )
    note = f"Features of the pre-trained encoder; predictions of the best method, {shown.title}."
    return map_section(mapped, shown.thumbnails, note)


def _confusion(report: Report, number: dict[int, int]) -> dict[str, Any]:
    """The matrices of the finished methods, the best first."""
    matrices = []
    for name in sorted((x for x in METHODS if x in report.results), key=lambda name: name != report.best):
        result, per_class = report.results[name], report.per_class[name]
        matrices.append(
            confusion_matrix(
                TITLES[name], report.config["class_names"], result.label, result.predicted, result.probabilities,
                number, table(per_class.header, per_class.rows),
            )
        )  # fmt: skip
    return confusion_section("Confusion matrices", matrices, PER_CLASS_NOTE)


def _galaxies(shown: _Shown) -> dict[str, Any]:
    """The most confidently wrong, the least certain and the oddest galaxies, with their nearest training galaxies."""
    embedded, numbers, distance = shown.embedded, list(shown.number.values()), None
    if embedded:
        with contextlib.suppress(UserError):  # all embeddings are equal
            distance = knn_distance(whiten(np.concatenate([embedded.test, embedded.train])))[: len(shown.rows)]

    def near(positions: np.ndarray) -> list[list[int]]:
        if not embedded:
            return [[] for _ in positions]
        rows, _ = neighbors(embedded.train, embedded.test[positions], NEIGHBORS, "exact")
        return [[shown.add_training(row) for row in embedded.train_rows[found]] for found in rows]

    lists = listed_galaxies(shown.probabilities, entropy(shown.probabilities), shown.label, distance, shown.title)
    sampled = embedded and len(embedded.train_rows) < len(shown.sources.split["train"])
    where = "a sample of the training set" if sampled else "the training set"
    return galaxies_section(lists, numbers.__getitem__, near, where)


def _run_folder(sources: _Sources) -> Path | None:
    """Where main.py pre-trained the encoder, if its history is there."""
    if sources.encoder is None:
        return None
    folder = Path(sources.encoder.name)
    return next((x for x in (folder, folder.resolve().parent) if (x / "trainer_state.json").is_file()), None)


def _pretraining(sources: _Sources, plots: dict[str, Model]) -> list[dict[str, Any]]:
    """Curves of the pre-training and reconstructions over its epochs."""
    folder = _run_folder(sources)
    if folder is None:
        return []
    try:
        log = read_json(folder / "trainer_state.json", "pre-train again", {"log_history": [dict]})["log_history"]
    except UserError as error:
        sources.missing.append(f"Without the curves of the pre-training: {error}.")
        return []

    def curve(key: str) -> tuple[list[float], list[float]] | None:
        points = [(x["epoch"], x[key]) for x in log if isinstance(x.get(key), float) and "epoch" in x]
        return tuple(map(list, zip(*points, strict=True))) if points else None

    panels = {
        "Training and validation loss of the pre-training": (
            {"training loss": curve("loss"), "validation loss": curve("eval_loss")}, "loss", True),
        "Accuracy of the online probes on the validation set": (
            {"linear probe": curve("eval_online_linear_probe_accuracy"), "k-NN": curve("eval_online_knn_accuracy")},
            "validation accuracy, 0 to 1", False),
        "Learning rate": ({"learning rate": curve("learning_rate")}, "learning rate", False),
    }  # fmt: skip
    blocks = []
    for i, (text, (curves, label, log_scale)) in enumerate(panels.items()):
        if found := {title: points for title, points in curves.items() if points}:
            log_scale = log_scale and all(min(y) > 0 for _, y in found.values())
            plots[f"curve-{i}"] = page_plots.training_curves(found, label, log_scale)
            ends = "; ".join(f"{title} {y[0]:.3g} at first, {y[-1]:.3g} at last" for title, (_, y) in found.items())
            blocks.append({"kind": "plot", "text": f"{text}: {ends}.", "plots": [f"curve-{i}"]})
    sections = [section("curves", "Pre-training", blocks=blocks)] if blocks else []
    return sections + _reconstructions(folder, log)


def _reconstructions(folder: Path, log: list[dict]) -> list[dict[str, Any]]:
    epochs = {entry["step"]: entry["epoch"] for entry in log if {"step", "epoch"} <= set(entry)}
    paths = sorted((folder / "reconstructions").glob("step_*.png"))
    named = [(path, int(path.stem.removeprefix("step_"))) for path in paths if path.stem[5:].isdecimal()]
    titled = [(path, f"epoch {epochs[step]:.3g}" if step in epochs else f"step {step:,}") for path, step in named]
    if (final := folder / "reconstruction_example.png").is_file():
        titled.append((final, "after the training"))
    frames = []
    for path, title in spread_evenly(titled, _MAX_FRAMES):
        with Image.open(path) as image:
            frames.append({"title": title, "image": data_uri(image, _FRAME_WIDTH)})
    if not frames:
        return []
    note = "The same validation galaxies with the same masks. Rows: original, visible patches, reconstruction, error."
    return [section("reconstructions", "Reconstructions over the epochs", "frames", note=note, frames=frames)]


def _attention(shown: _Shown) -> dict[str, Any] | None:
    """Attention of the last layer for a few test galaxies of different classes; a ViT has it."""
    galaxies, encoder = shown.sources.galaxies, shown.sources.encoder
    if not (galaxies and encoder and type(encoder.model) is ViTModel):
        return None
    _, first = np.unique(shown.label, return_index=True)
    first, numbers, items = first[:LISTED], list(shown.number.values()), []
    colors, size = matplotlib.colormaps["inferno"], (_ATTENTION_SIZE, _ATTENTION_SIZE)
    for i, attention in zip(
        first, attention_maps(encoder.model, _batches(shown.sources), shown.rows[first]), strict=True
    ):
        image = Image.fromarray((255 * colors(attention / attention.max())[..., :3]).astype(np.uint8))
        original = Image.fromarray(np.array(galaxies.pixels[shown.rows[i]])).resize(size, Image.Resampling.BICUBIC)
        overlay = Image.blend(original, image.resize(size, Image.Resampling.BILINEAR), 0.65)
        y, x = np.unravel_index(attention.argmax(), attention.shape)
        items.append(
            {
                "number": numbers[i],
                "name": shown.thumbnails.lines(numbers[i])[0],
                "image": data_uri(overlay, _ATTENTION_SIZE),
                "text": f"largest in row {y + 1}, column {x + 1} of {len(attention)} x {len(attention)} patches",
            }
        )
    note = (
        "How much the class token of the pre-trained encoder attends to each patch in the last layer, mean over heads; "
        "bright is much, relative to the largest of the galaxy."
    )
    return section("attention", "Attention", "attention", note=note, items=items)


@torch.no_grad()
def attention_maps(model: ViTModel, batches: GalaxyBatches, rows: np.ndarray) -> np.ndarray:
    """Attention of the class token to the patches in the last layer, mean over heads.

    Args:
        model: the encoder; left with eager attention, the only one that returns the weights.
        batches: makes the images.
        rows: (B,) int64.

    Returns:
        (B, patches per row, patches per row) float32.
    """
    model = model.to(batches.device).eval()
    model.set_attn_implementation("eager")
    pixels = batches.eval_transform(batches.collate(rows.tolist()))
    weights = model(pixels, output_attentions=True).attentions[-1].mean(dim=1)[:, 0, 1:]  # (B, patches)
    side = round(weights.shape[1] ** 0.5)
    return weights.reshape(len(rows), side, side).float().cpu().numpy()


def _foot(report: Report) -> dict[str, Any]:
    """Recipe, fingerprints, split, versions, commit, machine, and the command."""
    config, abouts = report.config, [result.about for result in report.results.values()]
    flags = to_flags(config["recipe"])
    command = ["python", "linear_probe_checkpoints.py", "--encoder", config["encoder_name"]]
    command += ["--dataset", config["dataset_name"], "--output_dir", str(report.folder), *flags]
    sizes = ", ".join(f"{count:,} {part}" for part, count in config["split_sizes"].items())
    entries = [
        ("Encoder", f"{config['encoder_name']}, SHA-256 {config['encoder']}"),
        ("Data", f"{config['dataset_name']}, SHA-256 {config['dataset']}"),
        ("Split", f"{sizes}; SHA-256 {config['split']}"),
        ("Recipe", _settings(config["recipe"])),
    ]
    if config["pretraining"]:
        entries.append(("Recipe of the pre-training", _settings(config["pretraining"])))
    for term, values in (
        ("Commit", (about["commit"] or "not known" for about in abouts)),
        ("Machine", (about["device"] for about in abouts)),
        ("Versions", (", ".join(f"{k} {v}" for k, v in about["versions"].items()) for about in abouts)),
    ):
        if found := sorted(set(values)):
            entries.append((term, "; ".join(found)))
    return section("foot", "How this was made", "foot", entries=entries, command=shlex.join(command))


def _settings(recipe: dict[str, Any]) -> str:
    """What a recipe sets."""
    return ", ".join(f"{key} {value}" for key, value in recipe.items() if value is not None)
