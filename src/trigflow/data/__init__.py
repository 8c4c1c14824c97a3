"""Data to train on: reading them, and the order in which training sees them."""

from trigflow.data.dataset import Dataset, ImageDataset, require_classes
from trigflow.data.latents import LatentDataset, measure_latents
from trigflow.data.loader import Loader
from trigflow.data.order import Order, epoch_order
from trigflow.data.sources.opening import open_dataset, register

__all__ = [
    "Dataset",
    "ImageDataset",
    "LatentDataset",
    "Loader",
    "Order",
    "epoch_order",
    "measure_latents",
    "open_dataset",
    "register",
    "require_classes",
]
