"""Custom autograd.Functions: their own forward derivative is used, and those without one are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tangent.helpers import check, draw, no_fallback, relative_error
from trigflow.tangent import TangentError, coverage, jvp

X, DX, PLAIN = draw(1, 4, 3), draw(2, 4, 3), draw(3, 4, 3)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] * g  # not the derivative, so that it is known by its number

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * dx


class Scaled(torch.autograd.Function):
    """Two differentiable outputs of two tensors and a number, and one of integers, in the older form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, factor: float) -> Any:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)
        ctx.factor = factor
        order = x.argsort(0)
        ctx.mark_non_differentiable(order)
        return factor * x * w, order, w.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any, h: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return ctx.factor * w * g, ctx.factor * x * g + w.exp() * h, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        product = sum(ctx.factor * (a * b) for a, b in ((w, dx), (x, dw)) if b is not None)
        return product, None, None if dw is None else w.exp() * dw


class Noisy(Square):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x + torch.randn_like(x)


class Counted(Noisy):
    generator = torch.Generator().manual_seed(0)

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x + torch.randn_like(x) + torch.randn(x.shape, generator=Counted.generator, dtype=x.dtype)


class InPlace(Square):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.mul_(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_dirty(*inputs)


class WritesTangent(Square):
    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        return dx.mul_(2)


class Fails(Square):
    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("no such\nluck")


class OfList(Square):
    @staticmethod
    def forward(xs: list[Tensor]) -> Tensor:  # type: ignore[override]
        return xs[0]


def test_the_tangent_is_that_of_the_function_and_the_gradient_its_own() -> None:
    x = X.clone().requires_grad_()
    out, tangent = jvp(lambda x: Square.apply(x), (x,), (DX,))
    assert torch.equal(tangent, 2 * X * DX)
    assert torch.equal(tangent, torch.func.jvp(Square.apply, (X,), (DX,))[1])
    assert type(out.grad_fn).__name__ == "SquareBackward"
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], 3 * X)
    check(Square.apply, (X,))
    no_fallback(Square.apply, X)
    assert coverage(Square.apply, X).rules["torch.autograd.Function.apply"] == 1


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, True)])
def test_several_tensors_in_the_older_form(carry: tuple[bool, bool]) -> None:
    moving = [draw(31 + i, 4, 3) * c for i, c in enumerate(carry)]
    product, later = 0.5 * (PLAIN * moving[0] + X * moving[1]), PLAIN.exp() * moving[1]
    check(
        lambda x, w: Scaled.apply(x, w, 0.5), (X, PLAIN), carry, expected=(product, torch.zeros(4, 3, dtype=torch.int64), later)
    )


def test_a_training_step_through_a_function() -> None:
    """Weights before and after it, activation checkpointing, selective or not, and tangents that go on."""

    def selective() -> Any:
        return create_selective_checkpoint_contexts(lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE)

    class Net(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kind, self.a, self.b = kind, nn.Linear(3, 3), nn.Linear(3, 3)

        def block(self, x: Tensor) -> Tensor:
            return self.b(Square.apply(self.a(x)).sin())

        def forward(self, x: Tensor) -> Tensor:
            if self.kind == "plain":
                return self.block(x)
            more = {"context_fn": selective} if self.kind == "selective" else {}
            return checkpoint(self.block, x, use_reentrant=False, **more)

    reference = Net("plain").double()
    plain = reference(X)
    wanted = torch.autograd.grad(plain.square().mean(), list(reference.parameters()))
    expected = torch.func.jvp(reference, (X,), (DX,))[1]
    for kind in ("plain", "whole", "selective"):
        net = Net(kind).double()
        out, tangent = jvp(net, (X,), (DX,))
        grads = torch.autograd.grad(out.square().mean(), list(net.parameters()))
        assert torch.equal(out, plain)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
        assert relative_error(tangent, expected) < 1e-14
        assert not tangent.requires_grad


def test_random_draws_are_those_of_one_run() -> None:
    torch.manual_seed(0)
    plain, then = Noisy.apply(X), torch.randn(3)
    torch.manual_seed(0)
    out, tangent = jvp(Noisy.apply, (X,), (DX,))
    assert torch.equal(out, plain)
    assert torch.equal(torch.randn(3), then)
    assert torch.equal(tangent, 2 * X * DX)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (Counted, "random draws"),
        (WritesTangent, "writes into its inputs or their tangents"),
        (Fails, "its jvp fails with 'no such luck'"),
    ],
)
def test_what_a_function_cannot_do(function: Any, word: str) -> None:
    with pytest.raises(TangentError, match=rf"test_functions\.{function.__name__} cannot carry a tangent: .*{word}"):
        jvp(lambda x: function.apply(x * 1), (X,), (DX.clone(),))


def test_writes_in_place_and_hidden_tensors_are_refused() -> None:
    with pytest.raises(TangentError, match="InPlace cannot carry a tangent"):
        jvp(lambda x: InPlace.apply(x * 1), (X,), (DX,))
    with pytest.raises(TangentError, match="OfList cannot carry a tangent: its forward runs outside"):
        jvp(lambda x: OfList.apply([x]), (X,), (DX,))
    report = coverage(lambda x: Fails.apply(x) + x.sin(), X)
    assert report.unsupported["torch.autograd.Function.apply"] == 1
    assert report.rules["torch.sin"] + report.rules["torch.Tensor.sin"] == 1
