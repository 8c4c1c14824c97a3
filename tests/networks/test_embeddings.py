"""Formulas of the conditioning path, and how fast it moves with time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.helpers import EMBEDDINGS, TIME_MAPS, awake, draw
from trigflow.networks import Conditioning, ConditioningConfig, FourierEmbedding, PositionalEmbedding
from trigflow.networks.embeddings import c_noise
from trigflow.process import HALF_PI
from trigflow.runtime.errors import UserError


def conditioning(seed: int = 0, **settings: Any) -> Conditioning:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Conditioning(ConditioningConfig(**{"width": 8, **settings}))


def derivative(f: Any, t: Tensor) -> Tensor:
    """`df/dt` of a function from `(b,)` to `(b, n)` that treats every sample alone."""
    return torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [10_000.0, 100.0])
def test_positional_formula(period: float) -> None:
    x = torch.tensor([0.0, 0.3, 1.5, -40.0])
    features = PositionalEmbedding(6, period)(x)
    assert features.shape == (4, 6)
    for row, value in zip(features, x.tolist(), strict=True):
        angles = [value * period ** (-i / 3) for i in range(3)]
        expected = [*map(math.cos, angles), *map(math.sin, angles)]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


def test_positional_derivative_is_at_most_one() -> None:
    embedding, x = PositionalEmbedding(64).double(), torch.linspace(-100, 100, 5001, dtype=torch.float64)
    speed = derivative(embedding, x).abs()
    assert speed.max() <= 1 + 1e-12
    assert speed.max() > 0.999
    assert torch.all(derivative(embedding, x).square().sum(1) <= 32)


def test_positional_frequencies_are_no_part_of_the_weights() -> None:
    assert PositionalEmbedding(16).state_dict() == {}


def test_fourier_formula_and_its_place_in_the_weights() -> None:
    embedding = FourierEmbedding(5, 2.0, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    w, p = (2.0 * torch.randn(5, generator=g)).tolist(), torch.rand(5, generator=g).tolist()
    for row, value in zip(embedding(torch.tensor([0.4, 1.2])), (0.4, 1.2), strict=True):
        expected = [math.sqrt(2) * math.cos(2 * math.pi * (wi * value + pi)) for wi, pi in zip(w, p, strict=True)]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)
    other = FourierEmbedding(5, 2.0, torch.Generator().manual_seed(4))
    x = torch.tensor([0.4])
    assert not torch.equal(other(x), embedding(x))
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(x), embedding(x))


def test_fourier_features_have_unit_mean_square() -> None:
    features = FourierEmbedding(20_000, 16.0, torch.Generator().manual_seed(0))(torch.tensor([0.0, 0.7, 1.5]))
    torch.testing.assert_close(features.square().mean(1), torch.ones(3), atol=0.03, rtol=0)


@pytest.mark.parametrize("scale", [16.0, 0.02])
def test_fourier_derivative_is_two_pi_times_the_scale(scale: float) -> None:
    """Root mean square over many features: `E[2 (2 pi w)^2 sin^2] = (2 pi scale)^2`. About 100 at 16, about 1/8 at 0.02."""
    embedding = FourierEmbedding(20_000, scale, torch.Generator().manual_seed(0))
    rms = derivative(embedding, torch.tensor([0.0, 0.7, 1.5])).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.full((3,), 2 * math.pi * scale), rtol=0.05, atol=0)


# Time map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_log_time_is_a_quarter_of_the_log_noise_level(sigma_data: float) -> None:
    told: list[Tensor] = []
    for time_map in ("identity", "log"):
        module = Conditioning(ConditioningConfig(width=8, time_map=time_map), sigma_data)  # type: ignore[arg-type]
        module.time.register_forward_pre_hook(lambda _, args: told.append(args[0]))
        module(torch.atan(torch.tensor([0.002, 0.5, 80.0]) / sigma_data))
    torch.testing.assert_close(told[0], torch.atan(torch.tensor([0.002, 0.5, 80.0]) / sigma_data))
    torch.testing.assert_close(told[1], torch.log(torch.tensor([0.002, 0.5, 80.0])) / 4)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_log_time_multiplies_the_derivative_by_its_own(embedding: str) -> None:
    """`d c_noise / dt = 1 / (4 sin t cos t)`: 250 at pi/2 - 1e-3, and the same on the other side, near 0."""
    identity = awake(conditioning(**EMBEDDINGS[embedding])).double()
    log = conditioning(time_map="log", **EMBEDDINGS[embedding]).double()
    log.load_state_dict(identity.state_dict())
    t = torch.tensor([1e-3, 0.4, HALF_PI - 1e-3], dtype=torch.float64)
    factor = 1 / (4 * torch.sin(t) * torch.cos(t))
    assert factor.tolist() == pytest.approx([250, 1 / (2 * math.sin(0.8)), 250], rel=1e-4)
    c_noise = torch.log(0.5 * torch.tan(t)) / 4
    torch.testing.assert_close(derivative(log, t), factor[:, None] * derivative(identity, c_noise), rtol=1e-9, atol=1e-12)


def test_identity_time_stays_calm_where_log_time_does_not() -> None:
    """The same weights: towards pi/2 the derivative settles with identity time and grows tenfold a decade with log time."""
    identity, log = awake(conditioning()).double(), conditioning(time_map="log").double()
    log.load_state_dict(identity.state_dict())
    t = HALF_PI - torch.tensor([1e-2, 1e-3, 1e-4], dtype=torch.float64)
    calm = torch.linalg.vector_norm(derivative(identity, t), dim=1)
    wild = torch.linalg.vector_norm(derivative(log, t), dim=1)
    torch.testing.assert_close(calm, calm[:1].expand(3), rtol=0.02, atol=0)
    assert torch.all(wild[1:] > 5 * wild[:-1])
    assert wild[1] > 50 * calm[1]


# The whole path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_map", TIME_MAPS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_conditioning_formula(time_map: str, embedding: str) -> None:
    """`silu(W2 silu(W1 (time + label + guidance)))`, rebuilt from the weights."""
    settings = {"time_map": time_map, **EMBEDDINGS[embedding]}
    module = awake(conditioning(num_classes=3, takes=("guidance",), **settings))
    t, label, scale = torch.tensor([0.2, 0.9, 1.4]), torch.tensor([2, 0, 3]), torch.tensor([1.0, 1.7, 3.0])
    w = module.state_dict()
    c_noise = t if time_map == "identity" else torch.log(0.5 * torch.tan(t)) / 4
    if embedding == "positional":
        angle = c_noise[:, None] * torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
        time = torch.cat([angle.cos(), angle.sin()], 1)
    else:
        time = math.sqrt(2) * torch.cos(2 * math.pi * (c_noise[:, None] * w["time.frequencies"] + w["time.phases"]))
    angle = (scale[:, None] - 1) * torch.tensor([100.0 ** (-i / 4) for i in range(4)])
    strength = torch.cat([angle.cos(), angle.sin()], 1) @ w["guidance.weight"].T + w["guidance.bias"]
    h = F.silu((time + w["label.weight"][label] + strength) @ w["linear1.weight"].T + w["linear1.bias"])
    expected = F.silu(h @ w["linear2.weight"].T + w["linear2.bias"])
    assert expected.shape == (3, module.out_width)
    torch.testing.assert_close(module(t, label=label, guidance=scale), expected, rtol=1e-4, atol=1e-5)


def test_no_label_means_the_null_label() -> None:
    module, t = conditioning(num_classes=3), torch.tensor([0.2, 0.9])
    assert torch.equal(module(t, label=torch.full((2,), 3)), module(t))
    assert not torch.allclose(module(t, label=torch.tensor([0, 1])), module(t))


def test_guidance_starts_without_effect_and_can_learn() -> None:
    module = conditioning(takes=("guidance",))
    plain = conditioning()
    plain.load_state_dict(module.state_dict(), strict=False)
    t = torch.tensor([0.2, 0.9])
    for scale in (0.0, 1.0, 7.5):
        assert torch.equal(module(t, guidance=torch.full((2,), scale)), plain(t))
    (module(t, guidance=torch.tensor([1.5, 2.0])) * draw(0, 2, 32)).sum().backward()
    assert module.guidance.weight.grad.abs().max() > 1e-4
    awake(module)
    assert not torch.allclose(module(t, guidance=torch.ones(2)), module(t, guidance=torch.full((2,), 2.0)))


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 7, -4])
def test_width_must_be_even(width: int) -> None:
    with pytest.raises(UserError, match=rf"conditioning.width is {width}; expected an even number >= 2; correct .+"):
        Conditioning(ConditioningConfig(width=width))


def test_labels_need_a_conditional_network() -> None:
    with pytest.raises(UserError, match=r"^label for a network that takes no conditions; expected .*; drop label$"):
        conditioning()(torch.tensor([0.5]), label=torch.tensor([0]))


def test_guidance_is_given_exactly_where_it_is_taken() -> None:
    t, scale = torch.tensor([0.5]), torch.tensor([1.5])
    with pytest.raises(
        UserError, match=r"^no guidance for a network that takes it; expected .*shape \(b, ...\); pass guidance$"
    ):
        conditioning(takes=("guidance",))(t)
    with pytest.raises(UserError, match=r"^guidance for a network that takes no conditions; expected .*; drop guidance$"):
        conditioning()(t, guidance=scale)


# Ends of the quarter circle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_logarithm_of_the_time_is_finite_at_both_ends(dtype: torch.dtype) -> None:
    """A jump may end at 0; the float32 number nearest to pi/2 is beyond it, where the tangent is negative."""
    t = torch.tensor([0.0, 1e-4, 1.5707962, math.pi / 2], dtype=dtype)
    found = c_noise(t, "log", 0.5)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[1:3], torch.log(0.5 * torch.tan(t[1:3])) / 4, rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[3] >= found[2]
