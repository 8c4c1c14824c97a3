"""Images that do not fit into memory: they are the same images, whatever holds them, and what is remembered of them is true."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trigflow.data import ImageDataset, open_dataset
from trigflow.data import rows as scan_module
from trigflow.data.sources.files import Names, OpenArchives
from trigflow.data.sources.zips import ZipFiles
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]
Pack = Callable[[Path], Path]

RNG = np.random.Generator(np.random.PCG64(0))


@pytest.fixture
def photos(save: Save) -> Path:
    """Nine images of noise in two classes, two of them gray."""
    for index in range(9):
        shape = (6, 5) if index in (0, 4) else (6, 5, 3)
        path = save(f"{'cats' if index % 3 else 'dogs'}/{index}.png", RNG.integers(0, 256, shape, dtype=np.uint8))
    return path.parent.parent


def check_same(streamed: ImageDataset, memory: ImageDataset) -> None:
    assert streamed.rows is not None
    assert memory.rows is None
    assert (len(streamed), streamed.shape, streamed.class_names) == (len(memory), memory.shape, memory.class_names)
    assert (streamed.name, streamed.skipped) == (memory.name, memory.skipped)
    assert streamed.images.shape == (0, *memory.shape)
    assert torch.equal(torch.cat(list(streamed.chunks(4))), memory.images)
    indices = torch.tensor([len(memory) - 1, 0, 0])
    flip = torch.tensor([True, False, True])
    for mine, other in zip(streamed.batch(indices, flip=flip), memory.batch(indices, flip=flip), strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or other is None or torch.equal(mine, other)
    assert streamed.codec("measured", 0.5) == memory.codec("measured", 0.5)


@pytest.mark.parametrize("options", [{}, {"channels": 1}, {"channels": 3}, {"resize": 4}, {"resize": 7, "crop": False}])
def test_images_are_those_of_memory(photos: Path, pack: Pack, options: dict[str, object]) -> None:
    source = pack(photos)
    check_same(
        open_dataset(source, memory_limit_gib=0, **options),  # type: ignore[arg-type]
        open_dataset(source, **options),  # type: ignore[arg-type]
    )


def test_workers_read_the_same(photos: Path) -> None:
    memory = open_dataset(photos)
    assert torch.equal(open_dataset(photos, workers=2).images, memory.images)
    check_same(open_dataset(photos, memory_limit_gib=0, workers=2), memory)


def test_all_gray_stay_gray(save: Save) -> None:
    save("a.png", 3)
    source = save("b.png", 4).parent
    check_same(open_dataset(source, memory_limit_gib=0), open_dataset(source))


def test_what_outgrows_memory_once_it_turns_rgb_is_left(save: Save) -> None:
    for name, value in (("a.png", 3), ("b.png", 4), ("c.png", (1, 2, 3))):
        source = save(name, value).parent
    gib = 3 * 16 / 2**30
    dataset = open_dataset(source, memory_limit_gib=gib)
    assert dataset.rows is not None
    check_same(dataset, open_dataset(source))
    assert open_dataset(source, memory_limit_gib=3 * gib).rows is None


def test_parts(photos: Path) -> None:
    memory, streamed = open_dataset(photos), open_dataset(photos, memory_limit_gib=0)
    chosen = torch.tensor([7, 2, 2, 0])
    part, expected = streamed.subset(chosen), memory.subset(chosen)
    assert torch.equal(next(part.chunks()), expected.images)
    assert part.codec("measured", 0.5) == expected.codec("measured", 0.5)  # and not as all of them
    for mine, other in zip(streamed.split(0.5, 3), memory.split(0.5, 3), strict=True):
        assert torch.equal(next(mine.chunks()), other.images)
        assert mine.labels is not None
        assert other.labels is not None
        assert torch.equal(mine.labels, other.labels)


def test_rows_can_be_sent_to_another_process(photos: Path, pack: Pack) -> None:
    dataset = open_dataset(pack(photos), memory_limit_gib=0)
    assert dataset.rows is not None
    expected = dataset.rows[torch.arange(9)]
    sent = pickle.dumps(dataset.rows)
    assert len(sent) < 3000
    assert torch.equal(pickle.loads(sent)[torch.arange(9)], expected)


@pytest.mark.parametrize("broken", [b"", b"no image at all"])
def test_corrupt_images(photos: Path, pack: Pack, broken: bytes) -> None:
    (photos / "cats" / "1.png").write_bytes(broken)
    source = pack(photos)
    with pytest.raises(UserError, match=r"1 of 9 images in .* corrupt or truncated: 'cats/1.png'; .*--skip-corrupt"):
        open_dataset(source, memory_limit_gib=0)
    check_same(open_dataset(source, memory_limit_gib=0, skip_corrupt=True), open_dataset(source, skip_corrupt=True))


def test_sizes_that_differ(photos: Path, save: Save) -> None:
    save("dogs/9.png", 1, size=(9, 8))
    messages = []
    for limit in (0, 4):
        with pytest.raises(UserError, match=r"'cats/1.png' is 5x6 and 'dogs/9.png' is 9x8") as error:
            open_dataset(photos, memory_limit_gib=limit)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_gigantic_side_is_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="resize 10000; expected a side of 1 to 8192 pixels"):
        open_dataset(photos, resize=10_000, memory_limit_gib=0)


# The index -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each scan decoded."""
    counts: list[int] = []
    original = scan_module._scan

    def counting(decoder: scan_module.Decoder, workers: int, progress: bool) -> scan_module.Arrays:
        counts.append(len(decoder.files))
        return original(decoder, workers, progress)

    monkeypatch.setattr(scan_module, "_scan", counting)
    return counts


