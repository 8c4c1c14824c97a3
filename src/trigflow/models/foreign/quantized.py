"""Linear layers whose weights are kept in 8 or 4 bits, for a base that is not trained.

=======  =====================================================  ===================
name     a weight is                                            bits with its scale
=======  =====================================================  ===================
int8     a whole number from -127 to 127, times a scale a row   8
fp8      a float8 (e4m3), times a scale a row                   8
nf4      one of 16 levels, times a scale of 64 weights          4.25
=======  =====================================================  ===================

The layer computes `x W^T + b` with W as it is read back, so outputs, gradients and tangents are exact in that W. The 16 levels
of nf4 are quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, appendix E).
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["int8", "fp8", "nf4"]
KINDS = get_args(Kind)
BLOCK = 64
"""Weights that share a scale in nf4."""
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


class QuantizedLinear(nn.Linear):
    """A linear layer with its weight in few bits; `weight` is what is read back, made anew each time.

    Args:
        layer: whose weight is taken over.
        kind: see the module.
    """

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.dtype = layer.weight.dtype
        self.bias = layer.bias
        weight = layer.weight.detach().float()
        if kind == "nf4":
            flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
            scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
            levels = torch.tensor(NF4, dtype=torch.float32, device=flat.device)
            chosen = torch.bucketize(flat / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1)
            stored = chosen[::2] * 16 + chosen[1::2]
        else:
            most = 127.0 if kind == "int8" else torch.finfo(torch.float8_e4m3fn).max
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / most
            stored = (weight / scale).round().to(torch.int8) if kind == "int8" else (weight / scale).to(torch.float8_e4m3fn)
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`(out_features, in_features)`, of the type of the layer that was taken over."""
        stored, scale = self._buffers["stored"], self._buffers["scale"]
        assert stored is not None
        assert scale is not None
        if self.kind != "nf4":
            return (stored.float() * scale.float()).to(self.dtype)
        levels = torch.tensor(NF4, dtype=torch.float32, device=stored.device)
        pairs = torch.stack([stored // 16, stored % 16], dim=1).view(-1, BLOCK).long()
        whole = (levels[pairs] * scale.float()).view(-1)[: self.out_features * self.in_features]
        return whole.view(self.out_features, self.in_features).to(self.dtype)

    def plain(self) -> nn.Linear:
        """The same in float32, with its weight as it is read back."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight, made.bias = nn.Parameter(self.weight.float(), False), self.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves between devices, in place as parameters do, so that copies go on sharing it; types stay as they are."""
        kept = {name: self._buffers.pop(name) for name in ("stored", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            assert value is not None
            value.data = value.data.to(fn(torch.empty(0, dtype=torch.float32, device=value.device)).device)
            self._buffers[name] = value
        return self


def quantize(model: nn.Module, kind: Kind, smallest: int = 4096) -> None:
    """Put quantized layers in place of linear layers of at least so many weights."""
    for parent in [*model.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Linear and layer.weight.numel() >= smallest:
                setattr(parent, name, QuantizedLinear(layer, kind))
