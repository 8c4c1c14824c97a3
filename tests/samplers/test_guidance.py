import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from oracles.gaussian import GaussianOracle
from oracles.mixture import MixtureOracle
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import SOLVERS, guided_velocity, network_velocity, sigma_grid
from trigflow.samplers.guidance import inside_interval, time_interval

PROCESS = TrigFlow(sigma_data=0.5)
ORACLE = MixtureOracle(
    torch.tensor([[-0.6, 0.3], [0.1, -0.5], [0.8, 0.2]]), torch.tensor([0.02, 0.05, 0.1]), torch.tensor([0.3, 0.2, 0.5])
)
LABEL = torch.tensor([0, 1, 2, 1])
TIMES = torch.tensor([0.2, 0.7, 1.1, 1.5])


class Recorder(nn.Module):
    """The mixture's teacher, remembering every call."""

    def __init__(self, takes_guidance: bool = False, null_label: int | None = 3) -> None:
        super().__init__()
        self.takes_guidance = takes_guidance
        self.null_label = null_label
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        self.calls.append((x, t, label, guidance))
        return ORACLE.F_velocity(x, t, label)


def states() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def test_network_velocity_scales_in_and_out() -> None:
    x, network = states(), Recorder()
    v = network_velocity(network, PROCESS, LABEL)(x, TIMES)
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))
    given, t, label, guidance = network.calls[0]
    torch.testing.assert_close(given, x / 0.5)
    assert torch.equal(t, TIMES)
    assert label is not None
    assert torch.equal(label, LABEL)
    assert guidance is None


def test_network_velocity_without_label_is_unconditional() -> None:
    x, network = states(), Recorder()
    torch.testing.assert_close(network_velocity(network, PROCESS)(x, TIMES), ORACLE.velocity(x, TIMES))
    assert network.calls[0][2] is None


def test_one_label_and_one_scale_serve_the_whole_batch() -> None:
    network = Recorder(takes_guidance=True)
    network_velocity(network, PROCESS, label=2, guidance=1.5)(states(), TIMES)
    _, _, label, guidance = network.calls[0]
    assert label is not None
    assert guidance is not None
    assert label.dtype == torch.int64
    assert label.tolist() == [2, 2, 2, 2]
    assert guidance.tolist() == [1.5, 1.5, 1.5, 1.5]


def test_scales_of_each_sample_reach_the_network() -> None:
    network, scales = Recorder(takes_guidance=True), torch.tensor([1.0, 1.25, 1.5, 2.0])
    network_velocity(network, PROCESS, LABEL, scales)(states(), TIMES)
    assert torch.equal(network.calls[0][3], scales)  # type: ignore[arg-type]


def test_low_precision_output_is_returned_in_the_dtype_of_the_state() -> None:
    def network(x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        return ORACLE.F_velocity(x, t, label).bfloat16()

    assert network_velocity(network, PROCESS)(states(), TIMES).dtype == torch.float32
    assert guided_velocity(network, PROCESS, LABEL, 2.0, null_label=3)(states(), TIMES).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 3.0])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale: float) -> None:
    x = states()
    uncond, cond = ORACLE.velocity(x, TIMES), ORACLE.velocity(x, TIMES, LABEL)
    v = guided_velocity(Recorder(), PROCESS, LABEL, scale)(x, TIMES)
    torch.testing.assert_close(v, uncond + scale * (cond - uncond))


