"""Recurrent layers: PyTorch's kernels for the output, the equations of the cell for the tangent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tangent.helpers import by_jacobian, check, draw, gradients, no_fallback, reference, relative_error, tensors
from trigflow.tangent import jvp

LAYERS: dict[str, Any] = {
    "rnn tanh": nn.RNN,
    "rnn relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
SETTINGS = {"layers": st.integers(1, 2), "both": st.booleans(), "biases": st.booleans(), "projected": st.booleans()}


def layer(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[name](3, 4, **kwargs).double()


def states(name: str, net: Any, batch: int) -> tuple[Tensor, ...]:
    count = net.num_layers * (2 if net.bidirectional else 1)
    shapes = [(count, batch, net.proj_size or net.hidden_size), (count, batch, net.hidden_size)]
    return tuple(draw(5 + i, *shape) for i, shape in enumerate(shapes[: 2 if name == "lstm" else 1]))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    first=st.booleans(),
    carry=st.sampled_from([(True, True), (True, False), (False, True)]),
    **SETTINGS,
)
def test_layers(
    name: str, first: bool, carry: tuple[bool, bool], layers: int, both: bool, biases: bool, projected: bool
) -> None:
    size = {"proj_size": 2} if projected and name == "lstm" else {}
    net = layer(name, num_layers=layers, bidirectional=both, bias=biases, batch_first=first, **size)
    x, hx = draw(1, 2, 5, 3), states(name, net, 2 if first else 5)

    def fn(x: Tensor, *hx: Tensor) -> Any:
        return net(x, hx if name == "lstm" else hx[0])

    check(fn, (x, *hx), (carry[0], *[carry[1]] * len(hx)))
    no_fallback(fn, x, *hx)
    check(net, (x,))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(name=st.sampled_from(sorted(LAYERS)), lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3), **SETTINGS)
def test_packed_sequences(name: str, lengths: list[int], layers: int, both: bool, biases: bool, projected: bool) -> None:
    size = {"proj_size": 2} if projected and name == "lstm" else {}
    net = layer(name, num_layers=layers, bidirectional=both, bias=biases, batch_first=True, **size)

    def fn(x: Tensor) -> Any:
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        out, last = net(packed)
        return pad_packed_sequence(out, batch_first=True)[0], last

    x = draw(2, 3, max(lengths), 3)
    check(fn, (x,), expected=by_jacobian(fn, (x,), (draw(31, *x.shape),)))
    no_fallback(fn, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_of_other_precisions(name: str, dtype: torch.dtype) -> None:
    """In these the CPU runs a kernel without a forward derivative; output and gradients stay its own."""
    exact = layer(name, num_layers=2, bidirectional=True)
    net = layer(name, num_layers=2, bidirectional=True).to(dtype)
    x, dx = draw(1, 6, 2, 3), draw(2, 6, 2, 3)
    expected = reference(exact, (x,), (dx,))
    leaf = x.to(dtype).requires_grad_()
    plain, (out, tangent) = net(leaf), jvp(net, (leaf,), (dx.to(dtype),))
    for a, b, t, e in zip(tensors(out), tensors(plain), tensors(tangent), tensors(expected), strict=True):
        assert torch.equal(a, b)
        assert t.dtype == dtype
        assert relative_error(t.double(), e) < (1e-5 if dtype == torch.float32 else 5e-2)
    inputs = [leaf, *net.parameters()]
    for a, b in zip(gradients(out, inputs), gradients(plain, inputs), strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_autocast(kind: Any) -> None:
    torch.manual_seed(0)
    net = kind(3, 4)
    x, dx = draw(1, 6, 3).float().requires_grad_(), draw(2, 6, 3).float()
    expected = reference(copy.deepcopy(net).double(), (x.detach().double(),), (dx.double(),))
    with torch.autocast("cpu", torch.bfloat16):
        plain, (out, tangent) = net(x), jvp(net, (x,), (dx,))
        again = net(x)
    for a, b, t, e in zip(tensors(out), tensors(plain), tensors(tangent), tensors(expected), strict=True):
        assert torch.equal(a, b)
        assert t.dtype == a.dtype
        assert relative_error(t.double(), e.double()) < 5e-2
    inputs = [x, *net.parameters()]
    wanted = gradients(plain, inputs)
    for one in (out, again):
        for a, b in zip(gradients(one, inputs), wanted, strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_between_layers_keeps_its_mask(dtype: torch.dtype) -> None:
    net = layer("lstm", num_layers=3, dropout=0.5).to(dtype)
    x, dx = draw(1, 6, 2, 3).to(dtype), draw(2, 6, 2, 3).to(dtype)
    torch.manual_seed(7)
    plain = net(x)[0]
    torch.manual_seed(7)
    out, tangent = jvp(lambda x: net(x)[0], (x,), (dx,))
    assert torch.equal(out, plain)
    exact = net.double()
    step = 1e-6
    ends = []
    for sign in (1, -1):
        torch.manual_seed(7)
        ends.append(exact(x.double() + sign * step * dx.double())[0])
    assert relative_error(tangent.double(), (ends[0] - ends[1]) / (2 * step)) < 1e-4


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind: Any) -> None:
    torch.manual_seed(0)
    net = kind(3, 4).double()

    def fn(x: Tensor, h: Tensor, c: Tensor) -> Any:
        return net(x, (h, c) if kind is nn.LSTMCell else h + c)

    for carry in [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]:
        check(fn, (draw(1, 2, 3), draw(2, 2, 4), draw(3, 2, 4)), carry)
    no_fallback(fn, draw(1, 2, 3), draw(2, 2, 4), draw(3, 2, 4))


def test_weights_that_carry_tangents() -> None:
    """Weights computed in the forward, as by a weight normalization that does not store its result."""
    net = layer("gru")
    names = [n for n, _ in net.named_parameters()]

    def fn(x: Tensor, scale: Tensor) -> Any:
        weights = [p.detach() * scale for _, p in net.named_parameters()]
        return torch.gru(x, torch.zeros(1, 2, 4, dtype=x.dtype), weights, True, 1, 0.0, True, False, False)

    assert len(names) == 4
    for carry in [(True, True), (False, True)]:
        check(fn, (draw(1, 5, 2, 3), draw(2).abs()), carry)
