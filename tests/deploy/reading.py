"""A model that reads words, small, of random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trigflow.conditions import Conditioner, Text
from trigflow.models.model import Model
from trigflow.models.outside import model_of


class Reading(nn.Module):
    """A network of one's own that is told a text, and makes a colour of the sum of its bytes."""

    takes = frozenset({"text", "text_mask"})

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.letter = nn.Embedding(258, 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        told = (self.letter(text) * text_mask[..., None]).sum(1) + t[:, None]
        return self.out(torch.tanh(self.inp(x) + told[:, :, None, None]))


def reading() -> Model:
    """A student of 8x8 pictures in colours that is told a text of at most 15 bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Reading()
    return model_of(network, (3, 8, 8), conditioner=Conditioner({"text": Text(16)}), kind="consistency")
