"""torch.compile around jvp and inside it: the uncompiled code runs, with a message and the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tangent.helpers import draw, gradients, same
from trigflow.tangent import coverage, jvp

X, DX = draw(1, 4, 6), draw(2, 4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


def built() -> Net:
    torch.manual_seed(0)
    return Net().double()


def compiled(module: Any, **settings: Any) -> Any:
    return torch.compile(module, backend="eager", **settings)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(net: Net) -> Any:
    return compiled(net)


def in_place(net: Net) -> Any:
    net.compile(backend="eager")
    return net


def block(net: Net) -> Any:
    net.block = compiled(net.block)
    return net


def block_in_one_graph(net: Net) -> Any:
    net.block = compiled(net.block, fullgraph=True)
    return net


def function(net: Net) -> Any:
    return compiled(lambda x: net(x))


def checkpointed(net: Net) -> Any:
    part = compiled(net.block)
    return lambda x: net.last(checkpoint(part, net.first(x), use_reentrant=False))


@pytest.mark.parametrize("wrap", [whole, in_place, block, block_in_one_graph, function, checkpointed])
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_network_gives_the_same_numbers_and_says_so(wrap: Any, warm: bool) -> None:
    plain, net = built(), built()
    expected = jvp(plain, (X,), (DX,))
    wrapped = wrap(net)
    if warm:
        wrapped(X)
    with pytest.warns(UserWarning, match=r"torch\.compile has no effect inside trigflow\.tangent\.jvp"):
        out, tangent = jvp(wrapped, (X,), (DX,))
    assert torch.equal(out, expected[0])
    assert torch.equal(tangent, expected[1])
    grads = gradients(out, list(net.parameters()))
    assert all(same(a, b) for a, b in zip(grads, gradients(expected[0], list(plain.parameters())), strict=True))
    assert all(g is not None for g in grads)


def test_the_message_comes_once_for_each_place() -> None:
    net = compiled(built())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            jvp(net, (X,), (DX,))
    assert len([w for w in seen if "torch.compile has no effect" in str(w.message)]) == 1


def test_compilation_goes_on_outside() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = torch.compile(built(), backend=backend)
    with pytest.warns(UserWarning, match="no effect"):
        jvp(net, (X,), (DX,))
    assert not graphs
    net(X)
    assert len(graphs) == 1


def test_a_compiled_step_with_jvp_in_it() -> None:
    net = built()

    def step(x: Tensor, dx: Tensor) -> Tensor:
        y = x * 2
        out, tangent = jvp(net, (y,), (dx,))
        return (out - tangent).square().mean()

    loss = compiled(step)(X, DX)
    expected = step(X, DX)
    assert torch.allclose(loss, expected, rtol=1e-12)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(grads, wanted, strict=True))


def test_without_compiled_code_there_is_no_message() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jvp(built(), (X,), (DX,))


def test_coverage_of_a_compiled_network() -> None:
    with pytest.warns(UserWarning, match="no effect"):
        report = coverage(compiled(built()), X)
    assert report.complete
    assert report.rules["torch.nn.functional.silu"] == 1
    assert report.rules["torch.nn.functional.linear"] == 3


def test_finite_differences_run_the_compiled_code() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = torch.compile(built(), backend=backend)
    _, tangent = jvp(net, (X,), (DX,), method="finite-difference")
    assert graphs
    assert torch.allclose(tangent, jvp(built(), (X,), (DX,))[1], rtol=1e-6, atol=1e-8)


def test_finite_differences_of_a_function_around_compiled_code() -> None:
    plain, net = (nn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    x, dx = draw(1, 5, 3), draw(2, 5, 3)
    compiled = torch.compile(net, backend="eager")
    _, tangent = jvp(lambda x: compiled(x * 2), (x,), (dx,), method="finite-difference")
    assert torch.allclose(tangent, jvp(lambda x: plain(x * 2), (x,), (dx,))[1], rtol=1e-6, atol=1e-8)
    assert int(net.num_batches_tracked) == 1
    assert torch.equal(net.running_mean, plain.running_mean)
