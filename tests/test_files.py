"""Files and folders appear complete or not at all."""

import errno
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from test_mae import small_config

from galaxy_mae.data import hats
from galaxy_mae.errors import UserError
from galaxy_mae.files import (
    atomic_file,
    atomic_folder,
    cached,
    check_output,
    claim,
    locked,
    make_output_folder,
    read_json,
    remove_leftovers,
    temporary_folder,
    write_json,
)
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.training.recipe import read_yaml

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
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_an_exception_leaves_nothing_and_keeps_the_old(tmp_path, atomic, error):
    def write(text: str, error: type[BaseException] | None = None) -> None:
        with atomic(tmp_path / "new") as staged:
            (staged / "content" if staged.is_dir() else staged).write_text(text)
            if error:
                raise error

    with pytest.raises(error):
        write("half", error)
    assert not list(tmp_path.iterdir())
    write("old")
    with pytest.raises(error):
        write("half", error)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


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


def test_json_may_have_more_keys_than_those_that_are_asked_for(tmp_path):
    write_json(tmp_path / "file.json", {"id": "x", "more": None})
    assert read_json(tmp_path / "file.json", "", ["id"]) == {"id": "x", "more": None}


@pytest.mark.parametrize("content", [None, [], ["id"], "id", {}, {"more": 1}])
def test_json_without_the_keys_raises_user_error(tmp_path, content):
    write_json(tmp_path / "file.json", content)
    with pytest.raises(UserError, match="does not hold what was written there; delete it"):
        read_json(tmp_path / "file.json", "delete it", ["id"])


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


def test_only_what_has_the_name_of_a_temporary_folder_is_a_left_over(tmp_path):
    for name in (".tmp-notes", ".tmp-0123456789ab", ".tmp-0123456789abc", "x.tmp-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").touch()
    write_json(tmp_path / "file.json", {})  # whoever writes removes what killed processes left
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {".tmp-notes", ".tmp-0123456789abc", "x.tmp-0123456789ab"}


# --------------------------------------------------------------------------------------------- clusters' file systems


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP", "EIO", "ENOSYS"])
def without_locks(request, monkeypatch):
    """A file system without locks and without exchanges of names, as NFS is mounted; a lease lasts for a second."""

    def flock(*_):
        raise OSError(getattr(errno, request.param), request.param)

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)
    monkeypatch.setattr("galaxy_mae.files._LEASE", 1.0)


def leave_lease(lock: Path, host: str = "node017") -> Path:
    """The lease of a process on another host."""
    lease = Path(f"{lock}.lease")
    lease.write_text(f"filelock/2\npid=4242\nhost={host}\nmode=lease\ntoken=ab\nduration=1.0\n")
    return lease


def test_who_waits_without_a_limit_takes_over_the_lease_of_a_dead_node(tmp_path, without_locks):
    lease = leave_lease(tmp_path / "a.lock")
    with locked(tmp_path / "a.lock"):
        assert "node017" not in lease.read_text()


def test_without_locks_there_are_leases(tmp_path, without_locks):
    (tmp_path / "run.lock").write_text("4242\nnode017\nabc\n")  # which filelock's own fall-back leaves
    with claim(tmp_path / "run.lock"):
        with pytest.raises(UserError, match="another process is writing to this folder"), claim(tmp_path / "run.lock"):
            pass
        write_json(tmp_path / "a.json", {})
        cached(tmp_path / ".lock", lambda: None, lambda: write_json(tmp_path / "b.json", {}))
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", ".lock", "run.lock"}


@pytest.mark.parametrize("without_locks", ["ENOLCK"], indirect=True)
@pytest.mark.parametrize("alive", [False, True])
def test_the_lease_of_a_dead_node_is_taken_over_and_that_of_a_living_one_is_not(tmp_path, without_locks, alive, caplog):
    lease, done = leave_lease(tmp_path / "run.lock"), threading.Event()

    def touch() -> None:
        while alive and not done.wait(0.3):
            lease.touch()

    node = threading.Thread(target=touch)
    node.start()
    with pytest.raises(UserError, match="another process") if alive else nullcontext(), claim(tmp_path / "run.lock"):
        assert "node017" not in lease.read_text()
    done.set()
    node.join()
    assert "process 4242 on node017" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock"} | ({"run.lock.lease"} if alive else set())


