"""What holds for each of the larger networks alike; `test_networks.py` says the same of the U-Net and the MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.helpers import awake
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, NetworkConfig, build

GIVEN = ConditioningConfig(width=16, num_classes=3)


def config(kind: str, dropout: float = 0.0) -> NetworkConfig:
    levels = {"width": 16, "mult": (1, 2), "blocks": 1, "dropout": dropout, "conditioning": GIVEN}
    configs: dict[str, NetworkConfig] = {
        "ddpmpp": DDPMPPConfig(channels=2, resolution=8, attention=(4,), **levels),  # type: ignore[arg-type]
        "edm2": EDM2Config(channels=2, resolution=8, attention=(4,), head_width=16, **levels),  # type: ignore[arg-type]
        "dit": DiTConfig(channels=2, width=16, depth=1, heads=2, dropout=dropout, conditioning=GIVEN),
    }
    return configs[kind]


def network(kind: str, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return awake(build(config(kind, dropout)).eval())


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([0.2, 0.8, 1.4])


every = pytest.mark.parametrize("kind", ["ddpmpp", "edm2", "dit"])


@every
def test_samples_do_not_see_each_other(kind: str) -> None:
    net = network(kind)
    x, t = inputs()
    label = torch.tensor([0, 3, 1])
    out = net(x, t, label=label)
    assert out.abs().max() > 1e-2
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], label=label[i : i + 1])
        torch.testing.assert_close(alone[0], out[i], rtol=1e-4, atol=1e-5)


@every
def test_dropout_works_in_training_only(kind: str) -> None:
    net, without = network(kind, dropout=0.4), network(kind)
    x, t = inputs()
    assert torch.equal(net(x, t), without(x, t))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert (net.train()(x, t) - net(x, t)).abs().max() > 1e-3


@every
def test_channels_last_is_the_same_network(kind: str) -> None:
    net = network(kind)
    x, t = inputs()
    out = net(x, t)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, out, rtol=1e-4, atol=1e-5)
