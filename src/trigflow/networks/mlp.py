"""A residual MLP for vectors: two-dimensional toys, tabular data, embeddings."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks.embeddings import Conditioning, ConditioningConfig, NetworkConfig
from trigflow.networks.layers import AdaptiveNorm, NormKind, check_at_least_one
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class MLPConfig(NetworkConfig):
    """Configuration of `MLP`."""

    axes: ClassVar[int | None] = 1

    features: int = 2
    """Length d of a data vector."""
    width: int = 128
    """Hidden features."""
    depth: int = 4
    """Residual blocks."""
    norm: NormKind = "double"
    """Adaptive double normalization, or AdaGN."""
    dropout: float = 0.0
    """Dropout inside the blocks, in [0, 1)."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)


class MLP(nn.Module):
    """`F(x, t)` for vectors: `h = W x`; `h += W2 drop(silu(adanorm(W1 silu(h), emb)))` times depth; `F = W silu(norm(h))`.

    The output layer starts at zero, so the untrained network predicts zero velocity.

    Shapes: x `(b, d)` of unit variance, t `(b,)`; result `(b, d)`.

    Raises:
        UserError: for vectors of another length than the configuration's.
    """

    def __init__(self, config: MLPConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        check_at_least_one(config, "features", "width", "depth")
        self.config = config
        self.conditioning = Conditioning(config.conditioning, sigma_data)
        self.takes, self.null = config.conditioning.takes_all, config.conditioning.null
        self.inp = nn.Linear(config.features, config.width)
        self.blocks = nn.ModuleList(
            MLPBlock(config.width, self.conditioning.out_width, config.norm, config.dropout) for _ in range(config.depth)
        )
        self.out_norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.config.features:
            raise UserError(
                f"vectors of shape {tuple(x.shape)}; expected (b, {self.config.features}); reshape the data or set features"
            )
        emb = self.conditioning(t, **conditions)
        h = self.inp(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.out(F.silu(self.out_norm(h)))


class MLPBlock(nn.Module):
    """One residual block of `MLP`; `(b, width)` to the same."""

    def __init__(self, width: int, emb_width: int, norm: NormKind, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.norm = AdaptiveNorm(width, emb_width, norm, groups=1)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = self.norm(self.linear1(F.silu(h)), emb)
        return h + self.linear2(self.dropout(F.silu(y)))
