"""The one schema of predictions: a table with one row per galaxy, whatever wrote it.

The evaluation of a method, `catalogue predict` and every partition of a survey write these columns, and the report, the
pages, the cards and the rankings read them. In this order, and only those that there are:

    row, object_id, ra, dec     the galaxy: its row of the data set, its name, its position (degrees, J2000)
    label                       its class in the data set
    (any other name)            columns of the data set that nobody here knows
    image_width, image_height   of its image, in pixels; frame_width, of the square that the model sees
    radius, radius_arcsec       of the galaxy, as `--fit galaxy` measured it
    predicted_class             the most probable class
    p_CLASS                     the probability of each class, mean over seeds
    entropy, disagreement       of the probabilities, and between the seeds, in nats
    predicted_class_seed_N      the most probable class by the classifier of a seed
    flag, problem               one of `FLAGS`, or no text; why an image cannot be read
    nan_fraction                of the pixels of a FITS cut-out or of fluxes, how many are NaN
    far_from_training           distance of an image from those that the model was trained on; above 1 it is far
    embedding, pca              vectors of fixed length

A field's metadata has its description and unit; where the rows come from is in the provenance, `Predictions.about`.
"""

import itertools
import os.path
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.data.cache import Galaxies, fingerprint_of, open_galaxies
from galaxy_mae.data.fits import MAX_IMAGE_SIZE, Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.images import STATISTICS
from galaxy_mae.data.kinds import find_source
from galaxy_mae.data.source import Options
from galaxy_mae.errors import UserError

VECTORS = ("embedding", "pca")  # columns with several numbers per row; of a CSV file embedding_000, embedding_001, ...
_LEFT_OUT = ("unreadable", "blank")  # flags of galaxies that are in no ranking
_SEED = "predicted_class_seed_"
# Names that no column of the user's own table keeps: ours, also where they are not there, and those of rankings.
_OURS = ("predicted_class", "entropy", "disagreement", "flag", "problem", "nan_fraction", "far_from_training", *VECTORS)
_OURS += ("rank", "query", "similarity", "knn_distance", "isolation_forest")
_TEXTS = ("object_id", "label", "predicted_class", "flag", "problem")
_NUMBERS = ("ra", "dec", "entropy", "disagreement", "nan_fraction", "far_from_training")
# The first that holds of an image is its flag; `flags` says what each means.
FLAGS = ("unreadable", "blank", "nan", "saturated", "empty", "far", "no_radius")
FLAGGED_FRACTION = 0.05  # of an image's values that are 255, or of its pixels that are NaN
_FLAT = 3.0  # noises of the sky, below which nothing stands at the center: of 7,018 real galaxies the least is 14
_MAY = {"columns": list}  # what may be missing of what follows
# Of the provenance that `predict` writes: what the other commands read.
_ABOUT = {"model": dict, "class_names": list, "dataset": str, "dataset_fingerprint": str, "image_size": int}
_ABOUT |= {"stretch": dict, "frame": dict, "orientations": bool, "bf16": bool, "versions": dict, "created": str}


