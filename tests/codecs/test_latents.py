"""Latents to x0 and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_vae import reference_vae, write_vae
from trigflow.codecs import Latents, Pixels, codec_from_state
from trigflow.codecs.vae import VAE, VAESource
from trigflow.runtime.errors import UserError


def latents(n: int = 12, side: int = 8) -> Tensor:
    """Values around 1, with a deviation of 2."""
    return 1 + 2 * torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(0))


def test_edm2s_numbers() -> None:
    codec = Latents.edm2((4, 1, 1))
    assert codec.raw_mean == (5.81, 3.25, 0.12, -2.15)
    assert codec.raw_std == (4.17, 4.62, 3.71, 3.28)
    assert codec.sigma_data == 0.5
    assert codec.vae == VAESource("stabilityai/sd-vae-ft-mse", "unit", None)
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    at = torch.stack([mean, mean + std, mean - 2 * std])[:, :, None, None]
    expected = torch.tensor([0.0, 0.5, -1.0])[:, None, None, None].expand(3, 4, 1, 1)
    torch.testing.assert_close(codec.encode(at), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_encoding_and_decoding_are_inverse(sigma_data: float) -> None:
    codec = Latents.edm2((4, 8, 8), sigma_data=sigma_data)
    given = latents()
    exact = (given.double() - torch.tensor(codec.raw_mean).double()[:, None, None]) / torch.tensor(codec.raw_std).double()[
        :, None, None
    ]
    x0 = codec.encode(given)
    torch.testing.assert_close(x0.double(), exact * sigma_data, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.stored(x0), given, rtol=0, atol=2e-6)
    assert x0.dtype == torch.float32


def test_the_normalization_as_json() -> None:
    codec = Latents((4, 8, 8), (0.5, 1, -2, 3), (1, 2, 3, 4), 0.25, VAESource("a/vae", "symmetric", "abc"))
    state = json.loads(json.dumps(codec.state()))
    assert codec_from_state(state) == codec
    images = Pixels.symmetric((3, 8, 8))
    assert codec_from_state(images.state()) == images


@pytest.mark.parametrize(
    "change",
    [
        {"raw_mean": [1.0]},
        {"raw_std": [1, 1, 1, 0]},
        {"raw_std": [1, 1, 1, math.inf]},
        {"raw_std": None},
        {"raw_mean": ["a", "b", "c", "d"]},
        {"sigma_data": 0},
        {"vae": None},
        {"vae": {"name": "x", "pixels": "bright", "digest": None}},
        {"vae": {"name": "x", "pixels": ["unit"], "digest": None}},
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"; expected .*; (measure|take)"):
        codec_from_state({**Latents.edm2((4, 8, 8)).state(), **change})


def test_bytes_and_other_channels_are_no_latents() -> None:
    codec = Latents.edm2((4, 1, 1))
    for wrong in (torch.zeros(1, 4, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(UserError, match="use the codec of these latents"):
            codec.encode(wrong)


def test_an_autoencoder_in_half_precision(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = reference_vae(write_vae(tmp_path))
    expected = VAE(VAESource(), network=network).encode(images)
    found = VAE(VAESource(), network=network.to(torch.bfloat16)).encode(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_what_is_loaded_from_a_pipeline_is_an_autoencoder(tmp_path: Path) -> None:
    config = write_vae(tmp_path / "vae") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "DiffusionPipeline"}))
    with pytest.raises(UserError, match="a DiffusionPipeline is no autoencoder"):
        VAE(VAESource(str(tmp_path), subfolder="vae")).load()
