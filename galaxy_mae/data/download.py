"""Find, download and verify the Galaxy10 DECaLS file.

Galaxy10 DECaLS is one HDF5 file of 2.7 GB. `find_galaxy10` takes it from `$GALAXY10_H5` or from astroNN's cache. If it
is in neither place, it is downloaded through astroNN, or from its record on Zenodo if astroNN fails. A file is only
accepted if its SHA-256 is right.

A download is written to a staging directory beside its final path and moved there once its checksum is right. The file
at the final path is therefore always complete, even if a run is killed during the download. If several jobs need the
file, a lock makes the others wait while one of them downloads it.

astroNN imports TensorFlow, which takes ten seconds and brings a second framework into the process, so only a child
process imports it. Hashing 2.7 GB takes seconds as well, so `content_fingerprint` caches its results by path, size and
modification time.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, locked, move_files, remove_leftovers, temporary_folder

_PROGRESS_BAR_MIN_BYTES = 200_000_000  # hashing this much takes about a second
_DISK_RESERVE = 100_000_000  # bytes that a download leaves free on the disk
_TIMEOUT = 60  # seconds without data after which a connection is closed


@dataclass(frozen=True)
class SurveyFile:
    """A published file and the places it can be downloaded from."""

    name: str
    size: int  # bytes
    sha256: str  # lower-case hexadecimal
    zenodo_url: str  # of the file itself; the part before "/files/" is the record's page
    astronn_origin: str | None  # the folder that astroNN downloads it from, ending in "/"; None: astroNN is not used


GALAXY10 = SurveyFile(
    name="Galaxy10_DECals.h5",
    size=2_735_267_419,
    sha256="19aefc477c41bb7f77ff07599a6b82a038dc042f889a111b0d4d98bb755c1571",
    zenodo_url="https://zenodo.org/records/10845026/files/Galaxy10_DECals.h5?download=1",
    astronn_origin="https://www.astro.utoronto.ca/~hleung/shared/Galaxy10/",
)


def cache_folder() -> Path:
    """Return the folder for everything that can be computed again, and create it if it is missing.

    It is `$GALAXY_MAE_CACHE`, else `$XDG_CACHE_HOME/galaxy_mae`, else `~/.cache/galaxy_mae`.

    It may be read-only as long as everything that is needed is in it.

    Raises:
        UserError: the folder cannot be created.
    """
    own, general = os.environ.get("GALAXY_MAE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own or Path(general or "~/.cache", "galaxy_mae")).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}: set GALAXY_MAE_CACHE to another folder") from error
    return folder


def writable_cache_folder() -> Path:
    """Return `cache_folder()`.

    Raises:
        UserError: it cannot be created or written to.
    """
    folder = cache_folder()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cache folder {folder} is not writable: set GALAXY_MAE_CACHE to another folder")
    return folder


def content_fingerprint(files: Sequence[Path], root: Path | None = None) -> str:
    """Return the SHA-256 of the contents of `files`. It is cached, so a second call does not read the files.

    Args:
        files: one or more files.
        root: folder that the file names are relative to; None takes the bare file names. A folder that is moved keeps
            its fingerprint.

    Returns:
        64 lower-case hexadecimal digits. For one file without `root` it is the SHA-256 of the file, else the SHA-256 of
        one line "hash size name" per file, sorted by name.

    Raises:
        UserError: the cache folder cannot be created.
        OSError: a file cannot be read.
    """
    files = [Path(file).absolute() for file in files]
    names = [str(file.relative_to(Path(root).absolute())) if root else file.name for file in files]
    has_names = root is not None or len(files) > 1
    cache_path = _hash_cache_path(files, names if has_names else [])
    if cached := _stored_hash(cache_path):
        return cached
    hashes = _sha256(files)
    fingerprint = hashes[0]
    if has_names:
        rows = sorted(zip(names, files, hashes, strict=True))
        lines = [f"{digest} {file.stat().st_size} {name}\n" for name, file, digest in rows]
        fingerprint = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()
    _store_hash(cache_path, fingerprint)
    return fingerprint


def _hash_cache_path(files: Sequence[Path], names: Sequence[str]) -> Path:
    """Return where the fingerprint of these files is cached, which depends on their sizes and modification times.

    `names` are those in the fingerprint; the fingerprint of one file has none.
    """
    key = []
    for file in files:
        state = file.stat()
        key.append((os.fsencode(file).hex(), state.st_size, state.st_mtime_ns))
    hashed_names = [os.fsencode(name).hex() for name in names]
    return cache_folder() / "fingerprints" / hashlib.sha256(json.dumps([key, hashed_names]).encode()).hexdigest()


def _store_hash(cache_path: Path, fingerprint: str) -> None:
    """Cache a fingerprint. If the cache is read-only or full, it is computed again the next time."""
    remove_leftovers(cache_path.parent)
    with suppress(OSError), atomic_file(cache_path) as tmp_path:
        tmp_path.write_text(f"{fingerprint} {_hash_checksum(cache_path, fingerprint)}\n")


def _stored_hash(cache_path: Path) -> str | None:
    """Return a cached fingerprint, or None if there is none or its entry was damaged or edited."""
    try:
        fingerprint, checksum = cache_path.read_text().split()
    except (OSError, ValueError):
        return None
    return fingerprint if checksum == _hash_checksum(cache_path, fingerprint) else None


def _hash_checksum(cache_path: Path, fingerprint: str) -> str:
    return hashlib.sha256(f"{cache_path.name} {fingerprint}".encode()).hexdigest()


def _sha256(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file. Large files get one progress bar for all of them."""
    total = sum(file.stat().st_size for file in files)
    hashes = []
    with tqdm(total=total, desc="SHA-256", unit="B", unit_scale=True, disable=total < _PROGRESS_BAR_MIN_BYTES) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
            hashes.append(digest.hexdigest())
    return hashes


