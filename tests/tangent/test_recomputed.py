"""Functions that only run a callable again in backward: reentrant checkpointing, and what others wrote for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tangent.helpers import draw, gradients, relative_error, same
from trigflow.tangent import TangentError, coverage, jvp

X, DX = draw(1, 4, 6), draw(2, 4, 6)


class OfInputsAndParameters(torch.autograd.Function):
    """In the manner of the first diffusion models: the callable, the number of its inputs, inputs and parameters."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Any:
        ctx.run, ctx.inputs, ctx.parameters = run, list(args[:length]), list(args[length:])
        with torch.no_grad():
            return ctx.run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            outputs = ctx.run(*[x.view_as(x) for x in inputs])
        found = torch.autograd.grad(outputs, inputs + ctx.parameters, grads, allow_unused=True)
        return None, None, *found


class OfSavedTensors(torch.autograd.Function):
    """Tensors are saved in the proper way; several outputs."""

    @staticmethod
    def forward(ctx: Any, fn: Any, *xs: Any) -> Any:
        assert any(ctx.needs_input_grad) or not torch.is_grad_enabled()
        ctx.fn = fn
        ctx.save_for_backward(*xs)
        ctx.set_materialize_grads(False)
        return fn(*xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        def again(*xs: Tensor) -> Any:
            with torch.enable_grad():
                xs = tuple(x.detach().requires_grad_() for x in xs)
                return xs, ctx.fn(*xs)

        xs, out = again(*ctx.saved_tensors)
        return None, *torch.autograd.grad(out, xs, grads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Dropout(0.3), nn.Linear(6, 6)).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Block, Any], Any]] = {
    "torch": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "torch, in a sequence": lambda net, x: checkpoint_sequential(net.net, 2, x, use_reentrant=True),
    "inputs and parameters": lambda net, x: OfInputsAndParameters.apply(net, 1, x, *net.parameters()),
    "saved": lambda net, x: net(OfSavedTensors.apply(lambda x: x.sin() * x, x)),
    "several outputs": lambda net, x: torch.add(*OfSavedTensors.apply(lambda x, y: (x.sin() * y, y), x, 2 * x)),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("moving", [True, False])
def test_tangents_and_gradients(name: str, moving: bool) -> None:
    net, fn = Block(), WAYS[name]
    if "torch" not in name:
        net.net[2].p = 0.0  # the others draw anew in backward

    def run(x: Tensor, engine: bool) -> tuple[Tensor, Any, list[Tensor | None]]:
        torch.manual_seed(3)
        x = x.clone().requires_grad_(moving)
        out, tangent = jvp(lambda x: fn(net, x * 1), (x,), (DX,)) if engine else (fn(net, x * 1), None)
        inputs = [x, *net.parameters()] if moving else list(net.parameters())
        total = (out * draw(5, *out.shape)).sum()
        if total.requires_grad:
            total.backward()
        found = [p.grad for p in inputs]
        net.zero_grad()
        return out, tangent, found

    out, _, right = run(X, engine=False)
    calls = net.calls
    again, tangent, found = run(X, engine=True)
    assert torch.equal(out, again)
    assert net.calls == 2 * calls
    assert all(map(same, found, right))
    h = 1e-6
    plus, minus = (run(X + s * h * DX, engine=False)[0].detach() for s in (1, -1))
    assert relative_error(tangent, (plus - minus) / (2 * h)) < 1e-7
    assert coverage(lambda x: fn(net, x), X).complete


class Scaled(OfInputsAndParameters):
    """The forward changes the result of the callable."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Any:
        return 2 * OfInputsAndParameters.forward(ctx, run, length, *args)


class Twice(OfInputsAndParameters):
    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Any:
        run(*args[:length])
        return OfInputsAndParameters.forward(ctx, run, length, *args)


class Detached(OfInputsAndParameters):
    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Any:
        return OfInputsAndParameters.forward(ctx, run, length, *args).detach()


class NoRecompute(OfInputsAndParameters):
    """A backward that does not run anything again, such as one that scales the gradient."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *grads


@pytest.mark.parametrize("kind", [Scaled, Twice, Detached, NoRecompute])
def test_others_are_refused(kind: Any) -> None:
    with pytest.raises(TangentError, match=rf"{kind.__name__} cannot carry a tangent"):
        jvp(lambda x: kind.apply(torch.sin, 1, x), (X,), (DX,))
    assert gradients(kind.apply(torch.sin, 1, X), []) == []
