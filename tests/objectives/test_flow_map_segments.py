"""The tangent and the loss of jumps to the lower end of a segment, against closed forms and separate autograd computations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from objectives.helpers import GAUSSIAN, PROCESS, VARIANCES, batch, consistency_loss, generator, student, tangent_of
from oracles.jumps import ExactJumps
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import AdaptiveWeight, FlowMap, TangentConfig, flow_map_loss, objective_of
from trigflow.process import Proposal
from trigflow.runtime.errors import UserError
from trigflow.samplers import flow_map_sample, network_velocity, segment_times
from trigflow.segments import segment_bounds, segment_ends

RAW = TangentConfig(mode="raw", warmup=0)
EXACT = ExactJumps(VARIANCES)
COUNTS = (1, 2, 4, 8, 16)


def column(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(t)[:, None], torch.sin(t)[:, None]


def jump(net: nn.Module, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """`f(x_t, t -> s) = cos(t - s) x_t - sin(t - s) sd F`, of a network that takes the end."""
    cos, sin = column(t - end)
    return cos * x - sin * 0.5 * net(x / 0.5, t, end=end)


def points(segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(x_t, t, s)` over every segment, close to its ends and at its upper one; three of each."""
    ends = torch.tensor(segment_ends(segments), dtype=torch.float64)
    inside = torch.tensor([1e-8, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0], dtype=torch.float64)
    t = (ends[:-1, None] + inside * (ends[1:] - ends[:-1])[:, None]).flatten().clamp(max=ends[-1]).repeat(3)
    x0 = GAUSSIAN.sample(len(t), generator(1), torch.float64)
    return PROCESS.interpolate(x0, PROCESS.sample_noise(x0, generator(2)), t), t, segment_bounds(t, segments)[0]


