"""Functions that write in place, all of them and in random compositions with views: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent.helpers import draw
from trigflow.tangent import TangentError, jvp
from trigflow.tangent.inplace import CONSTANT, twin

X, Y = draw(1, 4, 6), draw(2, 4, 6)
DX, DY = draw(3, 4, 6), draw(4, 4, 6)
MASK = torch.arange(24).reshape(4, 6) % 3 == 0
ROWS = torch.tensor([2, 0])

ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    *((), (Y,), (0.3,), (2,), (1, 0), (Y, 0.5), (Y, Y), (MASK, 0.2), (MASK, Y), (0,), (2, 0, 1.0)),
    *((0, ROWS, Y[:2]), (0, ROWS, 0.5), (0, ROWS[:, None].expand(2, 6), Y[:2]), ((ROWS,), Y[:2]), (Y @ Y.T, Y)),
)


def test_every_function_of_tensors_that_writes_is_right_or_raises() -> None:
    """Arguments of many kinds are tried; what runs must agree with the form that returns its result."""
    ran = set()
    for name in sorted(n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_")):
        for args in ARGUMENTS:
            x = X.abs() + 0.1
            try:
                torch.manual_seed(0)
                expected = getattr(x.clone(), name)(*args)
                torch.manual_seed(0)
                out, tangent = jvp(lambda x, n=name, a=args: getattr(x * 1, n)(*a), (x,), (DX,))
            except Exception:
                continue
            assert torch.equal(out.nan_to_num(), expected.nan_to_num()), name
            if name in {*CONSTANT, "copy_"}:
                wanted = torch.zeros_like(x)
            else:
                other = twin(getattr(Tensor, name))
                if other is None:
                    assert name in ("detach_", "requires_grad_")
                    continue
                wanted = jvp(lambda x, f=other, a=args: f(x, *a) * 1.0, (x,), (DX,))[1].double()
            assert torch.allclose(tangent.nan_to_num(), wanted.nan_to_num()), name
            ran.add(name)
    assert len(ran) > 100
    assert not ran & {"t_", "resize_", "set_", "squeeze_", "transpose_", "apply_", "as_strided_"}


# Each takes (a, b), of shape (4, 6), writes somewhere, and returns the next pair.
STEPS: list[Callable[[Any, Any], Any]] = [
    lambda a, b: (a.add_(b), b),
    lambda a, b: (a.mul_(b.tanh()), b),
    lambda a, b: (F.relu(a, inplace=True), b + a),
    lambda a, b: (a.clamp_(-1, 1), b * 1),
    lambda a, b: (a[:2].sin_().repeat(2, 1), b),
    lambda a, b: (a, a[1:3].mul_(b[:2]).repeat(2, 1)),
    lambda a, b: (a, b.T),
    lambda a, b: (a.view(-1)[::2].neg_().repeat(2).view(4, 6), b) if a.is_contiguous() else (a.neg_(), b),
    lambda a, b: (a.masked_fill_(MASK, 0.1), a + b),
    lambda a, b: (b, a.contiguous()),
    lambda a, b: (a[[3, 2, 1, 0]], b.detach().clone()),
    lambda a, b: (a.detach().add_(0.1) * b, b),
    lambda a, b: (b.copy_(a), a),
    lambda a, b: (a.__setitem__(0, b[1]) or a, b),
    lambda a, b: (a.__setitem__((slice(None), 2), 0.5) or a, b),
    lambda a, b: (a.unbind(0)[1].exp_().expand(4, 6), b),
    lambda a, b: (a * 0.5, a),
    lambda a, b: (a, a[:]),
    lambda a, b: (a.diagonal().mul_(2).sum() + b, a),
    lambda a, b: (a.reshape(4, 6), b.zero_() if b.numel() == 24 else b),
]


def _shaped(a: Any) -> Any:
    return a if a.shape == (4, 6) else a.reshape(4, 6)


@pytest.mark.filterwarnings("ignore:Use of masked_fill_ on expanded")
@settings(max_examples=250, derandomize=True, deadline=None)
@given(
    picks=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.booleans()), min_size=2, max_size=8),
    carry=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 1000),
)
def test_compositions_of_writes_and_views_are_right_or_raise(picks: Any, carry: Any, seed: int) -> None:
    def fn(x: Any, y: Any) -> Any:
        a, b = x * 1.0, y * 1.0
        for i, swap in picks:
            a, b = STEPS[i](a, b)
            a, b = _shaped(a), _shaped(b)
            if swap:
                a, b = b, a
        return a * 1.0, b * 1.0, a + b

    x, y = draw(seed, 4, 6), draw(seed + 1, 4, 6)
    try:
        plain = fn(x.clone(), y.clone())
    except RuntimeError:
        return  # PyTorch itself refuses the write
    tangents = tuple(d if c else None for d, c in zip((DX, DY), carry, strict=True))
    try:
        out, tangent = jvp(fn, (x.clone(), y.clone()), tangents)
    except TangentError:
        return
    step = 1e-6
    moved = [fn(*(p + s * (0 if t is None else t) for p, t in zip((x, y), tangents, strict=True))) for s in (step, -step)]
    detached = any(STEPS[i] in (STEPS[10], STEPS[11]) for i, _ in picks)
    for o, p, t, plus, minus in zip(out, plain, tangent, *moved, strict=True):
        assert torch.equal(o, p)
        if not detached:
            assert torch.allclose(t, (plus - minus) / (2 * step), rtol=1e-4, atol=1e-5)
