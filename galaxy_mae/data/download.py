"""The Galaxy10 DECaLS file, the cache folder, and the fingerprint of files.

Galaxy10 DECaLS is one HDF5 file of 2.7 GB. If it is not there, it is downloaded through astroNN, or from its record on
Zenodo if astroNN fails. It is moved to its final path once its checksum is right, so the file there is always complete.
If several jobs need it, a lock makes the others wait while one of them downloads it. astroNN imports TensorFlow, which
takes ten seconds and brings a second framework into the process, so only a child process imports it.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import atomic_file, locked, move_files, sha256, temporary_folder
from galaxy_mae.progress import stage

_DISK_RESERVE = 100_000_000  # bytes that a download leaves free on the disk
_CLOCK_TICK = 2 * 10**9  # nanoseconds: the coarsest times of file systems
_TIMEOUT = 60  # seconds without data after which a connection is closed


@dataclass(frozen=True)
class SurveyFile:
    """A published file and the places it can be downloaded from."""

    name: str
    size: int  # bytes
    sha256: str  # lower-case hexadecimal
    zenodo_url: str  # of the file itself; the part before "/files/" is the record's page
    astronn_origin: str | None = None  # the folder that astroNN downloads it from, ending in "/"


GALAXY10 = SurveyFile(
    name="Galaxy10_DECals.h5",
    size=2_735_267_419,
    sha256="19aefc477c41bb7f77ff07599a6b82a038dc042f889a111b0d4d98bb755c1571",
    zenodo_url="https://zenodo.org/records/10845026/files/Galaxy10_DECals.h5?download=1",
    astronn_origin="https://www.astro.utoronto.ca/~hleung/shared/Galaxy10/",
)


def cache_folder(writable: bool = False) -> Path:
    """Return the folder for everything that can be computed again, and create it if it is missing.

    It is `$GALAXY_MAE_CACHE`, else `$XDG_CACHE_HOME/galaxy_mae`, else `~/.cache/galaxy_mae`. It may be read-only as
    long as everything that is needed is in it. Raises a `UserError` if it cannot be created, or must be `writable` and
    is not.
    """
    own, general = os.environ.get("GALAXY_MAE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own or Path(general or "~/.cache", "galaxy_mae")).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}: set GALAXY_MAE_CACHE to another folder") from error
    if writable and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cache folder {folder} is not writable: set GALAXY_MAE_CACHE to another folder")
    return folder


def content_fingerprint(files: Sequence[Path], root: Path | None = None) -> str:
    """Return the SHA-256 of the contents of `files`.

    It is cached by their paths, inodes, sizes and times, as git does. The time of change (ctime) is among them: a tool
    may set that of modification. A file that changed shortly before it was hashed may have changed again within the
    same tick of the file system's clock, so it is hashed again.

    Args:
        files: one or more files.
        root: folder that the file names are relative to; None takes the bare file names. A folder that is moved keeps
            its fingerprint.

    Returns:
        64 lower-case hexadecimal digits. For one file without `root` it is the SHA-256 of the file, else the SHA-256 of
        one line "hash size name" per file, sorted by name, where the reason is in place of the hash of one of several
        files that cannot be read.

    Raises:
        UserError: the cache folder cannot be created, or the only file cannot be read.
        OSError: there is no such file.
    """
    files = [Path(file).absolute() for file in files]
    names = [str(file.relative_to(Path(root).absolute())) if root else file.name for file in files]
    states = [file.stat() if file.exists() else file.lstat() for file in files]  # of a link that is broken
    key = [(file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in states]
    key_hash = hashlib.sha256(repr((list(map(str, files)), key, root and names)).encode()).hexdigest()
    cache_path = cache_folder() / "fingerprints" / key_hash
    settled = max(state.st_ctime_ns for state in states) + _CLOCK_TICK
    with suppress(OSError, ValueError):  # not there, or damaged
        fingerprint = cache_path.read_text(encoding="utf-8")
        is_complete = len(bytes.fromhex(fingerprint)) == hashlib.sha256().digest_size
        if is_complete and cache_path.stat().st_mtime_ns > settled:
            return fingerprint
    started, is_one = time.time_ns(), root is None and len(files) == 1
    hashes, is_complete = [], True
    with stage("reading files (SHA-256)", len(files), "files") as progress:
        for file in files:
            progress.advance()
            try:
                hashes.append(sha256(file))
            except OSError as error:
                if is_one:
                    fix = "check its permissions and disk"
                    raise UserError(f"{file}: cannot be read ({error.strerror}): {fix}") from error
                hashes.append(str(error.strerror))  # what reads it says so, too
                is_complete = False
    fingerprint = hashes[0]
    if not is_one:
        rows = sorted(zip(names, files, states, hashes, strict=True))
        lines = [f"{file_hash} {state.st_size} {name}\n" for name, _, state, file_hash in rows]
        fingerprint = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()
    if not is_complete:  # it may be readable again without a change
        return fingerprint
    with suppress(OSError), atomic_file(cache_path) as tmp_path:  # of a read-only or full cache, computed again
        tmp_path.write_text(fingerprint, encoding="utf-8")
        os.utime(tmp_path, ns=(started, started))
    return fingerprint


def has_galaxy10(survey: SurveyFile = GALAXY10) -> bool:
    """Whether `find_galaxy10` needs no download."""
    return bool(os.environ.get("GALAXY10_H5")) or _is_official(_target(survey), survey)


def find_galaxy10(survey: SurveyFile = GALAXY10) -> Path:
    """Return the verified official file: `$GALAXY10_H5`, else astroNN's cache, else downloaded into astroNN's cache.

    Raises:
        UserError: `$GALAXY10_H5` is not the official file, every download failed, or the disk has too little space.
    """
    if own := os.environ.get("GALAXY10_H5"):
        if not _is_official(path := Path(own).expanduser(), survey):
            fix = "correct or unset the variable, or pass a file of your own with --dataset PATH"
            raise UserError(f"GALAXY10_H5: {path} is not there, or not the official {survey.name}: {fix}")
        return path
    target = _target(survey)
    try:
        if not _is_official(target, survey):
            cache_folder(writable=True)  # an unwritable cache folder should fail before the download, not after it
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


def _is_official(path: Path, survey: SurveyFile) -> bool:
    is_complete = path.is_file() and path.stat().st_size == survey.size
    return is_complete and content_fingerprint([path]) == survey.sha256


def _download(target: Path, survey: SurveyFile) -> None:
    """Put a verified file at `target`, or raise `UserError` and leave `target` as it is. Called with the lock held."""
    needed, free = survey.size + _DISK_RESERVE, shutil.disk_usage(target.parent).free
    if free < needed:
        space = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        raise UserError(f"{target}: {space}: free some space, or set GALAXY10_H5 to another copy")
    failures = []
    for name, source in {"astroNN": _from_astronn, "Zenodo": _from_zenodo}.items():
        if name == "astroNN" and not survey.astronn_origin:
            continue
        _log(f"Downloading {survey.name} ({survey.size / 1e9:.1f} GB) through {name}")
        with temporary_folder(target.parent) as staging:
            try:
                staged = source(survey, staging)
            except ValueError as failure:
                _log(f"Download of {survey.name} failed: {name} ({failure}).")
                failures.append(f"{name} ({failure})")
                continue
            move_files(staged.parent, target.parent)
        _log(f"{survey.name} is downloaded and verified: {target}")
        return
    failed = f"{survey.name} could not be downloaded from {' or from '.join(failures)}"
    fix = f"put it at {target}, or set GALAXY10_H5 to its path"
    raise UserError(f"{failed}: download it by hand from {survey.zenodo_url.partition('/files/')[0]} and {fix}")


def _from_zenodo(survey: SurveyFile, staging: Path) -> Path:
    """Download the file into `staging` with pooch, which verifies it. Raises ValueError with the reason."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    registry, urls = {survey.name: survey.sha256}, {survey.name: survey.zenodo_url}
    fetcher = pooch.create(staging, "", registry=registry, urls=urls, retry_if_failed=1)
    # pooch flushes every chunk: its default of 1 KiB would mean 2.7 million writes.
    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 20, timeout=_TIMEOUT)
    try:
        return Path(fetcher.fetch(survey.name, downloader=downloader))
    except requests.RequestException as error:
        raise ValueError(first_line(error)[:300]) from error
    except ValueError as error:
        raise ValueError("wrong checksum, twice") from error


