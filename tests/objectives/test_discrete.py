"""Discrete-time consistency against closed forms, the continuous-time gradient, and published schedules."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from objectives.helpers import GAUSSIAN, PROCESS, ExactStudent, batch, consistency_loss, generator, student, tangent_of
from trigflow.objectives import AdaptiveWeight, DiscreteConfig, TangentConfig, discrete_loss, discrete_tangent
from trigflow.process import HALF_PI, Proposal
from trigflow.samplers import SOLVERS, sigma_grid

RAW = TangentConfig(mode="raw", warmup=0)
DISTANCES = ("tangent", "huber", "squared")


def gradients(net: nn.Module, value: Tensor) -> Tensor:
    """All gradients in one vector."""
    parts = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


# Pairs of times: steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["sigma", "time"])
def test_pairs_are_neighbours_of_the_grid_around_the_proposal(grid: Any) -> None:
    config = DiscreteConfig(steps=16, grid=grid)
    drawn = torch.cat([1e-6 + 1.55 * torch.rand(1000, generator=generator()), torch.tensor([1e-6, 1.57])])
    t, s = config.pairs(PROCESS, drawn, 0, 1)
    expected = sigma_grid(PROCESS, 16) if grid == "sigma" else torch.linspace(PROCESS.t_max, 0, 17, dtype=torch.float64)
    times = expected.float().flip(0)
    position = torch.searchsorted(times, t)
    assert torch.equal(times[position], t)
    assert torch.equal(times[position - 1], s)
    assert bool((s < drawn)[:-1].all())
    assert bool((drawn <= t)[:-1].all())
    assert t.dtype == torch.float32
    assert s.min() == 0
    assert t[-1] == times[-1]  # beyond the last time


def test_a_time_on_the_grid_stays_where_it_is() -> None:
    times = sigma_grid(PROCESS, 7)[:-1]
    t, s = DiscreteConfig(steps=7).pairs(PROCESS, times, 0, 1)
    assert torch.equal(t, times)
    assert torch.equal(s, sigma_grid(PROCESS, 7)[1:])


def test_intervals_have_the_probability_of_the_proposal() -> None:
    """The discretized log-normal of Song and Dhariwal: differences of erf between neighbouring noise levels."""
    proposal, config = Proposal(-1.1, 2.0), DiscreteConfig(steps=6)
    t, _ = config.pairs(PROCESS, proposal.sample(PROCESS, 200_000, generator()), 0, 1)
    sigmas = PROCESS.sigma_from_time(sigma_grid(PROCESS, 6))[:-1].tolist()  # from 80 down to 0.002
    below = [1.0, *(normal_cdf((math.log(sigma) + 1.1) / 2.0) for sigma in sigmas[1:]), 0.0]
    for k in range(6):
        share = (t == sigma_grid(PROCESS, 6)[k].float()).double().mean().item()
        assert share == pytest.approx(below[k] - below[k + 1], abs=4e-3)


def test_one_step_goes_from_the_largest_time_to_the_data() -> None:
    t, s = DiscreteConfig(steps=1).pairs(PROCESS, torch.tensor([0.01, 1.0]), 0, 1)
    torch.testing.assert_close(t, torch.full((2,), PROCESS.t_max))
    assert torch.equal(s, torch.zeros(2))


def test_steps_double_as_published() -> None:
    """Song and Dhariwal: 10 at first, doubled to 1280 in 8 equal parts of the run."""
    config = DiscreteConfig(initial_steps=10, steps=1280)
    counts = [config.intervals(i, 400_000) for i in range(0, 400_000, 50_000)]
    assert counts == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert config.intervals(49_999, 400_000) == 10
    assert config.intervals(400_000, 400_000) == 1280  # a run that goes on
    assert [DiscreteConfig(initial_steps=3, steps=20).intervals(i, 4) for i in range(4)] == [3, 6, 12, 20]
    assert [DiscreteConfig(initial_steps=5, steps=5).intervals(i, 3) for i in range(3)] == [5, 5, 5]
    assert [DiscreteConfig(steps=9).intervals(i, 3) for i in range(3)] == [9, 9, 9]
    t, s = config.pairs(PROCESS, torch.tensor([1.0]), 60_000, 400_000)
    expected = DiscreteConfig(steps=20).pairs(PROCESS, torch.tensor([1.0]), 0, 1)
    assert (t, s) == expected


# Pairs of times: ECT -------------------------------------------------------------------------------------------------

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 1.0, 1.9, 2.0, 5.0, 20.0, 80.0], dtype=torch.float64)


def ect_ratio(config: DiscreteConfig, iteration: int, iterations: int) -> Tensor:
    """`sigma_s / sigma_t` at SIGMAS."""
    given = PROCESS.time_from_sigma(SIGMAS)
    t, s = config.pairs(PROCESS, given, iteration, iterations)
    assert torch.equal(t, given)
    return PROCESS.sigma_from_time(s) / SIGMAS


def test_ect_starts_as_diffusion_at_low_noise() -> None:
    """Stage 1 with q = 2, k = 8, b = 1: n(sigma) >= 2, and so s = 0, up to sigma = ln 7."""
    ratio = ect_ratio(DiscreteConfig(schedule="ect"), 0, 200_000)
    assert torch.equal(ratio == 0, math.log(7) > SIGMAS)
    assert ratio[-1].item() == pytest.approx(0.5)
    assert ratio[5].item() == pytest.approx(1 - (1 + 8 / (1 + math.exp(2))) / 2)


def test_ect_ends_at_the_published_ratio() -> None:
    """8 stages of q = 2, 4 of q = 4 and one of q = 256 all end at n(sigma) / 256, with n from 5 at low noise to 1."""
    ends = [
        ect_ratio(DiscreteConfig(schedule="ect"), 199_999, 200_000),
        ect_ratio(DiscreteConfig(schedule="ect", q=4, stages=4), 99_999, 100_000),
        ect_ratio(DiscreteConfig(schedule="ect", q=256, stages=1), 0, 8_000),
    ]
    for ratio in ends:
        torch.testing.assert_close(ratio, ends[0], rtol=1e-12, atol=0)
        assert ratio[-1].item() == pytest.approx(1 - 1 / 256, rel=1e-12)
        assert ratio[0].item() == pytest.approx(1 - 5 / 256, rel=1e-4)


def test_ect_moves_closer_in_every_stage_and_keeps_the_order_of_times() -> None:
    config = DiscreteConfig(schedule="ect")
    t = PROCESS.time_from_sigma(torch.logspace(-3, 3, 200, dtype=torch.float64))
    before = torch.full_like(t, -1)
    for stage in range(8):
        _, s = config.pairs(PROCESS, t, stage * 25_000, 200_000)
        assert torch.equal(s, config.pairs(PROCESS, t, stage * 25_000 + 24_999, 200_000)[1])
        assert bool((s < t).all())
        assert bool((s >= 0).all())
        assert bool((s >= before).all())
        assert bool((s.diff() >= 0).all())
        before = s


def test_ect_without_k_is_a_constant_share() -> None:
    torch.testing.assert_close(ect_ratio(DiscreteConfig(schedule="ect", k=0), 3, 8), torch.full_like(SIGMAS, 1 - 1 / 16))


@pytest.mark.parametrize("config", [DiscreteConfig(schedule="ect"), DiscreteConfig(steps=10_000)])
def test_times_of_single_precision_are_in_order_to_the_ends(config: DiscreteConfig) -> None:
    given = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 1.0, 1.57, PROCESS.t_max, HALF_PI])
    t, s = config.pairs(PROCESS, given, 7, 8)
    assert bool((s < t).all())
    assert bool((s >= 0).all())
    assert bool((t <= PROCESS.t_max).all())
    for weighting in ("gap", "snr"):
        weights = DiscreteConfig(weighting=weighting).weight(PROCESS, t, s)  # type: ignore[arg-type]
        assert isinstance(weights, Tensor)
        assert bool((weights > 0).all() & weights.isfinite().all())


def test_weights_are_those_published() -> None:
    t, s = torch.tensor([0.3, 1.2], dtype=torch.float64), torch.tensor([0.0, 1.1], dtype=torch.float64)
    high, low = PROCESS.sigma_from_time(t), PROCESS.sigma_from_time(s)
    torch.testing.assert_close(DiscreteConfig().weight(PROCESS, t, s), 1 / (high - low))
    torch.testing.assert_close(DiscreteConfig(weighting="snr").weight(PROCESS, t, s), 1 / high**2 + 1 / 0.5**2)
    assert DiscreteConfig(weighting="learned").weight(PROCESS, t, s) == 1


# The target ----------------------------------------------------------------------------------------------------------


def exact_teacher(t: Tensor, s: Tensor) -> Any:
    """The velocity of the rotation that leads from t exactly to the trajectory's point at s."""

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        assert torch.equal(time, t)
        x_s = x * (GAUSSIAN.variance(x, s) / GAUSSIAN.variance(x, t)).sqrt()
        h = (t - s)[:, None]
        return (torch.cos(h) * x - x_s) / torch.sin(h)

    return velocity


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("config", [{"steps": 4}, {"steps": 64}, {"grid": "time"}, {"schedule": "ect"}])
def test_the_exact_student_has_no_loss_on_exact_trajectories(distance: Any, config: dict[str, Any]) -> None:
    settings = DiscreteConfig(distance=distance, **config)
    x0, noise, drawn = batch(200)
    t, s = settings.pairs(PROCESS, drawn, 1, 8)
    loss = discrete_loss(ExactStudent(), PROCESS, x0, noise, t, s, teacher=exact_teacher(t, s), config=settings, tangent=RAW)
    assert loss.figures["loss"].max() < 1e-20
    assert loss.figures["tangent_norm"].max() < 1e-10


