"""Residuals of flow maps against exact jumps of Gaussian data, and against the objectives that they contain."""

import dataclasses

import pytest
import torch
from torch import Tensor

from objectives.helpers import GAUSSIAN, PROCESS, VARIANCES, batch, generator, student
from oracles.jumps import ExactJumps
from trigflow.networks import MLP
from trigflow.objectives import (
    MeanFlowConfig,
    TangentConfig,
    consistency_loss,
    consistency_tangent,
    diffusion_loss,
    meanflow_loss,
    multistep_loss,
)
from trigflow.objectives.flow_map import (
    FlowMapConfig,
    eulerian_tangent,
    flow_map_loss,
    jump,
    lagrangian_tangent,
    semigroup_tangent,
)  # fmt: skip
from trigflow.process import trig
from trigflow.runtime.errors import UserError
from trigflow.segments import segment_bounds

SD = PROCESS.sigma_data
EXACT = ExactJumps(VARIANCES)
RAW = TangentConfig(mode="raw", warmup=0)


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def points(n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """`(x_t, t, s)`; some s are 0."""
    x0, noise, t = batch(n)
    end = t * torch.rand(n, generator=generator(3), dtype=t.dtype)
    end[::4] = 0
    return PROCESS.interpolate(x0, noise, t), t, end


def jumping() -> MLP:
    return student(takes_end=True)


def gradients(net: MLP, loss: Tensor) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True) if g is not None]


def same(net: MLP, a: Tensor, b: Tensor) -> None:
    close(a, b)
    for one, other in zip(gradients(net, a), gradients(net, b), strict=True):
        close(one, other)


def test_tangents_of_exact_jumps_are_zero() -> None:
    x, t, s = points()
    zero = torch.zeros_like(x)
    close(eulerian_tangent(EXACT_, PROCESS, x, GAUSSIAN.velocity(x, t), t, s, {})[1], zero)
    close(lagrangian_tangent(EXACT_, PROCESS, x, GAUSSIAN.velocity, t, s, {})[1], zero)
    close(semigroup_tangent(EXACT_, PROCESS, x, t, (0.3 * t + 0.7 * s), s, {})[1], zero)
    close(jump(EXACT_, PROCESS, x, t, s, {}), EXACT.jump(x, t, s))


class Named(ExactJumps):
    """The exact jumps, called by names."""

    def forward(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, None, None, end)


EXACT_ = Named(VARIANCES)


def test_tangents_are_derivatives_of_jumps() -> None:
    net, (x, t, s) = jumping(), points()
    v, (c, _) = GAUSSIAN.velocity(x, t), trig(t - s, x)
    ones = torch.ones_like
    _, dt = torch.func.jvp(lambda y, u: jump(net, PROCESS, y, u, s, {}), (x, t), (v, ones(t)))
    close(eulerian_tangent(net, PROCESS, x, v, t, s, {})[1], c * dt)
    f, ds = torch.func.jvp(lambda u: jump(net, PROCESS, x, t, u, {}), (s,), (ones(s),))
    close(lagrangian_tangent(net, PROCESS, x, GAUSSIAN.velocity, t, s, {})[1], -c * (ds - GAUSSIAN.velocity(f, s)))
    u = (t + s) / 2
    prediction, g = semigroup_tangent(net, PROCESS, x, t, u, s, {})
    target = jump(net, PROCESS, jump(net, PROCESS, x, t, u, {}), u, s, {})
    close(PROCESS.ddim_step(x, SD * prediction + g, t, s), target)


@pytest.mark.parametrize("residual", ["eulerian", "lagrangian", "semigroup"])
def test_all_reduce_to_diffusion_at_no_length(residual: str) -> None:
    net, (x0, noise, t) = jumping(), batch(16)
    config = FlowMapConfig(residual, "self", anchor=1.0, tangent=RAW)  # type: ignore[arg-type]
    told = lambda x, time, label, guidance: net(x, time, end=time)  # noqa: E731
    found = flow_map_loss(net, PROCESS, x0, noise, t, t, config=config).value
    expected = diffusion_loss(told, PROCESS, x0, noise, t).value
    mine, theirs = gradients(net, found), gradients(net, expected)
    close(found, expected)
    ratio = SD  # F is moved here, sd F there
    for one, other in zip(mine, theirs, strict=True):
        close(one, other / ratio)


@pytest.mark.parametrize("residual", ["eulerian", "lagrangian"])
def test_short_jumps_have_the_error_of_diffusion(residual: str) -> None:
    net, (x, t, _) = jumping(), points()
    s, v = t - 1e-11, GAUSSIAN.velocity(x, t)
    if residual == "eulerian":
        prediction, g = eulerian_tangent(net, PROCESS, x, v, t, s, {})
    else:
        prediction, g = lagrangian_tangent(net, PROCESS, x, GAUSSIAN.velocity, t, s, {})
    close(g, -(SD * prediction - v), 1e-9)


