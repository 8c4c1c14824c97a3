import math

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from oracles.mixture import MixtureOracle
from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import SOLVERS, VelocityFunction, get_solver, nfe, sigma_grid, steps_for_nfe

PROCESS = TrigFlow()
ORDERS = {"ddim": 1, "heun": 2, "dpm2s": 2, "dpm++2m": 2}
GAUSSIAN = GaussianOracle(torch.tensor([0.02, 0.1, 0.25, 1.0, 2.0], dtype=torch.float64))
MIXTURE = MixtureOracle(
    torch.tensor([[-0.6], [0.1], [0.8]], dtype=torch.float64),
    torch.tensor([0.02, 0.05, 0.03], dtype=torch.float64),
    torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64),
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Counted:
    """A velocity function that counts its calls and remembers what it was given."""

    def __init__(self, velocity: VelocityFunction) -> None:
        self.velocity = velocity
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x, t))
        return self.velocity(x, t)


def measured_order(name: str, velocity: VelocityFunction, x: Tensor, exact: Tensor) -> float:
    """Slope of log error against log steps over the last doublings of the sigma grid."""
    steps = [24, 48, 96]
    errors = [(SOLVERS[name](velocity, x, sigma_grid(PROCESS, n)) - exact).square().mean().sqrt().item() for n in steps]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence_on_a_gaussian(name: str) -> None:
    x = noise(100, 5)
    order = measured_order(name, GAUSSIAN.velocity, x, GAUSSIAN.consistency(x, PROCESS.t_max))
    assert order == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence_on_a_mixture(name: str) -> None:
    x = noise(100, 1)
    order = measured_order(name, MIXTURE.velocity, x, MIXTURE.quantile_map(x, PROCESS.t_max))
    assert order == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("end", [0.0, 0.3])