@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3)])
def test_error_of_one_step_has_the_order_of_the_solver(solver: Any, order: int) -> None:
    """The difference of the exact student over one step, `N^-2` of DDIM and `N^-3` of Heun: N steps of it add up to one
    order less."""
    x0, noise, drawn = batch(500)
    drawn = drawn.clamp_min(0.2)  # away from the last step, which is DDIM for both
    counts, errors = [32, 64, 128], []
    for steps in counts:
        config = DiscreteConfig(steps=steps, grid="time", solver=solver, distance="squared")
        t, s = config.pairs(PROCESS, drawn, 0, 1)
        loss = discrete_loss(ExactStudent(), PROCESS, x0, noise, t, s, teacher=GAUSSIAN.velocity, config=config)
        errors.append(loss.figures["loss"].double().mean().sqrt().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.25)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize(("time", "earlier"), [(1.2, 0.7), (0.3, 0.0)])
def test_the_step_is_that_of_the_sampler(solver: Any, time: float, earlier: float) -> None:
    x0, noise, _ = batch(4)
    t, s = (torch.full((4,), value, dtype=torch.float64) for value in (time, earlier))
    seen: list[Tensor] = []

    def network(x: Tensor, at: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    config = DiscreteConfig(solver=solver)
    discrete_loss(network, PROCESS, x0, noise, t, s, teacher=GAUSSIAN.velocity, config=config)
    x_t = PROCESS.interpolate(x0, noise, t)
    torch.testing.assert_close(seen[0], x_t / 0.5)
    torch.testing.assert_close(seen[1], SOLVERS[solver](GAUSSIAN.velocity, x_t, [time, earlier]) / 0.5)


def test_training_compares_points_with_the_same_data_and_noise() -> None:
    x0, noise, drawn = batch(50)
    config = DiscreteConfig(distance="squared", weighting="learned")
    t, s = config.pairs(PROCESS, drawn, 0, 1)
    net = student()
    loss = discrete_loss(net, PROCESS, x0, noise, t, s, config=config)
    with torch.no_grad():
        later, earlier = (PROCESS.interpolate(x0, noise, time) for time in (t, s))
        f_t = PROCESS.denoise(later, 0.5 * net(later / 0.5, t), t)
        f_s = PROCESS.denoise(earlier, 0.5 * net(earlier / 0.5, s), s)
    expected = (f_t - f_s).square().mean(dim=1)
    torch.testing.assert_close(loss.figures["loss"], expected.float())
    torch.testing.assert_close(loss.value.detach(), expected.mean())


def test_distances_weights_and_the_learned_weighting() -> None:
    x0, noise, drawn = batch(50)
    t, s = DiscreteConfig().pairs(PROCESS, drawn, 0, 1)
    net = student()

    def value(weight: Any = None, **settings: Any) -> Tensor:
        config = DiscreteConfig(**settings)
        return discrete_loss(net, PROCESS, x0, noise, t, s, config=config, weight=weight).value.detach()

    figures = discrete_loss(net, PROCESS, x0, noise, t, s, config=DiscreteConfig(distance="squared")).figures
    square = figures["loss"].double()
    gap = PROCESS.sigma_from_time(t) - PROCESS.sigma_from_time(s)
    # the published constant belongs to the distance that is not divided by sqrt(D)
    published = torch.sqrt(3 * square + (0.00054 * math.sqrt(3)) ** 2) - 0.00054 * math.sqrt(3)
    huber = published / math.sqrt(3)

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)

    check(value(distance="huber", weighting="learned"), huber.mean())
    check(value(distance="huber"), (huber / gap).mean())
    check(value(distance="squared"), (square / gap).mean())
    weighted = value(weight=lambda t: 2 * t, distance="squared", weighting="learned")
    check(weighted, (torch.exp(2 * t) * square - 2 * t).mean())