def test_guidance_with_a_scale_for_each_sample() -> None:
    x, scales = states(), torch.tensor([1.0, 0.0, 2.0, 1.5])
    v = guided_velocity(Recorder(), PROCESS, LABEL, scales)(x, TIMES)
    singly = [
        guided_velocity(Recorder(), PROCESS, LABEL[i : i + 1], scales[i].item())(x[i : i + 1], TIMES[i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(v, torch.cat(singly))


def test_guidance_of_images_broadcasts_the_scale_over_all_axes() -> None:
    def network(x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        assert label is not None
        return x * label.reshape(-1, 1, 1, 1)

    x, scales = torch.ones(2, 3, 4, 4), torch.tensor([2.0, 3.0])
    v = guided_velocity(network, PROCESS, torch.tensor([0, 1]), scales, null_label=5)(x, torch.tensor([0.1, 0.2]))
    # F_uncond = 5 x / sd, F_cond = label x / sd.
    torch.testing.assert_close(v[:, 0, 0, 0], torch.tensor([5 + 2.0 * (0 - 5), 5 + 3.0 * (1 - 5)]))
    assert v.shape == x.shape


def test_both_branches_run_in_one_batched_call_equal_to_two() -> None:
    x, network = states(), Recorder()
    v = guided_velocity(network, PROCESS, LABEL, 1.7)(x, TIMES)
    assert len(network.calls) == 1
    given, t, label, guidance = network.calls[0]
    assert given.shape == (8, 2)
    assert t.shape == (8,)
    assert label is not None
    assert label.tolist() == [3, 3, 3, 3, *LABEL.tolist()]
    assert guidance is None
    uncond = network_velocity(network, PROCESS, 3)(x, TIMES)
    cond = network_velocity(network, PROCESS, LABEL)(x, TIMES)
    torch.testing.assert_close(v, uncond + 1.7 * (cond - uncond))


@pytest.mark.parametrize("scale", [1, 1.0, torch.tensor(1.0), torch.ones(4)])
def test_scale_one_skips_the_unconditional_branch(scale: float | Tensor) -> None:
    x, network = states(), Recorder()
    v = guided_velocity(network, PROCESS, LABEL, scale)(x, TIMES)
    assert [call[0].shape[0] for call in network.calls] == [4]
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))


def test_one_scale_other_than_one_needs_both_branches() -> None:
    network = Recorder()
    guided_velocity(network, PROCESS, LABEL, torch.tensor([1.0, 1.0, 1.0, 1.01]))(states(), TIMES)
    assert network.calls[0][0].shape[0] == 8


def test_null_label_argument_wins_over_the_attribute() -> None:
    network = Recorder(null_label=None)
    guided_velocity(network, PROCESS, LABEL, 2.0, null_label=3)(states(), TIMES)
    assert network.calls[0][2].tolist()[:4] == [3] * 4  # type: ignore[union-attr]


def test_mistakes_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"does not take one; expected guidance=None; call guided_velocity"):
        network_velocity(Recorder(), PROCESS, guidance=1.5)
    with pytest.raises(UserError, match=r"no guidance scale for a network that takes one; .*; pass guidance"):
        network_velocity(Recorder(takes_guidance=True), PROCESS)
    with pytest.raises(UserError, match=r"without a null label; .*; pass null_label"):
        guided_velocity(Recorder(null_label=None), PROCESS, LABEL, 2.0)
    with pytest.raises(UserError, match=r"takes the scale as an input; expected one without; use network_velocity"):
        guided_velocity(Recorder(takes_guidance=True), PROCESS, LABEL, 2.0)


@pytest.mark.parametrize("shape", [(3,), (4, 1)])
def test_labels_and_scales_must_match_the_batch(shape: tuple[int, ...]) -> None:
    x = states()
    labels = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(UserError, match=r"labels of shape .* for a batch of 4; expected one number or shape \(4,\)"):
        network_velocity(Recorder(), PROCESS, labels)(x, TIMES)
    with pytest.raises(UserError, match=r"labels of shape .* for a batch of 4"):
        guided_velocity(Recorder(), PROCESS, labels, 2.0)(x, TIMES)
    with pytest.raises(UserError, match=r"guidance scales of shape .* for a batch of 4"):
        guided_velocity(Recorder(), PROCESS, LABEL, 2 * torch.ones(shape))(x, TIMES)
    with pytest.raises(UserError, match=r"guidance scales of shape .* for a batch of 4"):
        network_velocity(Recorder(takes_guidance=True), PROCESS, LABEL, torch.ones(shape))(x, TIMES)


# Autoguidance --------------------------------------------------------------------------------------------------------

BLURRED = MixtureOracle(ORACLE.means, ORACLE.variances + 0.15, ORACLE.weights)
"""The same modes, wider: what a smaller or less trained model has learned."""


class Blurred(Recorder):
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        self.calls.append((x, t, label, guidance))
        return BLURRED.F_velocity(x, t, label)


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Velocity for data `N(mean, variance I)`, written out: `v = cos E[z] - sin E[x0]`; mean like x, variance `(b,)`."""
    cos, sin, var = torch.cos(t)[:, None], torch.sin(t)[:, None], variance[:, None]
    offset = (x - cos * mean) / (cos**2 * var + sin**2 * 0.25)
    return cos * (sin * 0.25 * offset) - sin * (mean + cos * var * offset)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 3.0])
def test_autoguidance_extrapolates_from_the_negative_at_the_same_label(scale: float) -> None:
    x, network, negative = states(), Recorder(), Blurred()
    v = guided_velocity(network, PROCESS, LABEL, scale, negative=negative)(x, TIMES)
    mean, variance = ORACLE.means[LABEL], ORACLE.variances[LABEL]
    good = gaussian_velocity(x, TIMES, mean, variance)
    bad = gaussian_velocity(x, TIMES, mean, variance + 0.15)
    torch.testing.assert_close(v, bad + scale * (good - bad))
    for one in (network, negative):
        assert [call[0].shape[0] for call in one.calls] == [4]
        assert torch.equal(one.calls[0][2], LABEL)  # type: ignore[arg-type]


def test_autoguidance_of_a_network_without_classes() -> None:
    x, network, negative = states(), Recorder(null_label=None), Blurred(null_label=None)
    v = guided_velocity(network, PROCESS, None, 2.0, negative=negative)(x, TIMES)
    bad = BLURRED.velocity(x, TIMES)
    torch.testing.assert_close(v, bad + 2.0 * (ORACLE.velocity(x, TIMES) - bad))
    assert network.calls[0][2] is None
    assert negative.calls[0][2] is None


def test_an_unconditional_negative_is_not_told_the_label() -> None:
    x, network, negative = states(), Recorder(), Blurred(null_label=None)
    v = guided_velocity(network, PROCESS, LABEL, 2.0, negative=negative)(x, TIMES)
    bad = BLURRED.velocity(x, TIMES)
    torch.testing.assert_close(v, bad + 2.0 * (ORACLE.velocity(x, TIMES, LABEL) - bad))
    assert negative.calls[0][2] is None


def test_a_plain_function_is_a_negative_too() -> None:
    def negative(x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        return BLURRED.F_velocity(x, t, label)

    x = states()
    v = guided_velocity(Recorder(), PROCESS, LABEL, 2.0, negative=negative)(x, TIMES)
    torch.testing.assert_close(v, guided_velocity(Recorder(), PROCESS, LABEL, 2.0, negative=Blurred())(x, TIMES))


@pytest.mark.parametrize("scale", [1, torch.ones(4)])
def test_scale_one_skips_the_negative(scale: float | Tensor) -> None:
    x, network, negative = states(), Recorder(), Blurred()
    v = guided_velocity(network, PROCESS, LABEL, scale, negative=negative)(x, TIMES)
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))
    assert negative.calls == []


# Guidance in an interval of noise levels -----------------------------------------------------------------------------

INTERVAL = (0.3, 1.2)
"""Noise levels between the first and the last two of TIMES: sigma = 0.10, 0.42, 0.98, 7.05."""


@pytest.mark.parametrize("auto", [False, True])
def test_guidance_acts_inside_the_interval_alone(auto: bool) -> None:
    x, network, negative = states(), Recorder(), Blurred()
    scales = torch.tensor([3.0, 2.0, 1.5, 4.0])
    v = guided_velocity(
        network, PROCESS, LABEL, scales, negative=negative if auto else None, interval=INTERVAL
    )(x, TIMES)  # fmt: skip
    cond = ORACLE.velocity(x, TIMES, LABEL)
    away = BLURRED.velocity(x, TIMES, LABEL) if auto else ORACLE.velocity(x, TIMES)
    expected = torch.where(
        torch.tensor([False, True, True, False])[:, None], away + scales[:, None] * (cond - away), cond
    )
    torch.testing.assert_close(v, expected)


def test_only_samples_inside_are_evaluated_twice() -> None:
    x, network = states(), Recorder()
    guided_velocity(network, PROCESS, LABEL, 2.0, interval=INTERVAL)(x, TIMES)
    (given, t, label, _) = network.calls[0]
    assert len(network.calls) == 1
    assert label is not None
    assert label.tolist() == [3, 3, *LABEL.tolist()]
    assert torch.equal(t, torch.cat([TIMES[1:3], TIMES]))
    assert torch.equal(given, torch.cat([x[1:3], x]) / 0.5)

    network, negative = Recorder(), Blurred()
    guided_velocity(network, PROCESS, LABEL, 2.0, negative=negative, interval=INTERVAL)(x, TIMES)
    assert network.calls[0][0].shape[0] == 4
    assert torch.equal(negative.calls[0][1], TIMES[1:3])
    assert torch.equal(negative.calls[0][2], LABEL[1:3])  # type: ignore[arg-type]


def test_no_sample_inside_makes_no_second_evaluation() -> None:
    x, network, negative = states(), Recorder(), Blurred()
    outside = torch.full((4,), 1.5)
    for other in (None, negative):
        v = guided_velocity(network, PROCESS, LABEL, 2.0, negative=other, interval=INTERVAL)(x, outside)
        torch.testing.assert_close(v, ORACLE.velocity(x, outside, LABEL))
    assert [call[0].shape[0] for call in network.calls] == [4, 4]
    assert negative.calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sd", [0.5, 0.37])
def test_both_ends_of_the_interval_are_inside(sd: float, dtype: torch.dtype) -> None:
    """An end at a time of the sampling grid is inside whatever the rounding, its neighbours beyond are outside."""
    process = TrigFlow(sigma_data=sd)
    grid = sigma_grid(process, 40)[:-1]
    sigmas = sd * torch.tan(grid)
    for high in range(0, 38, 3):
        bounds = time_interval(process, (sigmas[high + 2].item(), sigmas[high].item()))
        inside = inside_interval(grid.to(dtype), bounds).nonzero()[:, 0].tolist()
        assert inside == [high, high + 1, high + 2]


def test_an_interval_may_be_open_upwards_and_reach_zero() -> None:
    ends = torch.tensor([0.0, 0.7, math.pi / 2])
    assert inside_interval(ends, time_interval(PROCESS, (0.0, math.inf))).tolist() == [True, True, True]
    assert inside_interval(ends, time_interval(PROCESS, (0.1, math.inf))).tolist() == [False, True, True]


def test_the_interval_is_stated_in_sigma() -> None:
    low, high = time_interval(TrigFlow(sigma_data=0.25), (0.25, 0.25 * math.sqrt(3)))
    assert (low, high) == pytest.approx((math.pi / 4, math.pi / 3))


@pytest.mark.parametrize("name", SOLVERS)
def test_cost_of_sampling_with_an_interval(name: str) -> None:
    """Evaluations are counted in samples through both branches: one, and one more where the time is inside."""
    network, times = Recorder(), []

    def record(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return plain(x, t)

    plain = guided_velocity(network, PROCESS, LABEL, 2.0, interval=INTERVAL)
    SOLVERS[name](record, PROCESS.sample_noise(states()), sigma_grid(PROCESS, 12))
    sigmas = 0.5 * torch.tan(torch.stack(times)[:, 0].double())
    inside = int(((sigmas >= INTERVAL[0]) & (sigmas <= INTERVAL[1])).sum())
    assert 0 < inside < len(times)
    assert sum(call[0].shape[0] for call in network.calls) == 4 * (len(times) + inside)
    assert len(network.calls) == len(times)


def test_guided_trajectories_in_closed_form() -> None:
    """For centred Gaussians the ODE is `dlog x/dt = (s V'/V + (1 - s) W'/W) / 2` inside the interval, `V'/(2V)` outside."""
    narrow, wide, s = 0.04, 0.2, 2.5
    good, bad = GaussianOracle(torch.tensor([narrow])), GaussianOracle(torch.tensor([wide]))
    low, high = time_interval(PROCESS, INTERVAL)
    velocity = guided_velocity(good.teacher(), PROCESS, None, s, negative=bad.teacher(), interval=INTERVAL)
    x = torch.tensor([[1.0], [-0.3]], dtype=torch.float64)
    ends = [1.5, high, low, 0.0]
    grid = torch.cat(
        [torch.linspace(a, b, 400, dtype=torch.float64)[:-1] for a, b in pairwise(ends)] + [torch.zeros(1)]
    )
    drawn = SOLVERS["heun"](velocity, x, grid)

    def log_ratio(variance: float, t: float, u: float) -> float:
        at = [math.cos(a) ** 2 * variance + math.sin(a) ** 2 * 0.25 for a in (t, u)]
        return math.log(at[1] / at[0]) / 2

    outside = log_ratio(narrow, ends[0], high) + log_ratio(narrow, low, 0.0)
    inside = s * log_ratio(narrow, high, low) + (1 - s) * log_ratio(wide, high, low)
    torch.testing.assert_close(drawn, x * math.exp(outside + inside), rtol=2e-3, atol=0)
    unguided = x * math.exp(outside + log_ratio(narrow, high, low))
    assert ((drawn - unguided) / unguided).abs().min() > 0.05


def test_mistakes_in_guidance_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"both null_label and negative; expected one, .*; drop one of them"):
        guided_velocity(Recorder(), PROCESS, LABEL, 2.0, null_label=3, negative=Blurred())
    with pytest.raises(UserError, match=r"guidance without a label; expected a class, or a negative"):
        guided_velocity(Recorder(), PROCESS, None, 2.0)
    with pytest.raises(UserError, match=r"takes the scale as an input; expected one without"):
        guided_velocity(Recorder(), PROCESS, LABEL, 2.0, negative=Blurred(takes_guidance=True))
    for interval in ((1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(
            UserError, match=r"guidance interval .*; expected two noise levels sigma with 0 <= low < high"
        ):
            guided_velocity(Recorder(), PROCESS, LABEL, 2.0, interval=interval)