def _from_astronn(survey: SurveyFile, staging: Path) -> Path:
    """Download the file into `staging` with astroNN in a child process, and verify it. Raises as `_from_zenodo`."""
    if find_spec("astroNN") is None:
        raise ValueError('it is not installed: pip install "astroNN>=1.1" "setuptools<81"')
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "galaxy_mae.data.download", staging, survey.astronn_origin],
        cwd=Path(__file__).resolve().parents[2],  # where `-m` finds this package
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # TensorFlow would reserve all of a GPU's memory
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise ValueError((child.stdout.splitlines() or [f"exit status {child.returncode}"])[-1])
    staged = staging / "datasets" / survey.name
    if not staged.is_file() or sha256(staged) != survey.sha256:
        raise ValueError("wrong checksum")
    return staged


def _run_astronn(staging: str, origin: str) -> None:
    """Download into `staging`/datasets with astroNN 1.1.0, in the child process.

    If it fails, the last line on standard output says why. Comments marked "bug" are bugs in astroNN.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C also reaches the parent, which reports it
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    socket.setdefaulttimeout(_TIMEOUT)  # bug: its `urlretrieve` has no timeout
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no environment variable silences TensorFlow's start-up lines
    try:
        import astroNN.datasets.galaxy10 as astronn

        os.dup2(stderr, 2)
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


def _log(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    _run_astronn(*sys.argv[1:])
