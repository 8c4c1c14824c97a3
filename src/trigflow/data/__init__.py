"""Data to train on: reading them, and the order in which training sees them."""

from trigflow.data.dataset import Dataset, ImageDataset, require_classes
from trigflow.data.latents import LatentDataset, measure_latents
from trigflow.data.loader import Loader
from trigflow.data.order import Order, epoch_order
from trigflow.data.sources.opening import open_dataset, register
from trigflow.runtime.errors import renamed

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

RENAMED = {
    "Normalization": "trigflow.codecs.Pixels(shape, mean, scale, sigma_data)",
    "LatentNormalization": "trigflow.codecs.Latents(shape, raw_mean, raw_std, sigma_data, vae)",
    "normalization_for": "Dataset.codec(normalize, sigma_data)",
    "normalization_from_state": "trigflow.codecs.codec_from_state(state)",
    "measure": "ImageDataset.codec('measured', sigma_data)",
    "check_labels": "trigflow.conditions.check_labels",
    "derive_seed": "trigflow.runtime.seeds.derive_seed",
}


__getattr__ = renamed(__name__, RENAMED)