def test_the_index_is_built_once(photos: Path, pack: Pack, decoded: list[int], cache: Path) -> None:
    source = pack(photos)
    first = open_dataset(source, memory_limit_gib=0)
    check_same(open_dataset(source, memory_limit_gib=0), open_dataset(source))
    assert decoded == [9]
    assert len(list(cache.rglob("*.npz"))) == 1
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".npz"] == []
    open_dataset(source, memory_limit_gib=0, resize=4)  # other pixels
    assert decoded == [9, 9]
    assert first.counts is not None


def test_a_change_of_the_files_makes_it_anew(photos: Path, save: Save, decoded: list[int], cache: Path) -> None:
    open_dataset(photos, memory_limit_gib=0)
    changes: list[Callable[[], object]] = [
        lambda: save("cats/new.png", RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)),
        lambda: save("cats/new.png", RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)),  # another content
        lambda: (photos / "cats/new.png").rename(photos / "cats/newer.png"),
        lambda: (photos / "cats/newer.png").unlink(),
        lambda: os.utime(photos / "cats/1.png", ns=(0, 0)),
    ]
    for number, change in enumerate(changes, 2):
        change()
        check_same(open_dataset(photos, memory_limit_gib=0), open_dataset(photos))
        assert len(decoded) == number
    assert len(list(cache.rglob("*.npz"))) == 1  # each takes the place of the one before


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda data: data[:200] + b"x" + data[201:], lambda data: b""])
def test_a_damaged_index_is_made_anew(photos: Path, decoded: list[int], cache: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = open_dataset(photos, memory_limit_gib=0)
    (path,) = cache.rglob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    again = open_dataset(photos, memory_limit_gib=0)
    assert again.counts is not None
    assert expected.counts is not None
    assert torch.equal(again.counts, expected.counts)
    assert len(decoded) == 2


def test_what_a_killed_writer_left_in_the_cache_goes(photos: Path, cache: Path) -> None:
    left = cache / "data" / ".0123-abcdefgh.npz"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    open_dataset(photos, memory_limit_gib=0)
    assert not left.exists()
    assert list(cache.rglob("*.npz"))


def test_nothing_breaks_without_a_cache(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIGFLOW_CACHE", str(tmp_path / "file"))
    check_same(open_dataset(photos, memory_limit_gib=0), open_dataset(photos))


# Archives ------------------------------------------------------------------------------------------------------------


def test_names_are_kept_whatever_they_hold() -> None:
    names = ["a.png", "", "ü/é.png", "bad\udcff.png", "x\ny"]
    kept = pickle.loads(pickle.dumps(Names(names)))
    assert list(kept) == names
    assert kept[-1] == "x\ny"
    assert kept[1:3] == names[1:3]
    with pytest.raises(IndexError):
        kept[5]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_files_are_read_where_they_lie(tmp_path: Path, method: int) -> None:
    contents = {f"{i:03d}.png": RNG.integers(0, 256, i * 37, dtype=np.uint8).tobytes() for i in range(20)}
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.extra = b"\x99\x99" + (700).to_bytes(2, "little") + bytes(700)  # longer than what is read on suspicion
            archive.writestr(info, content)
    path.write_bytes(b"something before the zip" + path.read_bytes())
    files = ZipFiles.of(str(path))
    assert [files.read(index) for index in range(20)] == list(contents.values())
    assert files.only([3, 1]).read(0) == contents["003.png"]
    assert (files.find("007.png"), files.find("7.png")) == (7, None)
    spans = files.stored_spans()
    if method == zipfile.ZIP_DEFLATED:
        assert spans is None
    else:
        assert spans is not None
        data = path.read_bytes()
        assert [data[offset : offset + length] for offset, length in spans] == list(contents.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_opens_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    archives = OpenArchives()
    assert archives.read(str(path), 5, 3) == bytes([5, 6, 7])
    mine = archives._open[str(path)]
    child = os.fork()
    if child == 0:  # pragma: no cover
        fine = archives.read(str(path), 7, 1) == b"\x07" and archives._open[str(path)] is not mine
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert archives.read(str(path), 8, 1) == b"\x08"


def test_few_archives_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trigflow.data.sources.files.MOST_OPEN", 2)
    archives = OpenArchives()
    for name in "abcab":
        (tmp_path / name).write_text(name)
        assert archives.read(str(tmp_path / name), 0, 9) == name.encode()
    assert [Path(name).name for name in archives._open] == ["a", "b"]
    assert archives.read(str(tmp_path / "a"), 5, 9) == b""
    with pytest.raises(UserError, match=r"cannot read '.*gone'"):
        archives.read(str(tmp_path / "gone"), 0, 1)
