"""MeanFlow against the straight path it is defined on, and against average velocities in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from objectives.helpers import GAUSSIAN, PROCESS, VARIANCES, batch, draws, generator, student
from oracles.jumps import ExactJumps
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import (
    AdaptiveWeight,
    Loss,
    TangentConfig,
    VelocityFunction,
    eulerian_tangent,
    flow_map_loss,
    objective_of,
)
from trigflow.objectives.objective import Weight
from trigflow.process import HALF_PI, Proposal, trig

SD = PROCESS.sigma_data


def ends(t: Tensor, seed: int = 0) -> Tensor:
    """Ends anywhere in [0, t]; some are t, and some 0."""
    end = t * torch.rand(len(t), generator=generator(seed), dtype=t.dtype)
    end[::4] = t[::4]
    end[1::4] = 0
    return end


def straight(t: Tensor) -> tuple[Tensor, Tensor]:
    """`(m, tau)` of the straight path."""
    m = torch.cos(t) + torch.sin(t)
    return m, torch.sin(t) / m


def average_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """`u = (sin(t) - cos(t)) x_t + m(t) v`, of the straight path through `x_t / m(t)`."""
    cos, sin = trig(torch.as_tensor(t, dtype=x_t.dtype), x_t)
    return (sin - cos) * x_t + (cos + sin) * v


def error_of(net: nn.Module, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor, **conditions: Tensor) -> tuple[Tensor, Tensor]:
    """F and the error of the average velocity in units of sd, `-m(t)^2 / m(s) df/dt / sd`."""
    m, m_s = (straight(time)[0][:, None] for time in (t, s))
    prediction, g = eulerian_tangent(net, PROCESS, x_t, v, t, s, conditions, scale=m**2 / m_s)
    return prediction, -g / SD


def meanflow_loss(
    net: nn.Module,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    teacher: VelocityFunction | None = None,
    conditions: dict[str, Tensor] | None = None,
    weight: Weight | None = None,
    **settings: object,
) -> Loss:
    """The loss of meanflow or, with a teacher, of meanflow-distill."""
    config = objective_of("meanflow" if teacher is None else "meanflow-distill", **settings)
    return flow_map_loss(net, PROCESS, x0, noise, t, s, teacher=teacher, conditions=conditions, config=config, weight=weight)


def jumping(seed: int = 0) -> MLP:
    return student(seed, takes=("end",))


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# The straight path ---------------------------------------------------------------------------------------------------


def test_points_and_velocities_of_the_straight_path() -> None:
    x0, noise, t = batch(16)
    m, tau = (a[:, None] for a in straight(t))
    x_t, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    close(x_t / m, (1 - tau) * x0 + tau * noise)
    close(average_velocity(x_t, v, t), noise - x0)
    close(average_velocity(x_t[:1], v[:1], float(t[0])), (noise - x0)[:1])


def test_a_jump_is_a_ddim_step() -> None:
    """`z_r = z_tau - (tau - r) u` for whatever the network says, and `tau - r = sin(t - s) / (m(t) m(s))`."""
    x, v, t = batch(16)
    s = ends(t)
    (m, tau), (m_s, r) = straight(t), straight(s)
    close(tau - r, torch.sin(t - s) / (m * m_s))
    z_r = x / m[:, None] - (tau - r)[:, None] * average_velocity(x, v, t)
    close(m_s[:, None] * z_r, PROCESS.ddim_step(x, v, t, s))


def test_the_error_is_that_of_the_paper() -> None:
    """`u - (v - (tau - r) du/dtau)` with u a function of (z, r, tau) and autograd's derivative along (v, 0, 1)."""
    net, (x0, noise, t) = jumping(), batch(32)
    s = ends(t)
    (m, tau), (_, r) = straight(t), straight(s)
    x_t, v = PROCESS.interpolate(x0, noise, t), noise - x0

    def u(z: Tensor, tau: Tensor) -> Tensor:
        time = torch.atan2(tau, 1 - tau)
        x = z * (torch.cos(time) + torch.sin(time))[:, None]
        return average_velocity(x, SD * net(x / SD, time, end=s), time)

    value, slope = torch.func.jvp(u, (x_t / m[:, None], tau), (v, torch.ones_like(tau)))
    expected = value - (v - (tau - r)[:, None] * slope)
    prediction, error = error_of(net, x_t, PROCESS.velocity(x0, noise, t), t, s)
    close(average_velocity(x_t, SD * prediction, t), value)
    close(SD * error, expected)
    assert prediction.requires_grad
    assert not error.requires_grad


