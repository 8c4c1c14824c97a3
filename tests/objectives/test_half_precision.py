"""The consistency objective in half precision, close to t = 0 and t = pi/2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from objectives.helpers import PROCESS, batch, consistency_loss, generator, tangent_of
from trigflow.networks import ConditioningConfig, UNet, UNetConfig
from trigflow.objectives import AdaptiveWeight, TangentConfig
from trigflow.process import HALF_PI

RAW = TangentConfig(mode="raw", warmup=0)
ENDS = torch.tensor([1e-7, 1e-5, 1e-4, HALF_PI - 1e-4, HALF_PI - 1e-5, HALF_PI - 1e-6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("distill", [True, False])
def test_half_precision_survives_both_ends(dtype: torch.dtype, autocast: bool, distill: bool) -> None:
    """t within 1e-4 of 0 and pi/2: nothing is divided by a sine or cosine."""
    config = UNetConfig(channels=3, width=8, blocks=1, conditioning=ConditioningConfig(width=8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(config)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * torch.randn_like(p)
    g = generator(7)
    x0, z = (0.5 * torch.randn(6, 3, 4, 4, generator=g).to(dtype) for _ in range(2))
    teacher = (lambda x, t: (0.1 * x).to(dtype)) if distill else None
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = consistency_loss(net, x0, z, ENDS, teacher=teacher, tangent=RAW, weight=AdaptiveWeight(PROCESS))
    loss.value.backward()
    assert loss.value.dtype == torch.float32
    assert all(torch.isfinite(f).all() for f in loss.figures.values())
    assert torch.isfinite(loss.value)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())

    net, t = net.double(), ENDS.double()
    exact = consistency_loss(net, x0.double(), z.double(), t, teacher=teacher, tangent=RAW).figures
    rtol = 0.05 if autocast else 0.01
    near_zero = t < 1  # at the other end g goes to zero with cos(t), and float32 times stop resolving it
    torch.testing.assert_close(loss.figures["tangent_norm"][near_zero], exact["tangent_norm"][near_zero], rtol=rtol, atol=0)
    assert torch.all(loss.figures["tangent_norm"][~near_zero] < 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangent_of_half_precision_points(dtype: torch.dtype) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * torch.cos(t)[:, None]

    x0, z, _ = batch(6, dtype=torch.float32)
    x, v = PROCESS.interpolate(x0, z, ENDS).to(dtype), PROCESS.velocity(x0, z, ENDS).to(dtype)
    _, g = tangent_of(network, x, v, ENDS)
    _, exact = tangent_of(network, x.double(), v.double(), ENDS.double())
    assert torch.isfinite(g).all()
    torch.testing.assert_close(g.double(), exact, rtol=0.03, atol=0.01)
