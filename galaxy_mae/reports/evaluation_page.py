"""The page of an evaluation: `report.html`, the numbers of `report.md` with the galaxies behind them.

It shows what there is. The results folder alone is enough for the numbers. The images, the encoder and the history of
its pre-training are read where the evaluation read them; if they are gone, a line says so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import ViTModel

from galaxy_mae import figures, provenance
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.download import cache_folder, has_galaxy10
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.split import split_fingerprint, split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import encode, features_file, frozen_features, mean_pool
from galaxy_mae.evaluation.methods import ARRAY_METHODS, BY_NAME
from galaxy_mae.files import read_json
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder
from galaxy_mae.predictions.schema import Predictions, add_predictions, galaxy_table
from galaxy_mae.reports.document import Figure, Section, data_uri, write_page
from galaxy_mae.reports.page import LISTED, MAX_GALAXIES, GalaxySections, foot, sample
from galaxy_mae.reports.report import Report, describe, describe_leakage
from galaxy_mae.training.recipe import EvaluationRecipe, to_flags

_MAX_TRAINING = 1000  # training galaxies on the map
_MAX_FRAMES, _FRAME_WIDTH = 12, 1100  # of the reconstructions over the epochs
_ATTENTION_SIZE = 128  # pixels


def write_evaluation_page(report: Report, recipe: EvaluationRecipe) -> Path:
    """Write `report.html` into the folder of the results, and return its path.

    Args:
        report: what `report.md` was written from.
        recipe: says where galaxies and encoder are, if they are no longer where the evaluation found them.
    """
    config, missing, alerts, lines = report.config, [], [], {}

    def find(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns, or None and a line that it is missing."""
        try:
            return function(*arguments)
        except UserError as error:
            missing.append(f"Without {what}: {error}.")

    galaxies, split = find("images", _open_galaxies, config, recipe) or (None, {})
    encoder = find("map, neighbors and attention", _open_encoder, config, recipe)
    results, findings, *others = (section for section in report.sections if not section.markdown_only)
    sections, attention = [results, findings], []
    if report.best:
        predictions = report.results[report.best].predictions
        shown = sample(len(predictions), MAX_GALAXIES)
        if len(shown) < len(predictions):
            alerts.append(
                f"The page shows a random sample of {len(shown):,} of the {len(predictions):,} test galaxies; all "
                "numbers are of all test galaxies."
            )
        embedding, training = None, None
        if galaxies and encoder:
            embedding, training = _embed(galaxies, encoder, config, predictions.row[shown], split["train"], recipe)
        parts = GalaxySections(predictions, shown, shown, embedding, training, BY_NAME[report.best].title, lines)
        ordered = sorted(ARRAY_METHODS, key=lambda m: m.name != report.best)  # the best first
        matrices = {m.title: report.results[m.name].predictions for m in ordered if m.name in report.results}
        sampled = training is not None and len(training) < len(split["train"])
        note = f"Features of the pre-trained encoder; predictions of the best method, {parts.method}."
        sections += parts.map(note, _MAX_TRAINING)
        sections += parts.confusion("Confusion matrices", matrices)
        sections += parts.lists("a sample of the training set" if sampled else "the training set")
        if galaxies and encoder and type(encoder.model) is ViTModel:
            attention = [_attention(parts, galaxies, encoder)]
    curves = find("the curves of the pre-training", _pretraining, encoder) or []
    sections += [*others, *curves, *attention, _foot(report)]
    about, leakage = [report.verdict, describe(report).replace("`", "")], describe_leakage(config)
    if times := sorted(result.about["started"][:16].replace("T", " ") for result in report.results.values()):
        about.append(f"Computed {times[0]} to {times[-1]} UTC.")
    (alerts if leakage.startswith("**") else about).append(leakage.strip("*"))
    path, title = report.folder / "report.html", f"Evaluation of {config['encoder_name']}"
    write_page(path, title, about, alerts + missing, sections, lines, galaxies and galaxies.pixels)
    print(f"page: {path}")
    return path


