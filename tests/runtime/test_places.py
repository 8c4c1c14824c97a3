"""Places to write to: what can be written is found out before, and nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trigflow.runtime.errors import UserError
from trigflow.runtime.places import check_outside, check_place


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `full` with a file `full/file`, an empty one `empty`, and a link `link` to the first."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("full")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("file", "new"),
        ("file", "full/file"),
        ("file", "a/b/c"),
        ("file", "n" * 230),
        ("folder", "new"),
        ("folder", "full"),
        ("folder", "a/b/c"),
        ("new folder", "empty"),
        ("new folder", "link/new"),
    ],
)
def test_what_can_be_written_passes_and_nothing_is_left(there: Path, kind: str, path: str) -> None:
    before = sorted(there.rglob("*"))
    assert check_place(path, kind) == Path(path)  # type: ignore[arg-type]
    assert check_place(str(there / path), kind) == there / path  # type: ignore[arg-type]
    assert sorted(there.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "path", "reason"),
    [
        ("file", "full", "there is a folder of that name"),
        ("file", "full/file/below", "Not a directory"),
        ("file", "full/file/far/below", "Not a directory"),
        ("file", "a/" + "n" * 231, "a name of 231 bytes"),
        ("file", "é" * 116, "a name of 232 bytes"),
        ("file", "a\0b", "is no path"),
        ("folder", "full/file", "there is a file of that name"),
        ("folder", "full/file/below", "Not a directory"),
        ("folder", "n" * 500 + "/run", "a name of 500 bytes"),
        ("folder", "/".join(["n" * 200] * 30), "name too long"),
        ("new folder", "full", "it exists already and is not empty"),
        ("new folder", "full/file", "there is a file of that name"),
        ("folder", "/proc/run", "No such file|not permitted|Permission denied"),
    ],
)
def test_what_cannot_be_written_is_one_line(kind: str, path: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"(?i){reason}") as error:
        check_place(path, kind, "--json")  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    assert message.endswith("--json")
    assert "; expected " in message


@pytest.mark.parametrize("path", [5, None, ["a"]])
def test_what_is_no_path_is_said_so(path: object) -> None:
    with pytest.raises(UserError, match="is no path"):
        check_place(path, "file")  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours(there: Path) -> None:
    (there / "empty").chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        check_place("empty/a/b", "file")


@pytest.mark.parametrize("path", ["full", "full/run", "link/run", "./full/../full/a/b", "full/file"])
@pytest.mark.parametrize("data", ["full", "link", "./full/"])
def test_nothing_is_written_into_the_data(there: Path, path: str, data: str) -> None:
    with pytest.raises(UserError, match="expected an --out outside of the data"):
        check_outside(path, data)


@pytest.mark.parametrize("path", ["run", "empty/run", "fuller", "full2/run"])
@pytest.mark.parametrize("data", ["full", "digits", "hf:org/name", "full/file", "gone-{0..3}.tar", "a\0"])
def test_beside_the_data_is_fine(path: str, data: str) -> None:
    check_outside(path, data)
