"""Editing with models: what stays, whatever is drawn, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve.helpers import student, teacher
from trigflow.codecs import Pixels
from trigflow.models.model import Model, load
from trigflow.models.outside import model_of
from trigflow.runtime.errors import UserError
from trigflow.samplers.editing import LUMINANCE

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format1"


class Loud(nn.Module):
    """Draws colours far out of range."""

    takes = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 3 * self.conv(x) * (1 + t[:, None, None, None])


@functools.cache
def colours() -> Model:
    """A student of 8x8 pictures in colours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_of(Loud(), (3, 8, 8), codec=Pixels((3, 8, 8), (0.1, -0.2, 0.3), 0.8), kind="consistency")


KINDS: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "student": (student, {"steps": 3}),
    "segments": (functools.partial(student, segments=4), {}),
    "teacher": (teacher, {"steps": 4}),
    "guided": (teacher, {"steps": 4, "guidance": 2.0, "solver": "dpm++2m"}),
}
DIGIT = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
COLOURS = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:] = True


def means(images: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(images.double(), side)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_outside_the_mask_stays(kind: str) -> None:
    make, how = KINDS[kind]
    drawn = make().edit(DIGIT, 5, mask=MASK, **how)
    assert torch.equal(drawn[..., ~MASK], DIGIT[..., ~MASK].expand(5, 1, -1))
    assert not torch.equal(drawn[0, ..., MASK], drawn[1, ..., MASK])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [2, 4])
def test_the_means_of_blocks_stay(kind: str, side: int) -> None:
    make, how = KINDS[kind]
    low = torch.randint(0, 256, (1, 8 // side, 8 // side), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    drawn = make().edit(low, 4, keep=side, **how)
    assert (means(drawn, side) - low).abs().max() <= 0.5
    assert drawn.float().std((2, 3)).min() > 1


def test_the_means_of_a_whole_picture_stay() -> None:
    drawn = colours().edit(COLOURS, 3, keep=2)
    assert (means(drawn, 2) - means(COLOURS[None], 2)).abs().max() <= 1


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_luminance_stays_where_colours_would_leave_the_range(strength: float) -> None:
    gray = DIGIT.clone()
    gray[0, 0] = torch.tensor([0, 255, 1, 254, 128, 3, 250, 60])
    drawn = colours().edit(gray, 6, keep="gray", strength=strength)
    luminance = (torch.tensor(LUMINANCE, dtype=torch.float64)[:, None, None] * drawn).sum(1, keepdim=True)
    assert (luminance - gray).abs().max() <= 0.5 + 1e-6
    assert (drawn.amax(1).int() - drawn.amin(1).int()).float().mean() > 20
    assert (drawn == 0).any()


def test_colours_are_taken_from_a_picture() -> None:
    weights = torch.tensor(LUMINANCE, dtype=torch.float64)[:, None, None]
    gray = (weights * COLOURS).sum(0, keepdim=True).round().to(torch.uint8)
    assert torch.equal(colours().edit(COLOURS, 2, keep="gray"), colours().edit(gray, 2, keep="gray"))


@pytest.mark.parametrize("kind", KINDS)
def test_strength_goes_from_the_picture_to_sampling(kind: str) -> None:
    make, how = KINDS[kind]
    model = make()
    assert torch.equal(model.edit(DIGIT, 3, strength=1, **how), model.sample(3, **how))
    near, far = (model.edit(DIGIT, 3, strength=strength, **how).int() - DIGIT.int() for strength in (1e-4, 0.7))
    assert near.abs().max() <= 1
    assert far.abs().max() > 20


def test_the_least_strength_keeps_the_known_and_the_picture() -> None:
    for how in ({"mask": MASK}, {"keep": 2}, {}):
        drawn = student().edit(DIGIT, strength=5e-324, **how)
        assert (drawn.int() - (DIGIT if "keep" not in how else drawn).int()).abs().max() <= 1


def test_a_sample_does_not_depend_on_batch_or_number() -> None:
    model = student()
    how: dict[str, Any] = {"mask": MASK, "strength": 0.8, "seed": 3, "labels": 4}
    whole = model.edit(DIGIT, 7, **how)
    for other, place in (
        (model.edit(DIGIT, 7, batch_size=3, **how), slice(0, 7)),
        (model.edit(DIGIT, 2, first=5, **how), slice(5, 7)),
    ):
        assert (whole[place].int() - other.int()).abs().max() <= 1


def test_a_small_picture_on_a_larger_canvas() -> None:
    canvas = F.pad(DIGIT[:, :4, :6], (1, 1, 2, 2))
    mask = F.pad(torch.zeros(4, 6, dtype=torch.uint8), (1, 1, 2, 2), value=255)
    drawn = student().edit(canvas, 2, mask=mask)
    assert torch.equal(drawn[..., 2:6, 1:7], DIGIT[:, :4, :6].expand(2, 1, 4, 6))


def test_latents_outside_the_mask_stay() -> None:
    pytest.importorskip("diffusers", reason="latents are made with diffusers")
    model = load(FIXTURES / "latent", "cpu")
    model.codec = model.codec.with_autoencoder(str(FIXTURES / "vae"))
    photo = torch.randint(0, 256, model.codec.drawn_shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.zeros(photo.shape[1:], dtype=torch.bool)
    mask[:5, :5] = True  # of latents twice as large as pixels, three are in part under it
    latents = model.edit(photo, 2, mask=mask, decode=False)
    known = model.codec.stored(model.codec.seen(photo[None]))
    assert torch.equal(latents[:, :, 3:], known[:, :, 3:].expand(2, -1, -1, -1))
    assert torch.equal(latents[:, :, :, 3:], known[:, :, :, 3:].expand(2, -1, -1, -1))
    assert (latents[:, :, :3, :3] != known[:, :, :3, :3]).all()
    assert model.edit(photo, 2, mask=mask).shape == (2, *photo.shape)
    for keep in ("gray", 2):
        with pytest.raises(UserError, match=f"^keep {keep} for a model of latents; expected a model of pixels; use"):
            model.edit(photo, keep=keep)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"picture": DIGIT.float()}, r"a picture of type torch.float32 \(1, 8, 8\); expected a tensor, uint8 \(c, h, w\); convert"),
    ({"picture": [[0]]}, "a picture of type list; expected a tensor"),
    ({"picture": DIGIT[0]}, r"a picture of type torch.uint8 \(8, 8\); expected a tensor, uint8 \(c, h, w\)"),
    ({"picture": COLOURS}, r"a picture of shape \(3, 8, 8\); expected \(1, 8, 8\); resize it, or convert its channels"),
    ({"picture": DIGIT[:, :4]}, r"a picture of shape \(1, 4, 8\); expected \(1, 8, 8\)"),
    ({"picture": DIGIT[:, :3, :3], "keep": 2}, r"a picture of shape \(1, 3, 3\); expected \(1, 8, 8\) or \(1, 4, 4\)"),
    ({"picture": DIGIT[:, :1, :1].expand(1, 1 << 20, 1 << 20), "keep": 2}, r"a picture of shape \(1, 1048576, 1048576\)"),
    ({"mask": MASK[:4]}, r"a mask of type torch.bool \(4, 8\); expected a tensor, bool or uint8, .*size \(8, 8\); resize"),
    ({"mask": MASK.float()}, "a mask of type torch.float32"),
    ({"mask": [True]}, "a mask of type list"),
    ({"mask": MASK, "keep": 2}, "a mask and something to keep inside it; expected one of them; drop"),
    ({"keep": 3}, r"blocks of side 3 for pictures of shape \(1, 8, 8\); expected a divisor above 1; correct keep"),
    ({"keep": 1}, "blocks of side 1"),
    ({"keep": True}, "keep True; expected gray, or a whole number"),
    ({"keep": "grey"}, "keep 'grey'; expected gray, or a whole number"),
    ({"keep": "gray"}, r"keep gray for pictures of shape \(1, 8, 8\); expected 3 channels; use"),
    ({"strength": 0}, "strength 0; expected a number above 0"),
    ({"strength": 1.5}, "strength 1.5; expected a number above 0"),
    ({"strength": "much"}, "strength is 'much'; expected a number"),
    ({"steps": 0}, "0 sampling steps; expected at least 1"),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_bad_input_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}") as caught:
        student().edit(**{"picture": DIGIT, **given})
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") == 2


