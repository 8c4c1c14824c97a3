import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.gaussian import GaussianOracle
from oracles.jumps import ExactJumps
from oracles.mixture import MixtureOracle
from trigflow.networks import ConditioningConfig, MLPConfig, build
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

    oracle = ORACLE

    def __init__(self, takes: tuple[str, ...] = ("label",), null_label: int | None = 3) -> None:
        super().__init__()
        self.takes = frozenset(takes)
        self.null = {"label": torch.tensor(null_label)} if null_label is not None and "label" in takes else {}
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        assert conditions.keys() <= self.takes
        label = conditions.get("label")
        self.calls.append((x, t, label, conditions.get("guidance")))
        return self.oracle.F_velocity(x, t, label)


class Function(nn.Module):
    """A function of (x, t, label) as a network with a class that can be left out."""

    takes = frozenset({"label"})

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], null_label: int) -> None:
        super().__init__()
        self.function, self.null = function, {"label": torch.tensor(null_label)}

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.function(x, t, label)


def of(label: Tensor | int) -> dict[str, Any]:
    """The conditions of a class."""
    return {"label": label}


def states() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def test_network_velocity_scales_in_and_out() -> None:
    x, network = states(), Recorder()
    v = network_velocity(network, PROCESS, of(LABEL))(x, TIMES)
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
    network = Recorder(("label", "guidance"))
    network_velocity(network, PROCESS, {"label": 2, "guidance": 1.5})(states(), TIMES)
    _, _, label, guidance = network.calls[0]
    assert label is not None
    assert guidance is not None
    assert label.dtype == torch.int64
    assert label.tolist() == [2, 2, 2, 2]
    assert guidance.tolist() == [1.5, 1.5, 1.5, 1.5]


def test_scales_of_each_sample_reach_the_network() -> None:
    network, scales = Recorder(("label", "guidance")), torch.tensor([1.0, 1.25, 1.5, 2.0])
    network_velocity(network, PROCESS, {"label": LABEL, "guidance": scales})(states(), TIMES)
    assert torch.equal(network.calls[0][3], scales)  # type: ignore[arg-type]


def test_low_precision_output_is_returned_in_the_dtype_of_the_state() -> None:
    network = Function(lambda x, t, label: ORACLE.F_velocity(x, t, label).bfloat16(), 3)
    assert network_velocity(network, PROCESS, of(3))(states(), TIMES).dtype == torch.float32
    assert guided_velocity(network, PROCESS, of(LABEL), 2.0)(states(), TIMES).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 3.0])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale: float) -> None:
    x = states()
    uncond, cond = ORACLE.velocity(x, TIMES), ORACLE.velocity(x, TIMES, LABEL)
    v = guided_velocity(Recorder(), PROCESS, of(LABEL), scale)(x, TIMES)
    torch.testing.assert_close(v, uncond + scale * (cond - uncond))