@dataclass(frozen=True)
class Predictions:
    """What is predicted for N galaxies, and the provenance as JSON. An attribute is None if its column is not there."""

    table: pa.Table
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.table)

    def _values(self, name: str) -> np.ndarray | None:
        return to_numpy(self.table[name]) if name in self.table.column_names else None

    def codes(self, name: str) -> np.ndarray:
        """A column of class names as (N,) int64: positions in `class_names`, -1 for what is none of them."""
        found = pc.index_in(self.table[name], pa.array(self.class_names, pa.string()))
        return found.fill_null(-1).to_numpy().astype(np.int64)

    @cached_property
    def class_names(self) -> list[str]:
        """Those that can be predicted; without predictions those of the labels, sorted."""
        return list(self.about.get("class_names") or self._labels)

    @property
    def _labels(self) -> list[str]:
        return sorted(pc.unique(self.table["label"]).to_pylist()) if "label" in self.table.column_names else []

    row = cached_property(lambda self: self._values("row"))  # (N,) int64, of the data set
    object_id = cached_property(lambda self: self._values("object_id"))  # (N,) str
    entropy = cached_property(lambda self: self._values("entropy"))  # (N,) float, of the probabilities, in nats
    embedding = cached_property(lambda self: self._values("embedding"))  # (N, D) float32
    _flag = cached_property(lambda self: self._values("flag"))

    @property
    def position(self) -> np.ndarray:
        """(N, 2) float64: right ascension and declination in degrees, NaN if unknown."""
        return np.stack([self._values(name) for name in ("ra", "dec")], axis=1)

    @cached_property
    def label(self) -> np.ndarray | None:
        """(N,) int64; None also if some label is none of the classes."""
        return self.codes("label") if self._labels and not self.other_labels else None

    @property
    def other_labels(self) -> list[str]:
        """Labels that are none of the classes."""
        return [name for name in self._labels if name not in self.class_names]

    @property
    def seeds(self) -> list[int]:
        """Whose predictions there are, besides those of the mean probabilities."""
        found = (re.fullmatch(rf"{_SEED}(\d+)", name) for name in self.table.column_names)
        return [int(match[1]) for match in found if match]

    @cached_property
    def predicted(self) -> np.ndarray | None:
        """(S, N) int64: the predicted class by each of `seeds`, or by the mean probabilities if there are none."""
        if "predicted_class" not in self.table.column_names:
            return None
        return np.stack([self.codes(f"{_SEED}{seed}") for seed in self.seeds] or [self.codes("predicted_class")])

    @cached_property
    def probabilities(self) -> np.ndarray | None:
        """(N, classes) float64, means over seeds."""
        if "predicted_class" not in self.table.column_names:
            return None
        return np.stack([self._values(name) for name in column_names(self.class_names)], axis=1).astype(np.float64)

    @property
    def usable(self) -> np.ndarray:
        """(N,) bool: neither unreadable nor blank."""
        return np.ones(len(self), bool) if self._flag is None else is_usable(self._flag)

    @property
    def left_out(self) -> str:
        """How many galaxies are not usable, as in `2 unreadable, 1 blank`; empty if all are."""
        counts = {name: int(np.sum(self._flag == name)) for name in _LEFT_OUT}
        return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)

    def only_usable(self) -> "Predictions":
        """The usable galaxies."""
        return self if self.usable.all() else Predictions(self.table.filter(pa.array(self.usable)), self.about)

    def validate(self) -> None:
        """Raise an error if our columns and the provenance are not as they were written, because somebody edited them.

        Raises:
            ValueError: the first thing that is wrong. What is wrong with the provenance may raise other exceptions.
        """
        about, names = self.about, self.table.column_names
        if wrong := [key for key, kind in (_ABOUT | _MAY).items() if not isinstance(about.get(key, kind()), kind)]:
            raise ValueError(f"{wrong[0]} of its provenance is {str(about[wrong[0]])[:100]!r}")
        texts = [about.get("model", {}).get("name", ""), about.get("unlike", "")]
        texts += [*self.class_names, str("stretch" in about and self.stretch)]
        if {*map(type, texts)} - {str} or not 1 <= about.get("image_size", 1) <= MAX_IMAGE_SIZE:
            raise ValueError("its provenance names no model, classes or size of images")
        seeds, probabilities = [f"{_SEED}{seed}" for seed in self.seeds], column_names(self.class_names)
        for column, values in zip(self.table.schema, self.table.columns, strict=True):
            name, kind = column.name, column.type
            if name in VECTORS:
                is_right = pa.types.is_fixed_size_list(kind) and kind.list_size > 0
                is_right = is_right and pa.types.is_floating(kind.value_type)
            elif name in ("row", *_TEXTS, *seeds):
                is_right = kind == (pa.int64() if name == "row" else pa.string())
            elif name in _NUMBERS or (name in probabilities and "predicted_class" in names):
                is_right = pa.types.is_floating(kind)
            else:
                continue
            if not is_right or values.null_count or names.count(name) > 1:
                raise ValueError(f"its column {name} is {str(kind)[:60]}, has nulls, or is there twice")
        if "predicted_class" in names and "class_names" in about:
            usable = self.only_usable()
            if missing := {*probabilities} - {*names}:
                raise ValueError(f"it has no {min(missing)}")
            codes = np.array([usable.codes(name) for name in ("predicted_class", *seeds)])
            if np.any(codes < 0) or not np.all(np.abs(usable.probabilities - 0.5) < 0.501):
                raise ValueError("a predicted class is none of the classes, or a probability is not from 0 to 1")

    def check(self, path: object, columns: Collection[str]) -> None:
        """Raise a `UserError` with the path if a column or part of the provenance is missing, or a row is negative."""
        if missing := {*columns} - {*self.table.column_names} or {*_ABOUT} - {*self.about}:
            raise UserError(f"{path}: it has no {min(missing)}; write it again with predict")
        if np.any(self.row < 0):
            raise UserError(f"{path}: its column row has negative numbers; write it again with predict")

    @property
    def stretch(self) -> Stretch:
        """That of the images, if they are FITS cut-outs."""
        about = self.about["stretch"]
        return Stretch(about.get("preset", "auto"), about.get("changes", "{}"))

    @property
    def frame(self) -> Frame:
        """How the images became squares."""
        return Frame.of(self.about["frame"])

    def open_images(self, path: object, dataset: str | None, needed: bool = False) -> tuple[Galaxies | None, str]:
        """The images, or None and a clause why they are not there.

        Args:
            path: of the predictions, for messages.
            dataset: where the images are now; None is where they were.
            needed: whether their lack is an error also without a `dataset`.

        Raises:
            UserError: the needed images are not there, or are others.
        """
        size = self.about["image_size"]
        try:
            source = dataset or self._local_dataset(self.about["dataset"])
            columns = tuple(map(str, self.about.get("columns", ())))
            options = Options(size, self.stretch, self.frame, columns=columns)
            if fingerprint_of(find_source(source, options)) != self.about["dataset_fingerprint"]:
                raise UserError(f"--dataset {source}: these are not the images of {path}; give the same data set")
            how = {"stretch": self.stretch, "frame": self.frame, "columns": columns, "skip_unreadable": True}
            galaxies = open_galaxies(source, size, **how)
            if not np.array_equal(self.object_id, _names(galaxies, np.minimum(self.row, len(galaxies)))):
                raise UserError(f"{path}: its rows are not those of {source}, or have other names; write it again")
        except UserError as error:
            if dataset or needed:
                raise
            return None, f"{error}; where the images are now: --dataset"
        return galaxies, ""

    def _local_dataset(self, name: str) -> str:
        """The path of the data set that this table names, which may be anybody's: nothing is downloaded or made for it.

        Raises:
            UserError: there is no such path, or there are far more files in it than galaxies, or larger ones.
        """
        path, most = os.path.abspath(os.path.expanduser(name)), 1000 + 10 * len(self)  # noqa: PTH100, PTH111
        files = (os.path.join(folder, file) for folder, _, found in os.walk(path) for file in found)  # noqa: PTH118
        files = [path] if os.path.isfile(path) else itertools.islice(files, most)  # noqa: PTH113
        sizes = [os.path.isfile(file) and os.path.getsize(file) for file in files]  # noqa: PTH113, PTH202
        if not 0 < len(sizes) < most or sum(sizes) > most << 24:
            raise UserError(
                f"--dataset {name}: no such file or folder, or one far too large for {len(self):,} galaxies"
            )
        return path


