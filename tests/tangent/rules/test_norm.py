"""Normalization layers, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tangent.helpers import check, draw, no_fallback, reference
from trigflow.tangent import TangentError, jvp

NORMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b, 1e-3), ((3, 4, 5, 2), (4,), (4,))),
    "group_norm 3d": (lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 4, 7), (4,), (4,))),
    "group_norm flat": (lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 4), (4,), (4,))),
    "group_norm 5d": (lambda x: F.group_norm(x, 4), ((2, 4, 3, 2, 2),)),
    "torch.group_norm": (lambda x, w, b: torch.group_norm(x, 2, w, b, 1e-3), ((3, 4, 5), (4,), (4,))),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), ((2, 3, 4), (4,), (4,))),
    "layer_norm axes": (lambda x, w, b: F.layer_norm(x, (3, 4), w, b, eps=1e-3), ((2, 3, 4), (3, 4), (3, 4))),
    "layer_norm plain": (lambda x: F.layer_norm(x, (4,)), ((2, 3, 4),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), ((2, 3, 4), (4,))),
    "rms_norm axes": (lambda x, w: F.rms_norm(x, (3, 4), w, eps=1e-3), ((2, 3, 4), (3, 4))),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), ((6, 3, 2, 2), (3,), (3,))),
    "batch_norm flat": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3), (3,), (3,))),
    "batch_norm eval": (
        lambda x, w, b: F.batch_norm(
            x, torch.arange(3, dtype=x.dtype), torch.arange(1, 4, dtype=x.dtype), w, b, False, 0.1, 1e-3
        ),
        ((6, 3, 2), (3,), (3,)),
    ),
    "torch.batch_norm": (
        lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-3, False),
        ((6, 3, 2), (3,), (3,)),
    ),
    "torch.instance_norm": (
        lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-3, False),
        ((2, 3, 5), (3,), (3,)),
    ),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), ((2, 3, 4, 4), (3,), (3,))),
    "instance_norm eval": (
        lambda x: F.instance_norm(x, torch.arange(3, dtype=x.dtype), torch.arange(1, 4, dtype=x.dtype), use_input_stats=False),
        ((2, 3, 4),),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalizations(name: str) -> None:
    fn, shapes = NORMS[name]
    values = tuple(draw(60 + i, *shape) for i, shape in enumerate(shapes))
    for bits in range(1, 2 ** len(shapes)):
        check(fn, values, tuple(bool(bits >> i & 1) for i in range(len(shapes))))
    no_fallback(fn, *values)


@pytest.mark.parametrize("name", [n for n in NORMS if len(NORMS[n][1][0]) == 4])
def test_normalizations_of_strided_inputs(name: str) -> None:
    fn, shapes = NORMS[name]
    rest = tuple(draw(61 + i, *shape) for i, shape in enumerate(shapes[1:]))
    x = draw(60, *shapes[0])
    last = x.contiguous(memory_format=torch.channels_last)
    wide = draw(60, *shapes[0][:-1], 2 * shapes[0][-1])
    # torch.func.jvp cannot take group_norm of these layouts; the packed input has the same values.
    for layout in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.mT.contiguous().mT):
        tangents = tuple(draw(31 + i, *v.shape) for i, v in enumerate((x, *rest)))
        check(fn, (layout(x), *rest), expected=reference(fn, (x, *rest), tangents))
    sliced = lambda v, *r: fn(v[..., ::2], *r)  # noqa: E731
    packed = lambda v, *r: fn(v[..., ::2].contiguous(), *r)  # noqa: E731
    tangents = tuple(draw(31 + i, *v.shape) for i, v in enumerate((wide, *rest)))
    check(sliced, (wide, *rest), expected=reference(packed, (wide, *rest), tangents))
    assert last.shape == x.shape


def test_batch_norm_updates_its_buffers_once() -> None:
    plain, engine = torch.nn.BatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    x = draw(9, 6, 3)
    plain(x)
    jvp(engine, (x,), (x,))
    assert torch.equal(plain.running_mean, engine.running_mean)
    assert torch.equal(plain.running_var, engine.running_var)
    assert int(engine.num_batches_tracked) == 1
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    jvp(lambda x: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False), (x,), (x,))
    assert torch.equal(plain.running_mean, mean)
    assert torch.equal(plain.running_var, var)
    # These have no rule, and a second run for the tangent would update the buffers again.
    for function in (torch.native_batch_norm, torch.ops.aten._native_batch_norm_legit):
        with pytest.raises(TangentError, match="updates its buffers"):
            jvp(lambda x: function(x, None, None, mean, var, True, 0.1, 1e-5)[0], (x,), (x,))  # noqa: B023
    with pytest.raises(TangentError, match="updates its buffers"):
        jvp(lambda x: torch.batch_norm_update_stats(x, mean, var, 0.1)[0], (x,), (x,))
    assert torch.equal(plain.running_mean, mean)
