"""The finite difference as a named choice: accuracy by dtype, one plain run, the same draws and buffers in all runs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tangent.helpers import draw, gradients, relative_error, same
from trigflow.tangent import TangentError, jvp

X, DX, T, DT = draw(1, 5, 6), draw(2, 5, 6), draw(3, 5), draw(4, 5)


class Net(nn.Module):
    def __init__(self, p: float = 0.0, batch: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(8) if batch else nn.LayerNorm(8)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.first(x) + torch.cos(t)[:, None])
        return self.last(self.dropout(nn.functional.gelu(h)))


def built(dtype: torch.dtype = torch.float64, **settings: Any) -> Net:
    torch.manual_seed(0)
    return Net(**settings).to(dtype)


def both(net: Any, primals: Any, tangents: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """Output and tangent by finite difference, and the exact tangent from the same random state."""
    torch.manual_seed(7)
    exact = jvp(net, primals, tangents)[1]
    torch.manual_seed(7)
    return (*jvp(net, primals, tangents, method="finite-difference", **settings), exact)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4), (torch.float16, 5e-2), (torch.bfloat16, 0.15)]
)
def test_accuracy(dtype: torch.dtype, tolerance: float) -> None:
    values = tuple(v.to(dtype) for v in (X, T, DX, DT))
    _, tangent, exact = both(built(dtype), values[:2], values[2:])
    assert tangent.dtype == dtype
    assert not tangent.requires_grad
    assert relative_error(tangent.double(), exact.double()) < tolerance


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_accuracy_does_not_depend_on_the_length_of_the_tangent(factor: float) -> None:
    _, tangent, exact = both(built(), (X, T), (factor * DX, factor * DT))
    assert relative_error(tangent, exact) < 1e-9


def test_output_and_gradients_are_those_of_a_plain_run() -> None:
    net = built(p=0.3)
    torch.manual_seed(7)
    x = X.clone().requires_grad_()
    plain = net(x, T)
    state = torch.get_rng_state()
    expected = gradients(plain, [x, *net.parameters()])
    torch.manual_seed(7)
    out, _ = jvp(net, (x, T), (DX, None), method="finite-difference")
    assert torch.equal(out, plain)
    assert torch.equal(state, torch.get_rng_state())
    assert all(same(a, b) for a, b in zip(gradients(out, [x, *net.parameters()]), expected, strict=True))


def test_the_mask_of_dropout_is_the_same_in_every_run() -> None:
    _, tangent, exact = both(built(p=0.5), (X, T), (DX, DT))
    assert relative_error(tangent, exact) < 1e-9


def test_generators_passed_by_name_are_replayed() -> None:
    def fn(x: Tensor, g: torch.Generator) -> Tensor:
        return (x + torch.randn(x.shape, generator=g, dtype=x.dtype)).sin()

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    exact = jvp(fn, (X, seeded()), (DX, None))[1]
    g = seeded()
    tangent = jvp(fn, (X, g), (DX, None), method="finite-difference")[1]
    assert relative_error(tangent, exact) < 1e-9
    once = seeded()
    torch.randn(X.shape, generator=once, dtype=X.dtype)
    assert torch.equal(g.get_state(), once.get_state())


@pytest.mark.parametrize("closure", [False, True])
def test_buffers_are_updated_once(closure: bool) -> None:
    net, plain = built(batch=True).train(), built(batch=True).train()
    plain(X, T)
    fn: Any = (lambda x, t: net(x, t)) if closure else net
    before = dict(net.named_buffers())
    _, tangent = jvp(fn, (X, T), (DX, DT), method="finite-difference")
    for name, buffer in net.named_buffers():
        assert buffer is before[name]
        assert torch.equal(buffer, plain.get_buffer(name))
    assert int(net.norm.num_batches_tracked) == 1
    assert relative_error(tangent, jvp(built(batch=True), (X, T), (DX, DT))[1]) < 1e-8


def test_it_goes_where_no_exact_tangent_can() -> None:
    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    x = X.clone().requires_grad_()
    with pytest.raises(TangentError, match="Cubed"):
        jvp(Cubed.apply, (x,), (DX,))
    out, tangent = jvp(Cubed.apply, (x,), (DX,), method="finite-difference")
    assert relative_error(tangent, 3 * X**2 * DX) < 1e-9
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], 3 * X**2)


def test_outputs_of_any_nesting() -> None:
    def fn(x: Tensor) -> Any:
        return {"a": (x**2, [x.sum()]), "index": x.argmax(), "same": torch.ones(3)}

    out, tangent = jvp(fn, (X,), (DX,), method="finite-difference")
    exact = jvp(fn, (X,), (DX,))[1]
    assert pytree.tree_structure(out) == pytree.tree_structure(tangent)
    for a, b in zip(pytree.tree_leaves(tangent), pytree.tree_leaves(exact), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.double(), b.double()) < 1e-8


def test_the_error_falls_with_the_square_of_the_step() -> None:
    net = built()
    exact = jvp(net, (X, T), (DX, DT))[1]
    errors = [relative_error(jvp(net, (X, T), (DX, DT), method="finite-difference", step=h)[1], exact) for h in (1e-2, 1e-3)]
    assert 50 < errors[0] / errors[1] < 200


def test_a_tangent_of_zero() -> None:
    tangent = jvp(built(), (X, T), (0 * DX, None), method="finite-difference")[1]
    assert not tangent.any()


def test_under_autocast_the_step_follows_the_output() -> None:
    net = built(torch.float32)
    values = tuple(v.float() for v in (X, T, DX, DT))
    exact = jvp(net, values[:2], values[2:])[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, tangent = jvp(net, values[:2], values[2:], method="finite-difference")
    assert out.dtype == tangent.dtype == torch.bfloat16
    assert relative_error(tangent.float(), exact) < 0.2


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "complex-step"}, "expected one of 'exact', 'finite-difference'"),
        ({"method": "exact", "step": 1e-3}, "with the exact method"),
        ({"method": "finite-difference", "step": 0.0}, "expected a positive number"),
        ({"method": "finite-difference", "step": float("nan")}, "expected a positive number"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(TangentError, match=word) as caught:
        jvp(torch.sin, (X,), (DX,), **settings)
    assert str(caught.value).count(";") == 2


@pytest.mark.parametrize(
    ("fn", "primals", "tangents", "word"),
    [
        (torch.sin, (X,), (DX[:2],), "tangent 0"),
        (torch.sin, (torch.arange(3),), (torch.ones(3),), "torch.int64"),
        (lambda x: None, (X,), (DX,), "fn returned None"),
        (lambda x: (x, 3), (X,), (DX,), "int"),
        (lambda x: x.mul_(2), (X.clone(),), (DX,), "wrote into its inputs"),
        (lambda x, c: x * c.mul_(2), (X, X.clone()), (DX, None), "wrote into its inputs"),
        (lambda x: jvp(torch.sin, (X,), (DX,), method="finite-difference")[0] + x, (X,), (DX,), "inside jvp"),
    ],
)
def test_wrong_input(fn: Any, primals: Any, tangents: Any, word: str) -> None:
    method = "exact" if word == "inside jvp" else "finite-difference"
    with pytest.raises(TangentError, match=word):
        jvp(fn, primals, tangents, method=method)


class Out(dict[str, Any]):
    """As model libraries return, in part with more in it than pytree knows."""


@pytest.mark.parametrize("kind", [dict, Out, lambda **items: [tuple(items.values())], lambda **items: defaultdict(list, items)])
def test_outputs_in_containers_of_any_class(kind: Any) -> None:
    def fn(x: Any) -> Any:
        return kind(a=x.sin(), b=kind(c=x.cos(), d=x.argsort()))

    out, tangent, exact = both(fn, (X,), (DX,))
    assert type(tangent) is type(exact) is type(out)
    for found, expected in zip(inside(tangent), inside(exact), strict=True):
        assert torch.allclose(found, expected)


def inside(value: Any) -> list[Tensor]:
    value = value.values() if isinstance(value, dict) else value
    return [value] if isinstance(value, Tensor) else [leaf for v in value for leaf in inside(v)]


def test_keys_that_are_no_names() -> None:
    for method in ("exact", "finite-difference"):
        out, tangent = jvp(lambda x: defaultdict(list, {0: 2 * x}), (X,), (DX,), method=method)
        assert (type(out), list(out), list(tangent)) == (defaultdict, [0], [0])
        assert torch.allclose(tangent[0], 2 * DX)


def test_without_any_numbers_that_move() -> None:
    out, tangent = jvp(lambda i: i + 1, (torch.arange(3),), (None,), method="finite-difference")
    assert out.tolist() == [1, 2, 3]
    assert tangent.tolist() == [0, 0, 0]


def test_buffers_of_modules_that_are_not_registered() -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = [nn.BatchNorm1d(6, dtype=torch.float64)]

        def forward(self, x: Any) -> Any:
            return self.inside[0](x)

    net, expected = Hides(), nn.BatchNorm1d(6, dtype=torch.float64)
    jvp(net, (X,), (DX,), method="finite-difference")
    expected(X)
    for name, buffer in net.inside[0].named_buffers():
        assert torch.equal(buffer, expected.get_buffer(name))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x.sin() * self.calls


@pytest.mark.parametrize("hidden", [False, True])
def test_every_run_finds_the_buffers_of_the_first(hidden: bool) -> None:
    net = Counts()
    fn = (lambda x: net(x) + net(x)) if hidden else net
    _, tangent = jvp(fn, (X,), (DX,), method="finite-difference")
    assert relative_error(tangent, (3 if hidden else 1) * X.cos() * DX) < 1e-8
    assert int(net.calls) == (2 if hidden else 1)