def test_jumps_to_zero_are_the_consistency_tangent() -> None:
    net, (x, t, _) = jumping(), points()
    v, zero = GAUSSIAN.velocity(x, t), torch.zeros_like(t)
    for r in (1.0, 0.3):
        close(
            eulerian_tangent(net, PROCESS, x, v, t, zero, {}, r=r)[1],
            consistency_tangent(net, PROCESS, x, v, t, r=r)[1],
        )


@pytest.mark.parametrize("mode", ["normalize", "clip", "raw"])
@pytest.mark.parametrize("velocity", ["data", "teacher"])
def test_consistency_and_multistep_are_choices(mode: str, velocity: str) -> None:
    net, (x0, noise, t) = jumping(), batch(16)
    tangent = TangentConfig(mode=mode, prior=1.0)  # type: ignore[arg-type]
    teacher = GAUSSIAN.velocity if velocity == "teacher" else None
    config = FlowMapConfig("eulerian", velocity, "zero", tangent=tangent)  # type: ignore[arg-type]
    common = {"teacher": teacher, "r": 0.7}
    found = flow_map_loss(net, PROCESS, x0, noise, t, config.ends(t), config=config, **common)  # type: ignore[arg-type]
    same(net, found.value, consistency_loss(net, PROCESS, x0, noise, t, tangent=tangent, **common).value)  # type: ignore[arg-type]
    config = dataclasses.replace(config, jumps="segments", segments=4)
    found = flow_map_loss(net, PROCESS, x0, noise, t, config.ends(t), config=config, **common)  # type: ignore[arg-type]
    expected = multistep_loss(net, PROCESS, x0, noise, t, segments=4, tangent=tangent, **common)  # type: ignore[arg-type]
    same(net, found.value, expected.value)


@pytest.mark.parametrize("velocity", ["data", "teacher"])
def test_meanflow_is_a_choice(velocity: str) -> None:
    net, (x0, noise, t) = jumping(), batch(32)
    end = t * torch.rand(32, generator=generator(5), dtype=t.dtype)
    end[::4] = t[::4]
    teacher = GAUSSIAN.velocity if velocity == "teacher" else None
    config = FlowMapConfig("eulerian", velocity, weighting="error", power=0.75)  # type: ignore[arg-type]
    found = flow_map_loss(net, PROCESS, x0, noise, t, end, teacher=teacher, config=config)
    expected = meanflow_loss(net, PROCESS, x0, noise, t, end, teacher=teacher, config=MeanFlowConfig(power=0.75))
    same(net, found.value, expected.value)


def test_the_semi_continuous_derivative_nears_the_exact_one() -> None:
    net, (x, t, s) = jumping(), points()
    v = GAUSSIAN.velocity(x, t)
    exact = eulerian_tangent(net, PROCESS, x, v, t, s, {})[1]
    gaps = [(eulerian_tangent(net, PROCESS, x, v, t, s, {}, semi_step=h)[1] - exact).abs().max() for h in (1e-3, 1e-4)]
    assert 0.05 < gaps[1] / gaps[0] < 0.2  # of first order
    assert gaps[1] < 1e-2


def test_the_direction_of_the_network_leaves_the_residual_velocity() -> None:
    net, (x, t, s) = jumping(), points()
    v, own = GAUSSIAN.velocity(x, t), SD * net(x / SD, t, end=t).detach()
    (c, k) = trig(t - s, x)
    prediction, g = eulerian_tangent(net, PROCESS, x, v, t, s, {}, direction=own)
    _, change = torch.func.jvp(lambda y, u: net(y, u, end=s), (x / SD, t), (own / SD, torch.ones_like(t)))
    close(g, -(c**2) * (SD * prediction - v) - c * k * (x + SD * change))


def test_ends_of_jumps() -> None:
    t = batch(4000)[2]
    assert bool((FlowMapConfig(jumps="zero").ends(t) == 0).all())
    assert torch.equal(FlowMapConfig(jumps="segments", segments=4).ends(t), segment_bounds(t, 4)[0])
    end = FlowMapConfig(anchor=0.25).ends(t, generator(1))
    assert bool((end <= t).all())
    assert bool((end >= 0).all())
    assert abs((end == t).double().mean().item() - 0.25) < 0.03


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FlowMapConfig(velocity="self"), "anchor"),
        (FlowMapConfig("semigroup"), "anchor"),
        (FlowMapConfig("lagrangian", "data"), "velocity"),
        (FlowMapConfig(anchor=1.5), "anchor"),
        (FlowMapConfig(segments=0), "segments"),
    ],
)
def test_choices_that_contradict_each_other(config: FlowMapConfig, name: str) -> None:
    with pytest.raises(UserError, match=name):
        config.check()


def test_a_network_has_to_be_told_the_end() -> None:
    x0, noise, t = batch(4)
    with pytest.raises(UserError, match="takes_end"):
        flow_map_loss(student(), PROCESS, x0, noise, t, t / 2, teacher=GAUSSIAN.velocity)
    with pytest.raises(UserError, match="teacher"):
        flow_map_loss(jumping(), PROCESS, x0, noise, t, t / 2)