@pytest.mark.parametrize("without_locks", ["ENOLCK"], indirect=True)
@pytest.mark.parametrize(("hours", "stays"), [(1, True), (25, False)])
def test_without_locks_what_a_dead_node_left_is_removed_after_a_day(tmp_path, without_locks, hours, stays):
    left = tmp_path / ".tmp-0123456789ab"
    left.mkdir()
    (lock := left.with_name(f"{left.name}.lock")).touch()
    os.utime(leave_lease(lock), (time.time() - hours * 3600,) * 2)
    remove_leftovers(tmp_path)
    assert left.exists() == stays
    assert len(list(tmp_path.iterdir())) == 3 * stays


def test_a_process_that_lost_its_lease_ends(tmp_path):
    program = """
import errno, fcntl, sys, time
from pathlib import Path
from galaxy_mae import files
def flock(*_): raise OSError(errno.ENOLCK, "")
fcntl.flock, files._LEASE = flock, 0.3
with files.claim(Path(sys.argv[1])):
    Path(f"{sys.argv[1]}.lease").unlink()
    time.sleep(60)
"""
    command = [sys.executable, "-c", program, tmp_path / "run.lock"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 75  # Slurm's scripts requeue it
    assert done.stderr.endswith("lost its lock: stopped\n")


@pytest.mark.parametrize("other_disk", [False, True])
@pytest.mark.parametrize("exists", [True, False])
def test_what_a_link_points_to_is_written(tmp_path, monkeypatch, exists, other_disk):
    replace = Path.replace

    def replace_here(file: Path, path: Path) -> Path:
        if other_disk and file.parent.parent != path.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(file, path)

    monkeypatch.setattr(Path, "replace", replace_here)
    for folder in ("disk", "home"):
        (tmp_path / folder).mkdir()
    for name in ("a.csv", "a.csv.json") if exists else ():
        (tmp_path / "disk" / name).write_text("old")
    for name in ("a.csv", "a.csv.json"):
        (tmp_path / "home" / name).symlink_to(f"../disk/{name}")
    with atomic_file(tmp_path / "home" / "a.csv") as staged:
        staged.write_text("new")
        staged.with_name("a.csv.json").write_text("new")
    assert {path.read_text() for path in (tmp_path / "disk").iterdir()} == {"new"}
    assert all(path.is_symlink() for path in (tmp_path / "home").iterdir())
    assert len(list(tmp_path.rglob("*"))) == 6


def test_the_folder_that_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "link").symlink_to("disk")
    with atomic_folder(tmp_path / "link") as staged:
        (staged / "new").touch()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_json(tmp_path / "loop", {})
    assert (tmp_path / "loop").is_symlink()


