"""The survey file: looked for where it may lie already, fetched only when it is due, trusted only by its SHA-256.

Galaxy10 DECaLS is one HDF5 file of 2.7 GB. `find_galaxy10` takes it from `$GALAXY10_H5`, else from astroNN's cache,
else it downloads it: through astroNN, whose page may be gone, then from its record on Zenodo. A download grows in a
staging folder beside its final path and is renamed onto that path only once its checksum is right, so that whatever
lies there is whole, even if a run is killed half-way; a lock lets one of several jobs download while the others wait.
astroNN brings TensorFlow along, ten seconds and a second framework: only a child process ever imports it. Hashing
2.7 GB takes seconds as well, so `content_fingerprint` remembers its results by path, size and time of change.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from galaxy_mae.errors import UserError

_LONG_TO_HASH = 200_000_000  # bytes; what takes longer than about a second shows a progress bar
_SPARE = 100_000_000  # bytes that a download leaves free on the disk
_SILENCE = 60  # seconds without a byte after which a connection counts as dead


@dataclass(frozen=True)
class SurveyFile:
    """A published file: what it is, and where it is to be had."""

    name: str
    size: int  # bytes
    sha256: str  # lower-case hexadecimal
    zenodo_url: str  # the file itself; what stands before "/files/" is the record's page
    astronn_origin: str | None  # the folder that astroNN fetches it from, ending in "/"; None: astroNN is not asked


GALAXY10 = SurveyFile(
    name="Galaxy10_DECals.h5",
    size=2_735_267_419,
    sha256="19aefc477c41bb7f77ff07599a6b82a038dc042f889a111b0d4d98bb755c1571",
    zenodo_url="https://zenodo.org/records/10845026/files/Galaxy10_DECals.h5?download=1",
    astronn_origin="https://www.astro.utoronto.ca/~hleung/shared/Galaxy10/",
)


def cache_folder() -> Path:
    """The folder of everything that may be computed again, created if missing.

    `$GALAXY_MAE_CACHE`, else `$XDG_CACHE_HOME/galaxy_mae`, else `~/.cache/galaxy_mae`.
    Raises `UserError` if it cannot be created or written to.
    """
    own, general = os.environ.get("GALAXY_MAE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own or Path(general or "~/.cache", "galaxy_mae")).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}: set GALAXY_MAE_CACHE to another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cache folder {folder} is not writable: set GALAXY_MAE_CACHE to another folder")
    return folder


def content_fingerprint(files: Sequence[Path], root: Path | None = None) -> str:
    """SHA-256 of the contents of `files`, in lower-case hexadecimal; remembered, so the second call reads none of them.

    Of one file it is the file's own SHA-256; of several the SHA-256 over one line "hash size name" for each, sorted by
    name, where the name is told from `root` (without a root: the bare file name), so that a moved folder keeps it.
    Raises `UserError` for an unwritable cache folder, `OSError` for a file that cannot be read.
    """
    files = [Path(file).absolute() for file in files]
    names = [str(file.relative_to(Path(root).absolute())) if root else file.name for file in files]
    memory = _memory(files, names)
    if memory.is_file() and re.fullmatch(r"[0-9a-f]{64}", known := memory.read_text().strip()):
        return known
    hashes = _sha256(files)
    if len(files) == 1:
        fingerprint = hashes[0]
    else:
        rows = sorted(zip(names, files, hashes, strict=True))
        lines = [f"{digest} {file.stat().st_size} {name}\n" for name, file, digest in rows]
        fingerprint = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()
    _remember(memory, fingerprint)
    return fingerprint


def _memory(files: Sequence[Path], names: Sequence[str]) -> Path:
    """Where the fingerprint of these files, as they are now, is remembered: a changed file has another place."""
    states = [(file, file.stat()) for file in files]
    key = [(os.fsencode(file).hex(), state.st_size, state.st_mtime_ns) for file, state in states]
    shown = [os.fsencode(name).hex() for name in names] if len(files) > 1 else []  # one file's name is not hashed
    return cache_folder() / "fingerprints" / hashlib.sha256(json.dumps([key, shown]).encode()).hexdigest()


def _remember(memory: Path, fingerprint: str) -> None:
    memory.parent.mkdir(exist_ok=True)
    aside = memory.with_name(f"{memory.name}.{uuid.uuid4().hex}")
    aside.write_text(fingerprint + "\n")
    aside.replace(memory)


def _sha256(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file, with one progress bar over all of them if they are large."""
    total = sum(file.stat().st_size for file in files)
    hashes = []
    with tqdm(total=total, desc="SHA-256", unit="B", unit_scale=True, disable=total < _LONG_TO_HASH) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
            hashes.append(digest.hexdigest())
    return hashes


