"""Writes into plain tensors made inside the call, and the refusal of all others."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from tangent.helpers import check, draw, gradients, reference, relative_error, same
from trigflow.tangent import TangentError, coverage, jvp
from trigflow.tangent.dual import RUN

X, Y = draw(1, 4, 6), draw(2, 4, 6)
DX, DY = draw(3, 4, 6), draw(4, 4, 6)
KEPT = draw(5, 4, 6)
MASK = torch.arange(24).reshape(4, 6) % 3 == 0
ROWS = torch.tensor([2, 0])
WEIGHT = nn.Parameter(draw(6, 4, 6))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (4, 6)), dtype=torch.float64)


def filled(write: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`write(h, y)` into zeros that the function then reads."""

    def fn(x: Any, y: Any) -> Any:
        h = zeros()
        write(h, x)
        return h.sin() * y + F.layer_norm(h, (6,), eps=0.1)

    return fn


def assign(index: Any, value: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def write(h: Any, x: Any) -> None:
        h[index] = value(x)

    return write


WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "mask": assign(MASK, lambda x: x[MASK]),
    "slice": assign(slice(1, 3), lambda x: x[:2]),
    "everything": assign(Ellipsis, lambda x: x),
    "element": assign((0, 1), lambda x: x.sum()),
    "copy_": lambda h, x: h.copy_(x),
    "+=": lambda h, x: h.__iadd__(x),
    "index_add_": lambda h, x: h.index_add_(0, ROWS, x[:2]),
    "index_copy_": lambda h, x: h.index_copy_(0, ROWS, x[:2]),
    "scatter_": lambda h, x: h.scatter_(0, MASK.long(), x),
    "scatter_add_": lambda h, x: h.scatter_add_(1, torch.zeros(4, 6, dtype=torch.long), x),
    "masked_scatter_": lambda h, x: h.masked_scatter_(MASK, x),
    "index_put_": lambda h, x: h.index_put_((ROWS,), x[:2], accumulate=True),
    "fill_": lambda h, x: h.fill_(x[0, 0]),
    "by keyword": lambda h, x: Tensor.add_(h, other=x, alpha=2.0),
    "view": lambda h, x: h[1].copy_(x[0]),
    "view of a view": lambda h, x: assign(slice(1, 3), lambda x: x[0, :2])(h[0], x),
    "transposed": lambda h, x: h.T.copy_(x.T),
    "diagonal": lambda h, x: h.diagonal().copy_(x[:, 0]),
    "twice": lambda h, x: (h[:2].copy_(x[:2]), h[1:].add_(x[1:]), h.mul_(x)),
    "then a constant": lambda h, x: (h.copy_(x), h[0].zero_(), assign(1, lambda x: 2.0)(h, x)),
    "in a loop": lambda h, x: [h[i].copy_(h[i - 1] + x[i]) for i in range(4)],
    "without gradients": torch.no_grad()(lambda h, x: h.copy_(x)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    check(filled(WRITES[name]), (X, Y))
    assert coverage(filled(WRITES[name]), X, Y).complete


MADE: dict[str, Callable[[], Tensor]] = {
    "zeros": zeros,
    "full": lambda: torch.full((4, 6), 2.0, dtype=torch.float64),
    "zeros_like": lambda: torch.zeros_like(KEPT),
    "tensor": lambda: torch.tensor(KEPT.tolist(), dtype=torch.float64),
    "clone": KEPT.clone,
    "clone of a parameter": WEIGHT.clone,
    "function of a parameter": lambda: WEIGHT * 2,
    "function of a constant": lambda: KEPT * 2,
    "view of a fresh tensor": lambda: zeros(24).view(4, 6),
    "in a device context": lambda: zeros(),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_made_inside(name: str) -> None:
    def fn(x: Any) -> Any:
        with torch.device("cpu"):
            y = MADE[name]()
            z, alias = y[1:], y
            y += x
            assert type(alias) is Tensor
        kept = checkpoint(lambda y: (y * x).exp(), alias, use_reentrant=False)
        return kept, z.sum(), alias.mean(0), alias

    check(fn, (X,))
    assert torch._C._len_torch_function_stack() == 0


def test_every_read_sees_the_tangent() -> None:
    """Views taken before and after a write, functions of plain tensors alone, methods, attributes, Python."""

    def fn(x: Any) -> Any:
        y, w = zeros(), KEPT
        early = y[:2]
        y[0][1:3] = x[0, 1:3]
        late = y[0]
        y[3] = x[3]
        late *= 2
        out, _ = F.multi_head_attention_forward(
            *(y[:, None],) * 3, 6, 2, draw(7, 18, 6), None, None, None, False, 0.0, draw(8, 6, 6), None
        )
        rows = torch.stack([row + 1 for row in y]) + len(y)
        assert y.shape == (4, 6)
        assert y.requires_grad is (x.requires_grad and torch.is_grad_enabled())
        return (early * w[:2], late, y.T, y.mT @ w, torch.cat([y, w]), out, rows, y.view(-1)[MASK.view(-1)], late.square())

    check(fn, (X,))


def test_detached_aliases_are_constants() -> None:
    def fn(x: Any) -> Any:
        y = zeros()
        y.copy_(x)
        return y.detach() * y

    assert relative_error(jvp(fn, (X,), (DX,))[1], X * DX) < 1e-15


def test_integers_take_no_tangent() -> None:
    def fn(x: Any) -> Any:
        counts = torch.zeros(4, 6, dtype=torch.long)
        counts[0] = (10 * x)[0]
        counts += (x > 0).long()
        return counts * x

    counts = fn(X) / X
    assert relative_error(jvp(fn, (X,), (DX,))[1], counts * DX) < 1e-14


OUT: dict[str, Callable[[Any, Any], Any]] = {
    "baddbmm": lambda x, y: torch.baddbmm(x[None, :, :4], x[None], y.T[None], beta=0.5, out=zeros(1, 4, 4)),
    "bmm into a view": lambda x, y: torch.bmm(x[None], y.T[None], out=zeros(2, 4, 4)[:1]),
    "sin of itself": lambda x, y: torch.mul((z := x * 1), y, out=z),
    "cat": lambda x, y: torch.cat([x, y], out=zeros(8, 6)),
    "of constants": lambda x, y: torch.mul(KEPT, 2, out=x * 1) + x,
    "comparison": lambda x, y: x * torch.gt(x, 0, out=torch.zeros(4, 6, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", OUT)
def test_out_arguments(name: str) -> None:
    with torch.no_grad():
        out, tangent = jvp(OUT[name], (X, Y), (DX, DY))
        assert torch.equal(out, OUT[name](X, Y))
    h = 1e-6
    with torch.no_grad():
        expected = (OUT[name](X + h * DX, Y + h * DY) - OUT[name](X - h * DX, Y - h * DY)) / (2 * h)
    assert relative_error(tangent, expected) < 1e-8


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", zeros(24).view(4, 6))
        self.weight = nn.Parameter(zeros())
        self.cache = [zeros()]


OUTSIDE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "parameter": lambda x, c, net: net.weight.add_(x),
    "part of a parameter": lambda x, c, net: net.weight[0].add_(x[0]),
    "buffer": lambda x, c, net: net.table.copy_(x) * 0,
    "part of a buffer": lambda x, c, net: net.table[1].copy_(x[0]) * 0,
    "in a list": lambda x, c, net: net.cache[0].copy_(x),
    "constant input": lambda x, c, net: c.copy_(x),
    "of the surroundings": lambda x, c, net: KEPT.index_add_(0, ROWS, x[:2] * 0),
    "out": lambda x, c, net: torch.sin(x, out=c),
    "alias of a parameter": lambda x, c, net: net.weight.detach().add_(x),
    "data of a parameter": lambda x, c, net: net.weight.data[0].add_(x[0]),
    "alias of a buffer": lambda x, c, net: net.table.detach()[1].copy_(x[0]) * 0,
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("gradients", [True, False])
def test_tensors_that_outlive_the_call_are_refused(name: str, gradients: bool) -> None:
    net, fn, kept = Holds(), OUTSIDE[name], KEPT.clone()
    with torch.set_grad_enabled(gradients), pytest.raises(TangentError) as caught:
        jvp(lambda x, c: fn(x, c, net), (X, zeros()), (DX, None))
    message = str(caught.value)
    assert "writes a tangent into a tensor made outside of the call" in message
    assert "expected a tensor made inside the call" in message
    assert message.count(";") == 2
    assert torch._C._len_torch_function_stack() == 0
    assert gc.isenabled()
    assert not any(p.any() for p in (net.weight, net.table, *net.cache))
    assert torch.equal(KEPT, kept)
    assert not coverage(lambda x: fn(x, net.cache[0], net), X).complete


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize(
    "how",
    [
        lambda y: float(y.sum()) * y,
        lambda y: torch.tensor(y),
        lambda y: y.numpy(),
        lambda y: y.tolist(),
        lambda y: y[0, 0].item() * y,
        lambda y: y.data,
        lambda y: y.unsqueeze_(0),
        lambda y: y.view(torch.int64),
        lambda y: torch.vmap(torch.sin)(y),
        lambda y: torch.vmap(lambda row: row * y)(KEPT),
        lambda y: torch.jit.script(nn.Sequential(nn.SiLU(), nn.Linear(6, 6).double()))(y),
        lambda y: (y.detach().add_(1), y)[1],
        lambda y: (y.expand(2, 4, 6).mul_(2), y)[1],
    ],
)
def test_what_would_lose_the_tangent_of_a_plain_tensor_raises(how: Callable[[Any], Any]) -> None:
    def fn(x: Any) -> Any:
        y = zeros()
        y.copy_(x)
        assert type(y) is Tensor
        return how(y)

    with pytest.raises(TangentError):
        jvp(fn, (X,), (DX,))
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_tracing(mode: str) -> None:
    def fn(x: Any, y: Any) -> Any:
        h, out = torch.zeros_like(y), torch.zeros(x.shape[0], 6, dtype=x.dtype)
        h[1:] = x[1:]
        out[0][1:3] = h[1, 1:3]
        out.index_add_(0, torch.arange(2), y[:2] * WEIGHT[:2])
        return out.view(-1).exp(), h @ out.T

    def step(x: Tensor, y: Tensor, dx: Tensor) -> Any:
        return jvp(fn, (x, y), (dx, None))

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(X, Y, DX)
    for a, b in zip(pytree.tree_leaves(graph(Y, X, DY)), pytree.tree_leaves(step(Y, X, DY)), strict=True):
        assert relative_error(a, b) < 1e-14


def test_gradient_checkpointing_around_the_writes() -> None:
    def block(x: Any) -> Any:
        y = zeros()
        y[MASK] = (x * WEIGHT)[MASK]
        y[~MASK] = x[~MASK]
        return y.tanh()

    expected, tangent = jvp(block, (X,), (DX,))
    out, again = jvp(lambda x: checkpoint(block, x, use_reentrant=False), (X,), (DX,))
    assert torch.equal(out, expected)
    assert torch.equal(again, tangent)
    assert all(map(same, gradients(out, [WEIGHT]), gradients(expected, [WEIGHT])))


def test_networks_that_never_write_do_not_meet_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from trigflow.tangent import written

    monkeypatch.setattr(written, "Watch", lambda run: pytest.fail("the mode was entered"))
    net = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.LayerNorm(6)).double()
    jvp(lambda x: net(x) + torch.zeros_like(x) + zeros(), (X,), (DX,))


def test_nothing_outlives_the_call() -> None:
    kept: list[Any] = []

    def fn(x: Any) -> Any:
        y = zeros()
        y[0] = x[0]
        (shadow,) = RUN.get().shadows.values()  # type: ignore[union-attr]
        kept.extend(map(weakref.ref, (y, shadow.tangent, RUN.get().watch)))  # type: ignore[union-attr]
        return y.sum()

    gc.disable()
    try:
        jvp(fn, (X,), (DX,))
        assert not gc.isenabled()
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


def test_a_function_that_collects_garbage_is_refused_writes_into_what_it_made_before() -> None:
    def fn(x: Any, late: bool) -> Any:
        y = zeros()
        gc.collect()
        y = zeros() if late else y
        y += x
        return y

    assert torch.equal(jvp(lambda x: fn(x, True), (X,), (DX,))[1], DX)
    with pytest.raises(TangentError, match="made outside of the call"):
        jvp(lambda x: fn(x, False), (X,), (DX,))


def test_threads() -> None:
    def fn(x: Any) -> Any:
        y = zeros()
        for i in range(4):
            time.sleep(0.001)
            y[i] = x[i].sin()
        return y * x

    expected = jvp(fn, (X,), (DX,))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: jvp(fn, (X,), (DX,)), range(16)):
            assert all(map(torch.equal, found, expected))
    assert gc.isenabled()


class Both(NamedTuple):
    first: Any
    second: Any


def test_in_a_named_tuple() -> None:
    def fn(x: Any) -> Any:
        h = zeros()
        h[0] = x[0].sin()
        return torch.stack(Both(h, KEPT))

    check(
        fn,
        (X,),
        expected=reference(lambda x: torch.stack([x.sin() * (torch.arange(4) == 0)[:, None], KEPT]), (X,), (draw(31, 4, 6),)),
    )