def test_auto_is_the_published_distance_of_the_schedule() -> None:
    x0, noise, drawn = batch(20)
    net = student()
    for schedule, distance in (("steps", "tangent"), ("ect", "huber")):
        values = []
        for chosen in ("auto", distance):
            config = DiscreteConfig(schedule=schedule, distance=chosen)  # type: ignore[arg-type]
            t, s = config.pairs(PROCESS, drawn, 0, 1)
            values.append(discrete_loss(net, PROCESS, x0, noise, t, s, config=config).value)
        assert torch.equal(*values)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_target_is_fixed(distance: Any) -> None:
    """The gradient is that of the later evaluation alone: an unchangeable copy as the target changes nothing."""
    x0, noise, drawn = batch(30)
    config = DiscreteConfig(distance=distance)
    t, s = config.pairs(PROCESS, drawn, 0, 1)
    net, calls = student(), []

    def watched(x: Tensor, time: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return net(x, time)

    loss = discrete_loss(watched, PROCESS, x0, noise, t, s, config=config)
    assert calls == [True, False]
    frozen = student().requires_grad_(False)

    def mixed(x: Tensor, time: Tensor) -> Tensor:
        return (net if torch.equal(time, t) else frozen)(x, time)

    expected = discrete_loss(mixed, PROCESS, x0, noise, t, s, config=config)
    torch.testing.assert_close(gradients(net, loss.value), gradients(net, expected.value))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_network_of_log_time_gives_a_finite_loss_down_to_zero(distance: Any, solver: Any) -> None:
    x0, noise, _ = batch(6, dtype=torch.float32)
    t = torch.tensor([1e-3, 0.2, 1.0, 1.5, PROCESS.t_max, 0.7])
    s = torch.tensor([0.0, 0.0, 0.9, 0.0, 1.5, 0.69])
    module = student(time_map="log").float()
    config = DiscreteConfig(distance=distance, solver=solver)

    def net(x: Tensor, time: Tensor) -> Tensor:
        return module(x, time) + 0 * torch.log(time)[:, None]  # no number at 0, as in modules of one's own

    def teacher(x: Tensor, time: Tensor) -> Tensor:
        return 0.5 * net(x / 0.5, time)

    for velocity in (None, teacher):
        loss = discrete_loss(net, PROCESS, x0, noise, t, s, teacher=velocity, config=config)
        assert bool(gradients(module, loss.value).isfinite().all())
        assert all(bool(figure.isfinite().all()) for figure in loss.figures.values())


# The limit of small steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_the_tangent_tends_to_the_continuous_one(kind: str) -> None:
    """At first order in the step, in both of its terms."""
    x0, noise, t = batch(40)
    net, x_t = student(), PROCESS.interpolate(x0, noise, t)
    v = PROCESS.velocity(x0, noise, t) if kind == "ct" else GAUSSIAN.velocity(x_t, t)
    for r in (0.0, 0.4, 1.0):
        prediction, g = tangent_of(net, x_t, v, t, r=r)
        errors = []
        for h in (1e-3, 1e-4):
            s = (t - h).clamp_min(0)
            x_s = PROCESS.ddim_step(x_t, v, t, s)
            delta = discrete_tangent(PROCESS, x_t, v, prediction, net(x_s / 0.5, s), t, s, r)
            errors.append((torch.cos(t)[:, None] * delta - g).abs().max().item())
        assert errors[0] < 0.05 * g.abs().max()
        assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)