def find_galaxy10(survey: SurveyFile = GALAXY10) -> Path:
    """The verified official file: `$GALAXY10_H5`, else astroNN's cache, else downloaded into astroNN's cache.

    Raises `UserError` if `$GALAXY10_H5` is not that file, if no source delivers it, or if there is no room for it.
    """
    if given := os.environ.get("GALAXY10_H5"):
        return _given(Path(given).expanduser(), survey)
    cache_folder()  # an unwritable one is better told now than after the download
    target = Path("~/.astroNN/datasets", survey.name).expanduser().absolute()
    try:
        if not _is_official(target, survey):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target):
                if not _is_official(target, survey):  # unless another process fetched it while this one waited
                    _download(target, survey)
    except OSError as error:  # a full disk, an unwritable home
        mend = f"make that folder writable, with {survey.size / 1e9:.1f} GB free, or set GALAXY10_H5 to another copy"
        raise UserError(f"{target}: {error.strerror or error}: {mend}") from error
    return target


def _given(path: Path, survey: SurveyFile) -> Path:
    if not path.is_file():
        raise UserError(f"GALAXY10_H5: there is no file {path}: mend the variable, or unset it to download the file")
    if not _is_official(path, survey):
        own = "a file of your own is given as --dataset PATH"
        raise UserError(f"GALAXY10_H5: {path} is not the official {survey.name} (other size or SHA-256): {own}")
    return path


def _is_official(path: Path, survey: SurveyFile) -> bool:
    return _is_whole(path, survey) and content_fingerprint([path]) == survey.sha256


def _is_whole(path: Path, survey: SurveyFile) -> bool:
    return path.is_file() and path.stat().st_size == survey.size


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the download's lock. The system frees it when its holder dies, however that comes about."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _say(f"Another process is fetching {target.name}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _SourceFailed(Exception):
    """One source did not deliver the file; the message says which and why, in a few words."""


def _download(target: Path, survey: SurveyFile) -> None:
    """Put a verified file at `target` or raise `UserError`; until then what lies there stays. Called under the lock."""
    if target.exists():
        _say(f"{target} is not the official file (other size or SHA-256): it is downloaded afresh.")
    staging_prefix = f".{survey.name}.part-"
    for left_over in target.parent.glob(f"{staging_prefix}*"):  # of killed runs: a live one would hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < survey.size + _SPARE:
        needed = f"{(survey.size + _SPARE) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        raise UserError(f"{target}: {needed}: make room, or set GALAXY10_H5 to another copy")
    causes = []
    for source in (_from_astronn, _from_zenodo) if survey.astronn_origin else (_from_zenodo,):
        with tempfile.TemporaryDirectory(prefix=staging_prefix, dir=target.parent) as staging:
            try:
                staged = source(survey, Path(staging))
            except _SourceFailed as failure:
                _say(f"No {survey.name} from {failure}.")
                causes.append(str(failure))
                continue
            staged.chmod(0o644)  # pooch's files are their owner's alone
            staged.replace(target)
        _remember(_memory([target], [target.name]), survey.sha256)
        _say(f"{survey.name} is verified and lies at {target}")
        return
    by_hand = f"download it by hand from {survey.zenodo_url.partition('/files/')[0]}"
    raise UserError(
        f"{survey.name} could not be downloaded from {', nor from '.join(causes)}: {by_hand} "
        f"and put it at {target}, or set GALAXY10_H5 to where it lies"
    )


