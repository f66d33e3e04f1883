"""Errors: what a user can fix ends in one line and exit status 2; a bug keeps its traceback."""

import errno
import multiprocessing.synchronize
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from galaxy_mae.errors import EXIT_REQUEUE, UserError, first_line, is_disk_full, one_line_errors

ROOT = Path(__file__).resolve().parents[1]


def exit_status_and_line(error: BaseException, capsys) -> tuple[int, str]:
    """What a program ends with if it raises an error: its exit status and its standard error."""
    with pytest.raises(SystemExit) as exit_info, one_line_errors("folder/main.py"):
        raise error
    return exit_info.value.code, capsys.readouterr().err


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_user_error_ends_in_one_line(capsys):
    error = UserError("--seed x:\n   not a number")
    assert exit_status_and_line(error, capsys) == (2, "main.py: error: --seed x: not a number\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk or quota is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk or quota is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk or quota is full"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied: choose a file or folder"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system: choose a file or folder"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"), "a/b: Is a directory: choose a file or folder"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory: choose a file or folder"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a/b"), "a/b: File name too long: choose a file or folder"),
        (OSError(errno.EFBIG, "File too large", "a/b"), "a/b: the disk or quota is full, or ulimit -f too small"),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links", "a"),
            "a: Too many levels of symbolic links: choose",
        ),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "/dev/shm, the shared"),
        (UnicodeEncodeError("utf-8", "a/\udce9", 2, 3, "surrogates not allowed"), "'a/\\udce9': the name is not UTF-8"),
    ],
)
def test_full_and_read_only_disks_and_wrong_paths_end_in_one_line(capsys, error, line):
    status, text = exit_status_and_line(error, capsys)
    assert status == 2
    assert text.startswith(f"main.py: error: {line}")
    assert text.count("\n") == 1


def test_shared_memory_that_cannot_be_used_is_named(capsys, monkeypatch):
    """The semaphores of a loader's workers are files there."""

    def no_semaphore(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", no_semaphore)
    with pytest.raises(SystemExit), one_line_errors("main.py"):
        multiprocessing.Lock()
    assert "/dev/shm" in (line := capsys.readouterr().err)
    assert "--dataloader_num_workers 0" in line


def test_a_file_does_not_get_what_is_printed_to_a_closed_output(tmp_path):
    program = "import os, sys\nfrom galaxy_mae.errors import one_line_errors\nwith one_line_errors('main.py'):\n"
    program += "    file = open(sys.argv[1], 'w')\n    print('text')\n    os.system('echo text; echo text >&2')\n"
    program += "    sys.stdout.isatty(), sys.stderr.isatty(), file.write('content')"
    command = ["bash", "-c", '"$@" >&- 2>&-', "bash", sys.executable, "-c", program, tmp_path / "file"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


def test_a_user_without_a_home_is_told_to_set_it(capsys, monkeypatch):
    """As in a container whose user is not in the password file."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(RuntimeError) as raised:
        Path("~/.cache").expanduser()
    status, text = exit_status_and_line(raised.value, capsys)
    assert status == 2
    assert text == "main.py: error: the home folder is not known: set HOME to a folder that you may write to\n"


@pytest.mark.parametrize(
    "command",
    [
        "main.py --help",
        "-m galaxy_mae.sweep trials recipes/sweep/mask_ratio.yaml",
        "-m galaxy_mae.data synthetic:40 --image_size 16 --contact_sheet {tmp}/sheet.png",
    ],
)
def test_a_pipe_that_is_closed_ends_a_command_without_a_word(command, tmp_path):
    """As `| head`. Here nobody reads from the beginning."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *command.format(tmp=tmp_path).split()]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=buffered)
    os.close(write)
    assert run.returncode in (0, 141)  # argparse ignores an error while it writes a long help
    assert not re.search("Error|Exception|Traceback|error:", run.stderr)


def test_another_pipe_that_is_closed_is_no_silent_end():
    with pytest.raises(BrokenPipeError), one_line_errors("main.py"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("flag", ["--output_dir=é", "--output_dir=x"])
def test_names_that_a_locale_cannot_have_end_in_one_line(flag, tmp_path):
    """In an ASCII or Latin-1 locale. What is printed never fails."""
    code = "from galaxy_mae.errors import one_line_errors\nwith one_line_errors('a'): print('\\u6f22')"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, env=environment, cwd=tmp_path)
    if flag.isascii():
        assert (run.returncode, run.stdout) == (0, b"\\u6f22\n")
    else:
        assert (run.returncode, run.stdout) == (2, b"")
        assert run.stderr.endswith(b"it has characters that this locale has not: set PYTHONUTF8=1\n")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (SystemExit(EXIT_REQUEUE), EXIT_REQUEUE)])
def test_what_is_stopped_ends_with_the_command_that_resumes(capsys, monkeypatch, error, status):
    monkeypatch.setattr(sys, "orig_argv", ["python", "main.py", "--config", "my recipe.yaml"])
    line = "main.py: stopped; to resume: python main.py --config 'my recipe.yaml'\n"
    assert exit_status_and_line(error, capsys) == (status, line)
    assert exit_status_and_line(SystemExit(1), capsys) == (1, "")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOENT, "No such file"), AssertionError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as error_info, one_line_errors("main.py"):
        raise error
    assert error_info.value is error


def test_program_without_an_error_is_not_changed(capsys):
    with one_line_errors("main.py"):
        print("done")
    assert capsys.readouterr() == ("done\n", "")


def test_first_line_of_an_error():
    assert first_line(ValueError("  one \ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_disk_full_is_recognized_in_wrapped_errors():
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(RuntimeError("SafetensorError: Disk quota exceeded (os error 122)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