def test_solution_on_an_even_grid_down_to_any_time(name: str, end: float) -> None:
    """The state at t > 0 has the variance V(t) of the process there."""
    x = GAUSSIAN.variance(noise(1, 5), 1.4).sqrt()[None]
    times = torch.linspace(1.4, end, 201, dtype=torch.float64)
    out = SOLVERS[name](GAUSSIAN.velocity, x, times)
    expected = GAUSSIAN.variance(out, end).sqrt().expand_as(out)
    torch.testing.assert_close(out, expected, rtol=2e-2 if name == "ddim" else 2e-3, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_have_the_variance_of_the_data(name: str) -> None:
    x = noise(4_000, 5, dtype=torch.float32)
    data = SOLVERS[name](GAUSSIAN.velocity, x, sigma_grid(PROCESS, 160 if name == "ddim" else 40))
    assert data.dtype == torch.float32
    gain = data.var(0) / x.var(0)  # free of the scatter of 4000 samples
    torch.testing.assert_close(0.25 * gain, GAUSSIAN.variances.float(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_straight_problem_is_solved_in_any_number_of_steps(name: str) -> None:
    """One data point: the prediction of x0 is exact everywhere, so solvers built on rotations make no error."""
    x0 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    z = noise(4, 2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c, s = torch.cos(t)[:, None], torch.sin(t)[:, None]
        return (c * x - x0) / s

    start = PROCESS.interpolate(x0.expand(4, 2), z, torch.tensor(PROCESS.t_max, dtype=torch.float64))
    for steps in (1, 2, 5):
        out = SOLVERS[name](velocity, start, sigma_grid(PROCESS, steps))
        torch.testing.assert_close(out, x0.expand(4, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_is_the_denoiser(name: str) -> None:
    x = noise(3, 5)
    out = SOLVERS[name](GAUSSIAN.velocity, x, sigma_grid(PROCESS, 1))
    torch.testing.assert_close(out, GAUSSIAN.denoise(x, PROCESS.t_max), rtol=1e-9, atol=1e-9)


def test_ddim_on_segment_ends_composes_exact_jumps() -> None:
    """A network exact on each segment, `f(x_t, t -> s) = cos(t-s) x - sin(t-s) v`, is sampled without error by ddim."""
    ends = [HALF_PI, 1.0, 0.4, 0.0]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t0 = t[0].item()
        s0 = next(s for s in ends if s < t0 - 1e-9)
        landing = x * (GAUSSIAN.variance(x, s0) / GAUSSIAN.variance(x, t0)).sqrt()
        return (math.cos(t0 - s0) * x - landing) / math.sin(t0 - s0)

    x = noise(3, 5)
    out = SOLVERS["ddim"](velocity, x, ends)
    torch.testing.assert_close(out, GAUSSIAN.consistency(x, HALF_PI), rtol=1e-9, atol=1e-9)


# Evaluations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_nfe_is_what_the_solver_spends(name: str, steps: int) -> None:
    counted = Counted(GAUSSIAN.velocity)
    SOLVERS[name](counted, noise(2, 5), sigma_grid(PROCESS, steps))
    assert len(counted.calls) == nfe(name, steps)
    assert all(t.shape == (2,) and 0 < t[0] <= PROCESS.t_max for _, t in counted.calls)


def test_published_evaluation_counts() -> None:
    assert nfe("heun", 18) == 35
    assert nfe("heun", 32) == 63
    assert steps_for_nfe("heun", 63) == 32
    assert nfe("dpm++2m", 20) == nfe("ddim", 20) == 20


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_for_nfe_spends_the_budget_and_no_more(name: str) -> None:
    for budget in range(1, 70):
        steps = steps_for_nfe(name, budget)
        assert nfe(name, steps) <= budget < nfe(name, steps + 1)


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("given", "state"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_state_is_float32_or_higher(name: str, given: torch.dtype, state: torch.dtype) -> None:
    counted = Counted(lambda x, t: GAUSSIAN.velocity(x, t).bfloat16())
    x = noise(2, 5).to(given)
    before = x.clone()
    out = SOLVERS[name](counted, x, sigma_grid(PROCESS, 3))
    assert out.dtype == state
    assert all(x.dtype == t.dtype == state for x, t in counted.calls)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_gradient_is_recorded(name: str) -> None:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = SOLVERS[name](lambda x, t: scale * GAUSSIAN.velocity(x, t), noise(2, 5), sigma_grid(PROCESS, 3))
    assert not out.requires_grad


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_sees_every_state(name: str) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    times = sigma_grid(PROCESS, 4)
    out = SOLVERS[name](GAUSSIAN.velocity, noise(2, 5), times, callback=lambda i, t, x: seen.append((i, t, x)))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == times[1:].tolist()
    assert torch.equal(seen[-1][2], out)
    partial = SOLVERS[name](GAUSSIAN.velocity, noise(2, 5), times[:3])
    torch.testing.assert_close(seen[1][2], partial)


def test_progress_bar_changes_nothing_but_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    x, times = noise(2, 5), sigma_grid(PROCESS, 3)
    quiet = SOLVERS["ddim"](GAUSSIAN.velocity, x, times)
    assert capsys.readouterr().err == ""
    shown = SOLVERS["ddim"](GAUSSIAN.velocity, x, times, progress=True)
    captured = capsys.readouterr()
    assert "sampling" in captured.err
    assert captured.out == ""
    assert torch.equal(quiet, shown)


@pytest.mark.parametrize("name", SOLVERS)
def test_times_may_be_a_sequence_and_start_at_half_pi(name: str) -> None:
    x = noise(2, 5)
    from_floats = SOLVERS[name](GAUSSIAN.velocity, x, [HALF_PI, 1.0, 0.5, 0.0])
    assert bool(from_floats.isfinite().all())
    from_float32 = SOLVERS[name](GAUSSIAN.velocity, x, torch.tensor([HALF_PI, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(from_floats, from_float32, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("times", [[], [1.0], [0.5, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, -0.1], [1.0, math.nan, 0.0]])
def test_times_out_of_order_or_range_are_rejected(name: str, times: list[float]) -> None:
    counted = Counted(GAUSSIAN.velocity)
    with pytest.raises(UserError, match=r"times \(.*\); expected two or more decreasing times in \[0, pi/2\]; .+"):
        SOLVERS[name](counted, noise(2, 5), times)
    assert counted.calls == []


def test_unknown_solver_is_named_with_the_known_ones() -> None:
    known = r"unknown solver 'rk4'; expected one of ddim, heun, dpm2s, dpm\+\+2m; .+"
    with pytest.raises(UserError, match=known):
        get_solver("rk4")
    with pytest.raises(UserError, match=known):
        nfe("rk4", 3)
    with pytest.raises(UserError, match=known):
        steps_for_nfe("rk4", 3)
    assert get_solver("heun") is SOLVERS["heun"]


def test_counts_below_one_are_rejected() -> None:
    with pytest.raises(UserError, match="0 steps of heun; expected at least 1"):
        nfe("heun", 0)
    with pytest.raises(UserError, match="0 evaluations of ddim; expected at least 1"):
        steps_for_nfe("ddim", 0)
