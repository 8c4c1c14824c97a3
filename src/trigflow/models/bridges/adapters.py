"""How a bridge calls the model it wraps.

An adapter is `adapter(model, x, time, **conditions)`: noisy input `(b, ...)`, model time `(b,)` and conditions by name, to the
model's prediction, of the shape of x. It is handed the model rather than keeping it, so that a copied bridge calls its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trigflow.conditions import in_order

Adapter = Callable[..., Tensor]
"""`adapter(model, x, time, **conditions) -> prediction`."""


def plain(model: Any, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
    """`model(x, time)`, and after these the conditions that it takes, label first, then guidance, then others by name."""
    return model(x, time, *(conditions[name] for name in in_order(conditions)))


@dataclass(frozen=True)
class OneHot:
    """`model(x, time, one_hot)`: labels as rows of zeros with a one, all zeros for the null label. What EDM and EDM2 take.

    Attributes:
        num_classes: classes of the model; this index is the null label.
    """

    num_classes: int

    def __call__(self, model: Any, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return model(x, time, x.new_zeros(len(x), self.num_classes))
        return model(x, time, F.one_hot(label, self.num_classes + 1)[:, : self.num_classes].to(x.dtype))