def _from_zenodo(survey: SurveyFile, staging: Path) -> Path:
    """The file, fetched into `staging` and verified by pooch, which tries a failed download or checksum once more."""
    _say(f"Downloading {survey.name} ({survey.size / 1e9:.1f} GB) from {survey.zenodo_url}")
    pooch.get_logger().setLevel("WARNING")  # it would tell the same again, over three lines
    shelf = pooch.create(
        path=staging,
        base_url="",
        registry={survey.name: survey.sha256},
        urls={survey.name: survey.zenodo_url},
        retry_if_failed=1,
    )

    def fetch(url: str, file: str, shelf: pooch.Pooch) -> None:
        with tqdm(desc=survey.name, total=survey.size, unit="B", unit_scale=True) as bar:  # pooch leaves its own open
            # pooch flushes every chunk: its default of 1 KiB would mean 2.7 million writes
            pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=_SILENCE)(url, file, shelf)

    try:
        return Path(shelf.fetch(survey.name, downloader=fetch))
    except requests.HTTPError as error:
        raise _SourceFailed(f"Zenodo (HTTP status {error.response.status_code})") from error
    except requests.RequestException as error:  # its own text runs over several lines
        raise _SourceFailed(f"Zenodo (no connection, or a broken one: {type(error).__name__})") from error
    except ValueError as error:
        raise _SourceFailed("Zenodo (wrong checksum, twice)") from error


def _from_astronn(survey: SurveyFile, staging: Path) -> Path:
    """The file, fetched into `staging` by astroNN's own `load_galaxy10` in a child process, and verified here."""
    _say(f"Downloading {survey.name} ({survey.size / 1e9:.1f} GB) through astroNN, from {survey.astronn_origin}")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "galaxy_mae.download", staging, survey.astronn_origin],
        cwd=Path(__file__).resolve().parents[1],  # where `-m` finds this package
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # TensorFlow takes a GPU's whole memory
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        said = child.stdout.splitlines() or [f"exit status {child.returncode}"]
        raise _SourceFailed(f"astroNN ({said[-1]})")
    staged = staging / "datasets" / survey.name
    if not _is_whole(staged, survey) or _sha256([staged]) != [survey.sha256]:
        raise _SourceFailed("astroNN (wrong checksum)")
    return staged


def _run_astronn(staging: str, origin: str) -> None:
    """The child process: astroNN 1.1.0 downloads into `staging`/datasets; why it failed is the last line on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the parent too, and the parent tells of it
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    socket.setdefaulttimeout(_SILENCE)  # defect: its `urlretrieve` has no timeout and waits for ever
    try:
        with _silent_stderr():
            import astroNN.datasets.galaxy10 as astronn
        repairs = {
            "_G10_ORIGIN": origin,
            "astroNN_CACHE_DIR": staging,  # defect: it downloads straight onto the final path
            # defects: on a wrong checksum it calls itself again without end, and at last it reads all images, 3.5 GB,
            # into memory. Both come after the download, as does this call: there the child ends, its work done.
            "filehash": lambda *_arguments, **_options: sys.exit(0),
        }
        for name, value in repairs.items():
            getattr(astronn, name)  # another version may lack it, and must not write where it likes
            setattr(astronn, name, value)
        astronn.load_data()
    except Exception as error:
        print("\n" + " ".join(f"{type(error).__name__}: {error}".split())[:200])
        sys.exit(1)


def _end_with_parent(parent: int) -> None:
    """End this process once its parent is dead: nobody waits for the file then."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide what C++ code writes to standard error: TensorFlow's start-up lines heed no variable."""
    shown, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    _run_astronn(*sys.argv[1:])
