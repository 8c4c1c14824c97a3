from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trigflow.codecs import CODECS, Pixels, codec_from_state, pixels, register
from trigflow.data import ImageDataset, open_dataset
from trigflow.runtime.errors import UserError

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def measure(dataset: ImageDataset, sigma_data: float = 0.5) -> Pixels:
    return dataset.codec("measured", sigma_data)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_digits_agree_with_numpy() -> None:
    digits = open_dataset("digits")
    values = digits.images.numpy().astype(np.float64) / 127.5 - 1
    measured = measure(digits)
    assert measured.mean == pytest.approx((values.mean(),), rel=1e-12)
    assert measured.scale == pytest.approx(0.5 / values.std(), rel=1e-12)
    assert measured.sigma_data == 0.5


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_colour_has_one_mean_a_channel_and_one_scale(sigma_data: float) -> None:
    images = random_images(7, 3, 5, 4)
    images[:, 1] //= 2
    images[:, 2] = 40 + images[:, 2] // 8
    values = images.numpy().astype(np.float64) / 127.5 - 1
    mean = values.mean(axis=(0, 2, 3))
    measured = measure(ImageDataset("colour", images), sigma_data)
    assert measured.mean == pytest.approx(mean, rel=1e-12)
    assert measured.scale == pytest.approx(sigma_data / (values - mean[:, None, None]).std(), rel=1e-12)

    x0 = measured.encode(images).double()
    assert x0.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    assert float(x0.square().mean().sqrt()) == pytest.approx(sigma_data, rel=1e-6)


def test_the_chunk_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageDataset("chunks", random_images(11, 3, 4, 4))
    whole = measure(dataset)
    for elements in (1, 100, 500):
        monkeypatch.setattr(pixels, "CHUNK_ELEMENTS", elements)
        assert measure(dataset) == whole


def test_one_varying_channel_is_enough() -> None:
    images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    images[1, 0] = 255
    # Channel 0 is -1 and 1 about 0; the other two never vary: variance 1/3.
    measured = measure(ImageDataset("red", images))
    assert measured.mean == pytest.approx((0, -1, -1))
    assert measured.scale == pytest.approx(0.5 * math.sqrt(3))


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_constant_images_are_refused(level: int) -> None:
    images = torch.full((3, 3, 2, 2), level, dtype=torch.uint8)
    images[:, 1] = 9
    with pytest.raises(UserError, match="single colour; expected pixels that vary"):
        measure(ImageDataset("flat", images))


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        measure(ImageDataset("none", torch.zeros(0, 1, 2, 2, dtype=torch.uint8)))


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan, math.inf])
def test_sigma_data_must_be_positive(sigma_data: float) -> None:
    with pytest.raises(UserError, match="sigma_data"):
        measure(ImageDataset("any", random_images(2, 1, 2, 2)), sigma_data)


def test_encode_follows_its_formula() -> None:
    codec = Pixels((2, 1, 1), mean=(0.5, -0.25), scale=2.0)
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    x0 = codec.encode(images)
    assert x0.dtype == torch.float32
    assert x0.flatten().tolist() == [(-1 - 0.5) * 2, (1 + 0.25) * 2]


def test_symmetric_is_the_range_from_minus_one_to_one() -> None:
    codec = Pixels.symmetric((3, 1, 256))
    assert (codec.mean, codec.scale, codec.sigma_data) == ((0, 0, 0), 1, 0.5)
    x0 = codec.encode(ALL_BYTES.expand(1, 3, 1, 256))
    assert (float(x0.min()), float(x0.max())) == (-1, 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mean=st.lists(st.floats(-1, 1), min_size=1, max_size=3), scale=st.floats(0.01, 1000))
def test_all_bytes_survive_the_round_trip(mean: list[float], scale: float) -> None:
    codec = Pixels((len(mean), 1, 256), tuple(mean), scale)
    images = ALL_BYTES.expand(2, len(mean), 1, 256)
    assert torch.equal(codec.decode(codec.encode(images)), images)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mean=st.lists(st.floats(-1, 1), min_size=1, max_size=3), scale=st.floats(0.01, 1000), sigma=st.floats(0.1, 2))
def test_state_survives_json(mean: list[float], scale: float, sigma: float) -> None:
    codec = Pixels((len(mean), 1, 256), tuple(mean), scale, sigma)
    assert codec_from_state(json.loads(json.dumps(codec.state()))) == codec


def test_decode_rounds_to_the_nearest_and_clamps() -> None:
    def pixel(byte: float) -> float:
        return byte / 127.5 - 1

    x0 = torch.tensor([pixel(7.4), pixel(7.6), -9.0, 9.0, -math.inf, math.inf]).reshape(1, 1, 1, 6)
    decoded = Pixels.symmetric((1, 1, 256)).decode(x0)
    assert decoded.dtype == torch.uint8
    assert decoded.flatten().tolist() == [7, 8, 0, 255, 0, 255]


def test_decode_takes_half_precision_up_first() -> None:
    x0 = Pixels.symmetric((1, 1, 256)).encode(ALL_BYTES.reshape(1, 1, 1, 256)).bfloat16()
    expected = (x0.double() * 127.5 + 127.5).round()
    assert torch.equal(Pixels.symmetric((1, 1, 256)).decode(x0).double(), expected)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    codec = Pixels.symmetric((3, 2, 2))
    with pytest.raises(UserError, match="float32; expected uint8"):
        codec.encode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match=r"expected \(b, 3, h, w\)"):
        codec.encode(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"expected \(b, 3, h, w\)"):
        codec.decode(torch.zeros(3, 2, 2))


@pytest.mark.parametrize(("mean", "scale"), [((), 1.0), ((math.nan,), 1.0), ((0.0,), 0.0), ((0.0,), -1.0), ((0.0,), math.inf)])
def test_impossible_codecs_are_refused(mean: tuple[float, ...], scale: float) -> None:
    with pytest.raises(UserError, match="mean="):
        Pixels((len(mean), 1, 1), mean, scale)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"mean": [0.0], "scale": 1.0},
        {"mean": 0.0, "scale": 1.0, "sigma_data": 0.5},
        {"mean": ["0"], "scale": 1.0, "sigma_data": 0.5},
        {"mean": [0.0], "scale": None, "sigma_data": 0.5},
    ],
)
def test_damaged_states_are_refused(state: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"pixels saved as .* expected .* take the file"):
        codec_from_state({"kind": "pixels", "shape": [1, 2, 2], **state})


def test_no_other_codec_takes_its_place() -> None:
    with pytest.raises(UserError, match="the kind 'pixels' is taken by Pixels; expected a new one; choose another"):
        register(type("Own", (Pixels,), {"__module__": "elsewhere"}))
    assert codec_from_state(measure(open_dataset("digits")).state()).kind == "pixels"
    assert CODECS["pixels"] is Pixels
