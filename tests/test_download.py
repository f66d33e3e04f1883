"""The survey file is found, fetched and verified against a real HTTP server on this machine."""

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

from galaxy_mae.download import SurveyFile, cache_folder, content_fingerprint, find_galaxy10
from galaxy_mae.errors import UserError

NAME = "Galaxy10_DECals.h5"  # astroNN knows no other
WHOLE = bytes(range(251)) * 16_000  # 4 MB: several of the downloader's chunks
WRONG = WHOLE[:-1] + b"!"
ZENODO, ASTRONN = f"/records/1/files/{NAME}", f"/astronn/{NAME}"
ROOT = Path(__file__).resolve().parents[1]


class Server(ThreadingHTTPServer):
    """Answers each path as `answers` says, and writes down what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {ZENODO: "whole", ASTRONN: "whole"}
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def survey(self, **changes: object) -> SurveyFile:
        plain = SurveyFile(NAME, len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), self.url + ZENODO, None)
        return dataclasses.replace(plain, **changes)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answer = self.server.answers[self.path]
        if answer == "missing":
            self.send_error(404)
            return
        body = WRONG if answer == "wrong" else WHOLE
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            if answer == "held":
                self.server.go_on.wait()
            if answer != "truncated":
                self.wfile.write(body[half:])
        except ConnectionError:  # the client was killed: that is the test
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch) -> Path:
    """A home of its own for each test; the survey file's place in it."""
    for variable in ("GALAXY10_H5", "GALAXY_MAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / ".astroNN" / "datasets" / NAME


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def parts(target: Path) -> list[Path]:
    """What lies beside the file and its lock."""
    return [path for path in target.parent.iterdir() if path.name not in (NAME, f"{NAME}.lock")]


def in_a_process(survey: SurveyFile) -> subprocess.Popen:
    code = f"from galaxy_mae.download import *\nprint(find_galaxy10({survey!r}))"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 s"
        time.sleep(0.01)


def test_whole_file_lands_verified_and_is_read_once(server, target, capfd):
    assert find_galaxy10(server.survey()) == target
    assert target.read_bytes() == WHOLE
    assert parts(target) == []
    assert str(target) in capfd.readouterr().err
    state = target.stat()
    assert state.st_mode & 0o777 == 0o644

    # Other bytes under the same size and time: a second call that read the content would see them.
    target.write_bytes(WRONG)
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert find_galaxy10(server.survey()) == target
    assert server.asked == [ZENODO]

    target.touch()
    assert find_galaxy10(server.survey()) == target
    assert target.read_bytes() == WHOLE
    assert server.asked == [ZENODO] * 2


@pytest.mark.parametrize(
    ("answer", "reason"), [("truncated", "broken"), ("wrong", "checksum"), ("missing", "404"), ("nobody", "connection")]
)
def test_failed_download_is_one_line_after_one_retry(server, target, answer, reason):
    server.answers[ZENODO] = answer
    base = closed_port() if answer == "nobody" else server.url
    with pytest.raises(UserError, match=reason) as failure:
        find_galaxy10(server.survey(zenodo_url=base + ZENODO))
    message = str(failure.value)
    assert "\n" not in message
    assert f"by hand from {base}/records/1 and put it at {target}, or set GALAXY10_H5" in message
    assert not target.exists()
    assert parts(target) == []
    assert server.asked == ([] if answer == "nobody" else [ZENODO] * 2)


def test_wrong_file_in_the_cache_is_replaced_only_by_a_verified_one(server, target, capfd):
    target.parent.mkdir(parents=True)
    target.write_bytes(WRONG)
    server.answers[ZENODO] = "truncated"
    with pytest.raises(UserError):
        find_galaxy10(server.survey())
    assert target.read_bytes() == WRONG
    assert f"{target} is not the official file" in capfd.readouterr().err
    server.answers[ZENODO] = "whole"
    find_galaxy10(server.survey())
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_download_leaves_nothing_that_looks_whole(server, target, name):
    server.answers[ZENODO] = "held"
    with in_a_process(server.survey()) as run:
        wait_for(lambda: any(file.stat().st_size for file in target.parent.glob(f".{NAME}.part-*/*")))
        run.send_signal(getattr(signal, name))
    assert run.returncode != 0
    assert not target.exists()
    assert len(parts(target)) == (0 if name == "SIGINT" else 1)
    server.answers[ZENODO] = "whole"
    assert find_galaxy10(server.survey()).read_bytes() == WHOLE
    assert parts(target) == []


def test_two_processes_download_once(server, target):
    server.answers[ZENODO] = "held"
    with in_a_process(server.survey()) as first:
        wait_for(lambda: server.asked)
        with in_a_process(server.survey()) as second:
            assert "waiting for it" in second.stderr.readline()
            server.go_on.set()
            assert second.communicate(timeout=20)[0].strip() == str(target)
        assert first.communicate(timeout=20)[0].strip() == str(target)
    assert server.asked == [ZENODO]
    assert target.read_bytes() == WHOLE


def test_variable_names_the_official_file_or_is_refused(server, target, tmp_path, monkeypatch):
    file = tmp_path / "elsewhere.h5"
    monkeypatch.setenv("GALAXY10_H5", str(file))
    with pytest.raises(UserError, match="GALAXY10_H5: there is no file"):
        find_galaxy10(server.survey())
    file.write_bytes(WRONG)
    with pytest.raises(UserError, match=r"not the official Galaxy10_DECals.h5 .* --dataset PATH"):
        find_galaxy10(server.survey())
    file.write_bytes(WHOLE)
    assert find_galaxy10(server.survey()) == file
    assert server.asked == []
    assert not target.parent.exists()


def test_room_is_checked_before_the_download(server, target):
    with pytest.raises(UserError, match=r"1000000000\.1 GB needed"):
        find_galaxy10(server.survey(size=10**18))
    assert server.asked == []


def test_disk_that_fills_up_midway_is_told(server, target):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WHOLE) // 4, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(UserError, match="too large: make that folder writable"):
            find_galaxy10(server.survey())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()
    assert parts(target) == []


