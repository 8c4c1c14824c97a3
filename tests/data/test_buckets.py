"""Pictures of many shapes: their sizes, what is kept of each, and training on batches of one size."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from training.tiny import change, differing, state_of, tiny_config
from trigflow.codecs.pixels import count_all, count_values
from trigflow.data import Loader, open_dataset
from trigflow.data.decode import bucket_sizes, nearest_bucket
from trigflow.evaluation.evaluate_model import evaluate_model
from trigflow.models.model import load
from trigflow.networks import EDM2Config
from trigflow.runtime.errors import UserError
from trigflow.training.parallel import Share
from trigflow.training.trainer import Trainer

Save = Callable[..., Path]
Pack = Callable[[Path], Path]
SHAPES = [(30, 18), (20, 20), (18, 30), (27, 25)]
"""Width and height, for a side of 16: 20x12, 16x16 and 12x20 by scaling, and 16x16 by cutting off whole pixels."""


@pytest.fixture
def photos(save: Save) -> Path:
    """Nineteen images of noise in four shapes and two classes, most of them with a caption."""
    rng = np.random.Generator(np.random.PCG64(0))
    for index in range(19):
        width, height = SHAPES[index % 4]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = save(f"{'cats' if index % 2 else 'dogs'}/{index:02d}.png", pixels)
        if index % 3:
            path.with_suffix(".txt").write_text(f"picture {index}")
    return path.parent.parent


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes_are_those_that_are_known() -> None:
    assert bucket_sizes(64) == [(40, 96), (48, 80), (56, 72), (64, 64), (72, 56), (80, 48), (96, 40)]
    # Podell et al. 2023 (SDXL), appendix I, as far as their ratio is at most 2.5.
    sdxl = {(640, 1600), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)}
    assert sdxl <= {*bucket_sizes(1024)}


@pytest.mark.parametrize("side", [1, 2, 7, 8, 16, 24, 32, 48, 96, 128, 256, 384, 512, 1024, 2048])
def test_sizes_have_about_one_area(side: int) -> None:
    step = max(1, min(64, 2 ** int(math.log2(side / 8)))) if side >= 8 else 1
    sizes = bucket_sizes(side)
    assert (side, side) in sizes
    assert len({*sizes}) == len(sizes)
    for width, height in sizes:
        assert (height, width) in sizes
        assert width % step == height % step == 0
        assert max(width, height) <= 2.5 * min(width, height)
        assert side**2 - max(width, height, side) * step < width * height <= side**2 or width == height
    assert nearest_bucket((300, 300), side) == (side, side)
    assert all(nearest_bucket((3 * w, 3 * h), side) == (w, h) for w, h in sizes)


def test_sides_that_are_no_multiple_of_the_step(photos: Path) -> None:
    with pytest.raises(UserError, match=r"resize 100 with buckets; expected a multiple of 8; use --resize 96"):
        open_dataset(photos, resize=100, buckets=True)
    with pytest.raises(UserError, match=r"buckets without resize; .*; add --resize N"):
        open_dataset(photos, buckets=True)
    with pytest.raises(UserError, match=r"buckets for the stream .*; leave out stream=1"):
        open_dataset("hf:somewhere?stream=1", resize=16, buckets=True)


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_cropped_to_the_nearest_size(photos: Path, workers: int) -> None:
    names = sorted(photos.rglob("*.png"))
    expected = []
    for name in names:
        with Image.open(name) as image:
            middle = image.crop((1, 0, 26, 25)) if image.size == (27, 25) else image
            fitted = ImageOps.fit(middle, nearest_bucket(image.size, 16), Image.Resampling.LANCZOS)
            expected.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
    kept = open_dataset(photos, resize=16, buckets=True, workers=workers)
    left = open_dataset(photos, resize=16, buckets=True, memory_limit_gib=0, workers=workers)
    square = open_dataset(photos, resize=16)
    for dataset in (kept, left, kept.subset(torch.arange(18, -1, -2)).subset(torch.arange(9, -1, -1))):
        step = 1 if len(dataset) == 19 else 2
        assert dataset.shape == square.shape == (3, 16, 16)
        for index in range(len(dataset)):
            stored, truth = dataset.stored(torch.tensor([index]))[0], expected[index * step]
            assert stored.shape == truth.shape
            assert torch.equal(stored, truth)
    assert kept.captions is not None
    assert kept.captions.texts == square.captions.texts  # type: ignore[union-attr]
    assert kept.labels is not None
    assert kept.labels.equal(square.labels)  # type: ignore[arg-type]
    chunks = [*left.chunks(4)]
    assert sum(map(len, chunks)) == 19
    assert kept.codec("measured", 0.5) == left.codec("measured", 0.5)
    assert torch.equal(kept.counts, sum(count_values(image[None]) for image in expected))  # type: ignore[attr-defined]
    assert torch.equal(count_all(chunks, 3), kept.counts)  # type: ignore[attr-defined]


def test_a_batch_of_several_sizes_is_an_error(photos: Path) -> None:
    dataset = open_dataset(photos, resize=16, buckets=True)
    with pytest.raises(UserError, match=r"images of 2 sizes in one batch; expected those of one; .*order"):
        dataset.batch(torch.tensor([0, 9]))


def test_readers_ahead_give_the_same_batches(photos: Path) -> None:
    kept, left = (open_dataset(photos, resize=16, buckets=True, memory_limit_gib=limit) for limit in (4, 0))
    order = left.order(4, 0)
    loader = Loader(left, order.indices, 12, workers=2)
    shapes = set()
    for step in range(12):
        indices = order.indices(step)
        batch = loader.read(step, indices)
        assert torch.equal(batch, kept.stored(indices))
        shapes.add(tuple(batch.shape))
    loader.close()
    assert len(shapes) == 3


# Training ------------------------------------------------------------------------------------------------------------


def trainer(photos: Path, folder: Path, resume: bool = False, **changes: Any) -> Trainer:
    settings = {"data.source": str(photos), "data.resize": 16, "data.buckets": True, "data.flip": True, "loop.iterations": 8}
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return Trainer(change(tiny_config(settings), settings), folder, resume=resume, progress=False)


@pytest.mark.parametrize("kind", ["diffusion", "sct"])
def test_a_run_goes_on_exactly_whatever_reads(photos: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"objective.kind": kind}
    whole = trainer(photos, tmp_path / "whole", **changes)
    seen: set[tuple[int, ...]] = set()
    draw = whole.batches.draw
    object.__setattr__(whole.batches, "draw", lambda *args: [batch := draw(*args), seen.add(tuple(batch["x0"].shape))][0])
    whole.run()
    assert seen == {(8, 3, 16, 16), (8, 3, 12, 20), (8, 3, 20, 12)}
    first = trainer(photos, tmp_path / "run", data__memory_gib=0.0, data__workers=1, **changes)
    for _ in range(3):
        first.step()
    first.save_checkpoint()
    first.loader.close()
    (tmp_path / "run" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    second = trainer(photos, tmp_path / "run", resume=True, **changes)
    assert second.iteration == 3
    second.run()
    assert differing(state_of(whole), state_of(second)) == []


def test_shares_of_a_batch_are_the_batch(photos: Path, tmp_path: Path) -> None:
    batches = (made := trainer(photos, tmp_path, loop__accumulate=2)).batches
    for step in range(6):
        indices = made.order.indices(step)
        whole = batches.draw(indices, torch.Generator().manual_seed(step))
        for rank in range(2):
            share = Share(8, 2, 2, rank)
            part = dataclasses.replace(batches, share=share).draw(indices, torch.Generator().manual_seed(step))
            assert all(torch.equal(part[name], whole[name][share.rows()]) for name in whole)


def test_a_model_is_told_captions_and_draws_squares(photos: Path, tmp_path: Path) -> None:
    trainer(photos, tmp_path / "run").run()
    model = load(tmp_path / "run")
    assert model.sample(2, conditions={"text": "picture 1"}).shape == (2, 3, 16, 16)
    assert evaluate_model(model, num=8, steps=2, batch_size=8)["num"] == 8
    bare = trainer(photos, tmp_path / "bare", data__captions=False)
    assert "text" not in bare.network.takes
    with pytest.raises(UserError, match=r"^the run to resume .* data of another mean"):
        trainer(photos, tmp_path / "run", resume=True, data__buckets=False)


def test_a_network_that_cannot_take_the_sizes_says_so(photos: Path, tmp_path: Path) -> None:
    network = EDM2Config(width=8, mult=(1, 1, 1, 1), blocks=1, attention=())
    run = trainer(photos, tmp_path / "run", network=network)
    with pytest.raises(UserError, match=r"images of (12 x 20|20 x 12) for a network of 4 levels"):
        run.run()


@pytest.mark.parametrize("limit", [0, 4])
def test_an_image_that_has_another_size_by_now(photos: Path, limit: int) -> None:
    open_dataset(photos, resize=16, buckets=True)
    path = photos / "dogs" / "02.png"
    before = path.stat()
    Image.fromarray(np.zeros((10, 24, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"'dogs/02.png' in .* has changed since it was indexed \(it is now 24x10\)"):
        list(open_dataset(photos, resize=16, buckets=True, memory_limit_gib=limit).chunks())