def test_a_file_system_that_cannot_change_permissions_is_written(tmp_path, monkeypatch):
    def no_chmod(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", no_chmod)
    with atomic_file(tmp_path / "file") as staged:
        os.close(os.open(staged, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "file").exists()


def test_a_file_has_the_permissions_of_the_default_acl(tmp_path):
    """As of a group's folder: the umask does not apply there."""
    entries = [(1, 7), (4, 7), (32, 0)]  # of the user, the group and others
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, mode, 2**32 - 1) for tag, mode in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    with atomic_file(tmp_path / "file") as staged:
        os.close(os.open(staged, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o660


# ------------------------------------------------------------------------------------------------------ caches, outputs


def read_or_none(path: Path) -> dict | None:
    """What a cache reads: nothing if the file is missing or damaged."""
    try:
        return read_json(path, "")
    except (FileNotFoundError, UserError):
        return None


@pytest.mark.slow
def test_one_of_several_processes_writes_a_cache_and_the_others_read_it(tmp_path):
    program = """
import os, sys, time
from pathlib import Path
from galaxy_mae.files import cached, read_json, write_json
folder = Path(sys.argv[1])

def write():
    with (folder / "log").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.5)
    write_json(folder / "cache.json", {"pid": os.getpid()})

path = folder / "cache.json"
print(cached(folder / ".lock", lambda: read_json(path, "") if path.exists() else None, write)["pid"])
"""
    command = [sys.executable, "-c", program, tmp_path]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    (writer,) = (tmp_path / "log").read_text().split()
    assert printed == {writer}


def test_a_cache_is_read_without_its_lock_and_written_again_if_it_is_damaged(tmp_path):
    path, lock = tmp_path / "new" / "cache.json", tmp_path / "new" / ".lock"
    written = []

    def write() -> None:
        written.append(len(written))
        write_json(path, {"number": len(written)})

    assert cached(lock, lambda: read_or_none(path), write) == {"number": 1}
    with FileLock(lock):  # as another process that writes another entry of the folder
        assert cached(lock, lambda: read_or_none(path), write) == {"number": 1}
    path.write_text("{")
    left = path.parent / ".tmp-0123456789ab"
    left.mkdir()
    left.with_name(f"{left.name}.lock").touch()
    assert cached(lock, lambda: read_or_none(path), write) == {"number": 2}
    assert not left.exists()
    left.mkdir()  # of a process that was killed when what it wrote was complete
    left.with_name(f"{left.name}.lock").touch()
    assert cached(lock, lambda: read_or_none(path), write) == {"number": 2}
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_not_half_written(tmp_path):
    def write() -> None:
        with atomic_file(tmp_path / "cache.json") as tmp_path_of_file:
            tmp_path_of_file.write_text("half")
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        cached(tmp_path / ".lock", lambda: read_or_none(tmp_path / "cache.json"), write)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with locked(tmp_path / ".lock", before_waiting=lambda: pytest.fail("the lock is still held")):
        pass


def test_a_lock_is_waited_for_with_a_message(tmp_path):
    events, is_held, may_end = [], threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "lock"):
            is_held.set()
            may_end.wait(10)
            events.append("released")

    def before_waiting() -> None:
        events.append("waiting")
        may_end.set()

    other = threading.Thread(target=hold)
    other.start()
    is_held.wait(10)
    with locked(tmp_path / "lock", before_waiting):
        events.append("held")
    other.join()
    assert events == ["waiting", "released", "held"]


def test_outputs_that_may_be_written_pass(tmp_path):
    (tmp_path / "old.fits").touch()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").touch()
    (tmp_path / "own.png").write_bytes(b"... Software\0galaxy_mae ...")
    check_output(tmp_path / "new", "--output")
    check_output(tmp_path / "own.png", "--sheet", (".png",), replace_own=True)
    check_output(tmp_path / "new.FITS", "--output", (".csv", ".fits"))
    check_output(tmp_path / "old.fits", "--output", (".fits",), overwrite=True, inputs=[tmp_path / "input.fits"])
    check_output(tmp_path / "index", "--output", overwrite=True, contents=["index.json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "old.fits", "own.png"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.txt", {"suffixes": (".csv", ".fits")}, "its suffix names no format; use one of .csv, .fits"),
        ("a", {"suffixes": (".csv",)}, "its suffix names no format"),
        ("folder", {"overwrite": True}, "a folder is in the way; rename it, or choose another name"),
        ("folder", {"overwrite": True, "contents": ["index.json"]}, "a folder is in the way"),
        ("index", {"overwrite": True, "contents": ["index.json", "index.faiss"]}, "a folder is in the way"),
        ("index", {"contents": ["index.json"]}, "it exists; choose another name, or set --overwrite to replace it"),
        ("old.csv", {"overwrite": True, "contents": ["index.json"]}, "something else is in the way"),
        ("pipe.csv", {"overwrite": True}, "something else is in the way"),
        ("old.csv", {"replace_own": True}, "it exists, and this program did not write it; choose another name"),
        ("images/1.csv", {"overwrite": True}, "it would replace the input of this command; choose another name"),
        ("no/a.csv", {}, "there is no folder {folder}/no that you may write to; create it first"),
        ("input.csv", {"overwrite": True}, "it would replace the input of this command; choose another name"),
        ("link.csv", {"overwrite": True}, "it would replace the input of this command"),
        ("old.csv", {}, "it exists; choose another name, or set --overwrite to replace it"),
    ],
)
def test_outputs_that_may_not_be_written_are_named_with_the_fix(tmp_path, name, options, message):
    for folder in ("folder", "index", "images"):
        (tmp_path / folder).mkdir()
    for file in ("index/index.json", "input.csv", "old.csv", "images/1.csv"):
        (tmp_path / file).touch()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "input.csv")
    inputs = [tmp_path / "gone", "synthetic:60", "\0", tmp_path / "input.csv", str(tmp_path / "images")]
    with pytest.raises(UserError) as error:
        check_output(tmp_path / name, "--output", inputs=inputs, **options)
    assert str(error.value).startswith(f"--output {tmp_path / name}: {message.format(folder=tmp_path)}")