def has_galaxy10(survey: SurveyFile = GALAXY10) -> bool:
    """Whether `find_galaxy10` needs no download."""
    return bool(os.environ.get("GALAXY10_H5")) or _is_official(_target(survey), survey)


def find_galaxy10(survey: SurveyFile = GALAXY10) -> Path:
    """Return the verified official file: `$GALAXY10_H5`, else astroNN's cache, else downloaded into astroNN's cache.

    Raises:
        UserError: `$GALAXY10_H5` is not the official file, every download failed, or the disk has too little space.
    """
    if path := os.environ.get("GALAXY10_H5"):
        return _check_own_copy(Path(path).expanduser(), survey)
    target = _target(survey)
    try:
        if not _is_official(target, survey):
            writable_cache_folder()  # an unwritable cache folder should fail before the download, not after it
            target.parent.mkdir(parents=True, exist_ok=True)
            waiting = f"Another process is downloading {target.name}: waiting for it."
            with locked(Path(f"{target}.lock"), before_waiting=lambda: _log(waiting)):
                if not _is_official(target, survey):  # another process may have downloaded it in the meantime
                    _download(target, survey)
    except OSError as error:  # a full disk, an unwritable home
        fix = f"make that folder writable, with {survey.size / 1e9:.1f} GB free, or set GALAXY10_H5 to another copy"
        raise UserError(f"{target}: {error.strerror or error}: {fix}") from error
    return target


def _target(survey: SurveyFile) -> Path:
    return Path("~/.astroNN/datasets", survey.name).expanduser().absolute()


def _check_own_copy(path: Path, survey: SurveyFile) -> Path:
    if not path.is_file():
        raise UserError(f"GALAXY10_H5: there is no file {path}: correct the variable, or unset it to download the file")
    if not _is_official(path, survey):
        fix = "unset the variable, or pass a file of your own with --dataset PATH"
        raise UserError(f"GALAXY10_H5: {path} is not the official {survey.name} (other size or SHA-256): {fix}")
    return path


def _is_official(path: Path, survey: SurveyFile) -> bool:
    return _is_complete(path, survey) and content_fingerprint([path]) == survey.sha256


def _is_complete(path: Path, survey: SurveyFile) -> bool:
    return path.is_file() and path.stat().st_size == survey.size


class _SourceError(Exception):
    """The download from one source failed. The message names the source and the cause in a few words."""