def test_no_error_where_jumps_are_exact() -> None:
    """u is the average velocity of the exact flow, and every part of its identity is in place."""
    _, _, t = batch(64)
    x, s = torch.randn(64, 3, generator=generator(1), dtype=torch.float64), ends(t)
    prediction, error = error_of(ExactJumps(VARIANCES), x, GAUSSIAN.velocity(x, t), t, s)
    close(error, torch.zeros_like(error))
    (m, tau), (m_s, r) = straight(t), straight(s)
    flowed = x * torch.sqrt(GAUSSIAN.variance(x, s) / GAUSSIAN.variance(x, t))
    u, apart = average_velocity(x, SD * prediction, t), s < t
    average = (x / m[:, None] - flowed / m_s[:, None])[apart] / (tau - r)[apart, None]
    close(u[apart], average, 1e-8)
    assert 0 < int(apart.sum()) < 64
    shorter = error_of(ExactJumps(VARIANCES), x, GAUSSIAN.velocity(x, t), t, 0.9 * s)[1]
    wrong = error_of(ExactJumps(VARIANCES), x, 1.1 * GAUSSIAN.velocity(x, t), t, s)[1]
    close(shorter, torch.zeros_like(error))
    assert bool((wrong.abs().amax(1) > 1e-3).all())


def test_a_jump_of_no_length_is_flow_matching() -> None:
    net, (x0, noise, t) = jumping(), batch(32)
    x_t, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    prediction, error = error_of(net, x_t, v, t, t)
    u = average_velocity(x_t, SD * prediction, t)
    close(SD * error, u - (noise - x0))
    loss = meanflow_loss(net, x0, noise, t, t, power=0.0)
    flow_matching = ((u - (noise - x0)) / SD).square().sum(1).mean()
    close(loss.value, flow_matching)
    parameters = list(net.parameters())
    matched = torch.autograd.grad(flow_matching, parameters, allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(loss.value, parameters, allow_unused=True), matched, strict=True):
        if theirs is not None:
            close(mine, theirs)
    size = SD * error.square().mean(1).sqrt()  # of g, which is all error here
    close(loss.figures["tangent_norm"], size.float(), 1e-6)


def test_a_teacher_is_an_exact_start() -> None:
    """The weights of a diffusion network, in a network with an end at its initialization, are the velocity at s = t."""
    config = MLPConfig(3, 16, depth=1, conditioning=ConditioningConfig(width=8))
    teacher = student(width=16)
    net = MLP(MLPConfig(3, 16, depth=1, conditioning=ConditioningConfig(width=8, takes=("end",)))).double()
    assert teacher.config == config
    missing = net.load_state_dict(teacher.state_dict(), strict=False)
    assert (missing.unexpected_keys, len(missing.missing_keys)) == ([], 1)
    x0, noise, t = batch(16)
    x_t = PROCESS.interpolate(x0, noise, t)
    v = SD * teacher(x_t / SD, t)
    prediction, error = error_of(net, x_t, v, t, t)
    assert torch.equal(prediction, teacher(x_t / SD, t))
    close(error, torch.zeros_like(error), 1e-14)


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_weighting_by_the_error(power: float) -> None:
    """Value and gradient: that of the weighted squares, with target and weight held fixed."""
    net, (x0, noise, t) = jumping(), batch(24)
    s, c = ends(t), 0.3
    x_t, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    prediction, error = error_of(net, x_t, v, t, s)
    squares = error.square().sum(1)
    omega = 1 / (squares + c) ** power
    loss = meanflow_loss(net, x0, noise, t, s, power=power, c=c)
    close(loss.value.detach(), (omega * squares).mean())
    m = straight(t)[0][:, None]
    parameters = list(net.parameters())
    by_hand = torch.autograd.grad(prediction, parameters, 2 * omega[:, None] * error * m / 24, allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(loss.value, parameters, allow_unused=True), by_hand, strict=True):
        close(mine, theirs)
    close(loss.figures["loss"], (squares / 3).float(), 1e-5)


