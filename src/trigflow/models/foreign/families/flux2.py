"""Flux.2: dev (guidance is an input) and klein."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, family, rows_of


@family
class Flux2(Family):
    name = "flux2"
    classes = ("Flux2Transformer2DModel",)
    time_scale = 1.0
    scale = 4.0

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        rows = model(
            hidden_states=rows_of(x), timestep=time, guidance=told.get("guidance"), encoder_hidden_states=told["text"],
            txt_ids=places(1, 1, told["text"].shape[1]).to(x.device), img_ids=places(*x.shape[2:], 1).to(x.device),
            return_dict=False,
        )[0]  # fmt: skip
        return rows.mT.reshape(x.shape)

    def scaling(self, vae: Mapping[str, Any], weight: Callable[[str], Tensor]) -> tuple[Iterable[float], Iterable[float]]:
        deviation = (weight("bn.running_var") + vae["batch_norm_eps"]).sqrt()
        return weight("bn.running_mean").tolist(), deviation.tolist()


def places(*sides: int) -> Tensor:
    """Row, column and place in the text of everything, `(n, 4)`, after a zero."""
    return torch.cartesian_prod(torch.arange(1), *map(torch.arange, sides))
