"""Finding, downloading and verifying the survey file, with a real HTTP server on this machine."""

import dataclasses
import hashlib
import importlib.util
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from galaxy_mae.data import download
from galaxy_mae.data.download import SurveyFile, cache_folder, content_fingerprint, find_galaxy10
from galaxy_mae.errors import UserError

NAME = "Galaxy10_DECals.h5"  # the only name that astroNN downloads
CONTENT = bytes(range(251)) * 16_000  # 4 MB: several of the downloader's chunks
WRONG = CONTENT[:-1] + b"!"
ZENODO, ASTRONN = f"/records/1/files/{NAME}", f"/astronn/{NAME}"
ROOT = Path(__file__).resolve().parents[1]


class Server(ThreadingHTTPServer):
    """Responds to each path as `responses` says, and records the requested paths."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses = {ZENODO: "complete", ASTRONN: "complete"}
        self.requests: list[str] = []
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def survey(self, **changes: object) -> SurveyFile:
        survey = SurveyFile(NAME, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), self.url + ZENODO, None)
        return dataclasses.replace(survey, **changes)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        response = self.server.responses[self.path]
        if response == "missing":
            self.send_error(404)
            return
        body = WRONG if response == "wrong" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            if response == "hold":
                self.server.release.wait()
            if response != "truncated":
                self.wfile.write(body[half:])
        except ConnectionError:  # expected: the test killed the client
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch) -> Path:
    """Give each test its own home directory, and return the path of the survey file in it."""
    for variable in ("GALAXY10_H5", "GALAXY_MAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / ".astroNN" / "datasets" / NAME


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def leftovers(target: Path) -> list[Path]:
    """Everything in the file's folder except the file and its lock."""
    return [path for path in target.parent.iterdir() if path.name not in (NAME, f"{NAME}.lock")]


def start_process(survey: SurveyFile) -> subprocess.Popen:
    code = f"from galaxy_mae.data.download import *\nprint(find_galaxy10({survey!r}))"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 s"
        time.sleep(0.01)


def test_downloaded_file_is_verified_and_hashed_once(server, target, capfd, monkeypatch):
    assert find_galaxy10(server.survey()) == target
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == []
    assert str(target) in capfd.readouterr().err
    state = target.stat()
    assert state.st_mode & 0o777 == 0o644
    assert find_galaxy10(server.survey()) == target
    monkeypatch.setattr(download, "_CLOCK_TICK", 0)  # else a new file is hashed again
    with monkeypatch.context() as patch:
        patch.setattr(download, "sha256", lambda _: pytest.fail("hashed again"))
        assert find_galaxy10(server.survey()) == target
    assert server.requests == [ZENODO]

    # Other content with the same size and time
    target.write_bytes(WRONG)
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert find_galaxy10(server.survey()) == target
    assert target.read_bytes() == CONTENT
    assert server.requests == [ZENODO] * 2


@pytest.mark.parametrize(
    ("response", "reason"),
    [("truncated", "broken"), ("wrong", "checksum"), ("missing", "404"), ("closed port", "connection")],
)
def test_failed_download_is_retried_once_and_raises_one_line(server, target, response, reason):
    server.responses[ZENODO] = response
    base = closed_port() if response == "closed port" else server.url
    with pytest.raises(UserError, match=reason) as failure:
        find_galaxy10(server.survey(zenodo_url=base + ZENODO))
    message = str(failure.value)
    assert "\n" not in message
    assert f"by hand from {base}/records/1 and put it at {target}, or set GALAXY10_H5" in message
    assert not target.exists()
    assert leftovers(target) == []
    assert server.requests == ([] if response == "closed port" else [ZENODO] * 2)


def test_wrong_cached_file_is_only_replaced_by_a_verified_file(server, target):
    target.parent.mkdir(parents=True)
    target.write_bytes(WRONG)
    server.responses[ZENODO] = "truncated"
    with pytest.raises(UserError):
        find_galaxy10(server.survey())
    assert target.read_bytes() == WRONG
    server.responses[ZENODO] = "complete"
    find_galaxy10(server.survey())
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_download_leaves_no_file_at_the_final_path(server, target, name):
    server.responses[ZENODO] = "hold"
    with start_process(server.survey()) as run:
        wait_for(lambda: any(file.stat().st_size for file in target.parent.glob(".tmp-*/*")))
        run.send_signal(getattr(signal, name))
    assert run.returncode != 0
    assert not target.exists()
    assert len(leftovers(target)) == (0 if name == "SIGINT" else 2)  # a folder and its lock
    server.responses[ZENODO] = "complete"
    assert find_galaxy10(server.survey()).read_bytes() == CONTENT
    assert leftovers(target) == []


def test_two_processes_download_the_file_once(server, target):
    server.responses[ZENODO] = "hold"
    with start_process(server.survey()) as first:
        wait_for(lambda: server.requests)
        with start_process(server.survey()) as second:
            assert "waiting for it" in second.stderr.readline()
            server.release.set()
            assert second.communicate(timeout=20)[0].strip() == str(target)
        assert first.communicate(timeout=20)[0].strip() == str(target)
    assert server.requests == [ZENODO]
    assert target.read_bytes() == CONTENT


