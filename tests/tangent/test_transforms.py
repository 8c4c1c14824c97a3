"""Transforms of PyTorch around jvp and inside it, and TorchScript: refused by name, with the place of the call."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, scan, while_loop  # type: ignore[attr-defined]
from torch._higher_order_ops import map as higher_map  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from tangent.helpers import check, draw, relative_error
from trigflow.tangent import TangentError, coverage, jvp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.compile has no effect"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr"),
]
X, DX = draw(1, 4, 3), draw(2, 4, 3)
PLAIN, ROWS = draw(3, 3), draw(4, 5, 3, 3)
Q = draw(5, 1, 2, 16, 8)


def total(x: Tensor) -> Tensor:
    return x.sin().sum()


INSIDE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "vmap": ("torch.func.vmap", lambda x: torch.vmap(torch.sin)(x)),
    "vmap over rows, x closed over": ("torch.func.vmap", lambda x: torch.vmap(lambda w: F.linear(x, w))(ROWS)),
    "vmap in a checkpoint": (
        "torch.func.vmap",
        lambda x: checkpoint(lambda y: torch.vmap(torch.sin)(y), x, use_reentrant=False),
    ),
    "vmap of grad": ("torch.func.vmap", lambda x: torch.vmap(torch.func.grad(total))(x)),
    "grad": ("torch.func.grad", lambda x: torch.func.grad(total)(x)),
    "grad, x closed over": ("torch.func.grad", lambda x: torch.func.grad(lambda w: total(w * x))(PLAIN)),
    "grad_and_value": ("torch.func.grad_and_value", lambda x: torch.func.grad_and_value(total)(x)),
    "vjp": ("torch.func.vjp", lambda x: torch.func.vjp(torch.sin, x)[1](x)[0]),
    "jvp": ("torch.func.jvp", lambda x: torch.func.jvp(torch.sin, (x,), (x,))[0]),
    "jvp, x closed over": ("torch.func.jvp", lambda x: torch.func.jvp(lambda w: w * x, (PLAIN,), (PLAIN,))[0]),
    "linearize": ("torch.func.linearize", lambda x: torch.func.linearize(torch.sin, x)[0]),
    "jacrev": ("torch.func.jacrev", lambda x: torch.func.jacrev(torch.sin)(x)),
    "jacfwd": ("torch.func.jacfwd", lambda x: torch.func.jacfwd(torch.sin)(x)),
    "hessian": ("torch.func.hessian", lambda x: torch.func.hessian(total)(x)),
    "functionalize": ("torch.func.functionalize", lambda x: torch.func.functionalize(torch.sin)(x)),
    **{
        f"autograd.functional.{name}": (
            f"torch.autograd.functional.{name}",
            lambda x, name=name: getattr(torch.autograd.functional, name)(total, x, *[x] * (name in ("jvp", "hvp", "vhp"))),
        )
        for name in ("vjp", "jvp", "hvp", "vhp", "jacobian", "hessian")
    },
    "cond": ("torch.cond", lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))),
    "while_loop": (
        "while_loop",
        lambda x: while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))[1],
    ),
    "scan": ("scan", lambda x: scan(lambda c, y: (c + y, c * y), x[0], x)[1]),
    "associative_scan": ("associative_scan", lambda x: associative_scan(torch.add, x, 0, combine_mode="generic")),
    "map": ("map", lambda x: higher_map(torch.sin, x)),
    "flex_attention, x in the scores": (
        "flex_attention",
        lambda x: flex_attention(Q, Q, Q, score_mod=lambda s, b, h, i, j: s + x[h, b]),
    ),
    "trace": ("torch.jit.trace", lambda x: torch.jit.trace(torch.sin, x)(x)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_transforms_inside_are_refused_by_name(name: str) -> None:
    transform, fn = INSIDE[name]
    patched = [torch._functorch.vmap, torch._functorch.eager_transforms, torch.autograd.functional]
    before = [dict(vars(module)) for module in patched]
    with pytest.raises(TangentError) as caught:
        jvp(fn, (X,), (DX,))
    message = str(caught.value)
    assert f"{transform} called at {__file__}:" in message
    line = int(message.split(f"{__file__}:")[1].split(";")[0].split(" ")[0])
    lines, first = inspect.getsourcelines(fn)
    assert first <= line < first + len(lines)
    assert "method='finite-difference'" in message
    assert message.count(";") == 2
    assert "\n" not in message
    assert before == [dict(vars(module)) for module in patched]
    report = coverage(fn, X)
    assert not report.complete
    assert any(transform in m for m in report.messages.values())


AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda fn: torch.vmap(fn)(X),
    "grad": lambda fn: torch.func.grad(lambda x: fn(x).sum())(X),
    "vjp": lambda fn: torch.func.vjp(fn, X),
    "jvp": lambda fn: torch.func.jvp(fn, (X,), (DX,)),
    "jacrev": lambda fn: torch.func.jacrev(fn)(X),
    "jacfwd": lambda fn: torch.func.jacfwd(fn)(X),
    "hessian": lambda fn: torch.func.hessian(lambda x: fn(x).sum())(X),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("method", ["exact", "finite-difference"])
def test_jvp_inside_transforms_is_refused_by_name(name: str, method: str) -> None:
    with pytest.raises(TangentError, match=rf"jvp called inside torch\.func\.{name} called at .*test_transforms\.py:\d"):
        AROUND[name](lambda x: jvp(torch.sin, (x,), (torch.ones_like(x),), method=method)[0])
    with pytest.raises(TangentError, match="coverage called inside"):
        AROUND[name](lambda x: (coverage(torch.sin, x), x)[1])


def test_the_transform_itself_as_the_function() -> None:
    with pytest.raises(TangentError, match=rf"torch\.func\.vmap called at {__file__}:\d+; .*; batch by hand"):
        jvp(torch.vmap(torch.sin), (X,), (DX,))


def test_the_module_is_named_with_the_transform() -> None:
    class Batched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(torch.sin)(x)

    with pytest.raises(TangentError, match=r"torch\.func\.vmap called at .* in module 1 \(Batched\)"):
        jvp(nn.Sequential(nn.Identity(), Batched()), (X,), (DX,))


@pytest.mark.parametrize("name", ["vmap", "grad", "hessian", "vmap over rows, x closed over"])
def test_finite_differences_go_through_transforms(name: str) -> None:
    fn = INSIDE[name][1]
    out, tangent = jvp(fn, (X,), (DX,), method="finite-difference")
    assert torch.equal(out, fn(X))
    closer = jvp(fn, (X,), (DX,), method="finite-difference", step=1e-6)[1]
    assert relative_error(tangent, closer) < 1e-7


def test_transforms_of_plain_tensors_inside_are_untouched() -> None:
    def fn(x: Tensor) -> Tensor:
        y = torch.vmap(torch.sin)(ROWS)[0] + torch.func.hessian(total)(PLAIN)
        y = y * torch.autograd.functional.jacobian(total, PLAIN) + torch.cond(PLAIN.sum() > 0, total, total, (PLAIN,))
        return torch.func.functional_call(nn.Linear(3, 3).double(), {"weight": y, "bias": PLAIN}, (x,))

    weight = ROWS[0].sin() - PLAIN.sin().diag()
    check(fn, (X,), expected=draw(31, 4, 3) @ (weight * PLAIN.cos() + total(PLAIN)).T)


def test_a_forward_derivative_around_keeps_its_tangent() -> None:
    with forward_ad.dual_level():
        out, tangent = jvp(torch.sin, (forward_ad.make_dual(X, DX),), (DX,))
        assert torch.equal(forward_ad.unpack_dual(out).tangent, tangent)
    x = X.clone().requires_grad_()
    rows = torch.autograd.functional.jacobian(lambda x: jvp(total, (x,), (DX,))[0], x)
    assert relative_error(rows, X.cos()) < 1e-14


FIRST = """
import sys, torch
from torch.nn.attention.flex_attention import flex_attention
from trigflow.tangent import TangentError, jvp
assert "torch._dynamo" not in sys.modules
x = torch.ones(1, 2, 16, 8)
jvp(flex_attention, (x, x, x), (x, x, x))
try:
    jvp(lambda x: flex_attention(x, x, x, score_mod=lambda s, b, h, i, j: s * x[b, h, i, j]), (x,), (x,))