def _open_galaxies(config: dict, recipe: EvaluationRecipe) -> tuple[Galaxies, dict[str, np.ndarray]]:
    """The galaxies of an evaluation and their split, or a `UserError` if they are not there or not the same."""
    given = recipe.evaluation.dataset if "dataset" in recipe.explicitly_set else config["dataset_name"]
    here = any(cache_folder().glob(f"{config['dataset'][:16]}_*")) and (given != "galaxy10" or has_galaxy10())
    if not (Path(given).exists() or here):
        raise UserError(f"--dataset {given}: not in the cache")  # a report downloads nothing
    how = {"stretch": Stretch.named(recipe.evaluation.stretch), "frame": Frame.of(config["frame"])}
    how["columns"] = recipe.evaluation.columns
    galaxies = open_galaxies(given, config["model"]["image_size"], **how)
    split = split_galaxies(galaxies, config["recipe"]["split_seed"])
    if (galaxies.fingerprint, split_fingerprint(split)) != (config["dataset"], config["split"]):
        raise UserError(f"--dataset {given}: not the data set of the evaluation, or split in another way")
    return galaxies, split


def _open_encoder(config: dict, recipe: EvaluationRecipe) -> Encoder:
    """The encoder of an evaluation, or a `UserError` if it is not there or not the same."""
    name = recipe.evaluation.encoder or config["encoder_name"]
    if not (Path(name).exists() or provenance.hub_id(name)):
        raise UserError(f"--encoder {name}: no such folder")
    encoder = load_encoder(name)
    if encoder_fingerprint(encoder.model, encoder.mean, encoder.std, encoder.image_size) != config["encoder"]:
        raise UserError(f"--encoder {name}: not the encoder of the evaluation")
    return encoder


def _batches(galaxies: Galaxies, encoder: Encoder) -> GalaxyBatches:
    """The images as the encoder takes them."""
    return GalaxyBatches(galaxies.pixels, encoder.mean, encoder.std, encoder.image_size, "cpu")


def _embed(
    galaxies: Galaxies, encoder: Encoder, config: dict, test: np.ndarray, train: np.ndarray, recipe: EvaluationRecipe
) -> tuple[np.ndarray, Predictions]:
    """Features of the test galaxies, and the training galaxies, or a sample of them, with theirs.

    If the evaluation left the features of all galaxies in the cache, they are used.
    """
    batches = _batches(galaxies, encoder)
    paths = {features_file(galaxies, config["encoder"], x): x for x in (False, True)}
    if path := next((path for path in paths if path.is_file()), None):
        mean = frozen_features(encoder.model, batches, path, paths[path]).mean
        embedding = np.concatenate([mean[test], mean[train]])
    else:
        train = train[sample(len(train), _MAX_TRAINING)]
        tokens = encode(encoder.model, batches, np.concatenate([test, train]), recipe.training.bf16)
        embedding = np.concatenate([mean_pool(last) for *_, last in tokens])
    table = add_predictions(galaxy_table(galaxies, train), embedding=embedding[len(test) :])
    return embedding[: len(test)], Predictions(table, {"class_names": config["class_names"]})


def _pretraining(encoder: Encoder | None) -> list[Section]:
    """Curves of the pre-training and reconstructions over its epochs, if main.py's history of it is there."""
    folders = [Path(encoder.name), Path(encoder.name).resolve().parent] if encoder else []
    folder = next((folder for folder in folders if (folder / "trainer_state.json").is_file()), None)
    if folder is None:
        return []
    log = read_json(folder / "trainer_state.json", "pre-train again", ("log_history",))["log_history"]
    curves = {
        "loss": {"training loss": "loss", "validation loss": "eval_loss"},
        "validation accuracy": {
            "linear probe": "eval_online_linear_probe_accuracy",
            "k-NN": "eval_online_knn_accuracy",
        },
        "learning rate": {"learning rate": "learning_rate"},
    }
    panels, ends, frame = [], [], pd.DataFrame(log)
    for label, keys in curves.items():
        logged = {title: frame[["epoch", key]].dropna().to_numpy().T for title, key in keys.items() if key in frame}
        if found := {title: points.tolist() for title, points in logged.items() if points.size}:
            panels.append((label, found))
            ends += [f"{title} {y[0]:.3g} at first, {y[-1]:.3g} at last" for title, (_, y) in found.items()]
    blocks = [Figure("pretraining", figures.training_curves, (panels,), f"Over the epochs: {'; '.join(ends)}.")]
    sections = [Section("Pre-training", blocks, "curves")] if panels else []
    return sections + _reconstructions(folder, log)