@pytest.mark.skipif(importlib.util.find_spec("astroNN") is not None, reason="astroNN is here: it cannot be missed")
def test_without_astronn_zenodo_is_next(server, target, capfd):
    find_galaxy10(server.survey(astronn_origin=f"{server.url}/astronn/"))
    assert target.read_bytes() == WHOLE
    assert f"No {NAME} from astroNN (ModuleNotFoundError: No module named 'astroNN')." in capfd.readouterr().err
    assert server.asked == [ZENODO]


needs_astronn = pytest.mark.skipif(
    not (importlib.util.find_spec("astroNN") and importlib.util.find_spec("tensorflow")),
    reason="astroNN and TensorFlow are not installed",
)


@needs_astronn
def test_astronn_itself_downloads_outside_this_process(server, target, capfd):
    find_galaxy10(server.survey(astronn_origin=f"{server.url}/astronn/"))
    assert target.read_bytes() == WHOLE  # no HDF5 file: astroNN would fail on it, had it not been stopped before
    assert parts(target) == []
    assert server.asked == [ASTRONN]
    assert not {"astroNN", "tensorflow"} & set(sys.modules)
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.startswith(f"{NAME}: 4.02MB") for line in lines)  # its progress bar, and nothing of TensorFlow's
    assert [line for line in lines if line and not line.startswith((NAME, "Downloading"))] == []


@needs_astronn
def test_wrong_checksum_from_astronn_is_one_failure(server, target, capfd):
    server.answers[ASTRONN] = "wrong"
    find_galaxy10(server.survey(astronn_origin=f"{server.url}/astronn/"))
    assert target.read_bytes() == WHOLE
    assert parts(target) == []
    assert server.asked == [ASTRONN, ZENODO]
    assert f"No {NAME} from astroNN (wrong checksum)." in capfd.readouterr().err


def test_fingerprint_follows_contents_and_names_alone(tmp_path):
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

    for memory in (cache_folder() / "fingerprints").iterdir():
        memory.write_text("")  # lost in a crash: computed again, not believed
    assert content_fingerprint([a, b], folder) == both


def test_cache_folder_is_the_first_one_named(tmp_path, monkeypatch):
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
