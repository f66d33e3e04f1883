"""Files and folders appear complete or not at all."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, atomic_folder, read_json, remove_leftovers, temporary_folder, write_json

ROOT = Path(__file__).resolve().parents[1]


def test_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.npz"
    with atomic_file(path) as staged:
        staged.write_text("content")
        assert not path.exists()
        assert staged.suffix == ".npz"  # numpy would append it otherwise
        assert staged.stat().st_dev == path.parent.stat().st_dev  # a rename is atomic only within a file system
    assert path.read_text() == "content"
    assert [file.name for file in path.parent.iterdir()] == ["file.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_no_file_and_keeps_the_old_one(tmp_path, error):
    def write(path):
        with atomic_file(path) as staged:
            staged.write_text("half")
            raise error

    with pytest.raises(error):
        write(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_has_the_permissions_of_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        write_json(tmp_path / "file.json", {})
    finally:
        os.umask(umask)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o640


def test_folder_replaces_the_old_one_at_the_end(tmp_path):
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(folder) as staged:
            (staged / content).write_text(content)
            assert not (folder / content).exists()
        assert [path.name for path in folder.iterdir()] == [content]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_no_folder_and_keeps_the_old_one(tmp_path, error):
    def write(folder):
        with atomic_folder(folder) as staged:
            (staged / "half").write_text("half")
            raise error

    with pytest.raises(error):
        write(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(error):
        write(tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]


def test_json_survives_a_round_trip(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "d"}}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json", "delete it") == content
    assert (tmp_path / "file.json").read_text().startswith('{\n  "a"')


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\xfa"])
def test_damaged_json_raises_user_error_with_the_path_and_the_fix(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: cannot be read \(.*\); delete it and train again$"):
        read_json(path, "delete it and train again")


def test_missing_json_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "file.json", "")


SHAPE = {"id": str, "done": bool, "rows": [{"score": float}], "classes": {str: int}}
CONTENT = {"id": "x", "done": True, "rows": [{"score": 1}, {"score": 0.5}], "classes": {"a": 1}, "more": None}


def test_json_may_have_more_keys_than_its_shape(tmp_path):
    write_json(tmp_path / "file.json", CONTENT)
    assert read_json(tmp_path / "file.json", "", SHAPE) == CONTENT


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        CONTENT | {"id": 5},
        CONTENT | {"done": None},
        CONTENT | {"rows": {}},
        CONTENT | {"rows": [1]},
        CONTENT | {"rows": [{"score": "high"}]},
        CONTENT | {"classes": {"a": "b"}},
        CONTENT | {"classes": []},
    ],
)
def test_json_of_another_shape_raises_user_error(tmp_path, content):
    write_json(tmp_path / "file.json", content)
    with pytest.raises(UserError, match="does not hold what was written there; delete it"):
        read_json(tmp_path / "file.json", "delete it", SHAPE)


# ------------------------------------------------------------------------------------------ power losses and left-overs


@pytest.fixture
def disk_log(monkeypatch):
    """What is flushed and renamed, in order: (action, name)."""
    log, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def watched_fsync(descriptor):
        log.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def watched_rename(move):
        def wrapped(source, target, **kwargs):
            log.append(("rename", Path(target).name))
            move(source, target, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_rename(replace))
    monkeypatch.setattr(os, "rename", watched_rename(rename))
    return log


def test_a_file_is_on_the_disk_before_it_is_renamed_and_its_folder_after(tmp_path, disk_log):
    write_json(tmp_path / "file.json", {})
    assert disk_log == [("flush", "file.json"), ("rename", "file.json"), ("flush", tmp_path.name)]


def test_the_files_of_a_folder_are_on_the_disk_before_it_is_renamed(tmp_path, disk_log):
    with atomic_folder(tmp_path / "folder") as staged:
        (staged / "content").write_text("content")
    assert disk_log == [("flush", "content"), ("flush", "new"), ("rename", "folder"), ("flush", tmp_path.name)]


def test_left_overs_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path):
    """A process writes in a subfolder. Its temporary file stays while it lives, and goes when it was killed."""
    program = "import sys, time; from pathlib import Path; from galaxy_mae.files import atomic_file\n"
    program += "with atomic_file(Path(sys.argv[1])) as path: path.write_text('half'); print('.', flush=True); input()"
    arguments = [sys.executable, "-c", program, tmp_path / "sub" / "file.npy"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, cwd=ROOT) as process:
        process.stdout.readline()
        remove_leftovers(tmp_path)
        assert [path.read_text() for path in tmp_path.rglob("file.npy")] == ["half"]
        process.kill()
    assert [path.read_text() for path in tmp_path.rglob("file.npy")] == ["half"]
    (tmp_path / "sub" / ".hidden").write_text("a file of somebody else")
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == [".hidden"]


def test_writers_lose_nothing_while_left_overs_are_removed(tmp_path):
    """Temporary folders come and go in threads, whose locks exclude each other as those of processes do."""
    failures, done = [], threading.Event()

    def write(number: int) -> None:
        try:
            for i in range(100):
                write_json(tmp_path / f"{number}.json", i)
                with temporary_folder(tmp_path) as folder:
                    (folder / "file").write_text("content")
        except OSError as error:
            failures.append(error)

    def clean() -> None:
        while not done.is_set():
            remove_leftovers(tmp_path)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    cleaner = threading.Thread(target=clean)
    for thread in (cleaner, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    cleaner.join()
    assert not failures
    remove_leftovers(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {f"{n}.json": "99\n" for n in range(3)}