def _reconstructions(folder: Path, log: list[dict]) -> list[Section]:
    epochs = {entry["step"]: entry["epoch"] for entry in log if {"step", "epoch"} <= set(entry)}
    paths = sorted((folder / "reconstructions").glob("step_*.png"))
    named = [(path, int(path.stem.removeprefix("step_"))) for path in paths if path.stem[5:].isdecimal()]
    titled = [(path, f"epoch {epochs[step]:.3g}" if step in epochs else f"step {step:,}") for path, step in named]
    if (final := folder / "reconstruction_example.png").is_file():
        titled.append((final, "after the training"))
    frames = []
    for i in np.linspace(0, len(titled) - 1, min(len(titled), _MAX_FRAMES)).round().astype(int):  # first and last, too
        with Image.open(titled[i][0]) as image:
            frames.append({"title": titled[i][1], "image": data_uri(image, _FRAME_WIDTH)})
    note = "The same validation galaxies with the same masks. Rows: original, visible patches, reconstruction, error."
    blocks = [note, {"kind": "frames", "frames": frames}]
    return [Section("Reconstructions over the epochs", blocks, "reconstructions")] if frames else []


def _attention(parts: GalaxySections, galaxies: Galaxies, encoder: Encoder) -> Section:
    """Attention of the last layer for a few test galaxies of different classes."""
    predictions, items = parts.predictions, []
    _, first = np.unique(predictions.label[parts.shown], return_index=True)
    positions = parts.shown[first[:LISTED]]
    rows = predictions.row[positions]
    maps = attention_maps(encoder.model, _batches(galaxies, encoder), rows)
    colors, size = matplotlib.colormaps["inferno"], (_ATTENTION_SIZE, _ATTENTION_SIZE)
    for i, row, attention in zip(positions, rows, maps, strict=True):
        image = Image.fromarray((255 * colors(attention / attention.max())[..., :3]).astype(np.uint8))
        original = Image.fromarray(np.array(galaxies.pixels[row])).resize(size, Image.Resampling.BICUBIC)
        overlay = Image.blend(original, image.resize(size, Image.Resampling.BILINEAR), 0.65)
        y, x = np.unravel_index(attention.argmax(), attention.shape)
        patches = f"row {y + 1}, column {x + 1} of {len(attention)} x {len(attention)} patches"
        text = f"Attention over {predictions.object_id[i]}: largest in {patches}"
        items.append({"tile": [parts.rows[i]], "image": data_uri(overlay, _ATTENTION_SIZE), "text": text})
    note = (
        "How much the class token of the pre-trained encoder attends to each patch in the last layer, mean over heads; "
        "bright is much, relative to the largest of the galaxy."
    )
    return Section("Attention", [note, {"kind": "attention", "galaxies": items}], "attention")


@torch.no_grad()
def attention_maps(model: ViTModel, batches: GalaxyBatches, rows: np.ndarray) -> np.ndarray:
    """Attention of the class token to the patches in the last layer, mean over heads, for (B,) int64 rows.

    Returns:
        (B, patches per row, patches per row) float32. The model keeps eager attention, which alone gives the weights.
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
    versions = {f"{name} {version}" for about in abouts for name, version in about["versions"].items()}
    sessions = {key: sorted({about[key] or "not known" for about in abouts}) for key in ("commit", "device")}
    return foot(config | sessions | {"versions": sorted(versions)}, command)
