"""Folders, and zips where they are alike: what is read, in which order, and every fault."""

from __future__ import annotations

import builtins
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trigflow.data import open_dataset
from trigflow.data import rows as rows_module
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]
Pack = Callable[[Path], Path]


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


# What is read ------------------------------------------------------------------------------------------------------


def test_flat_images_are_unlabelled_and_sorted(photos: Path, save: Save, pack: Pack) -> None:
    for name, level in [("b.png", 2), ("a.jpg", 1), ("c.WEBP", 3), ("d.JPEG", 4)]:
        save(name, level * 50, lossless=True)
    (photos / "notes.txt").write_text("not an image")
    dataset = open_dataset(pack(photos))
    assert dataset.images.dtype == torch.uint8
    assert dataset.shape == (3, 4, 4)  # WebP has no grayscale
    assert (dataset.images[:, 0, 0, 0].int() - torch.tensor([50, 100, 150, 200])).abs().max() <= 1
    assert dataset.labels is None
    assert dataset.class_names == ()
    assert dataset.skipped == ()
    assert dataset.name in ("photos", "photos.zip")


def test_order_does_not_depend_on_the_file_system(photos: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    for level, name in enumerate(["a/1.png", "a/2.png", "a-b/1.png", "b/1.png", "b/x/1.png"]):
        save(name, level)
    expected = open_dataset(photos)
    assert expected.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]

    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self) -> list[os.DirEntry[str]]:
            return sorted(self.entries, key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    again = open_dataset(photos)
    assert torch.equal(again.images, expected.images)
    assert again.class_names == expected.class_names


def test_hidden_files_are_ignored(photos: Path, save: Save, pack: Pack) -> None:
    save("cats/1.png", 7)
    for name in (".DS_Store", "cats/.hidden.png", "._1.png", "__MACOSX/cats/._1.png", "__MACOSX/2.png", ".git/3.png"):
        path = photos / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"junk")
    dataset = open_dataset(pack(photos))
    assert len(dataset) == 1
    assert dataset.class_names == ("cats",)


def test_a_hidden_folder_can_itself_be_the_data(tmp_path: Path, save: Save) -> None:
    save("1.png", 7)
    (tmp_path / "photos").rename(tmp_path / ".cache")
    assert len(open_dataset(tmp_path / ".cache")) == 1


def test_gray_stays_gray_only_when_all_are(photos: Path, save: Save, pack: Pack) -> None:
    save("1.png", 10)
    save("2.png", 20)
    assert open_dataset(pack(photos)).channels == 1
    save("3.png", (1, 2, 3))
    save("4.png", 40)
    mixed = open_dataset(pack(photos))
    assert mixed.images[:, :, 0, 0].tolist() == [[10] * 3, [20] * 3, [1, 2, 3], [40] * 3]
    assert open_dataset(pack(photos), channels=1).images[:, :, 0, 0].tolist() == [[10], [20], [2], [40]]


def test_channels_can_be_forced_up(photos: Path, save: Save) -> None:
    save("1.png", 10)
    assert open_dataset(photos, channels=3).images[:, :, 0, 0].tolist() == [[10] * 3]


def test_links_are_followed_and_loops_are_not(photos: Path, save: Save) -> None:
    save("cats/1.png", 7)
    (photos / "dogs").symlink_to(photos / "cats", target_is_directory=True)
    (photos / "cats" / "loop").symlink_to(photos, target_is_directory=True)
    dataset = open_dataset(photos)
    assert len(dataset) == 2
    assert dataset.class_names == ("cats", "dogs")


def test_reading_changes_nothing_in_the_folder(photos: Path, save: Save, pack: Pack, tmp_path: Path) -> None:
    save("cats/1.png", 7)
    save("dogs/2.jpg", (1, 2, 3))
    (photos / "dogs" / "broken.png").write_bytes(b"junk")
    source = pack(photos)

    def state() -> dict[str, tuple[int, str]]:
        return {
            str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
            for path in tmp_path.rglob("*")
        }

    before = state()
    open_dataset(source, resize=2, skip_corrupt=True)
    assert state() == before


