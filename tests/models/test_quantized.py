"""Linear layers in few bits compute with the weight that they read back, and adapters are trained beside them."""

import copy

import pytest
import torch
from torch import nn

from trigflow.models.foreign.quantized import KINDS, QuantizedLinear, quantize
from trigflow.tangent import jvp

BITS = {"int8": 8, "fp8": 8, "nf4": 4}
ERRORS = {"int8": 0.005, "fp8": 0.04, "nf4": 0.12}


def layer(seed=0, rows=48, columns=80, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_near_and_small(kind, dtype):
    plain = layer(dtype=dtype)
    few = QuantizedLinear(plain, kind)
    assert few.weight.dtype == dtype
    error = (few.weight.float() - plain.weight.float()).norm() / plain.weight.float().norm()
    assert error < ERRORS[kind] + (0.004 if dtype == torch.bfloat16 else 0)
    stored = few.stored.numel() * few.stored.element_size()
    assert 8 * stored == pytest.approx(BITS[kind] * plain.weight.numel(), rel=0.02)
    assert not [name for name, _ in few.named_parameters() if name != "bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_tangents_are_those_of_the_weight_read_back(kind):
    few = QuantizedLinear(layer(), kind)
    read = nn.Linear(80, 48)
    read.load_state_dict({"weight": few.weight, "bias": few.bias.detach()})
    x, dx = torch.randn(5, 80, requires_grad=True), torch.randn(5, 80)
    y, dy = jvp(few, (x,), (dx,))
    expected, dexpected = jvp(read, (x,), (dx,))
    assert torch.equal(y, expected)
    assert torch.equal(dy, dexpected)
    (grad,) = torch.autograd.grad(few(x).square().sum(), x)
    assert torch.equal(grad, torch.autograd.grad(read(x).square().sum(), x)[0])


def test_levels_of_nf4_come_back():
    plain = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.linspace(-3, 3, 128).view(2, 64))
    once = QuantizedLinear(plain, "nf4")
    again = nn.Linear(64, 2, bias=False)
    again.load_state_dict({"weight": once.weight})
    assert torch.equal(QuantizedLinear(again, "nf4").weight, once.weight)


def test_types_stay_and_copies_share():
    few = QuantizedLinear(layer(), "fp8")
    shared = copy.deepcopy(few, {id(value): value for value in few.buffers()})
    shared.to(torch.float64)
    assert shared.stored is few.stored
    assert (shared.stored.dtype, shared.scale.dtype, shared.bias.dtype) == (torch.float8_e4m3fn, torch.float32, torch.float64)


def test_small_layers_and_other_kinds_are_left():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64), nn.Conv2d(64, 64, 3))
    quantize(model, "int8")
    assert [type(part) for part in model] == [nn.Linear, QuantizedLinear, nn.Conv2d]
