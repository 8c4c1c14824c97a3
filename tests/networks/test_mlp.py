"""The MLP against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.helpers import awake, draw, network
from trigflow.networks import MLP, MLPConfig
from trigflow.runtime.errors import UserError


def reference(net: MLP, x: Tensor, t: Tensor) -> Tensor:
    """`h = W x`; `h += W2 silu(adanorm(W1 silu(h), emb))`; `F = W silu(norm(h))`, from the weights alone."""
    w = {name: p.detach() for name, p in net.named_parameters()}
    emb = net.conditioning(t)
    h = x @ w["inp.weight"].T + w["inp.bias"]
    for i in range(net.config.depth):
        b = f"blocks.{i}."
        y = F.silu(h) @ w[b + "linear1.weight"].T + w[b + "linear1.bias"]
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        scale, shift = (emb @ w[b + "norm.affine.weight"].T + w[b + "norm.affine.bias"]).chunk(2, dim=1)
        if net.config.norm == "double":
            scale, shift = (a / (a.square().mean(1, keepdim=True) + 1e-4).sqrt() for a in (scale, shift))
        else:
            scale = 1 + scale
        h = h + F.silu(y * scale + shift) @ w[b + "linear2.weight"].T + w[b + "linear2.bias"]
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = h * w["out_norm.weight"] + w["out_norm.bias"]
    return F.silu(h) @ w["out.weight"].T + w["out.bias"]


@pytest.mark.parametrize("norm", ["double", "adagn"])
@pytest.mark.parametrize("depth", [1, 3])
def test_formula(depth: int, norm: str) -> None:
    net = awake(network("mlp", depth=depth, norm=norm)).double()
    assert isinstance(net, MLP)
    x, t = draw(0, 6, 5, dtype=torch.float64), torch.linspace(0.1, 1.5, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x, t), reference(net, x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("features", [1, 2, 17])
def test_any_length_of_vectors(features: int) -> None:
    net = awake(network("mlp", features=features))
    x = draw(1, 4, features)
    out = net(x, torch.full((4,), 0.7))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [(3, 4), (3, 6), (5,), (3, 5, 1), (3, 1, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"vectors of shape \(.*\); expected \(b, 5\); reshape the data or set features"):
        network("mlp")(torch.zeros(shape), torch.zeros(shape[0]))


def test_defaults_make_a_network_for_the_plane() -> None:
    assert MLP(MLPConfig())(torch.zeros(2, 2), torch.full((2,), 0.5)).shape == (2, 2)