def test_other_steps_of_segments_are_refused() -> None:
    with pytest.raises(UserError, match=r"^2 steps for a multistep model of 4 segments; expected 4 steps"):
        student(segments=4).edit(DIGIT, steps=2)


def test_noise_between_seeds() -> None:
    model = student()
    ends = model.sample(3, seed=1), model.sample(3, seed=2)
    for share, end in zip((0.0, 1.0), ends, strict=True):
        assert torch.equal(model.sample(3, seed=1, toward=(2, share)), end)
    between = model.sample(3, seed=1, toward=(2, 0.5))
    assert not torch.equal(between, ends[0])
    assert not torch.equal(between, ends[1])
    with pytest.raises(UserError, match=r"^a share of 2 of another noise; expected a number from 0 to 1; correct"):
        model.sample(1, toward=(2, 2.0))


@pytest.mark.parametrize("make", [student, teacher])
def test_classes_between_classes(make: Callable[[], Model]) -> None:
    model = make()
    assert torch.equal(model.sample(3, labels={3: 1.0, 5: 0.0}), model.sample(3, labels=3))
    between = model.sample(3, labels={3: 1, "5": 3})
    assert torch.equal(between, model.sample(3, labels={3: 0.25, 5: 0.75}))
    assert not torch.equal(between, model.sample(3, labels=5))
    for bad in ({}, {3: -1.0}, {3: True}, {3: float("nan")}):
        with pytest.raises(UserError, match=r"^a mix of labels with the weights"):
            model.sample(1, labels=bad)
    with pytest.raises(UserError, match="labels for an unconditional model"):
        colours().sample(1, labels={3: 1.0})