def galaxy_table(galaxies: Galaxies, rows: np.ndarray) -> pa.Table:
    """What is known of galaxies without a model, at (N,) int64 sample indices: the columns before `predicted_class`."""
    columns = [
        (field("row", pa.int64(), "row of the data set, from 0"), rows),
        (field("object_id", pa.string(), "name in the data set; the row if it has none"), _names(galaxies, rows)),
    ]
    for name, values, description in (("ra", galaxies.ra, "right ascension"), ("dec", galaxies.dec, "declination")):
        values = np.full(len(rows), np.nan) if values is None else values[rows]
        columns.append((field(name, pa.float64(), f"{description}, J2000", "deg"), values))
    if galaxies.label is not None:
        columns.append(class_column("label", "class in the data set", galaxies.label[rows], galaxies.class_names))
    extra = _renamed(galaxies.extra.take(rows), ["row", "object_id", "ra", "dec", "label"])
    table = beside(to_table(columns), extra)
    return table if galaxies.geometry is None else with_geometry(table, galaxies.geometry.take(rows))


def with_geometry(table: pa.Table, geometry: pa.Table) -> pa.Table:
    """Append the sizes of images and galaxies, as of `frame.geometry`."""
    return beside(_renamed(table, geometry.column_names), geometry)


def _names(galaxies: Galaxies, rows: np.ndarray) -> np.ndarray:
    """The column `object_id` of galaxies at sample indices: (N,) str; empty beyond the last one."""
    if galaxies.object_id is None:
        return rows.astype(str)
    return np.append(galaxies.object_id, "")[rows]