# The tangent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", COUNTS)
def test_the_exact_network_jumps_along_the_trajectory(segments: int) -> None:
    x, t, end = points(segments)
    there = jump(EXACT, x, t, end)
    torch.testing.assert_close(there, EXACT.jump(x, t, end), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(GAUSSIAN.consistency(there, end), GAUSSIAN.consistency(x, t), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segments", COUNTS)
def test_tangent_of_the_exact_network_is_zero_in_every_segment(segments: int) -> None:
    x, t, end = points(segments)
    for factor in (1.0, 5.0):  # also far from the data
        _, g = tangent_of(EXACT, factor * x, GAUSSIAN.velocity(factor * x, t), t, end)
        assert g.abs().max() < 1e-9


def test_tangent_of_the_exact_network_is_not_zero_along_a_wrong_velocity_or_to_another_end() -> None:
    x, t, end = points(4)
    v = GAUSSIAN.velocity(x, t)
    _, wrong = tangent_of(EXACT, x, v + 0.1, t, end)
    assert wrong.abs().max() > 0.01
    _, early = tangent_of(EXACT, x, v, t, end, r=0.5)
    assert early.abs().max() > 0.01

    def elsewhere(x: Tensor, t: Tensor) -> Tensor:
        return EXACT(x, t, end / 2)

    _, astray = tangent_of(elsewhere, x, v, t, end)
    assert astray.abs().max() > 0.01


@pytest.mark.parametrize("segments", COUNTS)
@pytest.mark.parametrize("time_map", ["identity", "log"])
def test_tangent_is_cos_times_the_total_derivative(segments: int, time_map: str) -> None:
    """`g = cos(t - s) d/dt f(x_t, t -> s)` along `dx_t/dt` at a fixed s, of a network far from the solution."""
    net, (x, t, end) = student(takes=("end",), time_map=time_map), points(segments)
    t = t.clamp(1e-4, 1.57)  # where the log of the tangent is a number
    v = GAUSSIAN.velocity(x, t) + 0.3 * torch.sin(5 * x)
    prediction, g = tangent_of(net, x, v, t, end)
    _, total = torch.func.jvp(lambda x, t: jump(net, x, t, end), (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(g, torch.cos(t - end)[:, None] * total, rtol=1e-9, atol=1e-9)
    assert g.abs().max() > 0.1
    assert torch.equal(prediction, net(x / 0.5, t, end=end))


@pytest.mark.parametrize("segments", COUNTS)
def test_tangent_of_a_linear_network_in_closed_form(segments: int) -> None:
    """For `F = a x`, `f = (cos - a sin) x_t` and `df/dt = -(sin + a cos) x_t + (cos - a sin) dx_t/dt`."""
    (x, t, end), a = points(segments), 0.7
    v = GAUSSIAN.velocity(x, t)
    _, g = tangent_of(lambda x, t: a * x, x, v, t, end)
    cos, sin = column(t - end)
    torch.testing.assert_close(g, cos * (-(sin + a * cos) * x + (cos - a * sin) * v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("r", [0.0, 0.3])
def test_warmup_holds_back_the_second_term_alone(r: float) -> None:
    net, (x, t, end) = student(takes=("end",)), points(4)
    v = GAUSSIAN.velocity(x, t)
    _, g = tangent_of(net, x, v, t, end, r=r)
    with torch.no_grad():
        fixed, dF = torch.func.jvp(lambda x, t: net(x, t, end=end), (x / 0.5, t), (v / 0.5, torch.ones_like(t)))
    cos, sin = column(t - end)
    expected = -(cos**2) * (0.5 * fixed - v) - r * cos * sin * (x + 0.5 * dF)
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


# One segment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("takes_end", [False, True])
def test_jumps_to_the_end_of_one_segment_are_jumps_to_zero_bit_for_bit(takes_end: bool, dtype: torch.dtype) -> None:
    net, (x0, z, t) = student(takes=("end",) if takes_end else ()).to(dtype), batch(9, dtype=dtype)
    config = objective_of("scd")
    losses = tuple(
        flow_map_loss(net, PROCESS, x0, z, t, end, teacher=GAUSSIAN.velocity, config=config, r=0.7)
        for end in (None, segment_bounds(t, 1)[0])
    )
    assert torch.equal(losses[0].value, losses[1].value)
    a, b = (torch.autograd.grad(loss.value, list(net.parameters())) for loss in losses)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert max(x.abs().max() for x in a) > 1e-3


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [2, 16])
@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("prior", [0.0, 2.0])
def test_gradient_is_the_shaped_tangent_through_the_network(segments: int, distill: bool, prior: float) -> None:
    """`dL/dtheta = mean[ -2/D cos(t - s)^p exp(w) (dF/dtheta)^T g ]`, all of it computed apart."""
    net, (x0, z, t) = student(takes=("end",)), batch(9)
    w = torch.linspace(-1, 1, 9, dtype=torch.float64)
    teacher, tangent = GAUSSIAN.velocity if distill else None, TangentConfig(prior=prior)
    loss = consistency_loss(net, x0, z, t, segments=segments, teacher=teacher, tangent=tangent, r=0.4, weight=lambda t: w)
    grads = torch.autograd.grad(loss.value, list(net.parameters()))

    end = torch.floor(t / (torch.pi / 2 / segments)) * (torch.pi / 2 / segments)
    x = torch.cos(t)[:, None] * x0 + torch.sin(t)[:, None] * z
    v = GAUSSIAN.velocity(x, t) if distill else torch.cos(t)[:, None] * z - torch.sin(t)[:, None] * x0
    cos, sin = column(t - end)
    with torch.no_grad():
        fixed, dF = torch.func.jvp(lambda x, t: net(x, t, end=end), (x / 0.5, t), (v / 0.5, torch.ones_like(t)))
        g = -(cos**2) * (0.5 * fixed - v) - 0.4 * cos * sin * (x + 0.5 * dF)
        g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    cotangent = -2 / 3 * cos**prior * w.exp()[:, None] * g / 9
    expected = torch.autograd.grad(net(x / 0.5, t, end=end), list(net.parameters()), cotangent)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert max(b.abs().max() for b in expected) > 1e-3
    assert loss.figures.keys() == {"t", "loss", "tangent_norm"}


@pytest.mark.parametrize("segments", COUNTS)
def test_exact_network_with_exact_teacher_has_no_loss(segments: int) -> None:
    _, t, _ = points(segments)
    x0 = GAUSSIAN.sample(len(t), generator(5), torch.float64)
    z = PROCESS.sample_noise(x0, generator(6))
    loss = consistency_loss(EXACT, x0, z, t, segments=segments, teacher=GAUSSIAN.velocity, tangent=RAW)
    assert loss.value < 1e-18
    assert loss.figures["tangent_norm"].max() < 1e-9


class Recorder(nn.Module):
    def __init__(self, *takes: str) -> None:
        super().__init__()
        self.takes = frozenset(takes)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.given = conditions
        return x


def test_the_network_is_told_the_end_where_it_takes_it() -> None:
    x0, z, _ = batch(3)
    t = torch.tensor([0.3, torch.pi / 4, 1.2], dtype=torch.float64)
    label, scales = torch.tensor([2, 0, 1]), torch.tensor([1.0, 1.5, 2.0])
    told, untold = Recorder("label", "guidance", "end"), Recorder("label", "guidance")
    for network in (told, untold):
        consistency_loss(network, x0, z, t, segments=2, label=label, guidance=scales)
    assert (untold.given.keys(), told.given.keys()) == ({"label", "guidance"}, {"label", "guidance", "end"})
    for network in (told, untold):
        assert network.given["label"] is label
        assert network.given["guidance"] is scales
    assert told.given["end"].tolist() == [0.0, 0.0, torch.pi / 4]
    consistency_loss(told, x0, z, t)
    assert told.given.keys() == {"end"}
    assert told.given["end"].tolist() == [0.0, 0.0, 0.0]


def test_impossible_segments() -> None:
    with pytest.raises(UserError, match=r"^0 segments of the quarter circle; expected at least 1; raise segments$"):
        segment_bounds(batch(2)[2], 0)
    with pytest.raises(UserError, match=r"segments"):
        segment_times(PROCESS, 0)
    assert [name for fine, name, *_ in FlowMap(jumps="segments", segments=0).checks(PROCESS) if not fine] == ["segments"]


# Learning ------------------------------------------------------------------------------------------------------------


def distance(net: nn.Module, segments: int) -> float:
    """Error of the jumps relative to the way that they go, root mean square over training times, in float32."""
    g = generator(77)
    x0 = GAUSSIAN.sample(4000, g)
    t = Proposal(-0.5, 1.4).sample(PROCESS, 4000, g)
    x, end = PROCESS.interpolate(x0, PROCESS.sample_noise(x0, g), t), segment_bounds(t, segments)[0]
    exact = EXACT.jump(x.double(), t.double(), end.double())
    with torch.no_grad():
        gap = jump(net, x, t, end) - exact
    return float((gap.square().mean() / (exact - x).square().mean()).sqrt())


@pytest.mark.parametrize("segments", [2, 4])
def test_a_small_network_learns_the_exact_jumps(segments: int) -> None:
    """From weights that say nothing, with the exact velocity of the data: most of the error goes, and samples fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(MLPConfig(3, 48, depth=2, conditioning=ConditioningConfig(width=16, takes=("end",))))
    weight, g, config = AdaptiveWeight(PROCESS), generator(3), TangentConfig(warmup=50, c=0.01)
    before, untrained = distance(net, segments), copy.deepcopy(net)
    optimizer = torch.optim.Adam([*net.parameters(), *weight.parameters()], lr=3e-3, betas=(0.9, 0.99))
    for i in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2 * (1 - i / 200))
        x0 = GAUSSIAN.sample(256, g)
        z, t = PROCESS.sample_noise(x0, g), Proposal(-0.5, 1.4).sample(PROCESS, 256, g)
        loss = consistency_loss(
            net, x0, z, t, segments=segments, teacher=GAUSSIAN.velocity, tangent=config,
            r=config.warmup_factor(i), weight=weight,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    after = distance(net, segments)
    z = PROCESS.sample_noise(torch.empty(4000, 3), generator(9))
    exact, times = GAUSSIAN.consistency(z, PROCESS.t_max), segment_times(PROCESS, segments)
    gaps = [
        float((flow_map_sample(network_velocity(n, PROCESS), PROCESS, z, times) - exact).norm() / exact.norm())
        for n in (untrained, net)
    ]
    assert after < 0.3 * before
    assert gaps[1] < 0.15 * gaps[0]