@pytest.mark.parametrize("kind", ["ct", "cd"])
@pytest.mark.parametrize("distance", ["squared", "tangent"])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_the_gradient_tends_to_the_continuous_one(kind: str, distance: Any, solver: Any) -> None:
    """Squared distance: f moves by `h df/dt` and F has the factor `-sd sin(t)` in it, so that the gradient tends to
    `h sd tan(t)` times that of the raw continuous-time loss. Halving the step halves what is left."""
    x0, noise, t = batch(40)
    t = t.clamp(0.1, 1.4)
    net, teacher = student(), None if kind == "ct" else GAUSSIAN.velocity
    expected = gradients(net, consistency_loss(net, x0, noise, t, teacher=teacher, tangent=RAW).value)
    config = DiscreteConfig(distance=distance, solver=solver, weighting="learned")

    def of_log_prior(h: float) -> Any:
        return None if distance == "tangent" else lambda t: -torch.log(h * 0.5 * torch.tan(t))

    errors = []
    for h in (4e-3, 2e-3, 1e-3):
        loss = discrete_loss(
            net, PROCESS, x0, noise, t, t - h, teacher=teacher, config=config, tangent=RAW, weight=of_log_prior(h)
        )
        errors.append(((gradients(net, loss.value) - expected).norm() / expected.norm()).item())
    assert errors[2] < 0.01
    assert errors[1:] == pytest.approx([errors[0] / 2, errors[0] / 4], rel=0.1)