def add_predictions(
    galaxies: pa.Table,
    class_names: Sequence[str] = (),
    probabilities: np.ndarray | None = None,
    *,
    seeds: Sequence[int] = (),
    flag: np.ndarray | None = None,
    problem: np.ndarray | None = None,
    nan_fraction: np.ndarray | None = None,
    far_from_training: np.ndarray | None = None,
    embedding: np.ndarray | None = None,
) -> pa.Table:
    """The table of predictions of some galaxies.

    Args:
        galaxies: N rows, as of `galaxy_table`; the columns come first.
        class_names: of the classes; empty if none is predicted.
        probabilities: (S, N, classes) float64, of each classifier; None if no class is predicted.
        seeds: of the S classifiers, whose predictions get a column each; none if empty.
        flag: (N,) str, as `flags` gives it; None leaves the column out, as of the next two.
        problem: (N,) str, why an image cannot be read, or empty; None if all can.
        nan_fraction: (N,) float32, as of `Galaxies`; None leaves the column out.
        far_from_training: (N,) float32, as of `TrainingImages.distance`; None leaves the column out.
        embedding: (N, D) float.
    """
    readable = np.ones(len(galaxies), bool) if problem is None else problem == ""
    columns = []
    if len(class_names):
        mean = probabilities.mean(axis=0)
        total, expected = entropy(mean), entropy(probabilities).mean(axis=0)
        disagreement = (total - expected).clip(min=0) if len(probabilities) > 1 else np.full(len(mean), np.nan)
        codes = np.where(readable, mean.argmax(axis=1), -1)
        columns.append(class_column("predicted_class", "the most probable class", codes, class_names))
        numbers = [
            *zip(column_names(class_names), (f"probability of {name}" for name in class_names), mean.T, strict=True),
            ("entropy", "entropy of the probabilities in nats", total),
            ("disagreement", "mutual information of class and seed in nats", disagreement),
        ]
        for name, description, values in numbers:
            values = np.where(readable, values, np.nan).astype(np.float32)
            columns.append((field(name, pa.float32(), description), values))
        for seed, each in zip(seeds, probabilities if len(seeds) else (), strict=True):
            codes = np.where(readable, each.argmax(axis=1), -1)
            columns.append(class_column(f"{_SEED}{seed}", f"the same of seed {seed}", codes, class_names))
    if flag is not None:
        columns.append((field("flag", pa.string(), f"{', '.join(FLAGS)}, or no text"), flag))
    if problem is not None:
        columns.append((field("problem", pa.string(), "why the image cannot be read"), problem))
    if nan_fraction is not None:
        columns.append((field("nan_fraction", pa.float32(), "fraction of the pixels that are NaN"), nan_fraction))
    if far_from_training is not None:
        description = "distance from the images that the model was trained on; 1 % of such are above 1"
        values = np.where(readable, far_from_training, np.float32(np.nan))
        columns.append((field("far_from_training", pa.float32(), description), values))
    if embedding is not None:
        values = np.where(readable[:, None], embedding, embedding.dtype.type(np.nan))
        columns.append(vector_column("embedding", "input of the first seed's head, or the encoder's features", values))
    added = to_table(columns)
    return beside(_renamed(galaxies, [*_OURS, *added.column_names]), added)


