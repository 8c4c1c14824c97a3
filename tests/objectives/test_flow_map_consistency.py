"""Flow maps with jumps to 0 (sCT, sCD) against closed forms, torch.func.jvp and separate autograd computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from objectives.helpers import (
    EDGES,
    GAUSSIAN,
    PROCESS,
    VARIANCES,
    ExactStudent,
    batch,
    consistency_loss,
    generator,
    student,
    tangent_of,
)
from trigflow.objectives import AdaptiveWeight, TangentConfig
from trigflow.process import HALF_PI

RAW = TangentConfig(mode="raw", warmup=0)


def consistency_function(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """`f = cos(t) x_t - sin(t) sd F(x_t / sd, t)`, t `(b,)`."""
    cos, sin = (a.reshape(-1, *[1] * (x.ndim - 1)) for a in (torch.cos(t), torch.sin(t)))
    return cos * x - sin * 0.5 * net(x / 0.5, t)


def column(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(t)[:, None], torch.sin(t)[:, None]


def edge_points() -> tuple[Tensor, Tensor]:
    """Points of the process at the times of EDGES, four of each."""
    t = EDGES.repeat(4)
    x0 = GAUSSIAN.sample(len(t), generator(1), torch.float64)
    return PROCESS.interpolate(x0, PROCESS.sample_noise(x0, generator(2)), t), t


# The tangent ---------------------------------------------------------------------------------------------------------


def test_exact_student_is_the_consistency_function_of_the_oracle() -> None:
    x, t = edge_points()
    torch.testing.assert_close(ExactStudent()(x / 0.5, t), GAUSSIAN.student()(x / 0.5, t), rtol=1e-12, atol=1e-12)
    exact = GAUSSIAN.consistency(x, t)
    torch.testing.assert_close(consistency_function(ExactStudent(), x, t), exact, rtol=1e-12, atol=1e-12)


def test_tangent_of_the_exact_student_is_zero_everywhere() -> None:
    x, t = edge_points()
    for factor in (1.0, 5.0):  # also far from the data
        _, g = tangent_of(ExactStudent(), factor * x, GAUSSIAN.velocity(factor * x, t), t)
        assert g.abs().max() < 1e-9
    ends = torch.tensor([0.0, HALF_PI], dtype=torch.float64)
    _, g = tangent_of(ExactStudent(), x[:2], GAUSSIAN.velocity(x[:2], ends), ends)
    assert g.abs().max() < 1e-9


def test_tangent_is_not_zero_along_a_wrong_velocity_or_during_warmup() -> None:
    x, t = edge_points()
    inside = (t > 0.2) & (t < 1.2)
    v = GAUSSIAN.velocity(x, t)
    _, wrong = tangent_of(ExactStudent(), x, v + 0.1, t)
    assert wrong[inside].abs().max() > 0.01
    _, early = tangent_of(ExactStudent(), x, v, t, r=0.5)
    assert early[inside].abs().max() > 0.01


@pytest.mark.parametrize("switch", [{}, {"time_map": "log"}, {"time_embedding": "fourier", "fourier_scale": 0.02}])
def test_tangent_is_cos_times_the_total_derivative(switch: dict[str, Any]) -> None:
    """`g = cos(t) d/dt f(x_t, t)` along `dx_t/dt`, of a network far from the solution."""
    net, (x, t) = student(**switch), edge_points()
    v = GAUSSIAN.velocity(x, t) + 0.3 * torch.sin(5 * x)
    prediction, g = tangent_of(net, x, v, t)
    _, total = torch.func.jvp(lambda x, t: consistency_function(net, x, t), (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(g, torch.cos(t)[:, None] * total, rtol=1e-9, atol=1e-9)
    assert g.abs().max() > 0.1
    assert torch.equal(prediction, net(x / 0.5, t))


def test_tangent_points_where_the_consistency_function_stops_changing() -> None:
    """A small step of F along g, near the solution, brings f closer to a constant: the sign of g is right.

    `F = F* + a h`, with `F* ` exact: the mean of `g . dF/da` has the sign of -a, so the loss pulls a towards 0.
    """
    x0, z, t = batch(4000)
    x = PROCESS.interpolate(x0, z, t)
    v = GAUSSIAN.velocity(x, t)
    for a in (-0.1, 0.1):

        def network(x: Tensor, t: Tensor, a: float = a) -> Tensor:
            return ExactStudent()(x, t) + a * x

        _, g = tangent_of(network, x, v, t)
        pull = (g * x / 0.5).mean()
        assert pull * a < 0
        assert pull.abs() > 0.005


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_tangent_formula_term_by_term(r: float) -> None:
    net, (x, t) = student(), edge_points()
    v = GAUSSIAN.velocity(x, t)
    _, g = tangent_of(net, x, v, t, r=r)
    with torch.no_grad():
        _, dF = torch.func.jvp(lambda x, t: net(x, t), (x / 0.5, t), (v / 0.5, torch.ones_like(t)))
        (cos, sin), fixed = column(t), net(x / 0.5, t)
        expected = -(cos**2) * (0.5 * fixed - v) - r * cos * sin * (x + 0.5 * dF)
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


def test_tangent_without_warmup_term_is_the_distance_to_the_velocity() -> None:
    """At r = 0 the objective is diffusion training, weighted by `cos^4`."""
    (x, t), net = edge_points(), GAUSSIAN.teacher()
    _, g = tangent_of(lambda x, t: x * 0, x, net(x / 0.5, t) * 0.5, t, r=0.0)
    torch.testing.assert_close(g, torch.cos(t)[:, None] ** 2 * GAUSSIAN.velocity(x, t))


def test_tangent_is_detached_and_the_prediction_is_not() -> None:
    x0, z, t = batch(5)
    x = PROCESS.interpolate(x0, z, t).requires_grad_()
    prediction, g = tangent_of(student(), x, GAUSSIAN.velocity(x.detach(), t), t)
    assert prediction.requires_grad
    assert not g.requires_grad


def test_network_is_called_once() -> None:
    net, calls = student(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    consistency_loss(net, *batch(4))
    assert calls == [1]


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["normalize", "clip", "raw"])
@pytest.mark.parametrize("r", [0.4, 1.0])
@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("prior", [0.0, 0.5, 2.0])
def test_gradient_is_the_shaped_tangent_through_the_network(mode: str, r: float, distill: bool, prior: float) -> None:
    """`dL/dtheta = mean[ -2/D cos(t)^p exp(w) (dF/dtheta)^T g ]`; F- and g give none. All of it computed apart."""
    net, config = student(), TangentConfig(mode=mode, limit=0.2, prior=prior)  # type: ignore[arg-type]
    x0, z, t = batch(9)
    w = torch.linspace(-1, 1, 9, dtype=torch.float64)
    teacher = GAUSSIAN.velocity if distill else None
    loss = consistency_loss(net, x0, z, t, teacher=teacher, tangent=config, r=r, weight=lambda t: w)
    grads = torch.autograd.grad(loss.value, list(net.parameters()))

    cos, sin = column(t)
    x = cos * x0 + sin * z
    v = GAUSSIAN.velocity(x, t) if distill else cos * z - sin * x0
    with torch.no_grad():
        fixed, dF = torch.func.jvp(lambda x, t: net(x, t), (x / 0.5, t), (v / 0.5, torch.ones_like(t)))
        g = -(cos**2) * (0.5 * fixed - v) - r * cos * sin * (x + 0.5 * dF)
        if mode == "normalize":
            g = g / (g.norm(dim=1, keepdim=True) + 0.1)
        elif mode == "clip":
            g = g.clamp(-0.2, 0.2)
    cotangent = -2 / 3 * cos**prior * w.exp()[:, None] * g / 9
    expected = torch.autograd.grad(net(x / 0.5, t), list(net.parameters()), cotangent)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert max(b.abs().max() for b in expected) > 1e-3
    value = (cos[:, 0] ** prior * (w.exp() * g.square().mean(1) - w)).mean()
    torch.testing.assert_close(loss.value.detach(), value, rtol=1e-10, atol=1e-12)


def test_a_prior_puts_back_what_normalizing_takes_out() -> None:
    """With F = b at b = 0, a velocity of ones and r = 0, `g = cos(t)^2` in every element: raw, times weigh as cos(t)^2."""

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 0 * x + self.bias

    x0, z, t = batch(6)

    def gradient(config: TangentConfig) -> torch.Tensor:
        net = Constant()
        loss = consistency_loss(net, x0, z, t, teacher=lambda x, _: torch.ones_like(x), tangent=config, r=0.0)
        return torch.autograd.grad(loss.value, net.bias)[0]

    raw = gradient(TangentConfig(mode="raw"))
    unit = gradient(TangentConfig(c=0.0, prior=2.0)) * 3**0.5  # of length 1 over 3 elements
    torch.testing.assert_close(unit, raw, rtol=1e-9, atol=0)
    assert not torch.allclose(gradient(TangentConfig(c=0.0)) * 3**0.5, raw, rtol=0.1)


def test_weight_learns_too() -> None:
    """`dL/db = mean[ exp(w) e - 1 ]` for the bias b of the weight."""
    weight = AdaptiveWeight(PROCESS).double()
    with torch.no_grad():
        weight.linear.weight.normal_(generator=generator()).mul_(0.1)
    x0, z, t = batch(20)
    loss = consistency_loss(student(), x0, z, t, weight=weight)
    loss.value.backward()
    expected = (weight(t).exp() * loss.figures["loss"].double() - 1).mean()
    torch.testing.assert_close(weight.linear.bias.grad[0], expected.detach(), rtol=1e-5, atol=0)


def test_exact_student_with_exact_teacher_has_no_loss() -> None:
    _, t = edge_points()
    x0 = GAUSSIAN.sample(len(t), generator(5), torch.float64)
    loss = consistency_loss(
        ExactStudent(), x0, PROCESS.sample_noise(x0, generator(6)), t, teacher=GAUSSIAN.velocity, tangent=RAW
    )
    assert loss.value < 1e-18
    assert loss.figures["tangent_norm"].max() < 1e-9


def test_training_without_a_teacher_follows_the_conditional_velocity() -> None:
    net, (x0, z, t) = student(), batch(8)
    cos, sin = column(t)
    seen: list[tuple[Tensor, Tensor]] = []

    def conditional(x_t: Tensor, time: Tensor) -> Tensor:
        seen.append((x_t, time))
        return cos * z - sin * x0

    given = consistency_loss(net, x0, z, t, teacher=conditional, r=0.7)
    own = consistency_loss(net, x0, z, t, r=0.7)
    torch.testing.assert_close(own.value, given.value, rtol=1e-12, atol=0)
    assert own.value != consistency_loss(net, x0, z, t, teacher=GAUSSIAN.velocity, r=0.7).value
    torch.testing.assert_close(seen[0][0], cos * x0 + sin * z)
    assert torch.equal(seen[0][1], t)


def test_teacher_gets_no_gradient() -> None:
    teacher, (x0, z, t) = student(seed=3), batch(6)
    loss = consistency_loss(student(), x0, z, t, teacher=lambda x, t: 0.5 * teacher(x / 0.5, t))
    loss.value.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_training_has_the_gradient_of_distillation_on_average() -> None:
    """`E[v | x_t]` is the exact velocity and g is affine in it, so unshaped expected gradients agree.

    100 batches of 1000: the difference of the two gradients against the scatter of its own mean.
    """
    net, batches = student(width=8, scale=0.4), 100
    differences, distilled = [], []
    for i in range(batches):
        x0, z, t = batch(1000, seed=i)
        grads = []
        for teacher in (None, GAUSSIAN.velocity):
            loss = consistency_loss(net, x0, z, t, teacher=teacher, tangent=RAW)
            flat = torch.autograd.grad(loss.value, list(net.parameters()))
            grads.append(torch.cat([g.flatten() for g in flat]))
        differences.append(grads[0] - grads[1])
        distilled.append(grads[1])
    difference = torch.stack(differences)
    standard_error = (difference.var(0) / batches).sum().sqrt()
    gap, size = difference.mean(0).norm(), torch.stack(distilled).mean(0).norm()
    assert gap < 2 * standard_error  # a chi-squared of many parameters: about 1 if the means agree
    assert standard_error < 0.05 * size  # a difference of a tenth would be seen


# What is passed on and what comes back -------------------------------------------------------------------------------


class Recorder(nn.Module):
    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.given = conditions
        return x


def test_label_and_guidance_reach_the_network() -> None:
    recorder, (x0, z, t) = Recorder(), batch(3)
    label, scales = torch.tensor([2, 0, 1]), torch.tensor([1.0, 1.5, 2.0])
    consistency_loss(recorder, x0, z, t, label=label, guidance=scales)
    assert recorder.given.keys() == {"label", "guidance"}
    assert recorder.given["label"] is label
    assert recorder.given["guidance"] is scales
    consistency_loss(recorder, x0, z, t)
    assert recorder.given == {}


def test_label_and_guidance_change_the_tangent_of_a_network_that_takes_them() -> None:
    net = student(num_classes=3, takes=("guidance",))
    x0, z, t = batch(3)
    x, v = PROCESS.interpolate(x0, z, t), PROCESS.velocity(x0, z, t)
    label, scales = torch.tensor([0, 1, 3]), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    _, g = tangent_of(net, x, v, t, label=label, guidance=scales)

    def f(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = column(t)
        return cos * x - sin * 0.5 * net(x / 0.5, t, label=label, guidance=scales)

    _, total = torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(g, torch.cos(t)[:, None] * total, rtol=1e-9, atol=1e-9)
    _, other = tangent_of(net, x, v, t, label=label.flip(0), guidance=scales.flip(0))
    assert (other - g).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 4, 4)])
def test_figures(shape: tuple[int, ...]) -> None:
    g = generator(4)
    x0, z = (torch.randn(shape, generator=g) for _ in range(2))
    t = torch.linspace(0.2, 1.4, 6)
    scale = torch.tensor(0.8, requires_grad=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return scale * torch.tanh(x)

    loss = consistency_loss(network, x0, z, t, weight=lambda t: 1 + t)
    assert loss.value.shape == ()
    assert loss.value.requires_grad
    assert loss.figures.keys() == {"t", "loss", "tangent_norm"}
    for figure in loss.figures.values():
        assert figure.shape == (6,)
        assert figure.dtype == torch.float32
        assert not figure.requires_grad
    assert torch.equal(loss.figures["t"], t)
    x = PROCESS.interpolate(x0, z, t)
    _, tangent = tangent_of(network, x, PROCESS.velocity(x0, z, t), t)
    norm = tangent.flatten(1).norm(dim=1)
    d = math.prod(shape[1:])
    torch.testing.assert_close(loss.figures["tangent_norm"], norm / d**0.5, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.figures["loss"], (norm / (norm + 0.1)) ** 2 / d, rtol=1e-4, atol=1e-6)


def test_default_shaping_is_normalization() -> None:
    net, data = student(), batch(6)
    by_default = consistency_loss(net, *data).value
    assert torch.equal(by_default, consistency_loss(net, *data, tangent=TangentConfig(c=0.1)).value)
    assert by_default != consistency_loss(net, *data, tangent=RAW).value


def test_variances_of_the_batch_are_those_of_the_oracle() -> None:
    """The helper draws what the closed forms are for."""
    x0, z, t = batch(50_000)
    x = PROCESS.interpolate(x0, z, torch.full_like(t, 0.8))
    torch.testing.assert_close(x0.var(0), VARIANCES, rtol=0.03, atol=0)
    torch.testing.assert_close(x.var(0), GAUSSIAN.variance(x[:1], 0.8).expand(1, 3)[0], rtol=0.03, atol=0)
