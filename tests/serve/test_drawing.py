"""A picture depends on its own order alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serve.helpers import student, teacher
from trigflow.models.model import Model
from trigflow.runtime.errors import UserError
from trigflow.serve.drawing import ModelDrawer, Order, draw_together, mixed_velocity
from trigflow.serve.limits import Limits
from trigflow.serve.noise import NoiseSource
from trigflow.serve.offers import offer_of


def draw(model: Model, *orders: Order) -> list[Tensor]:
    return draw_together(ModelDrawer(model), NoiseSource(model), orders)


@pytest.mark.parametrize(
    ("make", "steps", "guidance"),
    [
        (student, 1, 1.0),
        (student, 2, 1.0),
        (functools.partial(student, segments=4), 4, 1.0),
        (teacher, 3, 1.0),
        (teacher, 3, 2.5),
    ],
)
def test_same_as_sampling(make: Callable[[], Model], steps: int, guidance: float) -> None:
    model = make()
    order = offer_of(model, Limits()).order(seed=4, count=5, steps=steps, guidance=guidance)
    expected = model.sample(5, seed=4, steps=steps, guidance=guidance)
    assert torch.equal(draw(model, order)[0], expected)
    assert len(expected.unique()) > 10


def test_a_picture_does_not_depend_on_its_company() -> None:
    model = student()
    offer = offer_of(model, Limits())
    orders = [
        offer.order(seed=1, count=3, labels=3),
        offer.order(seed=2, count=40, walk=(0.3, 2.0)),
        offer.order(seed=1, count=1, labels={"1": 2.0, "7": 1.0}),
        offer.order(seed=9, count=7, labels=[0, 1]),
    ]
    together = draw(model, *orders)
    reordered = draw(model, *orders[::-1])[::-1]
    for order, images, other in zip(orders, together, reordered, strict=True):
        alone = draw(model, order)[0].int()
        assert images.shape == alone.shape
        for drawn in (images.int(), other.int()):
            difference = (drawn - alone).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.01


def test_a_part_is_the_same_picture() -> None:
    model = student()
    whole = offer_of(model, Limits()).order(seed=3, count=9)
    part = dataclasses.replace(whole, start=6, mixes=(whole.mixes or ())[6:])
    difference = (draw(model, whole)[0][6:].int() - draw(model, part)[0].int()).abs()
    assert difference.max() <= 1


def test_a_mix_is_the_weighed_sum_of_velocities() -> None:
    model = teacher()
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.2])
    guidance = torch.tensor([1.0, 3.0])
    mixes = [((3, 0.7), (5, 0.3)), ((1, 1.0),)]
    v = mixed_velocity(model, mixes, guidance)(x, t)
    at = {c: model.velocity({"label": torch.tensor([c, c])}, guidance)(x, t) for c in (1, 3, 5)}
    expected = torch.stack([0.7 * at[3][0] + 0.3 * at[5][0], at[1][1]])
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(at[3][0], at[5][0], atol=1e-3)


def test_a_mix_of_one_class_is_that_class() -> None:
    model = student()
    offer = offer_of(model, Limits())
    one, same = offer.order(labels=6, count=4), offer.order(labels={"6": 0.2, "8": 0.0}, count=4)
    assert one == same
    assert one.mixes == (((6, 1.0),),) * 4


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"labels": 10}, "label 10"),
        ({"labels": -1}, "label -1"),
        ({"labels": [0, 11]}, "label 11"),
        ({"labels": []}, "empty list"),
        ({"labels": {"10": 1.0}}, "labels: there is no class '10'; expected one of 0, 1"),
        ({"labels": {"1": 0.0}}, "a mix of labels"),
        ({"labels": {"1": -1.0, "2": 3.0}}, "a mix of labels"),
        ({"labels": {"1": float("inf")}}, "a mix of labels"),
        ({"labels": {"1": float("nan")}}, "a mix of labels"),
        ({"labels": {str(c): 1.0 for c in range(5)}}, "a mix of 5 labels"),
        ({"guidance": 1.5}, "guidance 1.5"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 65}, "steps 65"),
    ],
)
def test_orders_that_a_student_does_not_take(bad: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        offer_of(student(), Limits()).order(**bad)  # type: ignore[arg-type]


def test_ranges_of_models() -> None:
    limits = Limits(steps=8, guidance=4.0)
    assert offer_of(teacher(), limits).guidance == (1.0, 4.0)
    assert offer_of(teacher(), limits).steps == (1, 8)
    assert offer_of(student(segments=4), limits).steps == (4, 4)
    assert offer_of(student(segments=4), limits).guidance == (1.0, 1.0)
    with pytest.raises(UserError, match="steps 2 for the student; expected 4"):
        offer_of(student(segments=4), limits).order(steps=2)
