"""Images or latents to train on: reading them, normalizing them, and the order in which training sees them."""

from trigflow.data.dataset import ImageDataset, check_labels, require_classes
from trigflow.data.latents import (
    LatentDataset,
    LatentNormalization,
    measure_latents,
    normalization_for,
    normalization_from_state,
)
from trigflow.data.loader import Loader
from trigflow.data.order import Order, derive_seed, epoch_order
from trigflow.data.sources.opening import open_dataset
from trigflow.data.statistics import Normalization, measure

__all__ = [
    "ImageDataset",
    "LatentDataset",
    "LatentNormalization",
    "Loader",
    "Normalization",
    "Order",
    "check_labels",
    "derive_seed",
    "epoch_order",
    "measure",
    "measure_latents",
    "normalization_for",
    "normalization_from_state",
    "open_dataset",
    "require_classes",
]