def test_guidance_with_a_scale_for_each_sample() -> None:
    x, scales = states(), torch.tensor([1.0, 0.0, 2.0, 1.5])
    v = guided_velocity(Recorder(), PROCESS, of(LABEL), scales)(x, TIMES)
    singly = [
        guided_velocity(Recorder(), PROCESS, of(LABEL[i : i + 1]), scales[i].item())(x[i : i + 1], TIMES[i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(v, torch.cat(singly))


def test_guidance_of_images_broadcasts_the_scale_over_all_axes() -> None:
    network = Function(lambda x, t, label: x * label.reshape(-1, 1, 1, 1), 5)
    x, scales = torch.ones(2, 3, 4, 4), torch.tensor([2.0, 3.0])
    v = guided_velocity(network, PROCESS, of(torch.tensor([0, 1])), scales)(x, torch.tensor([0.1, 0.2]))
    # F_uncond = 5 x / sd, F_cond = label x / sd.
    torch.testing.assert_close(v[:, 0, 0, 0], torch.tensor([5 + 2.0 * (0 - 5), 5 + 3.0 * (1 - 5)]))
    assert v.shape == x.shape


def test_both_branches_run_in_one_batched_call_equal_to_two() -> None:
    x, network = states(), Recorder()
    v = guided_velocity(network, PROCESS, of(LABEL), 1.7)(x, TIMES)
    assert len(network.calls) == 1
    given, t, label, guidance = network.calls[0]
    assert given.shape == (8, 2)
    assert t.shape == (8,)
    assert label is not None
    assert label.tolist() == [3, 3, 3, 3, *LABEL.tolist()]
    assert guidance is None
    uncond = network_velocity(network, PROCESS, of(3))(x, TIMES)
    cond = network_velocity(network, PROCESS, of(LABEL))(x, TIMES)
    torch.testing.assert_close(v, uncond + 1.7 * (cond - uncond))


@pytest.mark.parametrize("scale", [1, 1.0, torch.tensor(1.0), torch.ones(4)])
def test_scale_one_is_the_network_itself_and_as_a_number_skips_the_unconditional_branch(scale: float | Tensor) -> None:
    """The numbers of a tensor are not looked at, which would wait for the device."""
    x, network = states(), Recorder()
    v = guided_velocity(network, PROCESS, of(LABEL), scale)(x, TIMES)
    assert [call[0].shape[0] for call in network.calls] == [8 if isinstance(scale, Tensor) else 4]
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))


def test_one_scale_other_than_one_needs_both_branches() -> None:
    network = Recorder()
    guided_velocity(network, PROCESS, of(LABEL), torch.tensor([1.0, 1.0, 1.0, 1.01]))(states(), TIMES)
    assert network.calls[0][0].shape[0] == 8


def test_mistakes_say_what_to_do() -> None:
    guided = Recorder(("label", "guidance"))
    with pytest.raises(UserError, match=r"^guidance for a network that takes label; expected .*; drop guidance$"):
        network_velocity(Recorder(), PROCESS, {"guidance": 1.5})
    with pytest.raises(UserError, match=r"^no guidance for a network that takes it; expected .*; pass guidance$"):
        network_velocity(guided, PROCESS)
    with pytest.raises(UserError, match=r"^label for a network that takes no conditions; expected .*; drop label$"):
        network_velocity(Recorder(()), PROCESS, of(LABEL))
    with pytest.raises(UserError, match=r"^no label for a network that takes it; expected .*; pass label$"):
        network_velocity(Recorder(null_label=None), PROCESS)
    with pytest.raises(UserError, match=r"away from nothing: .* label .*leave out none; expected .*negative network"):
        guided_velocity(Recorder(null_label=None), PROCESS, of(LABEL), 2.0)
    with pytest.raises(UserError, match=r"network that takes the scale itself; expected one without; use network_velocity"):
        guided_velocity(guided, PROCESS, of(LABEL), 2.0)


def test_conditions_and_scales_must_match_the_batch() -> None:
    x, labels, scales = states(), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    wrong = r" of shape \(3,\) for a batch of 4; expected one .*, or one a sample; "
    with pytest.raises(UserError, match="^label" + wrong):
        network_velocity(Recorder(), PROCESS, of(labels))(x, TIMES)
    with pytest.raises(UserError, match="^label" + wrong):
        guided_velocity(Recorder(), PROCESS, of(labels), 2.0)(x, TIMES)
    with pytest.raises(UserError, match="^guidance" + wrong):
        guided_velocity(Recorder(), PROCESS, of(LABEL), 2 * scales)(x, TIMES)
    with pytest.raises(UserError, match="^guidance" + wrong):
        network_velocity(Recorder(("label", "guidance")), PROCESS, {"label": LABEL, "guidance": scales})(x, TIMES)


@pytest.mark.parametrize("name", ["label", "guidance"])
def test_conditions_that_are_one_number_have_no_more_axes(name: str) -> None:
    network = Recorder((name,))
    with pytest.raises(UserError, match=rf"^{name} of shape \(4, 1\) for a batch of 4; expected one number"):
        network_velocity(network, PROCESS, {name: torch.zeros(4, 1, dtype=torch.int64)})(states(), TIMES)


# The end of jumps -----------------------------------------------------------------------------------------------------


class Told(nn.Module):
    """Remembers what it was told."""

    def __init__(self, *takes: str) -> None:
        super().__init__()
        self.takes = frozenset(takes)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.given = conditions
        return x


JUMPS = GaussianOracle(torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64))


def test_a_network_that_takes_the_end_is_told_it() -> None:
    network, x, t = Told("end"), states(), TIMES
    velocity, end = network_velocity(network, PROCESS), 0.3 * TIMES
    torch.testing.assert_close(velocity(x, t, end), x)
    assert network.given.keys() == {"end"}
    assert network.given["end"] is end
    velocity(x, t)
    assert network.given["end"] is t  # a jump of no length


