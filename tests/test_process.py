import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles.gaussian import GaussianOracle
from oracles.mixture import MixtureOracle
from trigflow.process import HALF_PI, Prediction, Proposal, TrigFlow, trig
from trigflow.runtime.errors import UserError

PREDICTIONS = get_args(Prediction)

seeds = st.integers(0, 2**31)
inner_times = st.floats(0.05, 1.5)
sigma_datas = st.floats(0.1, 3.0)
few = settings(max_examples=30, deadline=None, derandomize=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# Trigonometry and shapes ---------------------------------------------------------------------------------------------


def test_trig_broadcasts_over_the_sample_axes() -> None:
    x = torch.zeros(3, 2, 4, 4)
    t = torch.tensor([0.1, 0.7, 1.5])
    c, s = trig(t, x)
    assert c.shape == s.shape == (3, 1, 1, 1)
    close(c.flatten(), torch.cos(t))
    assert trig(torch.tensor(0.3), x)[0].shape == ()
    assert trig(torch.tensor([0.3]), x)[0].shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("t_dtype", "x_dtype", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_trig_computes_in_float32_or_higher(t_dtype: torch.dtype, x_dtype: torch.dtype, expected: torch.dtype) -> None:
    c, s = trig(torch.tensor([0.5], dtype=t_dtype), torch.zeros(1, 2, dtype=x_dtype))
    assert c.dtype == s.dtype == expected


@pytest.mark.parametrize(("t", "x"), [((2,), (3, 4)), ((3, 1), (3, 4)), ((2, 2), (2, 2))])
def test_trig_rejects_times_that_do_not_fit(t: tuple[int, ...], x: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"times of shape .*; expected .*; .+") as error:
        trig(torch.zeros(t), torch.zeros(x))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("level", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["sigma_data", "sigma_min", "sigma_max"])
def test_levels_must_be_finite_and_positive(name: str, level: float) -> None:
    with pytest.raises(UserError, match=r"noise levels .*; expected finite positive numbers"):
        TrigFlow(**{name: level})


def test_levels_must_be_ordered() -> None:
    with pytest.raises(UserError, match="sigma_min < sigma_max"):
        TrigFlow(sigma_min=2.0, sigma_max=2.0)


# Time and noise level ------------------------------------------------------------------------------------------------


@few
@given(sigma=st.floats(1e-3, 1e3), sd=sigma_datas)
def test_time_and_sigma_are_inverse(sigma: float, sd: float) -> None:
    process = TrigFlow(sigma_data=sd)
    s = torch.tensor(sigma, dtype=torch.float64)
    t = process.time_from_sigma(s)
    assert 0 < t < HALF_PI
    close(process.sigma_from_time(t), s, 1e-9)
    # sigma / sd is the ratio of noise to signal, and lambda its negative logarithm.
    close(process.log_snr(t), -torch.log(s / sd), 1e-9)


def test_ends_of_the_time_axis() -> None:
    process = TrigFlow(sigma_data=0.5, sigma_max=80.0)
    assert process.t_max == pytest.approx(math.atan(160))
    sigma = torch.tensor([0.0, math.inf], dtype=torch.float64)
    close(process.time_from_sigma(sigma), torch.tensor([0, HALF_PI], dtype=torch.float64))


# Interpolant and its derivative --------------------------------------------------------------------------------------


@few
@given(seed=seeds, t=st.floats(0, HALF_PI))
def test_velocity_is_the_time_derivative_of_the_interpolant(seed: int, t: float) -> None:
    process = TrigFlow()
    x0, z = draw(seed, 2, 5), draw(seed + 1, 2, 5)
    times = torch.full((2,), t, dtype=torch.float64)
    x_t, dx_dt = torch.func.jvp(lambda s: process.interpolate(x0, z, s), (times,), (torch.ones_like(times),))
    close(process.velocity(x0, z, times), dx_dt)
    close(process.denoise(x_t, dx_dt, times), x0)
    close(process.predict_noise(x_t, dx_dt, times), z)


def test_interpolant_keeps_the_variance_of_normalized_data() -> None:
    process = TrigFlow(sigma_data=0.7)
    g = generator(3)
    x0 = 0.7 * torch.randn(200_000, 1, generator=g)
    x_t = process.interpolate(x0, process.sample_noise(x0, g), torch.tensor(0.9))
    assert x_t.std().item() == pytest.approx(0.7, rel=0.01)


def test_noise_follows_the_data_and_the_generator() -> None:
    process = TrigFlow(sigma_data=0.5)
    x0 = torch.zeros(50_000, 2, dtype=torch.float64)
    z = process.sample_noise(x0, generator(1))
    assert (z.shape, z.dtype) == (x0.shape, x0.dtype)
    assert z.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(z, process.sample_noise(x0, generator(1)))
    assert not torch.equal(z, process.sample_noise(x0, generator(2)))


@few
@given(seed=seeds)
def test_consistency_function_is_the_identity_at_time_zero(seed: int) -> None:
    x, anything = draw(seed, 3, 4), 1e3 * draw(seed + 1, 3, 4)
    assert torch.equal(TrigFlow().denoise(x, anything, torch.zeros(3)), x)


@few
@given(seed=seeds, t=st.floats(0, HALF_PI), s=st.floats(0, HALF_PI))
def test_ddim_step_is_exact_along_the_circle(seed: int, t: float, s: float) -> None:
    process = TrigFlow()
    x0, z = draw(seed, 2, 3), draw(seed + 1, 2, 3)
    start, end = torch.full((2,), t, dtype=torch.float64), torch.full((2,), s, dtype=torch.float64)
    x_t, v = process.interpolate(x0, z, start), process.velocity(x0, z, start)
    close(process.ddim_step(x_t, v, start, end), process.interpolate(x0, z, end))


# Conversions ---------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, t=inner_times, sd=sigma_datas)
def test_every_prediction_converts_to_every_other(seed: int, t: float, sd: float) -> None:
    process = TrigFlow(sigma_data=sd)
    x0, z = draw(seed, 2, 3), sd * draw(seed + 1, 2, 3)
    times = torch.full((2,), t, dtype=torch.float64)
    x_t, v = process.interpolate(x0, z, times), process.velocity(x0, z, times)
    known = {"F": v / sd, "velocity": v, "x0": x0, "noise": z, "score": -z / (math.sin(t) * sd**2)}
    assert known.keys() == set(PREDICTIONS)
    for source, target in product(PREDICTIONS, PREDICTIONS):
        close(process.convert(known[source], x_t, times, source, target), known[target], 1e-8)


@pytest.mark.parametrize(("source", "target"), [("eps", "x0"), ("x0", "v"), ("eps", "eps")])
def test_unknown_prediction_is_named_with_the_known_ones(source: str, target: str) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(UserError, match=r"unknown prediction '(eps|v)'; expected one of F, velocity, x0, noise, score"):
        TrigFlow().convert(x, x, 0.5, source, target)  # type: ignore[arg-type]


@few
@given(seed=seeds, t=inner_times, sd=sigma_datas)
def test_edm_preconditioning_is_the_same_model(seed: int, t: float, sd: float) -> None:
    """EDM's `D = c_skip y + c_out F_edm(c_in y)`, y = x_t / cos t, is TrigFlow's denoiser with F = -F_edm."""
    process = TrigFlow(sigma_data=sd)
    x_t = draw(seed, 2, 3)
    times = torch.full((2,), t, dtype=torch.float64)
    sigma = process.sigma_from_time(times)[:, None]
    y = x_t / math.cos(t)
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / torch.sqrt(sigma**2 + sd**2)
    c_in = 1 / torch.sqrt(sigma**2 + sd**2)

    close(c_in * y, x_t / sd, 1e-9)
    close(c_skip * y, math.cos(t) * x_t, 1e-9)
    close(c_out, torch.full_like(c_out, sd * math.sin(t)), 1e-9)

    f_edm = torch.tanh(c_in * y)
    denoised = c_skip * y + c_out * f_edm
    close(process.convert(-f_edm, x_t, times, "F", "x0"), denoised, 1e-9)
    close(process.convert(denoised, x_t, times, "x0", "F"), -f_edm, 1e-8)


@few
@given(seed=seeds, t=inner_times, sd=sigma_datas)
def test_rectified_flow_is_the_same_model(seed: int, t: float, sd: float) -> None:
    """`x_s = (1 - s) x0 + s n` with `s = sd sin t / (cos t + sd sin t)` is `x_t` on another scale, n = z / sd."""
    process = TrigFlow(sigma_data=sd)
    x0, n = draw(seed, 2, 3), draw(seed + 1, 2, 3)
    times = torch.full((2,), t, dtype=torch.float64)
    scale = math.cos(t) + sd * math.sin(t)
    s = sd * math.sin(t) / scale
    x_t = process.interpolate(x0, sd * n, times)
    x_s = (1 - s) * x0 + s * n
    close(x_s, x_t / scale, 1e-10)

    u = n - x0
    from_flow = math.cos(t) * sd * (x_s + (1 - s) * u) - math.sin(t) * (x_s - s * u)
    close(process.velocity(x0, sd * n, times), from_flow, 1e-10)


# Exact distributions -------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, t=inner_times)
def test_predictions_of_a_gaussian(seed: int, t: float) -> None:
    process = TrigFlow()
    oracle = GaussianOracle(torch.tensor([0.04, 0.25, 2.0]).double())
    x, times = draw(seed, 4, 3), torch.full((4,), t, dtype=torch.float64)
    v = oracle.velocity(x, times)
    close(process.convert(v, x, times, "velocity", "x0"), oracle.denoise(x, times), 1e-9)
    close(process.convert(v, x, times, "velocity", "score"), oracle.score(x, times), 1e-9)


@few
@given(seed=seeds, t=inner_times)
def test_score_of_a_mixture(seed: int, t: float) -> None:
    process = TrigFlow()
    oracle = MixtureOracle(draw(0, 3, 2), torch.tensor([0.02, 0.1, 0.3]).double(), torch.tensor([1.0, 2.0, 3.0]).double())
    x, times = draw(seed, 4, 2), torch.full((4,), t, dtype=torch.float64)
    score = torch.func.grad(lambda y: oracle.log_density(y, times).sum())(x)
    v = oracle.velocity(x, times)
    close(process.convert(v, x, times, "velocity", "score"), score, 1e-8)
    close(process.convert(score, x, times, "score", "velocity"), v, 1e-8)


# Proposal ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(-1.0, 1.4), (-0.4, 1.0), (0.4, 2.0)])
def test_proposal_has_normal_log_noise_levels(mean: float, std: float) -> None:
    process = TrigFlow()
    t = Proposal(mean, std).sample(process, 100_000, generator(7))
    assert (t.shape, t.dtype) == ((100_000,), torch.float32)
    assert t.min() > 0
    assert t.max() < HALF_PI
    tau = process.sigma_from_time(t.double()).log()
    assert tau.mean().item() == pytest.approx(mean, abs=0.02)
    assert tau.std().item() == pytest.approx(std, rel=0.01)
    skew = ((tau - tau.mean()) / tau.std()).pow(3).mean().item()
    assert skew == pytest.approx(0, abs=0.03)


def test_proposal_is_reproducible() -> None:
    first, second = (Proposal().sample(TrigFlow(), 8, generator(5)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_proposal_rejects_degenerate_settings(mean: float, std: float) -> None:
    with pytest.raises(UserError, match=r"proposal mean=.*; expected finite numbers with std > 0"):
        Proposal(mean, std)


@pytest.mark.parametrize(("mean", "std", "name"), [("a", 1.0, "mean"), (None, 1.0, "mean"), (0.0, True, "std")])
def test_a_proposal_of_something_else_than_numbers_is_refused(mean: Any, std: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is .*; expected a number"):
        Proposal(mean, std)
