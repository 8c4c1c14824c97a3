"""The images of the scikit-learn digits and of MNIST, as the shipped networks expect them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

Labelled = tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def digits() -> Labelled:
    """Images uint8 `(1797, 1, 8, 8)` and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (torch.from_numpy(data.images) * 255 / 16).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target).long()


@pytest.fixture(scope="session")
def mnist(mnist_arrays: tuple[np.ndarray, np.ndarray]) -> Labelled:
    """Images uint8 `(5000, 1, 28, 28)` and labels."""
    pixels, labels = mnist_arrays
    return torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()
