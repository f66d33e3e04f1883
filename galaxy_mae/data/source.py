"""What somebody brings: a table of galaxies with an image each, in one of many forms.

A kind of input is a subclass of `Source`, and a line in `kinds.KINDS`, which recognizes it. It checks
what a file declares before it reads it, so that a damaged or hostile file ends in one line, without minutes of work or
gigabytes of memory. It reads nothing but what its fingerprint covers: what a link or URL points to can change while the
cached pixels stay.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from galaxy_mae.data.columns import parse_columns
from galaxy_mae.data.download import content_fingerprint
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.frame import Frame
from galaxy_mae.data.images import Encoded
from galaxy_mae.errors import UserError

# Names of folders and of Parquet shards, in lower case, that tell splits. The test split is the last one in the table.
_SPLITS = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "test": 2, "testing": 2}
TEST = 2
# Of tables that may name image files.
TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".ecsv", ".vot", ".votable", ".xml")
_SHARD = re.compile(rf"({'|'.join(_SPLITS)})(-\d+(-of-\d+(-[\da-f]+)?)?)?\.(parquet|tar)")


@dataclass(frozen=True)
class Options:
    """What a source may depend on, and the flag that named it, as the arguments of `cache.open_galaxies`."""

    image_size: int | None = None
    stretch: Stretch = Stretch()  # noqa: RUF009 (frozen)
    frame: Frame = Frame()  # noqa: RUF009 (frozen)
    skip_unreadable: bool = False
    flag: str = "--dataset"
    columns: tuple[str, ...] = ()

    @property
    def image_column(self) -> str | None:
        """The one that `--columns` names."""
        return parse_columns(self.columns).get("image")


class Source:
    """N galaxies. Creating one reads nothing; its members raise a `UserError` for what cannot be read.

    Attributes:
        name, path: the value of `--dataset`.
        class_names: names of the classes of integer labels, if all sources of this kind have the same.
        predefined_test: (N,) bool, true in the source's own test split; None if it has no splits.
        file_names: N names for the galaxies where no column names them: of their image files; or None.
        takes_stretch: whether images may be fluxes, so that the stretch is part of the fingerprint.
        notes: what is there and is not read, or not as one may expect; each is logged after `where` and a colon.
        suffixes: of its files, in lower case; a name that ends with one is never taken for a Hub id.
    """

    class_names: tuple[str, ...] = ()
    predefined_test: np.ndarray | None = None
    file_names: list[str] | None = None
    takes_stretch: bool = False
    notes: Sequence[str] = ()
    suffixes: tuple[str, ...] = ()

    def __init__(self, name: str, path: Path, options: Options):
        self.name, self.path, self.options = name, path, options

    @cached_property
    def files(self) -> list[Path]:
        """All files of a folder, or the file itself."""
        return files_in_folder(self.where, self.path) if self.path.is_dir() else [self.path]

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits, of the content of everything that is read, and of the options that matter."""
        content = content_fingerprint(self.files, root=self.path if self.path.is_dir() else None)
        if not self.takes_stretch:
            return content
        return hashlib.sha256(f"{content} {self.options.stretch}".encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.file_names)

    @property
    def table(self) -> pa.Table:
        """What is known of the galaxies but their images, N rows. `columns.read_columns` finds what it knows in it."""
        ...

    def images(self) -> Iterator[Sequence[Encoded]]:
        """Yield the images in the order of the rows, in batches of the source's choice, of at most some megabytes."""
        ...

    @property
    def where(self) -> str:
        """How messages begin."""
        return f"{self.options.flag} {self.name}"


def files_in_folder(where: str, folder: Path) -> list[Path]:
    """All files of a folder that are not hidden, sorted, with links to files, which may be broken.

    Raises:
        UserError: there is none, a folder in it cannot be read, or is a link: changes in it would not be noticed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{where}: {error.filename}: {error.strerror}: its files would be missing") from error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if linked := next((path for name in folders if (path := Path(parent, name)).is_symlink()), None):
            fix = "link the files in it one by one, or copy them"
            raise UserError(f"{where}: {linked} is a link to a folder, in which changes would not be noticed: {fix}")
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]
    if not files:
        raise UserError(f"{where}: the folder is empty; it should contain Parquet files or images")
    return sorted(files, key=str)


def splits_by_name(names: Sequence[str]) -> tuple[list[int], bool, list[str]]:
    """The splits of the files of a folder, which only whole names tell: a galaxy may be called `NGC1365_test`.

    They are told by folders directly in it (train, training, valid, validation, val, test, testing, in any case), and
    by Parquet files like `train-00000-of-00004`, `train-0` or `train`, in any folder.

    Args:
        names: of the files, relative to the folder.

    Returns:
        Of each file 0 (training), 1 (validation) or `TEST`; whether folders told any; and `Source.notes`.
    """
    places = [Path(name).parts for name in names]
    by_folder = [_SPLITS.get(parts[0].lower()) if len(parts) > 1 else None for parts in places]
    shards = [_SHARD.fullmatch(parts[-1].lower()) if parts else None for parts in places]
    by_name = [_SPLITS[match[1]] if match else None for match in shards]
    splits = [name if folder is None else folder for folder, name in zip(by_folder, by_name, strict=True)]
    others = {parts[0] for parts, split in zip(places, splits, strict=True) if split is None and parts}
    notes, found = [], [split or 0 for split in splits]
    if any(split is not None for split in splits):
        counts = "{} training, {} validation, {} test".format(*(found.count(split) for split in (0, 1, TEST)))
        notes.append(f"names of folders or shards tell the splits of its files: {counts}")
    if notes and others:
        listed = ", ".join(map(text_of_path, sorted(others)[:5]))[:200]
        notes[0] += f"; what is beside them is training data: {listed}"
    return found, any(split is not None for split in by_folder), notes


def not_read(files: Sequence[Path], why: str) -> list[str]:
    """`Source.notes` of the files of a folder that are not read."""
    if not files:
        return []
    examples = ", ".join(text_of_path(file.name) for file in files[:5])[:200]
    is_table = any(file.name.lower().endswith(TABLE_SUFFIXES) for file in files)
    fix = "; a table of the images is metadata.csv with a column file_name, or itself the data set" * is_table
    return [f"{len(files)} files are not read, {why} ({examples}){fix}"]


def text_of_path(path: str | Path) -> str:
    """A path as text: its bytes that are not UTF-8 as Python's escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
