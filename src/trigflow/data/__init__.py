"""Images to train on: reading them, normalizing them, and the order in which training sees them."""

from trigflow.data.dataset import ImageDataset, check_labels, require_classes
from trigflow.data.order import Order, derive_seed, epoch_order
from trigflow.data.sources import open_dataset
from trigflow.data.statistics import Normalization, measure

__all__ = [
    "ImageDataset",
    "Normalization",
    "Order",
    "check_labels",
    "derive_seed",
    "epoch_order",
    "measure",
    "open_dataset",
    "require_classes",
]
