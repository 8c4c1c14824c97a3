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
from trigflow.runtime.errors import UserError

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


@dataclass(frozen=True)
class Diffusers:
    """A model of diffusers: `model(x, timestep=time, class_labels=label)`, in the model's own precision.

    Of a prediction with more channels than x (epsilon and variance, as DiT's), the first are taken.

    Attributes:
        states: for models conditioned on text: `(classes, tokens, width)`, the encoded prompt of each label, the empty
            prompt at the null label. Passed as `encoder_hidden_states`, and the label itself is not.
    """

    states: Tensor | None = None

    def __call__(self, model: Any, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        conditions: dict[str, Tensor] = {}
        if self.states is not None:
            if label is None:
                raise UserError(
                    "no labels for a model conditioned on text; expected the index of a prompt for each sample; "
                    "pass labels, or give the bridge the empty prompt as null={'label': ...}"
                )
            conditions["encoder_hidden_states"] = self.states.to(x.device, model.dtype)[label]
        elif label is not None:
            conditions["class_labels"] = label
        prediction = model(x.to(model.dtype), timestep=time, return_dict=False, **conditions)[0]
        return prediction[:, : x.shape[1]].to(x.dtype)
