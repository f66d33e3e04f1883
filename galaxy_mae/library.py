"""The functions of `import galaxy_mae as gm` that are not commands of their own: they call what the commands call."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from galaxy_mae.catalogue.predict import as_rgb, predict
from galaxy_mae.files import atomic_file, read_json
from galaxy_mae.model.encoder import Encoder, load_encoder
from galaxy_mae.training.recipe import to_flags

if TYPE_CHECKING:
    from galaxy_mae.reports.report import Report


def embed(
    images: str | Path | np.ndarray | Sequence[Image.Image | str | Path],
    encoder: Encoder | str | Path = "pretrained",
    *,
    orientations: bool = False,
    **options: Any,
) -> np.ndarray:
    """Features of images by a frozen encoder.

    Args:
        images: as for `predict`.
        encoder: of `load_encoder`, or what it takes.
        orientations: mean and std over sixteen orientations of each image, at sixteen times the cost, in place of the
            mean patch token. They do not change if an image is turned by 90 degrees or mirrored.
        options: others of `predict`: stretch, fit, arcsec, bf16, use_cpu.

    Returns:
        (N, D) float32, NaN where an image cannot be read.

    Raises:
        UserError: as `predict` and `load_encoder`.

    >>> encoder = gm.load_encoder("pretrained")
    >>> gm.embed("my_galaxies/", encoder).shape
    (50, 96)
    >>> images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    >>> gm.embed(images, encoder, orientations=True).dtype
    dtype('float32')
    """
    opened = encoder if isinstance(encoder, Encoder) else load_encoder(str(encoder))
    table = predict(images, opened, embeddings=True, orientations=orientations, **options)
    return np.stack(table["embedding"].to_list()).astype(np.float32)


@dataclass(frozen=True)
class Run:
    """A finished pre-training."""

    folder: Path

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return load_encoder(str(self.folder))

    @property
    def history(self) -> pd.DataFrame:
        """What was logged: one row per entry, with step, epoch, loss, eval_loss, accuracies of probes, ..."""
        fix = "delete the folder and train again"
        return pd.DataFrame(read_json(self.folder / "trainer_state.json", fix, ("log_history",))["log_history"])

    def _repr_html_(self) -> str:
        """In a notebook: the last losses and accuracies, and reconstructions of validation galaxies."""
        from galaxy_mae.reports.document import data_uri

        last = self.history.filter(regex="^(epoch|loss|eval_loss|eval_.*accuracy)$").ffill().tail(1)
        text, path = f"<b>{self.folder}</b>{last.to_html(index=False)}", self.folder / "reconstruction_example.png"
        if not path.exists():  # a student has no decoder
            return text
        with Image.open(path) as image:
            return f"{text}<img src='{data_uri(image, 800)}'>"


def pretrain(
    dataset: str | Path | np.ndarray | Sequence[Image.Image] = "galaxy10",
    *,
    output_dir: str | Path,
    recipe: str | Path = "galaxy10",
    epochs: float | None = None,
    **fields: Any,
) -> Run:
    """Pre-train a masked autoencoder, as `main.py` does. The same call resumes a run that was interrupted.

    Args:
        dataset: as for `--dataset`; or (N, S, S, 3) uint8 or PIL images, which are kept in a Parquet file beside
            `output_dir`.
        output_dir: folder of the run.
        recipe: a YAML file, or a name of the package's, such as `demo`, a small model for a CPU.
        epochs: passes over the training set; None takes the recipe's.
        fields: others of `main.py --help`. Dashboards are off unless `report_to` is set.

    Returns:
        The run, with its `encoder` and its `history`.

    Raises:
        UserError: as the command; `output_dir` holds a run of another recipe.

    >>> run = gm.pretrain("my_galaxies/", recipe="demo", epochs=2, batch_size=16, output_dir="runs/mine")
    >>> run.encoder.image_size
    64
    >>> run.history["eval_loss"].dropna().is_monotonic_decreasing
    True
    """
    from galaxy_mae.main import main

    folder = Path(output_dir)
    fields = {"report_to": "none", "dataset": _as_dataset(dataset, folder), "num_train_epochs": epochs} | fields
    main(["--config", str(recipe), *to_flags(fields), "--output_dir", str(folder)])
    return Run(folder)


def evaluate(
    encoder: Run | str | Path,
    dataset: str | Path | None = None,
    *,
    output_dir: str | Path | None = None,
    recipe: str | Path = "evaluation",
    **fields: Any,
) -> "Report":
    """Evaluate an encoder on labelled galaxies, as `linear_probe_checkpoints.py` does. The same call resumes.

    Args:
        encoder: a run, an encoder's folder, or a Hub id.
        dataset: labelled, as for `--dataset`; None takes those of the pre-training.
        output_dir: folder of the results; None takes `results/NAME`.
        recipe: a YAML file, or a name of the package's: `evaluation`, `evaluation_demo`.
        fields: others of `linear_probe_checkpoints.py --help`, such as `method="ssl_linear_probe"` for one of the five.

    Returns:
        The report: `table` (a DataFrame), `best` (the name of the most accurate method), `show()`, `folder`.

    Raises:
        UserError: as the command.

    >>> report = gm.evaluate("pretrained", "my_galaxies.parquet", recipe="evaluation_demo", batch_size=16,
    ...     method="ssl_linear_probe", output_dir="results/mine")
    >>> report.best
    'ssl_linear_probe'
    >>> report.table.query("accuracy.notna()")["method"].to_list()
    ['Linear probe (SSL weights)']
    """
    from galaxy_mae.linear_probe_checkpoints import main

    source = encoder.folder if isinstance(encoder, Run) else encoder
    folder = output_dir or Path("results", Path(source).name)
    fields = {"report_to": "none", "encoder": source, "dataset": dataset, "output_dir": folder} | fields
    return main(["--config", str(recipe), *to_flags(fields)])


def _as_dataset(images: str | Path | np.ndarray | Sequence[Image.Image], folder: Path) -> str:
    """A value of `--dataset`: images in memory are written beside the run's folder, under their hash."""
    if isinstance(images, str | Path):
        return str(images)
    files = []
    for i, image in enumerate(images):
        Image.fromarray(as_rgb(image, i)).save(buffer := io.BytesIO(), "PNG", compress_level=1)
        files.append(buffer.getvalue())
    name = hashlib.sha256(b"".join(files)).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}_images_{name}.parquet")  # a new run's folder must be empty
    if not path.exists():
        with atomic_file(path) as tmp_path:
            pq.write_table(pa.table({"image": files}), tmp_path, compression="none")
    return str(path)
