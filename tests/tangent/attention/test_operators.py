"""Attention as an operator: what a traced step computes, and what the operator promises to a tracer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from tangent.helpers import draw
from trigflow.networks.dit import DiT, DiTConfig
from trigflow.tangent import attention_implementation, jvp
from trigflow.tangent.attention import chunked, operators
from trigflow.tangent.attention.layout import arguments

OPERATOR = torch.ops.trigflow.attention_tangent.default


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_traced_dit_computes_the_same(mode: str) -> None:
    net = DiT(DiTConfig(channels=1, width=16, depth=1, heads=2))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * draw(i, *p.shape, dtype=torch.float32))
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    x, dx = (draw(i, 3, 1, 8, 8, dtype=torch.float32) for i in (1, 2))
    t, dt = draw(3, 3, dtype=torch.float32).abs(), torch.ones(3)

    def step(state: dict[str, Tensor], x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        with attention_implementation("chunked"):
            out, tangent = jvp(lambda x, t: functional_call(net, state, (x, t)), (x, t), (dx, dt))
        return out, tangent.detach()

    graph = make_fx(step, tracing_mode=mode)(state, x, t, dx, dt)
    assert sum(node.target is OPERATOR for node in graph.graph.nodes) == 1
    (out, tangent), (expected, expected_tangent) = graph(state, x, t, dx, dt), step(state, x, t, dx, dt)
    assert torch.equal(out, expected)
    assert torch.equal(tangent, expected_tangent)
    parameters = list(net.parameters())
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (out, expected)), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_graph_computes_the_same() -> None:
    q, dq = draw(1, 2, 2, 9, 4), draw(2, 2, 2, 9, 4)

    def step(q: Tensor, dq: Tensor) -> tuple[Tensor, Tensor]:
        with attention_implementation("chunked"):
            out, tangent = jvp(lambda q: F.scaled_dot_product_attention(q, q.sin(), q.cos()), (q,), (dq,))
        return out, tangent.detach()

    leaves = [q.clone().requires_grad_() for _ in range(2)]
    graph = make_fx(step, tracing_mode="symbolic")(leaves[0], dq)
    values, expected = torch.compile(graph, backend="aot_eager")(leaves[0], dq), step(leaves[1], dq)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y, x in zip((values[0], expected[0]), leaves, strict=True)]
    torch.testing.assert_close(*gradients)


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "self": ((2, 2, 6, 4), (2, 2, 6, 4), {}),
    "grouped": ((2, 4, 6, 4), (2, 2, 3, 4), {"grouped": True}),
    "two axes, causal": ((6, 4), (6, 4), {"causal": True}),
    "broadcast": ((3, 1, 2, 6, 4), (2, 1, 5, 4), {"scale": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_operator_keeps_its_promises(name: str) -> None:
    queries, keys, settings = CASES[name]
    q, k, v = draw(1, *queries), draw(2, *keys), draw(3, *keys[:-1], 5)
    settings = {"causal": False, "scale": None, "grouped": False, **settings}
    given = (q, k, v, q, None, v, None, None, None, *settings.values(), "chunked")
    library.opcheck(OPERATOR, given)
    a = arguments(q, k, v, q, None, v, None, None, settings["scale"], settings["grouped"])
    assert torch.equal(OPERATOR(*given), chunked.attention(a, settings["causal"]))


def test_only_a_traced_run_uses_the_operator() -> None:
    assert not operators.traced()
    seen = []
    make_fx(lambda x: (seen.append(operators.traced()), x + 1)[1])(torch.ones(2))
    assert seen == [True]
    assert not operators.traced()
