"""Which data a run uses, and how they become tensors."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import tyro

from trigflow.conditions.encoded import States
from trigflow.data.captions import encoder_named
from trigflow.data.dataset import Dataset, require_classes
from trigflow.data.sources.opening import open_dataset
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they become tensors."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "digits"
    """digits, mnist, or the path of a folder or zip of images."""
    resize: Annotated[int | None, tyro.conf.arg(aliases=["--resize"])] = None
    """Scale and crop every image to N x N."""
    buckets: Annotated[bool, tyro.conf.arg(aliases=["--buckets"])] = False
    """Scale and crop every image to the nearest of several sizes of about N x N pixels, and train on batches of one size."""
    channels: int | None = None
    """Force 1 (grayscale) or 3 (RGB)."""
    skip_corrupt: Annotated[bool, tyro.conf.arg(aliases=["--skip-corrupt"])] = False
    """Leave out images that cannot be decoded instead of stopping."""
    captions: bool = True
    """Take what is written of the images as captions; networks that read words are trained on them."""
    flip: bool = False
    """Mirror half of the images horizontally while training."""
    normalize: Literal["measured", "symmetric", "edm2"] = "measured"
    """measured: subtract the mean and scale to sigma_data. symmetric: [-1, 1], as the paper's pixel presets. edm2: EDM2's
    mean and deviation a channel, for latents of SD-VAE."""
    text_encoder: str | None = None
    """Frozen encoder of transformers that reads the captions: a folder or an id of the hub. What it makes of them is kept in
    the cache folder. By default the network reads bytes, and learns to."""
    text_states: States = "last"
    """What of that encoder is read: states of the last layer, of the one before, or one pooled state."""
    text_length: int = 77
    """Tokens of that encoder that are read."""
    memory_gib: float = 4.0
    """Largest size of decoded images kept in memory; larger data stay where they are and are decoded as training asks."""
    workers: Annotated[int, tyro.conf.arg(aliases=["--workers"])] = 0
    """Processes that read and decode, ahead of the training; 0 for the training process itself."""
    ahead: int = 2
    """Batches that each of them is ahead."""


def load_data(config: DataConfig, progress: bool = False) -> Dataset:
    """The data set of a configuration, read with a progress bar on a terminal; see `open_dataset`. Raises a UserError as
    `open_dataset`, and for labelled data of one class only."""
    progress = progress and sys.stderr.isatty()
    dataset = open_dataset(
        config.source, resize=config.resize, buckets=config.buckets, channels=config.channels, captions=config.captions,
        skip_corrupt=config.skip_corrupt, memory_limit_gib=config.memory_gib, workers=config.workers, progress=progress,
    )  # fmt: skip
    if dataset.labels is not None:
        require_classes(dataset)
    if config.text_encoder is None:
        return dataset
    if dataset.captions is None:
        raise UserError(
            f"data.text_encoder for '{config.source}', which has no captions; expected data with captions; leave it out"
        )
    encoder = encoder_named(config.text_encoder, config.text_states, config.text_length)
    return replace(dataset, captions=dataset.captions.encoded(encoder, progress=progress))


def data_of(origin: Mapping[str, Any]) -> DataConfig:
    """The settings of the data that a model was trained on, as far as its origin says them; see `Model.origin`."""
    known = {field.name for field in fields(DataConfig)}
    return DataConfig(**{name: value for name, value in (origin.get("data") or {}).items() if name in known})
