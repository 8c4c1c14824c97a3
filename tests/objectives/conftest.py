"""The teacher of the mixture in the plane, trained once for all students of it."""

from __future__ import annotations

import pytest
import torch

from objectives.test_learning import taught, untrained
from training.shared import made_once
from trigflow.networks import MLP


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> MLP:
    """Not to be changed."""
    folder = made_once(tmp_path_factory, "mixture", lambda folder: torch.save(taught().state_dict(), folder / "weights"))
    net = untrained()
    net.load_state_dict(torch.load(folder / "weights"))
    return net