def test_the_gradient_on_the_grid_tends_to_the_continuous_one_as_steps_grow() -> None:
    """`N` times the gradient of the squared distance on an even grid of N steps."""
    x0, noise, drawn = batch(400)
    drawn = drawn.clamp(0.2, 1.4)
    net = student()
    config = consistency_loss(net, x0, noise, drawn, tangent=RAW, weight=lambda t: torch.log(torch.tan(t)))
    expected = gradients(net, config.value)
    errors = []
    for steps in (128, 512, 2048):
        config_n = DiscreteConfig(steps=steps, grid="time", distance="squared", weighting="learned")
        t, s = config_n.pairs(PROCESS, drawn, 0, 1)
        value = discrete_loss(net, PROCESS, x0, noise, t, s, config=config_n).value
        scaled = steps * gradients(net, value) / (0.5 * PROCESS.t_max)
        errors.append(((scaled - expected).norm() / expected.norm()).item())
    assert errors[2] < 0.01
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_shaping_and_warmup_are_those_of_the_continuous_loss() -> None:
    x0, noise, t = batch(40)
    t, net = t.clamp(0.1, 1.4), student()
    config = DiscreteConfig(distance="tangent")
    for tangent in (TangentConfig(), TangentConfig(mode="clip", limit=0.05)):
        for r in (0.0, 0.5, 1.0):
            continuous = consistency_loss(net, x0, noise, t, tangent=tangent, r=r)
            loss = discrete_loss(net, PROCESS, x0, noise, t, t - 1e-5, config=config, tangent=tangent, r=r)
            for name, figure in continuous.figures.items():
                torch.testing.assert_close(loss.figures[name], figure, rtol=2e-3, atol=1e-5)
            torch.testing.assert_close(loss.value, continuous.value, rtol=1e-3, atol=0)