def test_a_network_that_does_not_is_not() -> None:
    network, plain, x, t = Told("label"), [], states(), TIMES
    for end in ((t / 2,), ()):
        network_velocity(network, PROCESS, of(2))(x, t, *end)
        assert network.given.keys() == {"label"}
        network_velocity(lambda x, t: plain.append(x) or x, PROCESS)(x, t, *end)  # type: ignore[func-returns-value]
    assert len(plain) == 2


def test_the_velocity_at_an_end_of_its_own_is_that_of_the_ode() -> None:
    """The limit of ever shorter jumps, with the exact network."""
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.3, 0.9, 1.5], dtype=torch.float64)
    velocity = network_velocity(ExactJumps(JUMPS.variances), PROCESS)
    torch.testing.assert_close(velocity(x, t), JUMPS.velocity(x, t), rtol=1e-12, atol=1e-12)
    assert math.isfinite(velocity(x, torch.zeros_like(t)).sum())


# Autoguidance --------------------------------------------------------------------------------------------------------

BLURRED = MixtureOracle(ORACLE.means, ORACLE.variances + 0.15, ORACLE.weights)
"""The same modes, wider: what a smaller or less trained model has learned."""


class Blurred(Recorder):
    oracle = BLURRED


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Velocity for data `N(mean, variance I)`, written out: `v = cos E[z] - sin E[x0]`; mean like x, variance `(b,)`."""
    cos, sin, var = torch.cos(t)[:, None], torch.sin(t)[:, None], variance[:, None]
    offset = (x - cos * mean) / (cos**2 * var + sin**2 * 0.25)
    return cos * (sin * 0.25 * offset) - sin * (mean + cos * var * offset)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 3.0])
def test_autoguidance_extrapolates_from_the_negative_at_the_same_label(scale: float) -> None:
    x, network, negative = states(), Recorder(), Blurred()
    v = guided_velocity(network, PROCESS, of(LABEL), scale, negative=negative)(x, TIMES)
    mean, variance = ORACLE.means[LABEL], ORACLE.variances[LABEL]
    good = gaussian_velocity(x, TIMES, mean, variance)
    bad = gaussian_velocity(x, TIMES, mean, variance + 0.15)
    torch.testing.assert_close(v, bad + scale * (good - bad))
    for one in (network, negative):
        assert [call[0].shape[0] for call in one.calls] == [4]
        assert torch.equal(one.calls[0][2], LABEL)  # type: ignore[arg-type]


def test_autoguidance_of_a_network_without_classes() -> None:
    x, network, negative = states(), Recorder(()), Blurred(())
    v = guided_velocity(network, PROCESS, None, 2.0, negative=negative)(x, TIMES)
    bad = BLURRED.velocity(x, TIMES)
    torch.testing.assert_close(v, bad + 2.0 * (ORACLE.velocity(x, TIMES) - bad))
    assert network.calls[0][2] is None
    assert negative.calls[0][2] is None


def test_an_unconditional_negative_is_not_told_the_label() -> None:
    x, network, negative = states(), Recorder(), Blurred(())
    v = guided_velocity(network, PROCESS, of(LABEL), 2.0, negative=negative)(x, TIMES)
    bad = BLURRED.velocity(x, TIMES)
    torch.testing.assert_close(v, bad + 2.0 * (ORACLE.velocity(x, TIMES, LABEL) - bad))
    assert negative.calls[0][2] is None


def test_a_plain_function_is_an_unconditional_negative() -> None:
    def negative(x: Tensor, t: Tensor) -> Tensor:
        return BLURRED.F_velocity(x, t)

    x = states()
    v = guided_velocity(Recorder(), PROCESS, of(LABEL), 2.0, negative=negative)(x, TIMES)
    torch.testing.assert_close(v, guided_velocity(Recorder(), PROCESS, of(LABEL), 2.0, negative=Blurred(()))(x, TIMES))


def test_a_negative_is_told_what_it_takes_of_the_same_conditions() -> None:
    class Sized(Recorder):
        def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
            size = conditions.pop("size")
            return super().forward(x, t, **conditions) * size[:, None]

    x, negative, size = states(), Blurred(), torch.tensor([1.0, 0.5, 2.0, 3.0])
    network = Sized(("label", "size"))
    v = guided_velocity(network, PROCESS, {"label": LABEL, "size": size}, 2.0, negative=negative)(x, TIMES)
    bad = BLURRED.velocity(x, TIMES, LABEL)
    torch.testing.assert_close(v, bad + 2.0 * (size[:, None] * ORACLE.velocity(x, TIMES, LABEL) - bad))


@pytest.mark.parametrize("scale", [1, torch.ones(4)])
def test_scale_one_as_a_number_skips_the_negative(scale: float | Tensor) -> None:
    x, network, negative = states(), Recorder(), Blurred()
    v = guided_velocity(network, PROCESS, of(LABEL), scale, negative=negative)(x, TIMES)
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))
    assert len(negative.calls) == isinstance(scale, Tensor)


# Guidance in an interval of noise levels -----------------------------------------------------------------------------

INTERVAL = (0.3, 1.2)
"""Noise levels between the first and the last two of TIMES: sigma = 0.10, 0.42, 0.98, 7.05."""


@pytest.mark.parametrize("auto", [False, True])
def test_guidance_acts_inside_the_interval_alone(auto: bool) -> None:
    x, network, negative = states(), Recorder(), Blurred()
    scales = torch.tensor([3.0, 2.0, 1.5, 4.0])
    v = guided_velocity(
        network, PROCESS, of(LABEL), scales, negative=negative if auto else None, interval=INTERVAL
    )(x, TIMES)  # fmt: skip
    cond = ORACLE.velocity(x, TIMES, LABEL)
    away = BLURRED.velocity(x, TIMES, LABEL) if auto else ORACLE.velocity(x, TIMES)
    expected = torch.where(torch.tensor([False, True, True, False])[:, None], away + scales[:, None] * (cond - away), cond)
    torch.testing.assert_close(v, expected)


def test_only_samples_inside_are_evaluated_twice() -> None:
    x, network = states(), Recorder()
    guided_velocity(network, PROCESS, of(LABEL), 2.0, interval=INTERVAL)(x, TIMES)
    (given, t, label, _) = network.calls[0]
    assert len(network.calls) == 1
    assert label is not None
    assert label.tolist() == [3, 3, *LABEL.tolist()]
    assert torch.equal(t, torch.cat([TIMES[1:3], TIMES]))
    assert torch.equal(given, torch.cat([x[1:3], x]) / 0.5)

    network, negative = Recorder(), Blurred()
    guided_velocity(network, PROCESS, of(LABEL), 2.0, negative=negative, interval=INTERVAL)(x, TIMES)
    assert network.calls[0][0].shape[0] == 4
    assert torch.equal(negative.calls[0][1], TIMES[1:3])
    assert torch.equal(negative.calls[0][2], LABEL[1:3])  # type: ignore[arg-type]


def test_no_sample_inside_makes_no_second_evaluation() -> None:
    x, network, negative = states(), Recorder(), Blurred()
    outside = torch.full((4,), 1.5)
    for other in (None, negative):
        v = guided_velocity(network, PROCESS, of(LABEL), 2.0, negative=other, interval=INTERVAL)(x, outside)
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

    plain = guided_velocity(network, PROCESS, of(LABEL), 2.0, interval=INTERVAL)
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
    grid = torch.cat([torch.linspace(a, b, 400, dtype=torch.float64)[:-1] for a, b in pairwise(ends)] + [torch.zeros(1)])
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
    with pytest.raises(UserError, match=r"away from nothing: of the conditions \(none\) .*leave out label; expected"):
        guided_velocity(Recorder(), PROCESS, None, 2.0)
    with pytest.raises(UserError, match=r"network that takes the scale itself; expected one without"):
        guided_velocity(Recorder(), PROCESS, of(LABEL), 2.0, negative=Blurred(("label", "guidance")))
    for interval in ((1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(UserError, match=r"guidance interval .*; expected two noise levels sigma with 0 <= low < high"):
            guided_velocity(Recorder(), PROCESS, of(LABEL), 2.0, interval=interval)


def test_an_end_is_an_argument_of_the_velocity_and_no_condition() -> None:
    network = build(MLPConfig(features=2, width=8, depth=1, conditioning=ConditioningConfig(width=8, takes=("end",))))
    with pytest.raises(UserError, match="end among the conditions; expected it as the third argument"):
        network_velocity(network, PROCESS, {"end": 0.1})