@pytest.fixture
def read_only(monkeypatch):
    """A folder in which this process may not write, also as root."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "read_only")


def test_outputs_in_a_folder_that_may_not_be_written_to(tmp_path, read_only):
    folder = tmp_path / "read_only"
    folder.mkdir()
    for action in (
        lambda: check_output(folder / "a", "--output"),
        lambda: make_output_folder(folder, "--output", markers=["run.json"]),
    ):
        with pytest.raises(UserError, match=r"folder .*that you may write to"):
            action()


def test_a_folder_for_output_is_made_or_taken_up_again(tmp_path):
    folder = make_output_folder(tmp_path / "new" / "run", "--output_dir", markers=["run.json"])
    assert folder.is_dir()
    (folder / "dataset" / ".tmp-0123456789ab").mkdir(
        parents=True
    )  # a killed process may have left folders, locks and temporary files before its marker
    for name in (".tmp-1.lock", "run.lock", "run.lock.lease", "slurm-12.out"):
        (folder / name).touch()
    assert make_output_folder(folder, "--output", markers=["survey.json"], inputs=[tmp_path / "input"]) == folder
    (folder / "notes.txt").touch()
    (folder / "survey.json").touch()
    assert make_output_folder(folder, "--output", markers=["survey.json"]) == folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("file", {}, r"cannot be created \(File exists\); choose another folder"),
        ("file/run", {}, r"cannot be created \(Not a directory\); choose another folder"),
        ("no/out", {"parents": False}, r"cannot be created \(No such file or directory\); choose another folder"),
        ("used", {}, "holds other files and no run.json; choose an empty or new folder"),
        ("model", {}, "holds other files and no run.json; choose an empty or new folder"),
        ("input", {}, "this is the input, or in it; choose another folder"),
        ("input/out", {}, "this is the input, or in it; choose another folder"),
    ],
)
def test_folders_that_may_not_be_written_to_are_named_with_the_fix(tmp_path, name, options, message):
    for folder in ("used", "input", "model/encoder"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("file", "used/thesis.tex", "model/encoder/model.safetensors"):
        (tmp_path / file).touch()
    inputs = [tmp_path / "input"]
    with pytest.raises(UserError, match=rf"^--output_dir .*: {message}"):
        make_output_folder(tmp_path / name, "--output_dir", **{"inputs": inputs, "markers": ["run.json"]} | options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "input", "model", "used"]


def test_pipes_devices_and_huge_files_are_refused_before_they_are_opened(tmp_path):
    """As a recipe, a partition, a model's weights or settings; opening a pipe would wait for ever."""
    pipe, large = tmp_path / "pipe", tmp_path / "large.json"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    model = tmp_path / "model"
    save_encoder(build_mae(small_config()), model, np.full(3, 0.4), np.full(3, 0.3), ())
    for name in ("model.safetensors", "preprocessor_config.json"):
        broken = tmp_path / name
        shutil.copytree(model, broken)
        (broken / name).unlink()
        os.mkfifo(broken / name)
    partition = hats.Partition(1, 0, "Npix=0.parquet", (pipe,))
    for read in (
        lambda: read_json(pipe, "fix"),
        lambda: read_json(large, "fix"),
        lambda: read_yaml(pipe),
        lambda: read_yaml(Path("/dev/zero")),
        lambda: hats.read_properties(pipe),
        partition.count_rows,
        lambda: list(partition.read(["ra"], 64)),
        lambda: load_encoder(str(tmp_path / "model.safetensors")),
        lambda: load_encoder(str(tmp_path / "preprocessor_config.json")),
    ):
        with pytest.raises(UserError, match=r"no file that is expected there|cannot be loaded"):
            read()