except TangentError as error:
    assert "flex_attention called at" in str(error), error
else:
    raise AssertionError
graphs = []
torch.compile(torch.cos, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(x)
assert len(graphs) == 1, "compiled code runs again after jvp"
"""


def test_the_first_call_of_the_process_that_loads_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.sin(x) * x


class Gated(nn.Module):
    """TorchScript differentiates the gate as one group, and the sorting by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.a(x))
        h = h * torch.sigmoid(h) + torch.tanh(h)
        return torch.cat([torch.sort(torch.cumprod(x, 0), 0)[0], self.b(h) * h], 1)

    @torch.jit.export
    def twice(self, x: Tensor) -> Tensor:
        return self.a(x) * 2


@pytest.mark.parametrize("repeat", range(3))
def test_torchscript_is_refused(repeat: int) -> None:
    torch.manual_seed(0)
    x, dx = X.float(), DX.float()
    gated = torch.jit.script(Gated())
    for fn in (
        scripted,
        lambda x: x + scripted(x),
        torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.SiLU())),
        nn.Sequential(nn.Linear(3, 3), gated),
        gated,
        gated.twice,
        torch.jit.trace(Gated(), x, check_trace=False),
    ):
        for _ in range(3):
            with pytest.raises(TangentError, match=r"TorchScript.*before torch\.jit\.script.*finite-difference"):
                jvp(fn, (x,), (dx,))
    assert torch.equal(scripted(x), x.sin() * x)


def test_finite_differences_go_through_torchscript() -> None:
    tangent = jvp(scripted, (X,), (DX,), method="finite-difference")[1]
    assert relative_error(tangent, (X.cos() * X + X.sin()) * DX) < 1e-8


def test_traced_modules_are_differentiated() -> None:
    torch.manual_seed(0)
    net = Gated().double()
    traced = torch.jit.trace(net, X)
    for _ in range(3):
        out, tangent = jvp(traced, (X,), (DX,))
        expected = jvp(net, (X,), (DX,))
        assert torch.equal(out, expected[0])
        assert relative_error(tangent, expected[1]) < 1e-14
