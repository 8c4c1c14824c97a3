"""Tangents of flow maps against exact jumps of Gaussian data, derivatives of jumps, and closed forms of their shapes."""

import pytest
import torch
from torch import Tensor

from objectives.helpers import GAUSSIAN, PROCESS, VARIANCES, batch, generator, student
from oracles.jumps import ExactJumps
from trigflow.networks import MLP
from trigflow.objectives import TangentConfig, eulerian_tangent, lagrangian_tangent, semigroup_tangent, shape_tangent
from trigflow.objectives.tangents import jump
from trigflow.process import trig
from trigflow.runtime.errors import UserError
from trigflow.samplers import network_velocity

SD = PROCESS.sigma_data
EXACT = ExactJumps(VARIANCES)


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def points(n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """`(x_t, t, s)`; some s are 0."""
    x0, noise, t = batch(n)
    end = t * torch.rand(n, generator=generator(3), dtype=t.dtype)
    end[::4] = 0
    return PROCESS.interpolate(x0, noise, t), t, end


def jumping() -> MLP:
    return student(takes=("end",))


def test_tangents_of_exact_jumps_are_zero() -> None:
    x, t, s = points()
    zero = torch.zeros_like(x)
    close(eulerian_tangent(EXACT, PROCESS, x, GAUSSIAN.velocity(x, t), t, s, {})[1], zero)
    close(lagrangian_tangent(EXACT, PROCESS, x, GAUSSIAN.velocity, t, s, {})[1], zero)
    close(semigroup_tangent(EXACT, PROCESS, x, t, (0.3 * t + 0.7 * s), s, {})[1], zero)
    close(jump(EXACT, PROCESS, x, t, s, {}), EXACT.jump(x, t, s))


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


@pytest.mark.parametrize("residual", ["eulerian", "lagrangian"])
def test_short_jumps_have_the_error_of_diffusion(residual: str) -> None:
    net, (x, t, _) = jumping(), points()
    s, v = t - 1e-11, GAUSSIAN.velocity(x, t)
    if residual == "eulerian":
        prediction, g = eulerian_tangent(net, PROCESS, x, v, t, s, {})
    else:
        prediction, g = lagrangian_tangent(net, PROCESS, x, GAUSSIAN.velocity, t, s, {})
    close(g, -(SD * prediction - v), 1e-9)


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


# Shaping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 4, 5)])
@pytest.mark.parametrize("c", [0.1, 2.0])
def test_normalized_tangent_keeps_its_direction_and_has_norm_below_one(shape: tuple[int, ...], c: float) -> None:
    sizes = torch.tensor([0.0, 1e-6, 0.1, 1.0, 30.0, 1e6], dtype=torch.float64)
    g = torch.randn(shape, generator=generator(), dtype=torch.float64)
    g = g * (sizes / g.flatten(1).norm(dim=1)).reshape(-1, *[1] * (len(shape) - 1))
    shaped = shape_tangent(g, TangentConfig(mode="normalize", c=c))
    norms = shaped.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, sizes / (sizes + c), rtol=1e-12, atol=1e-15)
    assert torch.all(norms < 1)
    torch.testing.assert_close(shaped.flatten(1)[3] / norms[3], g.flatten(1)[3], rtol=1e-10, atol=1e-12)


def test_clipped_and_raw_tangents() -> None:
    g = torch.tensor([[-3.0, -0.5, 0.0, 0.2, 7.0]])
    assert shape_tangent(g, TangentConfig(mode="clip")).tolist() == [[-1.0, -0.5, 0.0, pytest.approx(0.2), 1.0]]
    assert shape_tangent(g, TangentConfig(mode="clip", limit=0.3))[0].tolist() == pytest.approx([-0.3, -0.3, 0, 0.2, 0.3])
    assert torch.equal(shape_tangent(g, TangentConfig(mode="raw")), g)


def test_unknown_mode() -> None:
    with pytest.raises(UserError, match=r"unknown tangent mode 'sign'; expected normalize, clip or raw; correct tangent\.mode"):
        shape_tangent(torch.ones(1, 2), TangentConfig(mode="sign"))  # type: ignore[arg-type]


def test_warmup_factor() -> None:
    config = TangentConfig(warmup=200)
    assert [config.warmup_factor(i) for i in (0, 1, 50, 200, 10_000)] == [0.0, 0.005, 0.25, 1.0, 1.0]
    assert TangentConfig(warmup=0).warmup_factor(0) == 1.0
    assert TangentConfig().warmup_factor(5_000) == 0.5


def test_a_lagrangian_jump_to_0_asks_a_teacher_told_the_logarithm_of_the_time() -> None:
    x, t, _ = points()
    teacher = network_velocity(student(time_map="log"), PROCESS)
    g = lagrangian_tangent(jumping(), PROCESS, x, teacher, t, torch.zeros_like(t), {})[1]
    assert bool(g.isfinite().all())


@pytest.mark.parametrize("h", [1e-2, 1e-3])
def test_the_semi_continuous_derivative_is_on_the_same_dropout_masks(h: float) -> None:
    """A difference of two masks over h would be larger than any derivative. What is drawn after is as without."""
    net, (x, t, s) = jumping().train(), points()
    net.blocks[0].dropout.p = 0.3  # type: ignore[union-attr]
    v = GAUSSIAN.velocity(x, t)
    found, after = [], []
    for step in (0.0, h):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(eulerian_tangent(net, PROCESS, x, v, t, s, {}, semi_step=step)[1])
            after.append(torch.rand(3))
    assert (found[0] - found[1]).abs().max() < 100 * h
    assert torch.equal(*after)
