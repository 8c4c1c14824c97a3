"""An autoencoder of random weights that halves the side of an image, written as diffusers writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


def write_vae(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder with the autoencoder: 3 channels to 4 and back, one step down, a few thousand weights."""
    diffusers = pytest.importorskip("diffusers", reason="latents are made with diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 16,
        }
        diffusers.AutoencoderKL(**{**settings, **changes}).save_pretrained(folder)
    return folder


def reference_vae(folder: Path) -> Any:
    """The same autoencoder as diffusers reads it."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def write_images(folder: Path, names: list[str], side: int = 16, seed: int = 0) -> Path:
    """Random RGB images of `side` x `side` under these names."""
    generator = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder
