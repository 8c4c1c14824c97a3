"""What only a zip can be: damaged, encrypted, malicious. What it shares with a folder is in test_folder.py."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trigflow.data import open_dataset
from trigflow.data.sources import zips as zips_module
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, once it is seen to be one line of what was wrong; what was expected; what to do."""
    message = str(error.value)
    assert "\n" not in message
    assert message.count("; ") >= 2
    return message


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16), level).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_a_zip_gives_what_its_folder_gives(photos: Path, save: Save, tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    for name in ("cats/1.png", "cats/deep/2.png", "dogs/3.png"):
        save(name, rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    source = write_zip(
        tmp_path / "all.zip", {str(path.relative_to(photos)): path.read_bytes() for path in photos.rglob("*.png")}
    )
    folder, packed = open_dataset(photos), open_dataset(source)
    assert torch.equal(folder.images, packed.images)
    assert folder.labels is not None
    assert packed.labels is not None
    assert torch.equal(folder.labels, packed.labels)
    assert folder.class_names == packed.class_names == ("cats", "dogs")


def test_a_zip_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    path = write_zip(tmp_path / "a.zip", {"1.png": png(1)})
    monkeypatch.setattr(zipfile, "ZipFile", denied)
    with pytest.raises(UserError, match=r"cannot read '.*a.zip' \(Permission denied\)") as error:
        open_dataset(path)
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"not a zip", png(1)])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("photos.zip", "not a readable zip file"),
        ("photo.PNG", "a single image"),
        ("photos.tar.gz", "a compressed tar"),
        ("photos.TGZ", "a compressed tar"),
        ("photo.npy", "a single array"),
    ],
)
def test_other_files_are_no_zips(tmp_path: Path, content: bytes, name: str, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"'.*{name}' is {what}; expected a folder") as error:
        open_dataset(path)
    one_line(error)


def test_a_truncated_zip_is_a_user_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": png(1)})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="not a readable zip file"):
        open_dataset(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(UserError, match="not a readable zip file"):
        open_dataset(tmp_path / "pipe.zip")


def test_a_damaged_entry_is_a_corrupt_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": png(1), "2.png": png(2)})
    content = bytearray(path.read_bytes())
    content[content.index(png(2)) + 50] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 2 .*: '2.png'; .*--skip-corrupt"):
        open_dataset(path)
    assert open_dataset(path, skip_corrupt=True).skipped == ("2.png",)


def test_an_encrypted_entry_is_a_user_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": png(1)})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag "encrypted" in the central directory
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'1.png' in .* is encrypted; expected a zip without a password") as error:
        open_dataset(path)
    one_line(error)


def test_an_unknown_compression_is_a_user_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": png(1)})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = 97
    content[content.index(b"PK\x03\x04") + 8] = 97
    path.write_bytes(content)
    with pytest.raises(UserError, match="packed in an unknown way") as error:
        open_dataset(path, skip_corrupt=True)
    one_line(error)


def test_an_entry_that_unpacks_to_too_much_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zips_module, "MEMBER_LIMIT_BYTES", 1000)
    path = write_zip(tmp_path / "a.zip", {"1.png": png(1) + bytes(1000)})
    with pytest.raises(UserError, match="expected files up to 1000 bytes") as error:
        open_dataset(path)
    one_line(error)


def test_entries_are_never_written_to_disk(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    source = write_zip(inner / "a.zip", {"../escaped.png": png(1), f"{tmp_path}/absolute.png": png(2), "b/c.png": png(3)})
    assert len(open_dataset(source)) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "inner"]


def test_odd_entry_names_are_read_as_paths_from_the_root(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {"/a/1.png": png(1), "./a/2.png": png(2), "b\\3.png": png(3), "../b/4.png": png(4)})
    dataset = open_dataset(source)
    assert dataset.class_names == ("a", "b")
    assert dataset.images[:, 0, 0, 0].tolist() == [1, 2, 3]  # what points outside of the zip is left out


def test_every_damaged_byte_of_a_zip_ends_in_a_data_set_or_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    whole = write_zip(path, {"a/1.png": png(1), "b/2.png": png(2)}).read_bytes()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert len(open_dataset(path, skip_corrupt=True)) in (1, 2)
        except UserError:
            refused += 1
    assert refused > 0
