"""`trigflow sample --from PICTURE`, and mixes on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trigflow.models.model import load

Cli = Callable[..., Any]
GRAY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
MASK = np.zeros((8, 8), dtype=np.uint8)
MASK[2:5, 3:] = 255


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(np.stack([GRAY, 255 - MASK], -1), "LA").save(tmp_path / "clear.png")
    Image.fromarray(GRAY.repeat(4, 0).repeat(2, 1)).save(tmp_path / "wide.webp", lossless=True)
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def drawn(cli: Cli, run: Path, out: Path, *options: object) -> Tensor:
    result = cli("sample", run, "--device", "cpu", "--quiet", "--num", 3, "--out", out, *options)
    assert result.code == 0, result.err
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())]))[:, None]


def test_a_mask_and_transparency_are_one(files: Path, student_folder: Path, cli: Cli) -> None:
    photo = torch.from_numpy(GRAY)[None]
    expected = load(student_folder, "cpu").edit(photo, 3, mask=torch.from_numpy(MASK), labels=3)
    how = ("--labels", 3)
    by_mask = drawn(cli, student_folder, files / "a", "--from", files / "gray.png", "--mask", files / "mask.png", *how)
    by_alpha = drawn(cli, student_folder, files / "b", "--from", files / "clear.png", *how)
    assert torch.equal(by_mask, expected)
    assert torch.equal(by_alpha, expected)
    assert (by_mask[..., torch.from_numpy(MASK == 0)] == photo[..., torch.from_numpy(MASK == 0)]).all()


def test_details_of_a_small_picture(files: Path, student_folder: Path, cli: Cli) -> None:
    Image.fromarray(GRAY[:4, :4]).save(files / "small.png")
    images = drawn(cli, student_folder, files / "a", "--from", files / "small.png", "--keep", 2)
    means = torch.nn.functional.avg_pool2d(images.float(), 2)
    assert (means - torch.from_numpy(GRAY[:4, :4])).abs().max() <= 0.5


def test_the_middle_of_a_larger_picture_is_scaled(files: Path, student_folder: Path, cli: Cli) -> None:
    images = drawn(cli, student_folder, files / "a", "--from", files / "wide.webp", "--strength", 1e-4)
    square = Image.open(files / "wide.webp").convert("L").crop((0, 8, 16, 24)).resize((8, 8), Image.Resampling.LANCZOS)
    assert (images.int() - torch.from_numpy(np.array(square)).int()).abs().max() <= 1


def test_mixes(files: Path, student_folder: Path, cli: Cli) -> None:
    model = load(student_folder, "cpu")
    mixed = drawn(cli, student_folder, files / "a", "--labels", 3, 5, "--weights", 0.25, 0.75)
    assert torch.equal(mixed, model.sample(3, labels={3: 1, 5: 3}))
    moved = drawn(cli, student_folder, files / "b", "--seed", 1, "--toward", 2, 0.5)
    assert torch.equal(moved, model.sample(3, seed=1, toward=(2, 0.5)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "0.5"], "--strength, --mask or --keep without a picture; expected one to begin at; pass --from"),
        (["--from", "gray.png", "--strength", "1.5"], "strength 1.5; expected a number above 0"),
        (["--from", "none.png"], "'none.png': No such file or directory; expected a picture"),
        (["--from", "text.png"], "the picture cannot be read (it is no PNG, JPEG or WebP); expected a whole PNG"),
        (["--from", "gray.png", "--mask", "text.png"], "the mask cannot be read"),
        (["--from", "gray.png", "--mask", "wide.webp"], "a mask of (16, 32) pixels for a picture of (8, 8); expected the same"),
        (["--from", "gray.png", "--keep", "gray"], "keep gray for pictures of shape (1, 8, 8); expected 3 channels"),
        (["--from", "gray.png", "--keep", "0"], "blocks of side 0 for pictures"),
        (["--from", "gray.png", "--keep", "two"], "keep 'two'; expected gray, or a whole number"),
        (["--from", "gray.png", "--keep", "2", "--mask", "mask.png"], "a mask and something to keep inside it"),
        (["--labels", "3", "--weights", "0.5", "0.5"], "2 weights for 1 prompts or labels; expected one for each"),
        (["--weights", "0.5"], "1 weights for 0 prompts or labels"),
        (["--toward", "2", "1.5"], "a share of 1.5 of another noise; expected a number from 0 to 1"),
    ],
)
def test_bad_input_ends_in_one_line(
    options: list[str], words: str, files: Path, student_folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    result = cli("sample", student_folder, "--device", "cpu", "--quiet", *options, "--out", "out.png")
    assert result.code == 2
    assert result.err.startswith("trigflow: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err
    assert not (files / "out.png").exists()