def test_files_that_arrive_during_the_reading_are_left_out(photos: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save("1.png", 1)
    save("2.png", 2)
    decode = rows_module.decode

    def decode_and_write(data: bytes, name: str, **options: object) -> torch.Tensor:
        save("0.png", 0)
        save("3.png", 3)
        return decode(data, name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rows_module, "decode", decode_and_write)
    assert open_dataset(photos).images[:, 0, 0, 0].tolist() == [1, 2]


def test_the_bar_counts_images_only_when_asked(photos: Path, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    save("1.png", 1)
    save("2.png", 2)
    open_dataset(photos)
    assert capsys.readouterr() == ("", "")
    open_dataset(photos, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


# Sizes -------------------------------------------------------------------------------------------------------------


def test_mixed_sizes_need_resize(photos: Path, save: Save, pack: Pack) -> None:
    save("a.png", 1, size=(4, 6))
    save("b.png", 2, size=(4, 6))
    save("c.png", 3, size=(6, 4))
    source = pack(photos)
    with pytest.raises(UserError) as error:
        open_dataset(source)
    message = one_line(error)
    assert "'a.png' is 4x6 and 'c.png' is 6x4" in message
    assert "--resize N" in message
    for crop in (True, False):
        dataset = open_dataset(source, resize=3, crop=crop)
        assert dataset.shape == (1, 3, 3)
        assert dataset.images[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_sizes_are_compared_after_the_exif_rotation(photos: Path, save: Save) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save("a.png", 1, size=(4, 6))
    save("b.png", 2, size=(6, 4), exif=exif)
    assert open_dataset(photos).shape == (1, 6, 4)


def test_equal_sizes_need_not_be_square(photos: Path, save: Save) -> None:
    save("a.png", 1, size=(4, 6))
    dataset = open_dataset(photos)
    assert (dataset.height, dataset.width) == (6, 4)


@pytest.mark.parametrize("resize", [0, -8])
def test_resize_below_one_is_refused(photos: Path, save: Save, resize: int) -> None:
    save("a.png", 1)
    with pytest.raises(UserError, match=f"resize {resize}; expected a side of 1 to 8192 pixels") as error:
        open_dataset(photos, resize=resize)
    one_line(error)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_only_one_or_three_channels_can_be_asked_for(photos: Path, save: Save, channels: int) -> None:
    save("a.png", 1)
    with pytest.raises(UserError, match=rf"{channels} channels; expected 1 \(grayscale\) or 3 \(RGB\)") as error:
        open_dataset(photos, channels=channels)
    one_line(error)


def test_the_memory_limit_is_kept(photos: Path, save: Save, pack: Pack) -> None:
    save("a.png", 1, size=(8, 8))
    save("b.png", 1, size=(8, 8))
    source = pack(photos)
    gray = 2 * 64 / 2**30

    def in_memory(**options: object) -> bool:
        return open_dataset(source, **options).rows is None  # type: ignore[arg-type]

    assert in_memory(memory_limit_gib=gray)
    assert not in_memory(memory_limit_gib=gray * 0.99)
    assert in_memory(memory_limit_gib=gray / 4, resize=4)
    assert not in_memory(memory_limit_gib=gray, channels=3)
    save("c.png", (1, 2, 3), size=(8, 8))
    source = pack(photos)
    assert not in_memory(memory_limit_gib=gray * 2)
    assert in_memory(memory_limit_gib=gray * 4.5)


def test_a_gigantic_resize_is_refused_before_it_is_tried(photos: Path, save: Save) -> None:
    save("a.png", 1)
    with pytest.raises(UserError, match=r"resize 1000000; expected a side of 1 to 8192 pixels; ") as error:
        open_dataset(photos, resize=1_000_000)
    one_line(error)


# Faulty images -----------------------------------------------------------------------------------------------------


def with_broken(photos: Path, save: Save, broken: int) -> None:
    """Two good images in two classes, and some broken ones, all but the first of them cut short."""
    save("cats/1.png", 10)
    save("dogs/9.png", 90)
    good = save("cats/2.png", np.arange(256, dtype=np.uint8).reshape(16, 16)).read_bytes()
    (photos / "cats/2.png").unlink()
    for index in range(broken):
        (photos / f"cats/broken{index}.png").write_bytes(good[: len(good) // 2] if index else b"no image at all")


@pytest.mark.parametrize(
    ("broken", "listed"),
    [
        (1, "1 of 3 images in .* corrupt or truncated: 'cats/broken0.png'; "),
        (3, "3 of 5 .*: 'cats/broken0.png', 'cats/broken1.png', 'cats/broken2.png'; "),
        (4, "4 of 6 .*: 'cats/broken0.png', 'cats/broken1.png', 'cats/broken2.png', ...; "),
    ],
)
def test_corrupt_images_are_named(photos: Path, save: Save, pack: Pack, broken: int, listed: str) -> None:
    with_broken(photos, save, broken)
    with pytest.raises(UserError, match=listed) as error:
        open_dataset(pack(photos))
    assert "--skip-corrupt" in one_line(error)


def test_corrupt_images_can_be_skipped(photos: Path, save: Save, pack: Pack) -> None:
    with_broken(photos, save, 2)
    dataset = open_dataset(pack(photos), skip_corrupt=True)
    assert dataset.skipped == ("cats/broken0.png", "cats/broken1.png")
    assert dataset.images[:, 0, 0, 0].tolist() == [10, 90]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1]


def test_skipped_images_have_no_say_in_size_and_colour(photos: Path, save: Save) -> None:
    save("b.png", 10)
    whole = save("a.png", np.zeros((50, 50, 3), dtype=np.uint8)).read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) // 2])
    dataset = open_dataset(photos, skip_corrupt=True)
    assert dataset.skipped == ("a.png",)
    assert dataset.shape == (1, 4, 4)


def test_a_class_of_only_corrupt_images_keeps_its_number(photos: Path, save: Save) -> None:
    save("b/1.png", 10)
    (photos / "a").mkdir()
    (photos / "a" / "1.png").write_bytes(b"junk")
    dataset = open_dataset(photos, skip_corrupt=True)
    assert dataset.class_names == ("a", "b")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1]


@pytest.mark.parametrize("skip_corrupt", [True, False])
def test_all_corrupt_is_an_error_of_its_own(photos: Path, pack: Pack, skip_corrupt: bool) -> None:
    for index in range(4):
        (photos / f"{index}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"all 4 images in .*: '0.png', '1.png', '2.png', \.\.\.; ") as error:
        open_dataset(pack(photos), skip_corrupt=skip_corrupt)
    assert "--skip-corrupt" not in one_line(error)


def test_bombs_are_refused_even_when_skipping(photos: Path, save: Save, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png", 1, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"'a.png' has more pixels than are safe") as error:
        open_dataset(pack(photos), skip_corrupt=True)
    one_line(error)


def test_names_with_line_breaks_stay_on_one_line(photos: Path, save: Save) -> None:
    save("a.png", 1)
    (photos / "b\nc.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"b\\nc.png") as error:
        open_dataset(photos)
    one_line(error)


# Faulty folders ----------------------------------------------------------------------------------------------------


def test_an_empty_folder_names_the_endings(photos: Path, pack: Pack) -> None:
    (photos / "notes.txt").write_text("nothing here")
    (photos / "old.bmp").write_bytes(b"")
    with pytest.raises(UserError, match=r"no images found in .*; expected files ending in .png, .jpg, .jpeg, .webp; ") as error:
        open_dataset(pack(photos))
    one_line(error)


def refuse(monkeypatch: pytest.MonkeyPatch, module: object, function: str, ending: str) -> None:
    """Let a function deny access to paths of this ending: root, who may run the tests, is denied nothing by chmod."""
    original = getattr(module, function)

    def guarded(path: str, *args: object, **options: object) -> object:
        if str(path).endswith(ending):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(module, function, guarded)


@pytest.mark.parametrize(
    ("module", "function", "ending"), [(builtins, "open", "1.png"), (os, "scandir", "cats"), (os, "scandir", "photos")]
)
@pytest.mark.parametrize("skip_corrupt", [True, False])
def test_what_may_not_be_read_is_named(
    photos: Path, save: Save, monkeypatch: pytest.MonkeyPatch, module: object, function: str, ending: str, skip_corrupt: bool
) -> None:
    save("cats/1.png", 1)
    refuse(monkeypatch, module, function, ending)
    with pytest.raises(UserError, match=rf"cannot read '.*{ending}' \(Permission denied\)") as error:
        open_dataset(photos, skip_corrupt=skip_corrupt)
    assert "check the path and its permissions" in one_line(error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["cats/1.png", "cats", "."])
def test_permissions_of_the_file_system_are_reported(photos: Path, save: Save, name: str) -> None:
    save("cats/1.png", 1)
    target = photos / name
    mode = target.stat().st_mode
    target.chmod(0)
    try:
        with pytest.raises(UserError, match="Permission denied") as error:
            open_dataset(photos)
    finally:
        target.chmod(stat.S_IMODE(mode))
    one_line(error)


def test_a_dangling_link_is_not_passed_over(photos: Path, save: Save) -> None:
    save("a.png", 1)
    (photos / "b.png").symlink_to(photos / "gone.png")
    with pytest.raises(UserError, match=r"cannot read '.*b.png' \(No such file"):
        open_dataset(photos)
