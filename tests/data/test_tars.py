"""Tar shards, against the WebDataset library, which wrote the layout down, and every way in which a tar can be odd."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from trigflow.data import open_dataset
from trigflow.data.sources import tars as tars_module
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]
RNG = np.random.Generator(np.random.PCG64(0))
NOISE = RNG.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, entries: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten images in four shards, as the library writes them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%04d.tar"), maxcount=3, verbose=0) as writer:
        for index, pixels in enumerate(NOISE):
            writer.write({"__key__": f"{index:06d}", "png": png(pixels), "cls": index % 4, "json": {"index": index}})
    return folder


def test_images_and_labels_are_what_the_library_reads(shards: Path) -> None:
    paths = sorted(map(str, shards.iterdir()))
    expected = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    dataset = open_dataset(shards)
    assert len(dataset) == len(expected) == 10
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [label for _, label in expected]
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1), np.stack([pixels for pixels, _ in expected]))
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1), NOISE)
    assert dataset.class_names == ("0", "1", "2", "3")


def test_all_ways_to_name_shards(shards: Path) -> None:
    everything = open_dataset(shards)
    by_range = open_dataset(f"{shards}/train-{{0000..0003}}.tar")
    assert torch.equal(by_range.images, everything.images)
    some = open_dataset(f"{shards}/train-{{0001..0002}}.tar")
    assert torch.equal(some.images, everything.images[3:9])
    assert torch.equal(open_dataset(shards / "train-0003.tar").images, everything.images[9:])
    for shard in shards.iterdir():
        shard.rename(shard.with_suffix(".TAR"))
    assert torch.equal(open_dataset(f"{shards}/train-{{0000..0003}}.TAR").images, everything.images)
    assert torch.equal(open_dataset(shards / "train-0003.TAR").images, everything.images[9:])


def test_other_files_beside_shards_are_no_parts(shards: Path) -> None:
    (shards / "val.txt").write_text("seen by nobody")
    assert len(open_dataset(shards)) == 10
    shutil.copy(shards / "train-0000.tar", shards / "val-0000.tar")
    with pytest.raises(UserError, match="holds shards of several parts of a data set"):
        open_dataset(shards)


def test_names_end_at_a_nul(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("a.png\0.txt", png(NOISE[0])), ("b.png", png(NOISE[1])), ("c.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"path": name}
            archive.addfile(info, io.BytesIO(content))
    assert np.array_equal(open_dataset(tmp_path / "odd.tar").images.permute(0, 2, 3, 1), NOISE[:2])


def test_shards_of_a_range_that_are_missing(shards: Path) -> None:
    with pytest.raises(UserError, match=r"2 of the 6 shards of .* do not exist, such as '.*train-0004.tar'; "):
        open_dataset(f"{shards}/train-{{0000..0005}}.tar")


def test_images_left_in_their_shards(shards: Path) -> None:
    memory, streamed = open_dataset(shards), open_dataset(shards, memory_limit_gib=0, workers=2)
    assert streamed.rows is not None
    order = torch.tensor([9, 0, 5, 5, 2])
    assert torch.equal(streamed.stored(order), memory.images[order])


def test_headers_are_read_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_dataset(shards)

    def refuse(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(tars_module, "tar_members", refuse)
    assert torch.equal(open_dataset(shards).images, expected.images)
    os.utime(shards / "train-0001.tar", ns=(0, 0))
    with pytest.raises(AssertionError, match=r"train-0000.tar"):
        open_dataset(shards)


def test_shards_without_labels(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x/1.png": png(NOISE[1]), "x/0.seg.png": png(NOISE[0]), "x/1.txt": b"words"})
    dataset = open_dataset(path)
    assert dataset.labels is None
    assert np.array_equal(dataset.images[0].permute(1, 2, 0), NOISE[0])


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.0", b"99999999999999999999999", "٣".encode()])
def test_labels_must_be_numbers(tmp_path: Path, text: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": png(NOISE[0]), "1.cls": text})
    with pytest.raises(UserError, match=r"'a.tar/1.cls' in .* holds .*; expected an integer from 0 to 999999; ") as error:
        open_dataset(path)
    assert "\n" not in str(error.value)


def test_some_labels_are_too_few(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": png(NOISE[0]), "1.cls": b"3\n", "2.png": png(NOISE[1])})
    with pytest.raises(UserError, match=r"1 image\(s\) in .* have no label, such as 'a.tar/2.png'; "):
        open_dataset(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("link", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("dev", tarfile.CHRTYPE),
            ("pipe", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(f"{name}.png")
            info.type = kind
            info.linkname = "/etc/passwd"
            archive.addfile(info)
        for name in ("../out.png", "/abs.png", ".hidden.png", "1.png"):
            info = tarfile.TarInfo(name)
            content = png(NOISE[0])
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    dataset = open_dataset(path)
    assert len(dataset) == 2  # abs.png, seen from the root of the tar, and 1.png
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_all_formats(tmp_path: Path, form: int) -> None:
    name = "/".join(["a" * 40] * 3) + "/ü.png"
    path = write_tar(tmp_path / "a.tar", {name: png(NOISE[0])}, format=form)
    assert len(open_dataset(path, memory_limit_gib=0)) == 1


def test_damaged_and_compressed_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(NOISE[i]) for i in range(5)})
    whole = path.read_bytes()
    middle = whole[:2000] + b"\xff" * 700 + whole[2700:]
    for content in (b"", b"no tar at all" * 100, whole[:1500], middle, gzip.compress(whole)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"'.*a.tar' is not a readable tar file .*; .*; ") as error:
            open_dataset(path)
        assert "\n" not in str(error.value)


def test_every_cut_of_a_tar_ends_in_a_data_set_or_a_user_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": png(NOISE[0]), "2.png": png(NOISE[1])})
    whole = path.read_bytes()[:4096]
    refused = 0
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        try:
            assert len(open_dataset(path)) in (1, 2)
        except UserError:
            refused += 1
    assert refused > 20
