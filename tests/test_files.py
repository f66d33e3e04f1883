"""Files and folders appear complete or not at all."""

import os

import pytest

from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_file, atomic_folder, read_json, write_json


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