def test_galaxy10_h5_must_be_the_official_file(server, target, tmp_path, monkeypatch):
    file = tmp_path / "elsewhere.h5"
    monkeypatch.setenv("GALAXY10_H5", str(file))
    with pytest.raises(UserError, match=r"GALAXY10_H5: .* is not there"):
        find_galaxy10(server.survey())
    file.write_bytes(WRONG)
    with pytest.raises(UserError, match=r"not the official Galaxy10_DECals.h5: .* --dataset PATH"):
        find_galaxy10(server.survey())
    file.write_bytes(CONTENT)
    assert find_galaxy10(server.survey()) == file
    assert server.requests == []
    assert not target.parent.exists()


def test_free_disk_space_is_checked_before_the_download(server, target):
    with pytest.raises(UserError, match=r"1000000000\.1 GB needed"):
        find_galaxy10(server.survey(size=10**18))
    assert server.requests == []


def test_disk_full_during_the_download_raises_user_error(server, target):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 4, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(UserError, match="too large: make that folder writable"):
            find_galaxy10(server.survey())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()
    assert leftovers(target) == []


def test_zenodo_is_used_if_astronn_is_not_installed(server, target, capfd, monkeypatch):
    monkeypatch.setattr("galaxy_mae.data.download.find_spec", lambda name: None)
    find_galaxy10(server.survey(astronn_origin=f"{server.url}/astronn/"))
    assert target.read_bytes() == CONTENT
    message = f'{NAME} failed: astroNN (it is not installed: pip install "astroNN>=1.1" "setuptools<81").'
    assert message in capfd.readouterr().err
    assert server.requests == [ZENODO]


needs_astronn = pytest.mark.skipif(
    not (importlib.util.find_spec("astroNN") and importlib.util.find_spec("tensorflow")),
    reason="astroNN and TensorFlow are not installed",
)


@needs_astronn
def test_astronn_downloads_in_a_child_process(server, target, capfd, monkeypatch):
    for module in ("astroNN", "tensorflow"):  # another test of this process may have imported it
        monkeypatch.delitem(sys.modules, module, raising=False)
    find_galaxy10(server.survey(astronn_origin=f"{server.url}/astronn/"))
    assert target.read_bytes() == CONTENT  # not an HDF5 file: astroNN would fail if it tried to read it
    assert leftovers(target) == []
    assert server.requests == [ASTRONN]
    assert not {"astroNN", "tensorflow"} & set(sys.modules)
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    # The progress bar of astroNN, and no output of TensorFlow.
    assert any(line.startswith(f"{NAME}: 4.02MB") for line in lines)
    assert [line for line in lines if line and not line.startswith((NAME, "Downloading"))] == []


@needs_astronn
def test_zenodo_is_used_after_a_wrong_checksum_from_astronn(server, target, capfd):
    server.responses[ASTRONN] = "wrong"
    find_galaxy10(server.survey(astronn_origin=f"{server.url}/astronn/"))
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == []
    assert server.requests == [ASTRONN, ZENODO]
    assert f"Download of {NAME} failed: astroNN (wrong checksum)." in capfd.readouterr().err


def test_fingerprint_depends_only_on_contents_and_names(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    a, b = folder / "a.png", folder / "b.png"
    a.write_bytes(b"spiral")
    b.write_bytes(b"smooth")
    assert content_fingerprint([a]) == hashlib.sha256(b"spiral").hexdigest()
    both = content_fingerprint([a, b], folder)
    assert content_fingerprint([b, a], folder) == both
    assert content_fingerprint([a, b], tmp_path) != both

    moved = shutil.copytree(folder, tmp_path / "moved")
    files = sorted(moved.iterdir())
    assert content_fingerprint(files, moved) == both
    files[0].write_bytes(b"barred")
    os.utime(files[0], ns=(0, 0))
    assert content_fingerprint(files, moved) != both

    for cached in (cache_folder() / "fingerprints").iterdir():
        cached.write_text("")  # damaged by a crash: it must be computed again
    assert content_fingerprint([a, b], folder) == both


def test_a_file_that_changed_just_before_it_was_hashed_is_hashed_again(tmp_path, monkeypatch):
    """Within one tick of the file system's clock a change is not to be seen in the times of a file."""
    file, hashed = tmp_path / "a.png", []
    file.write_bytes(b"spiral")
    monkeypatch.setattr(download, "sha256", lambda file: hashed.append(file) or "0" * 64)
    for tick, expected in ((10**12, 1), (10**12, 2), (0, 2)):
        monkeypatch.setattr(download, "_CLOCK_TICK", tick)
        content_fingerprint([file])
        assert len(hashed) == expected


def test_cache_folder_follows_the_environment_variables(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / ".cache" / "galaxy_mae"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "galaxy_mae"
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert (tmp_path / "own").is_dir()
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path / "a_file" / "below"))
    with pytest.raises(UserError, match="set GALAXY_MAE_CACHE"):
        cache_folder()