# Dropout, precision, arguments ---------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Notes the masks it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.masks.append(functional.dropout(torch.ones_like(x), 0.5))
        return self.scale * x * self.masks[-1]


def test_both_evaluations_drop_the_same() -> None:
    x0, noise, drawn = batch(64)
    t, s = DiscreteConfig().pairs(PROCESS, drawn, 0, 1)
    net = Dropping()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for _ in range(2):
            discrete_loss(net, PROCESS, x0, noise, t, s)
        after = torch.rand(3)
        torch.manual_seed(5)
        for _ in range(2):
            functional.dropout(torch.ones_like(x0), 0.5)
        assert torch.equal(torch.rand(3), after)  # as much is drawn as by one evaluation each time
    first, first_again, second, second_again = net.masks
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("distance", DISTANCES)
def test_mixed_precision_trains_every_parameter(distance: Any) -> None:
    """The evaluation without gradients leaves none of its casts to the one with."""
    x0, noise, drawn = batch(32, dtype=torch.float32)
    config = DiscreteConfig(distance=distance, steps=8)
    t, s = config.pairs(PROCESS, drawn, 0, 1)
    net = student().float()
    exact = gradients(net, discrete_loss(net, PROCESS, x0, noise, t, s, config=config, tangent=RAW).value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = discrete_loss(net, PROCESS, x0, noise, t, s, config=config, tangent=RAW)
    assert loss.value.dtype == torch.float32
    rounded = gradients(net, loss.value)
    assert rounded.shape == exact.shape
    assert functional.cosine_similarity(rounded, exact, dim=0) > 0.9


def test_labels_and_scales_reach_both_evaluations_and_figures_have_one_number_a_sample() -> None:
    x0, noise, drawn = batch(6)
    t, s = DiscreteConfig().pairs(PROCESS, drawn, 0, 1)
    label, scale = torch.arange(6), torch.linspace(1, 2, 6)
    calls: list[dict[str, Tensor]] = []
    net = student(num_classes=6, takes=("guidance",))

    def watched(x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        calls.append(conditions)
        return net(x, time, **conditions)

    weight = AdaptiveWeight(PROCESS).double()
    loss = discrete_loss(watched, PROCESS, x0, noise, t, s, conditions={"label": label, "guidance": scale}, weight=weight)
    assert [call.keys() for call in calls] == [{"label", "guidance"}] * 2
    assert all(call["label"] is label and call["guidance"] is scale for call in calls)
    assert loss.value.shape == ()
    assert set(loss.figures) == {"t", "loss", "tangent_norm"}
    assert all(figure.shape == (6,) and not figure.requires_grad for figure in loss.figures.values())
    images = [torch.randn(2, 3, 4, 4, generator=generator(1)) for _ in range(2)]
    times = torch.tensor([0.5, 1.0])
    for solver in ("ddim", "heun"):
        loss = discrete_loss(
            lambda x, t: 0.1 * x,
            PROCESS,
            images[0],
            images[1],
            times,
            times / 2,
            teacher=lambda x, t: -x,
            config=DiscreteConfig(solver=solver),  # type: ignore[arg-type]
        )
        assert loss.figures["loss"].shape == (2,)
