"""The page of an evaluation: `report.html`, the numbers of `report.md` with the galaxies behind them.

It shows what there is. The results folder alone is enough for the numbers. The images, the encoder and the history of
its pre-training are read where the evaluation read them; if they are gone, a line says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from transformers import ViTModel

from galaxy_mae import figures, provenance
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.download import cache_folder, has_galaxy10
from galaxy_mae.data.split import split_fingerprint, split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import encode, features_file, frozen_features, mean_pool
from galaxy_mae.evaluation.methods import ARRAY_METHODS, BY_NAME
from galaxy_mae.files import read_json
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder
from galaxy_mae.reports.document import Block, Figure, Section, Text, Thumbnails, data_uri, write_page
from galaxy_mae.reports.page import LISTED, MAX_GALAXIES, GalaxySections, TrainingGalaxies, foot, sample
from galaxy_mae.reports.report import Report, describe, describe_leakage
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

    @property
    def batches(self) -> GalaxyBatches:
        """The images as the encoder takes them."""
        encoder = self.encoder
        return GalaxyBatches(self.galaxies.pixels, encoder.mean, encoder.std, encoder.image_size, "cpu")


def write_evaluation_page(report: Report, recipe: EvaluationRecipe) -> Path:
    """Write `report.html` into the folder of the results.

    Args:
        report: what `report.md` was written from.
        recipe: says where galaxies and encoder are, if they are no longer where the evaluation found them.

    Returns:
        The path of the page.
    """
    config, sources = report.config, _open(report.config, recipe)
    thumbnails = Thumbnails(sources.galaxies and sources.galaxies.pixels)
    results, findings, *others = (section for section in report.sections if not section.in_matrices)
    sections, alerts = [results, findings], []
    if report.best:
        parts = _galaxies(report, sources, thumbnails, recipe.training.bf16, alerts)
        ordered = sorted(ARRAY_METHODS, key=lambda m: m.name != report.best)  # the best first
        matrices = {m.title: report.results[m.name].predictions for m in ordered if m.name in report.results}
        sampled = parts.training is not None and parts.training.sampled
        note = f"Features of the pre-trained encoder; predictions of the best method, {parts.method}."
        sections += parts.map(note, _MAX_TRAINING)
        sections += parts.confusion("Confusion matrices", matrices)
        sections += parts.lists("a sample of the training set" if sampled else "the training set")
    sections += others + _pretraining(sources)
    if report.best:
        sections += _attention(parts, sources)
    sections.append(_foot(report))
    about, leakage = [describe(config, report.results), *_when(report)], describe_leakage(config)
    (alerts if leakage.startswith("**") else about).append(leakage.strip("*"))
    path, title = report.folder / "report.html", f"Evaluation of {config['encoder_name']}"
    write_page(path, title, about, alerts + sources.missing, sections, thumbnails)
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


def _galaxies(
    report: Report, sources: _Sources, thumbnails: Thumbnails, bf16: bool, alerts: list[str]
) -> GalaxySections:
    """The test galaxies, or a sample of them, which is added to the alerts, by the best method."""
    predictions = report.results[report.best].predictions
    shown = sample(len(predictions), MAX_GALAXIES)
    if len(shown) < len(predictions):
        alerts.append(
            f"The page shows a random sample of {len(shown):,} of the {len(predictions):,} test galaxies; all numbers "
            "are of all test galaxies."
        )
    embedding, training = _embed(sources, predictions.row[shown], bf16)
    title = BY_NAME[report.best].title
    return GalaxySections(predictions, thumbnails, shown, shown, embedding, training, title)


def _embed(sources: _Sources, test: np.ndarray, bf16: bool) -> tuple[np.ndarray | None, TrainingGalaxies | None]:
    """Features of the shown test galaxies, and the training galaxies or a sample of them.

    If the evaluation left the features of all galaxies in the cache, they are used.
    """
    if not (sources.galaxies and sources.encoder):
        return None, None
    galaxies, encoder, train = sources.galaxies, sources.encoder, sources.split["train"]
    fingerprint = encoder_fingerprint(encoder.model, encoder.mean, encoder.std, encoder.image_size)
    paths = {features_file(galaxies, fingerprint, x): x for x in (False, True)}
    if path := next((path for path in paths if path.is_file()), None):
        mean = frozen_features(encoder.model, sources.batches, path, paths[path]).mean
        rows, embedding = train, np.concatenate([mean[test], mean[train]])
    else:
        rows = train[sample(len(train), _MAX_TRAINING)]
        tokens = encode(encoder.model, sources.batches, np.concatenate([test, rows]), bf16)
        embedding = np.concatenate([mean_pool(last) for *_, last in tokens])
    names = rows.astype(str) if galaxies.object_id is None else galaxies.object_id[rows]
    sampled = len(rows) < len(train)
    return embedding[: len(test)], TrainingGalaxies(embedding[len(test) :], rows, names, galaxies.label[rows], sampled)


def _when(report: Report) -> list[str]:
    dates = sorted(result.about["started"] for result in report.results.values())
    times = [date[:16].replace("T", " ") for date in dates]
    return [f"Computed {times[0]} to {times[-1]} UTC."] if times else []


# ------------------------------------------------------------------------------------------- the sections of its own


def _run_folder(sources: _Sources) -> Path | None:
    """Where main.py pre-trained the encoder, if its history is there."""
    if sources.encoder is None:
        return None
    folder = Path(sources.encoder.name)
    return next((x for x in (folder, folder.resolve().parent) if (x / "trainer_state.json").is_file()), None)


def _pretraining(sources: _Sources) -> list[Section]:
    """Curves of the pre-training and reconstructions over its epochs."""
    folder = _run_folder(sources)
    if folder is None:
        return []
    try:
        log = read_json(folder / "trainer_state.json", "pre-train again", ("log_history",))["log_history"]
    except UserError as error:
        sources.missing.append(f"Without the curves of the pre-training: {error}.")
        return []
    curves = {
        "loss": {"training loss": "loss", "validation loss": "eval_loss"},
        "validation accuracy": {
            "linear probe": "eval_online_linear_probe_accuracy",
            "k-NN": "eval_online_knn_accuracy",
        },
        "learning rate": {"learning rate": "learning_rate"},
    }
    panels, ends = [], []
    for label, keys in curves.items():
        found = {title: points for title, key in keys.items() if (points := _curve(log, key))}
        if found:
            panels.append((label, found))
            ends += [f"{title} {y[0]:.3g} at first, {y[-1]:.3g} at last" for title, (_, y) in found.items()]
    blocks = [Figure("pretraining", figures.training_curves, (panels,), f"Over the epochs: {'; '.join(ends)}.")]
    sections = [Section("Pre-training", blocks, "curves")] if panels else []
    return sections + _reconstructions(folder, log)


def _curve(log: list[dict], key: str) -> tuple[list[float], list[float]] | None:
    """The epochs at which a number was logged, and its values."""
    points = [(x["epoch"], x[key]) for x in log if isinstance(x.get(key), float) and "epoch" in x]
    return tuple(map(list, zip(*points, strict=True))) if points else None


def _reconstructions(folder: Path, log: list[dict]) -> list[Section]:
    epochs = {entry["step"]: entry["epoch"] for entry in log if {"step", "epoch"} <= set(entry)}
    paths = sorted((folder / "reconstructions").glob("step_*.png"))
    named = [(path, int(path.stem.removeprefix("step_"))) for path in paths if path.stem[5:].isdecimal()]
    titled = [(path, f"epoch {epochs[step]:.3g}" if step in epochs else f"step {step:,}") for path, step in named]
    if (final := folder / "reconstruction_example.png").is_file():
        titled.append((final, "after the training"))
    frames = []
    for path, title in _spread_evenly(titled, _MAX_FRAMES):
        with Image.open(path) as image:
            frames.append({"title": title, "image": data_uri(image, _FRAME_WIDTH)})
    note = "The same validation galaxies with the same masks. Rows: original, visible patches, reconstruction, error."
    blocks: list[Block] = [Text(note), {"kind": "frames", "frames": frames}]
    return [Section("Reconstructions over the epochs", blocks, "reconstructions")] if frames else []


def _spread_evenly(values: Sequence, maximum: int) -> list:
    """At most `maximum` of the values, the first and the last among them."""
    if len(values) <= maximum:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, maximum).round().astype(int)]


def _attention(parts: GalaxySections, sources: _Sources) -> list[Section]:
    """Attention of the last layer for a few test galaxies of different classes; a ViT has it."""
    galaxies, encoder, predictions = sources.galaxies, sources.encoder, parts.predictions
    if not (galaxies and encoder and type(encoder.model) is ViTModel):
        return []
    _, first = np.unique(predictions.label[parts.shown], return_index=True)
    positions = parts.shown[first[:LISTED]]
    rows, items = predictions.row[positions], []
    colors, size = matplotlib.colormaps["inferno"], (_ATTENTION_SIZE, _ATTENTION_SIZE)
    for i, row, attention in zip(positions, rows, attention_maps(encoder.model, sources.batches, rows), strict=True):
        image = Image.fromarray((255 * colors(attention / attention.max())[..., :3]).astype(np.uint8))
        original = Image.fromarray(np.array(galaxies.pixels[row])).resize(size, Image.Resampling.BICUBIC)
        overlay = Image.blend(original, image.resize(size, Image.Resampling.BILINEAR), 0.65)
        y, x = np.unravel_index(attention.argmax(), attention.shape)
        items.append(
            {
                "number": parts.number[i],
                "name": str(predictions.object_id[i]),
                "image": data_uri(overlay, _ATTENTION_SIZE),
                "text": f"largest in row {y + 1}, column {x + 1} of {len(attention)} x {len(attention)} patches",
            }
        )
    note = (
        "How much the class token of the pre-trained encoder attends to each patch in the last layer, mean over heads; "
        "bright is much, relative to the largest of the galaxy."
    )
    return [Section("Attention", [Text(note), {"kind": "attention", "galaxies": items}], "attention")]


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


def _foot(report: Report) -> Section:
    """Recipe, fingerprints, split, versions, commit, machine, and the command."""
    config, abouts = report.config, [result.about for result in report.results.values()]
    command = ["python", "linear_probe_checkpoints.py", "--encoder", config["encoder_name"]]
    command += ["--dataset", config["dataset_name"], "--output_dir", str(report.folder), *to_flags(config["recipe"])]
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
    return foot(entries, command)


def _settings(recipe: dict[str, Any]) -> str:
    """What a recipe sets."""
    return ", ".join(f"{key} {value}" for key, value in recipe.items() if value is not None)
