"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from trigflow.runtime import files
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import (
    clear_leftovers,
    ensure_folder,
    read_json,
    read_tensors,
    replacing,
    write_folder,
    write_json,
    write_tensors,
    write_text,
)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_what_was_there(error: type[BaseException], existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if existing:
        path.write_text("before")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert listing(tmp_path) == (["file.txt"] if existing else [])
    assert not existing or path.read_text() == "before"


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
    assert path.read_text() == "new"
    assert listing(tmp_path) == ["file.txt"]


def test_results_have_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_folder(tmp_path / "folder", lambda folder: write_text(folder / "file", "x"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_files_that_others_make_meanwhile_have_the_usual_permissions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is of the whole process, threads that write something else included."""
    monkeypatch.setattr(os, "umask", Mock(side_effect=AssertionError))
    write_text(tmp_path / "file", "x")
    write_folder(tmp_path / "folder", lambda folder: write_text(folder / "file", "x"))


@pytest.mark.parametrize("value", [math.nan, math.inf, {"deep": [1.0, -math.inf]}])
def test_json_has_no_nan(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", value)
    assert listing(tmp_path) == []


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": []}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json", "test") == value
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"{'a': 1}", b"[" * 100_000])
def test_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^recipe '.*file\.json' cannot be read .*; expected a JSON file") as caught:
        read_json(tmp_path / "file.json", "recipe")
    assert "\n" not in str(caught.value)


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; expected a JSON file; check the path"):
        read_json(tmp_path / "file.json", "recipe")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path, "recipe")


def test_tensors_round_trip(tmp_path: Path) -> None:
    last = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    tensors = {
        "a": last,
        "b": torch.tensor(3),
        "c": torch.arange(6).reshape(2, 3).T,
        "d": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    again = read_tensors(tmp_path / "t.safetensors", "test")
    assert sorted(again) == ["a", "b", "c", "d"]
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in tensors.items())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_tensors(share: float, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"^weights '.*' cannot be read .*; expected a whole safetensors file"):
        read_tensors(path, "weights")


def test_tensors_that_are_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "t.safetensors", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=reason):
            read_tensors(path, "weights")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """Below a regular file, in the place of a folder."""
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.json", tmp_path / "folder"):
        with pytest.raises(UserError, match=r"cannot write '.*; expected .*; choose another --out") as caught:
            write_json(path, {})
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["file", "folder"]
    write_json(tmp_path / "new" / "below" / "x.json", {})
    assert listing(tmp_path / "new") == ["below", "below/x.json"]


@pytest.mark.parametrize("text", ["new", ""])
def test_a_folder_is_written_as_a_whole(text: str, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        write_text(folder / "a", text)
        assert not (tmp_path / "result").exists()

    write_folder(tmp_path / "result", fill)
    assert listing(tmp_path) == ["result", "result/a"]
    assert (tmp_path / "result" / "a").read_text() == text


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    write_folder(tmp_path / "result", lambda folder: write_text(folder / "old", "1"))
    write_folder(tmp_path / "result", lambda folder: write_text(folder / "new", "2"))
    assert listing(tmp_path) == ["result", "result/new"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "result").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "result")
    write_folder(tmp_path / "link", lambda folder: write_text(folder / "new", "2"))
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path) == ["disk", "disk/result", "disk/result/new", "link"]


def test_a_folder_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_text(folder / "new", "2")
        raise KeyboardInterrupt

    write_folder(tmp_path / "result", lambda folder: write_text(folder / "old", "1"))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "result", fail)
    assert listing(tmp_path) == ["result", "result/old"]


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_folder(path, Mock())])
def test_what_is_cleared_up_before_it_is_owned_is_made_again(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process clears up between the moments in which the temporary file or folder is made and locked."""
    cleared: list[Path] = []
    original = files.owned

    @contextlib.contextmanager
    def late(path: Path) -> Iterator[None]:
        if len(cleared) < 2:
            clear_leftovers(tmp_path, lambda name: True)
            cleared.append(path)
            assert not path.exists()
        with original(path):
            yield

    monkeypatch.setattr(files, "owned", late)
    write(tmp_path / "result", "x")
    assert len(cleared) == 2
    assert listing(tmp_path) == ["result"]


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_folder(path, Mock())])
def test_what_another_is_writing_under_the_same_temporary_name_stays(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "a1b2c3d4")
    theirs = [tmp_path / ".result-a1b2c3d4", tmp_path / ".result-a1b2c3d4.partial"]
    with contextlib.ExitStack() as stack:
        for path in theirs:
            path.touch()
            stack.enter_context(files.owned(path))
        with pytest.raises(UserError, match="cannot write"):
            write(tmp_path / "result", "x")
        assert all(path.exists() for path in theirs)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_who_clears_up_holds_what_it_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is gone nobody begins to own it; and it is open for writing, without which NFS gives no such lock."""
    import fcntl

    leftover = tmp_path / ".file-a1b2c3d4.txt"
    leftover.touch()
    unlink, asked, refused = Path.unlink, list[tuple[int, int]](), list[Path]()
    flock = fcntl.flock

    def lock(handle: int, how: int) -> None:
        asked.append((how, fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
        flock(handle, how)

    def remove(path: Path, missing_ok: bool = False) -> None:
        with path.open() as file, pytest.raises(BlockingIOError):
            flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        refused.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(Path, "unlink", remove)
    clear_leftovers(tmp_path, lambda name: True)
    assert refused == [leftover]
    assert asked == [(fcntl.LOCK_EX | fcntl.LOCK_NB, os.O_RDWR)]
    assert listing(tmp_path) == []


def test_ensure_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert ensure_folder(path) == path
    assert ensure_folder(path) == path  # again: nothing changes
    assert listing(tmp_path) == ["a", "a/b"]
    (path / "file").write_text("")
    for wrong in (path / "file", path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot write to .*; expected a folder that can be written; choose another"):
            ensure_folder(wrong)
    assert listing(path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            ensure_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)