def class_column(
    name: str, description: str, codes: np.ndarray, class_names: Sequence[str]
) -> tuple[pa.Field, np.ndarray]:
    """A column of class names, from their (N,) integer codes; -1 gives an empty text."""
    return field(name, pa.string(), description), np.array([*class_names, ""], object)[codes]


def vector_column(name: str, description: str, values: np.ndarray) -> tuple[pa.Field, pa.Array]:
    """A column of (N, D) floats."""
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return field(name, array.type, description), array


def field(name: str, kind: pa.DataType, description: str, unit: str = "") -> pa.Field:
    """A column with its description and unit, which all formats keep."""
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, metadata=metadata)


def to_table(columns: Sequence[tuple[pa.Field, Any]]) -> pa.Table:
    """A table of columns and their values."""
    return pa.table([values for _, values in columns], pa.schema([column for column, _ in columns]))


def beside(left: pa.Table, right: pa.Table) -> pa.Table:
    """The columns of two tables with the same rows."""
    return pa.table([*left.columns, *right.columns], pa.schema([*left.schema, *right.schema]))


def _renamed(table: pa.Table, taken: Sequence[str]) -> pa.Table:
    """A table whose names suit FITS and CSV: on one line, without quotes, and none of `taken`, whatever their case."""
    used, names = {name.lower() for name in taken}, []
    for name in table.column_names:
        name = " ".join(name.replace('"', "'").split()) or "unnamed"
        while name.lower() in used or re.fullmatch(rf"{_SEED}\d+|({'|'.join(VECTORS)})_\d{{3,}}", name):
            name += "_input"
        used.add(name.lower())
        names.append(name)
    return table.rename_columns(names)


def column_names(class_names: Sequence[str]) -> list[str]:
    """Names of the probabilities' columns, as in `p_round_smooth`: ASCII, and unique."""
    names: list[str] = []
    for c, class_name in enumerate(class_names):
        ascii_only = unicodedata.normalize("NFKD", class_name).encode("ascii", "ignore").decode().lower()
        name = "p_" + (re.sub(r"[^a-z0-9]+", "_", ascii_only).strip("_") or f"class_{c}")
        while name in names:
            name += f"_{c}"
        names.append(name)
    return names


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column: (N,) numbers or str objects, or (N, D) float32 for a vector."""
    if pa.types.is_fixed_size_list(column.type):
        values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(column), column.type.list_size)
    return column.to_numpy()


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis. The mean's minus the members' mean is their disagreement.

    That difference is the mutual information between the class and the member (Houlsby et al. 2011, equation 2).
    """
    return -np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(float).tiny)), axis=-1)


def is_usable(flag: np.ndarray) -> np.ndarray:
    """Of the column `flag`, whether an image is neither unreadable nor blank: bool."""
    return ~np.isin(flag.astype(str), _LEFT_OUT)


def flags(
    statistics: np.ndarray,
    problem: np.ndarray,
    blank: np.ndarray,
    nan: np.ndarray | None = None,
    radius: np.ndarray | None = None,
    far_from_training: np.ndarray | None = None,
) -> np.ndarray:
    """The column `flag` of N galaxies, from `image_statistics` and `problem`, `blank`, `nan_fraction` of `Galaxies`.

    An image is saturated if more than 5 % of its values are 255, and `nan` if more than 5 % of its pixels are NaN;
    empty if nothing at its center stands out of the noise of its sky; far if `far_from_training` is above 1. What has
    no radius is in the frame of `--fit crop`.
    """
    peak, noise, saturated = (statistics[:, STATISTICS.index(name)] for name in ("peak", "noise", "saturated"))
    conditions = [
        *(problem != "", blank, np.zeros(len(blank), bool) if nan is None else nan > FLAGGED_FRACTION),
        *(saturated > FLAGGED_FRACTION, peak < _FLAT * noise.clip(1)),
        np.zeros(len(blank), bool) if far_from_training is None else far_from_training > 1,
        np.zeros(len(blank), bool) if radius is None else np.isnan(radius),
    ]
    return np.select(conditions, FLAGS, "")