@pytest.mark.parametrize("weighting", ["learned", "average"])
def test_the_learned_weighting(weighting: str) -> None:
    """Of raw tangents; and of the errors of average velocities, `m(t)^2 / m(s)` times them in units of sd."""
    net, (x0, noise, t) = jumping(), batch(24)
    s, weight = ends(t), AdaptiveWeight(PROCESS).double()
    nn.init.constant_(weight.linear.bias, 0.7)
    settings = {"weighting": weighting, "tangent": TangentConfig(mode="raw", warmup=0)}
    x_t, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    # What g has as c df/dt, the average velocity has as m(t)^2 / m(s) df/dt.
    scale = None if weighting == "learned" else (straight(t)[0] ** 2 / straight(s)[0]).reshape(-1, 1)
    error = eulerian_tangent(net, PROCESS, x_t, v, t, s, {}, scale=scale)[1]
    mean_square = (error if scale is None else error / PROCESS.sigma_data).square().mean(1)
    w = weight(t)
    loss = meanflow_loss(net, x0, noise, t, s, weight=weight, **settings)
    close(loss.value, (torch.exp(w) * mean_square - w).mean())
    close(meanflow_loss(net, x0, noise, t, s, **settings).value.detach(), mean_square.mean())


def test_a_learned_weight_has_no_part_in_the_weighting_by_the_error() -> None:
    net, (x0, noise, t) = jumping(), batch(24)
    plain, weighted = (meanflow_loss(net, x0, noise, t, ends(t), weight=w) for w in (None, lambda t: 1 + t))
    assert torch.equal(plain.value, weighted.value)
    assert not objective_of("meanflow").learns_weight
    assert objective_of("meanflow", weighting="learned").learns_weight
    assert objective_of("meanflow", weighting="average").learns_weight


def test_figures() -> None:
    """The tangent is what is left of the average velocity's identity, `m(t)^2 / m(s) df/dt`."""
    net, (x0, noise, t) = jumping(), batch(16)
    s = ends(t)
    x_t, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    m, m_s = (straight(time)[0][:, None] for time in (t, s))

    def moved(x: Tensor, time: Tensor) -> Tensor:
        return PROCESS.ddim_step(x, SD * net(x / SD, time, end=s), time, s)

    _, slope = torch.func.jvp(moved, (x_t, t), (v, torch.ones_like(t)))
    tangent = m**2 / m_s * slope
    figures = meanflow_loss(net, x0, noise, t, s).figures
    assert set(figures) == {"t", "loss", "tangent_norm"}
    close(figures["tangent_norm"], tangent.square().mean(1).sqrt().float().detach(), 1e-5)
    assert bool((figures["tangent_norm"][1::4] > 0.01).all())


def test_a_teacher_gives_the_velocity() -> None:
    """Distillation follows the teacher at x_t, once and without gradients, not the velocity of the sample."""
    net, (x0, noise, t) = jumping(), batch(16)
    s, calls = ends(t), []

    def teacher(x: Tensor, time: Tensor) -> Tensor:
        calls.append((x, time, torch.is_grad_enabled()))
        return GAUSSIAN.velocity(x, time)

    loss = meanflow_loss(net, x0, noise, t, s, teacher=teacher, power=0.0)
    x_t = PROCESS.interpolate(x0, noise, t)
    error = error_of(net, x_t, GAUSSIAN.velocity(x_t, t), t, s)[1]
    close(loss.value.detach(), error.square().sum(1).mean())
    assert len(calls) == 1
    assert (torch.equal(calls[0][0], x_t), calls[0][2]) == (True, False)
    exact = meanflow_loss(ExactJumps(VARIANCES), x0, noise, t, s, teacher=teacher, power=0.0)
    assert float(exact.value) < 1e-20