def _download(target: Path, survey: SurveyFile) -> None:
    """Put a verified file at `target`, or raise `UserError` and leave `target` as it is. Called with the lock held."""
    if target.exists():
        _log(f"{target} is not the official file (other size or SHA-256): downloading it again.")
    remove_leftovers(target.parent, recursive=False)
    free = shutil.disk_usage(target.parent).free
    if free < survey.size + _DISK_RESERVE:
        needed = f"{(survey.size + _DISK_RESERVE) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        raise UserError(f"{target}: {needed}: free some space, or set GALAXY10_H5 to another copy")
    failures = []
    for source in (_from_astronn, _from_zenodo) if survey.astronn_origin else (_from_zenodo,):
        with temporary_folder(target.parent) as staging:
            try:
                staged = source(survey, staging)
            except _SourceError as failure:
                _log(f"Download of {survey.name} failed: {failure}.")
                failures.append(str(failure))
                continue
            move_files(staged.parent, target.parent)
        _store_hash(_hash_cache_path([target], []), survey.sha256)
        _log(f"{survey.name} is downloaded and verified: {target}")
        return
    record_page = survey.zenodo_url.partition("/files/")[0]
    raise UserError(
        f"{survey.name} could not be downloaded from {' or from '.join(failures)}: download it by hand from "
        f"{record_page} and put it at {target}, or set GALAXY10_H5 to its path"
    )


def _from_zenodo(survey: SurveyFile, staging: Path) -> Path:
    """Download the file into `staging` with pooch, which verifies it and retries a failed attempt once."""
    import pooch
    import requests

    _log(f"Downloading {survey.name} ({survey.size / 1e9:.1f} GB) from {survey.zenodo_url}")
    pooch.get_logger().setLevel("WARNING")  # at INFO it repeats the line above on three lines
    fetcher = pooch.create(
        path=staging,
        base_url="",
        registry={survey.name: survey.sha256},
        urls={survey.name: survey.zenodo_url},
        retry_if_failed=1,
    )

    def download(url: str, file: str, fetcher: "pooch.Pooch") -> None:
        # pooch does not close a progress bar of its own after a failure.
        with tqdm(desc=survey.name, total=survey.size, unit="B", unit_scale=True) as bar:
            # pooch flushes every chunk: its default of 1 KiB would mean 2.7 million writes.
            pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=_TIMEOUT)(url, file, fetcher)

    try:
        return Path(fetcher.fetch(survey.name, downloader=download))
    except requests.HTTPError as error:
        raise _SourceError(f"Zenodo (HTTP status {error.response.status_code})") from error
    except requests.RequestException as error:  # its message is several lines long
        raise _SourceError(f"Zenodo (connection failed or broken: {type(error).__name__})") from error
    except ValueError as error:
        raise _SourceError("Zenodo (wrong checksum, twice)") from error


def _from_astronn(survey: SurveyFile, staging: Path) -> Path:
    """Download the file into `staging` with astroNN in a child process, and verify it."""
    _log(f"Downloading {survey.name} ({survey.size / 1e9:.1f} GB) through astroNN, from {survey.astronn_origin}")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "galaxy_mae.data.download", staging, survey.astronn_origin],
        cwd=Path(__file__).resolve().parents[2],  # where `-m` finds this package
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # TensorFlow would reserve all of a GPU's memory
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        lines = child.stdout.splitlines() or [f"exit status {child.returncode}"]
        raise _SourceError(f"astroNN ({lines[-1]})")
    staged = staging / "datasets" / survey.name
    if not _is_complete(staged, survey) or _sha256([staged]) != [survey.sha256]:
        raise _SourceError("astroNN (wrong checksum)")
    return staged


def _run_astronn(staging: str, origin: str) -> None:
    """Download into `staging`/datasets with astroNN 1.1.0, in the child process.

    If it fails, the last line on standard output says why. Comments marked "bug" are bugs in astroNN.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C also reaches the parent, which reports it
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    socket.setdefaulttimeout(_TIMEOUT)  # bug: its `urlretrieve` has no timeout
    try:
        with _silent_stderr():
            import astroNN.datasets.galaxy10 as astronn
        patches = {
            "_G10_ORIGIN": origin,
            "astroNN_CACHE_DIR": staging,  # bug: it downloads directly to the final path
            # Bugs: after a wrong checksum it calls itself again without end, and it finally reads all images (3.5 GB)
            # into memory. `filehash` is called right after the download and before both, so it ends the child process.
            "filehash": lambda *_arguments, **_options: sys.exit(0),
        }
        for name, value in patches.items():
            getattr(astronn, name)  # fail if another version lacks the name: it could write anywhere
            setattr(astronn, name, value)
        astronn.load_data()
    except Exception as error:
        print("\n" + " ".join(f"{type(error).__name__}: {error}".split())[:200])
        sys.exit(1)


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended, because nothing waits for the file then."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Suppress what C++ code writes to standard error. No environment variable silences TensorFlow's start-up lines."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)


def _log(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    _run_astronn(*sys.argv[1:])
