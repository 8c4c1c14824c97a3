"""torch.compile takes each network as one graph: nothing in a forward sends it back to Python."""

from __future__ import annotations

import pytest
import torch

from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, NetworkConfig, UNetConfig, build

GIVEN = ConditioningConfig(width=16, num_classes=10, takes=("guidance",))
U: dict[str, object] = {"width": 16, "mult": (1, 2), "blocks": 1, "conditioning": GIVEN}
CONFIGS: list[NetworkConfig] = [
    UNetConfig(attention=(1,), **U),  # type: ignore[arg-type]
    DDPMPPConfig(resolution=16, attention=(8,), **U),  # type: ignore[arg-type]
    EDM2Config(resolution=16, attention=(8,), head_width=16, **U),  # type: ignore[arg-type]
    DiTConfig(width=32, depth=2, heads=2, conditioning=GIVEN),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_one_graph(config: NetworkConfig) -> None:
    net = build(config).eval()
    x = torch.randn(2, config.channels, 16, 16)  # type: ignore[union-attr]
    found = torch._dynamo.explain(net)(x, torch.rand(2), label=torch.arange(2), guidance=torch.ones(2))
    torch._dynamo.reset()
    assert found.graph_count == 1
    assert found.graph_break_count == 0
