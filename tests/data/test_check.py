"""`trigflow data check`: every kind of fault is found, named and told in one line, and nothing ever crashes it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.tiny import untrained_teacher
from trigflow.cli import main
from trigflow.conditions import Conditioner
from trigflow.data import open_dataset
from trigflow.data.check import check_data
from trigflow.data.findings import Report
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]
Pack = Callable[[Path], Path]
RNG = np.random.Generator(np.random.PCG64(0))


def noise(height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(save: Save) -> Path:
    """Six good images in two classes."""
    for index in range(6):
        path = save(f"{'cats' if index % 2 else 'dogs'}/{index}.png", noise())
    return path.parent.parent


def problems(report: Report) -> list[tuple[str, str]]:
    return [(finding.kind, finding.name) for finding in report.problems]


def notes(report: Report) -> list[str]:
    return [finding.kind for finding in report.notes]


def test_good_data_have_no_problems(photos: Path, pack: Pack) -> None:
    report = check_data(str(pack(photos)))
    assert problems(report) == []
    assert (report.images, report.sizes, report.classes) == (6, {"5x6 RGB": 6}, {"cats": 3, "dogs": 3})


@pytest.mark.parametrize("workers", [0, 2])
def test_mean_and_deviation(save: Save, workers: int) -> None:
    arrays = [noise() for _ in range(5)] + [noise(channels=1)]
    for index, array in enumerate(arrays):
        path = save(f"{index}.png", array)
    pixels = np.stack([np.broadcast_to(a[..., None], (6, 5, 3)) if a.ndim == 2 else a for a in arrays]) / 127.5 - 1.0
    report = check_data(str(path.parent), workers=workers)
    np.testing.assert_allclose(report.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(report.std, pixels.std(axis=(0, 1, 2)), rtol=1e-10)
    assert notes(report) == ["channels"]


FRAMES = [Image.new("RGB", (5, 6), colour) for colour in ("red", "blue")]
BROKEN = {
    "empty.png": (b"", "the file is empty"),
    "text.png": (b"<html>not found</html>", "it is no PNG, JPEG or WebP"),
    "gif.png": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "it is a GIF, and no PNG"),
    "bmp.jpg": (encoded(FRAMES[0], "BMP"), "it is a BMP, and no PNG"),
    "cut.png": (encoded(noise(40, 40))[:900], ""),
    "cut.jpg": (encoded(noise(40, 40), "JPEG")[:900], ""),
    "cut.webp": (encoded(noise(40, 40), "WEBP")[:300], ""),
    "head.png": (encoded(noise())[:8], ""),
    "flipped.png": (encoded(noise()).replace(b"IDAT", b"IDAX"), ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named_with_the_reason(photos: Path, pack: Pack, name: str) -> None:
    content, reason = BROKEN[name]
    (photos / "cats" / name).write_bytes(content)
    report = check_data(str(pack(photos)))
    assert problems(report) == [("corrupt", f"cats/{name}")]
    assert reason in report.problems[0].what
    assert report.problems[0].what
    assert report.images == 7
    assert "\n" not in report.problems[0].text()


STORED = {
    "cmyk.jpg": (encoded(Image.new("CMYK", (5, 6), (9, 80, 7, 1)), "JPEG"), "is CMYK"),
    "palette.png": (encoded(Image.fromarray(noise()).quantize(4)), "has a palette"),
    "clear.png": (encoded(Image.fromarray(noise()).quantize(4), transparency=1), "is transparent"),
    "alpha.webp": (encoded(noise(channels=4), "WEBP"), "is transparent"),
    "sixteen.png": (encoded(RNG.integers(0, 65536, (6, 5), dtype=np.uint16)), "has 16 bits"),
    "moving.webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "is an animation"),
    "moving.png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "is an animation"),
}


@pytest.mark.parametrize("name", STORED)
def test_what_training_copes_with_is_noted(photos: Path, name: str) -> None:
    content, trait = STORED[name]
    (photos / "cats" / name).write_bytes(content)
    report = check_data(str(photos))
    assert problems(report) == []
    assert any(trait in finding.what and finding.name == f"cats/{name}" for finding in report.notes)


def test_pictures_turned_by_their_exif_data_are_noted(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (photos / "cats" / "turned.jpg").write_bytes(encoded(noise(5, 6), "JPEG", exif=exif))
    report = check_data(str(photos))
    assert problems(report) == []
    assert "is turned as its EXIF data say; 1 such image" in report.text()


def test_bombs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cats" / "bomb.png").write_bytes(encoded(Image.new("1", (3000, 3000))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    report = check_data(str(photos))
    assert problems(report) == [("corrupt", "cats/bomb.png")]
    assert "more pixels than are safe" in report.problems[0].what


def test_sizes(photos: Path, save: Save) -> None:
    save("dogs/big.png", noise(9, 9))
    report = check_data(str(photos))
    assert problems(report) == [("size", "dogs/big.png")]
    assert report.problems[0].what == "is 9x9 RGB, most others are 5x6"
    assert report.sizes == {"5x6 RGB": 6, "9x9 RGB": 1}
    assert problems(check_data(str(photos), resize=4)) == []
    for side in (0, 8193):
        with pytest.raises(UserError, match=f"resize {side}; expected a side of 1 to 8192 pixels"):
            check_data(str(photos), resize=side)


def test_duplicates_are_found_by_what_they_show(photos: Path) -> None:
    pixels = Image.open(photos / "cats" / "1.png")
    (photos / "cats" / "again.png").write_bytes(encoded(pixels.copy(), compress_level=0))
    (photos / "dogs" / "1.webp").write_bytes(encoded(pixels.copy(), "WEBP", lossless=True))
    report = check_data(str(photos))
    assert problems(report) == [("duplicate", "cats/again.png"), ("duplicate", "dogs/1.webp")]
    assert report.problems[0].what == "shows the same as 'cats/1.png'"
    assert report.problems[1].what == "shows the same as 'cats/1.png', though of class 'dogs' and not 'cats'"


def test_labels(photos: Path, save: Save) -> None:
    save("root.png", noise())
    assert problems(check_data(str(photos))) == [("labels", str(photos))]
    names = [str(path.relative_to(photos)) for path in sorted(photos.rglob("*.png"))]
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, 3] for name in names]}))
    report = check_data(str(photos))
    assert problems(report) == [("labels", "3")]
    assert report.classes == {"0": 0, "1": 0, "2": 0, "3": 7}
    assert "classes" in notes(report)
    (photos / "dataset.json").write_text("{")
    assert "is not valid JSON" in check_data(str(photos)).problems[0].what
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in names[1:]]}))
    assert "leaves out 1 image(s)" in check_data(str(photos)).problems[0].what


def test_one_colour(save: Save) -> None:
    for level in range(3):
        path = save(f"{level}.png", 100 + level)
    assert problems(check_data(str(path.parent))) == [("contrast", str(path.parent))]


def test_links(photos: Path) -> None:
    (photos / "cats" / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "cats" / "gone.png").symlink_to(photos / "nowhere.png")
    report = check_data(str(photos))
    assert sorted(problems(report)) == [("corrupt", "cats/gone.png"), ("link", "cats/gone.png"), ("link", "cats/loop")]
    assert report.images == 7


def test_other_files_are_counted(photos: Path, pack: Pack) -> None:
    (photos / "readme.txt").write_text("hello")
    (photos / "cats" / "1.tiff").write_bytes(b"")
    report = check_data(str(pack(photos)))
    assert problems(report) == []
    assert [(n.kind, n.name) for n in report.notes if n.kind == "other files"] == [("other files", "cats/1.tiff")]


# Archives ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_zips(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../out.png", "/abs.png", "C:\\abs2.png", "a/1.png", "a/1.png", "new\nline.png"):
            archive.writestr(name, encoded(noise()))
        archive.writestr(zipfile.ZipInfo("a/packed.png"), encoded(noise()), zipfile.ZIP_DEFLATED)
        link = zipfile.ZipInfo("a/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    report = check_data(str(path))
    unsafe = [finding.name for finding in report.problems if finding.kind == "unsafe name"]
    assert unsafe == ["../out.png", "/abs.png", "C:\\abs2.png", "new\nline.png"]
    assert ("repeated name", "a/1.png") in problems(report)
    assert ("link", "a/link.png") in problems(report)
    assert ("corrupt", "a/link.png") in problems(report)
    assert [(n.kind, n.name) for n in report.notes if n.kind == "compressed"] == [("compressed", "a/packed.png")]
    assert "problem: unsafe name: 'new\\nline.png' would lead outside" in report.text()


def test_damaged_and_encrypted_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    contents = {f"{i}.png": encoded(noise()) for i in range(3)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    data = bytearray(path.read_bytes())
    data[data.index(contents["1.png"]) + 50] ^= 0xFF
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    report = check_data(str(path))
    assert problems(report) == [("corrupt", "1.png"), ("corrupt", "2.png")]
    assert report.problems[0].what == "its bytes in the zip are damaged"
    assert "is encrypted" in report.problems[1].what


def test_odd_tars(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name in ("1.png", "../2.png", "/3.png"):
            info = tarfile.TarInfo(name)
            content = encoded(noise())
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, kind in (("dev.png", tarfile.CHRTYPE), ("link.png", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "1.png"
            archive.addfile(info)
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes()[:1000])
    report = check_data(str(folder))
    assert ("shard", "1.tar") in problems(report)
    left_out = {finding.name: finding.what for finding in report.problems if finding.kind == "left out"}
    assert set(left_out) == {"0.tar/dev.png", "0.tar/link.png", "0.tar/pipe"}
    assert "device" in left_out["0.tar/dev.png"]
    assert len([finding for finding in report.problems if finding.kind == "unsafe name"]) == 2
    assert report.images == 2
    (folder / "0.tar").unlink()
    with pytest.raises(UserError, match="is not a readable tar file"):
        check_data(str(folder))


def test_two_hundred_damaged_images_are_no_crash(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    kinds = {"png": ("PNG", {}), "jpg": ("JPEG", {}), "webp": ("WEBP", {"lossless": True}), "PNG": ("PNG", {"optimize": True})}
    sources: dict[str, bytes] = {ending: encoded(noise(30, 30), kind, **options) for ending, (kind, options) in kinds.items()}
    for index in range(200):
        ending = list(sources)[index % 4]
        data = bytearray(sources[ending])
        for _ in range(1 + index % 5):
            data[int(RNG.integers(len(data)))] = int(RNG.integers(256))
        if index % 3 == 0:
            data = data[: int(RNG.integers(len(data)))]
        (folder / f"{index:03d}.{ending}").write_bytes(data)
    report = check_data(str(folder))
    corrupt = [finding for finding in report.problems if finding.kind == "corrupt"]
    assert report.images == 200
    assert 60 <= len(corrupt) < 200
    assert all(finding.what and "\n" not in finding.text() for finding in corrupt)
    for finding in corrupt:
        if "more pixels" in finding.what:
            (folder / finding.name).unlink()  # refused even when skipping
    for limit in (0, 4):
        dataset = open_dataset(folder, skip_corrupt=True, resize=8, memory_limit_gib=limit)
        assert set(dataset.skipped) == {finding.name for finding in corrupt if "more pixels" not in finding.what}


# Latents -------------------------------------------------------------------------------------------------------------


def test_latents(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    latents = np.abs(RNG.normal(size=(5, 8, 4, 4))).astype(np.float32)
    for index, latent in enumerate(latents):
        np.save(folder / f"{index}.npy", latent)
    assert problems(check_data(str(folder))) == []
    np.save(folder / "5.npy", np.full((8, 4, 4), np.nan, dtype=np.float32))
    np.save(folder / "6.npy", -latents[0])
    np.save(folder / "7.npy", latents[0, :, :2])
    np.save(folder / "8.npy", latents[0])
    (folder / "9.npy").write_bytes((folder / "0.npy").read_bytes()[:200])
    report = check_data(str(folder), workers=1)
    assert report.of == "latents"
    assert sorted(problems(report)) == [
        ("corrupt", "5.npy"), ("corrupt", "6.npy"), ("corrupt", "9.npy"), ("duplicate", "8.npy"), ("size", "7.npy"),
    ]  # fmt: skip
    assert len(report.mean) == 8
    (folder / "photo.png").write_bytes(encoded(noise()))
    assert ("mixture", "0.npy") in problems(check_data(str(folder)))


def test_latents_of_other_autoencoders(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    for index, latent in enumerate(np.abs(RNG.normal(size=(4, 32, 1, 3, 5))).astype(np.float32)):
        np.save(folder / f"{index}.npy", latent)
    described = {"vae": {"name": "own", "pixels": "symmetric", "channels": 16}, "class_names": ["cats", "dogs"]}
    content = {"labels": [[f"{i}.npy", i % 2] for i in range(4)], "latents": described}
    (folder / "dataset.json").write_text(json.dumps(content))
    report = check_data(str(folder))
    assert problems(report) == []
    assert report.sizes == {"32 channels of 5x3x1": 4}
    assert report.classes == {"cats": 2, "dogs": 2}
    content["latents"] = {**described, "class_names": ["cats"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    assert problems(check_data(str(folder))) == [("labels", str(folder))]


# Against a run -------------------------------------------------------------------------------------------------------


def run_with(tmp_path: Path, **changes: object) -> Path:
    run = tmp_path / "run"
    run.mkdir(parents=True)
    codec = {
        "kind": "pixels", "shape": [3, 6, 5], "mean": [0.0, 0.0, 0.05], "scale": 0.5 / 0.577, "sigma_data": 0.5,
        **{name: value for name, value in changes.items() if name != "class_names"},
    }  # fmt: skip
    names = changes.get("class_names", ["cats", "dogs"])
    conditioner = Conditioner.of_classes(len(names), names).state()  # type: ignore[arg-type]
    others: dict[str, dict[str, object]] = {name: {} for name in ("process", "network", "sampling", "times", "origin")}
    (run / "model.json").write_text(json.dumps({"format": 2, "conditioner": conditioner, "codec": codec, **others}))
    return run


def test_data_like_those_of_a_run(photos: Path, tmp_path: Path) -> None:
    assert problems(check_data(str(photos), like=run_with(tmp_path))) == []
    other_order = run_with(tmp_path / "other", class_names=["dogs", "cats"])  # they are matched by name
    assert problems(check_data(str(photos), like=other_order)) == []


def test_a_run_that_was_saved_can_be_compared_with(photos: Path, tmp_path: Path) -> None:
    report = check_data(str(photos), like=untrained_teacher().save(tmp_path / "digits"))
    assert {finding.kind for finding in report.problems} == {"unlike"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [3, 8, 8]}, "has the shape (3, 6, 5) where"),
        ({"class_names": ["cats", "birds"]}, "'birds' is not in both"),
        ({"mean": [0.5, 0.5, 0.5], "scale": 1.0}, "expected 0 and 0.5"),
        ({"mean": [0.0, 0.1, 0.0], "scale": 2.0}, "expected 0 and 0.5"),
    ],
)
def test_data_unlike_those_of_a_run(photos: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    report = check_data(str(photos), like=run_with(tmp_path, **changes))
    assert [finding.kind for finding in report.problems] == ["unlike"]
    assert message in report.problems[0].what


def test_a_normalization_that_was_not_measured_says_nothing(photos: Path, tmp_path: Path) -> None:
    symmetric = run_with(tmp_path, mean=[0.0, 0.0, 0.0], scale=1.0)
    assert problems(check_data(str(photos), like=symmetric)) == []


def test_no_run_to_compare_with(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model description .* does not exist"):
        check_data(str(photos), like=tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"does not exist"):
        check_data(str(photos), like=tmp_path)


@pytest.mark.parametrize(("channels", "stored"), [(4, 4), (4, 8), (16, 16), (16, 32), (4, 16)])
def test_latents_like_those_of_a_run(tmp_path: Path, channels: int, stored: int) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    for index, latent in enumerate(np.abs(RNG.normal(size=(64, stored, 3, 5))).astype(np.float32)):
        np.save(folder / f"{index}.npy", latent)
    depth = max(channels, stored // 2)
    described = {"vae": {"name": "own", "pixels": "unit", "channels": depth}, "class_names": ["cats", "dogs"]}
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i % 2] for i in range(64)], "latents": described}))
    vae = {"name": "own", "pixels": "unit", "digest": None, "channels": channels}
    numbers = {"raw_mean": [0.798] * channels, "raw_std": [0.603] * channels, "sigma_data": 0.5, "vae": vae}
    run = run_with(tmp_path, kind="latents", shape=[channels, 3, 5], **numbers)
    found = [finding.what for finding in check_data(str(folder), like=run).problems]
    assert [what[:22] for what in found] == (["has the shape (16, 3, "] if stored == 4 * channels else [])


# The command ---------------------------------------------------------------------------------------------------------


def run_command(*args: object) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_exit_codes_and_text(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("data", "check", photos) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 problems found"
    (photos / "cats" / "x.png").write_bytes(b"")
    assert run_command("data", "check", photos) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"7 images in '{photos}' (folder)"
    assert lines[-2:] == ["problem: corrupt: 'cats/x.png' the file is empty", "1 problem found"]
    for path in (photos / "nowhere", "digits", "hf:"):
        assert run_command("data", "check", path) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("trigflow: error: ")
        assert err.count("\n") == 1


def test_json_and_the_limit(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(4):
        (photos / "cats" / f"x{index}.png").write_bytes(b"")
    assert run_command("data", "check", photos, "--limit", 2) == 1
    assert "problem: corrupt: 2 more" in capsys.readouterr().out
    assert run_command("data", "check", photos, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["problems"]) == 4
    assert facts["problems"][0] == {"kind": "corrupt", "name": "cats/x0.png", "what": "the file is empty"}
    assert torch.tensor(facts["mean"]).shape == (3,)
