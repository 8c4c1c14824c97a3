"""Small networks with every switch, and weights that hide nothing."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.networks import MLP, ConditioningConfig, MLPConfig, UNet, UNetConfig

TIME_MAPS = ("identity", "log")
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "positional": {"time_embedding": "positional"},
    "fourier 16": {"time_embedding": "fourier", "fourier_scale": 16.0},
    "fourier 0.02": {"time_embedding": "fourier", "fourier_scale": 0.02},
}
NORMS = ("double", "adagn")
SWITCHES: dict[str, dict[str, Any]] = {
    f"{time_map}, {embedding}, {norm}": {"time_map": time_map, **EMBEDDINGS[embedding], "norm": norm}
    for time_map, embedding, norm in product(TIME_MAPS, EMBEDDINGS, NORMS)
}
KINDS = ("mlp", "unet")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A small MLP of 5 features or U-Net of 2 channels; settings of the network and of its conditioning, mixed."""
    own = MLPConfig if kind == "mlp" else UNetConfig
    inner = {k: v for k, v in settings.items() if k in ConditioningConfig.__dataclass_fields__ and k != "width"}
    outer = {k: v for k, v in settings.items() if k in own.__dataclass_fields__}
    assert len(inner) + len(outer) == len(settings), settings
    conditioning = ConditioningConfig(width=8, **inner)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "mlp":
            return MLP(MLPConfig(**{"features": 5, "width": 16, "depth": 2, "conditioning": conditioning, **outer}))
        sizes = {"channels": 2, "width": 8, "mult": (1, 2), "blocks": 1, "conditioning": conditioning}
        return UNet(UNetConfig(**{**sizes, **outer}))


def awake(net: nn.Module, seed: int = 7, scale: float = 0.15) -> nn.Module:
    """The network with every weight moved, so that layers that start at zero take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
    return net


def inputs(kind: str, b: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`(x, t)` for `network(kind)`."""
    shape = (b, 5) if kind == "mlp" else (b, 2, 6, 5)
    return draw(seed, *shape, dtype=dtype), torch.linspace(0.2, 1.5, b, dtype=dtype)