def test_labels_and_guidance_reach_the_network() -> None:
    net, (x0, noise, t) = student(num_classes=4, takes=("guidance", "end")), batch(8)
    label, scale = torch.arange(8) % 4, torch.linspace(1, 2, 8, dtype=torch.float64)
    x_t, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    prediction, _ = error_of(net, x_t, v, t, ends(t), label=label, guidance=scale)
    assert torch.equal(prediction, net(x_t / SD, t, label=label, guidance=scale, end=ends(t)))
    told = {"label": label, "guidance": scale}
    loss = meanflow_loss(net, x0, noise, t, ends(t), conditions=told)
    for changed in ({"label": (label + 1) % 4}, {"guidance": scale + 0.3}):
        assert loss.value != meanflow_loss(net, x0, noise, t, ends(t), conditions={**told, **changed}).value


def test_finite_over_the_whole_quarter_circle_in_single_precision() -> None:
    grid = torch.tensor([1e-6, 0.3, 1.2, HALF_PI - 1e-4, PROCESS.t_max], dtype=torch.float64)
    t, s = (a.flatten() for a in torch.meshgrid(grid, torch.cat([grid.new_zeros(1), grid]), indexing="ij"))
    t, s = t[s <= t], s[s <= t]
    x = torch.randn(len(t), 3, generator=generator(), dtype=torch.float64)
    exact = error_of(jumping(), x, GAUSSIAN.velocity(x, t), t, s)[1]
    v = GAUSSIAN.velocity(x, t).float()
    single = error_of(jumping().float(), x.float(), v, t.float(), s.float())[1]
    close(single.double(), exact, 2e-4)


# Drawing jumps -------------------------------------------------------------------------------------------------------


def drawn(n: int, seed: int = 0, **settings: object) -> tuple[Tensor, Tensor]:
    """`(t, s)` of meanflow."""
    jumps = objective_of("meanflow", **settings).draw(draws(n, seed))
    assert jumps.keys() == {"t", "end"}
    return jumps["t"], jumps["end"]


def test_times_are_logit_normal_and_in_order() -> None:
    t, s = drawn(40_000, anchor=0.0)
    assert (t.shape, t.dtype, s.dtype) == ((40_000,), torch.float32, torch.float32)
    assert bool(((s > 0) & (s < t) & (t < HALF_PI)).all())
    cos, sin = trig(torch.cat([t, s]), torch.zeros(80_000))
    logit = torch.logit((sin / (cos + sin)).double())
    assert float(logit.mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.02)
    high, low = logit.chunk(2)
    assert float((high - low).mean()) == pytest.approx(2 / torch.pi**0.5, abs=0.02)  # of two normal numbers
    other = drawn(40_000, proposal=Proposal(-2.0 + math.log(SD), 2.0), anchor=0.0)
    assert float(torch.log(torch.tan(torch.cat(other))).mean()) == pytest.approx(-2.0, abs=0.03)


def test_a_share_of_the_jumps_has_no_length() -> None:
    for equal in (0.0, 0.25, 0.75, 1.0):
        t, s = drawn(20_000, 3, anchor=equal)
        assert float((t == s).double().mean()) == pytest.approx(equal, abs=0.02)
        assert torch.equal(t, drawn(20_000, 3, anchor=0.0)[0])
    assert float(torch.eq(*drawn(20_000, 3)).double().mean()) == pytest.approx(0.75, abs=0.02)
    assert all(torch.equal(a, b) for a, b in zip(drawn(100, 4), drawn(100, 4), strict=True))
