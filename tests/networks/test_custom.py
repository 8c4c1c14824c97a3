"""What is read off a module of one's own."""

from __future__ import annotations

import pytest
from torch import nn

from trigflow.networks.custom import describe

LAYERS = {
    "elements": nn.Dropout(0.3),
    "channels": nn.Dropout2d(0.3),
    "alpha": nn.AlphaDropout(0.3),
    "attention": nn.MultiheadAttention(4, 2, dropout=0.3),
    "recurrent": nn.GRU(4, 4, num_layers=2, dropout=0.3),
    "transformer": nn.TransformerEncoderLayer(4, 2, dropout=0.3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_found_whatever_layer_draws_it(name: str) -> None:
    """Where there is some, training seeds it for every step."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), LAYERS[name])
    assert describe(network, 0, guided=False).dropout == 0.3


def test_a_module_without_dropout_has_none() -> None:
    assert describe(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), 0, guided=False).dropout == 0
