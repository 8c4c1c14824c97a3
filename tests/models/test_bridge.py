"""Bridged models against closed forms: exact Gaussian and mixture models, in every parameterization, are the same network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.gaussian import GaussianOracle
from oracles.mixture import MixtureOracle
from trigflow import TrigFlow, UserError, tangent
from trigflow.models.bridges import (
    Bridge,
    CosineSchedule,
    DenoiserBridge,
    DiscreteSchedule,
    EDMBridge,
    FlowBridge,
    LinearSchedule,
    OneHot,
    VPBridge,
    plain,
)

Posterior = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""`E[x0' | y = x0' + sigma n]` of `(y, sigma, label)`, all that any diffusion model knows."""

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS = torch.cumprod(1 - BETAS, 0)
EXTREMES = [1e-6, 1e-4, 1e-3, 0.05, 0.4, 0.8, 1.2, 1.5, math.atan(160.0)]
DATA = [(0.5, 1.0), (0.5, 2.0), (1.0, 1.0), (0.3, 3.7)]
"""(sd, scale)."""


class Exact(nn.Module):
    """A model that knows the posterior mean; it has a parameter to count and train, without effect at zero."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.function(x, like(time, x), label) + self.shift


def like(time: Tensor, x: Tensor) -> Tensor:
    return time.reshape(-1, *[1] * (x.ndim - 1))


def posterior_of(gaussian: GaussianOracle | MixtureOracle, scale: float) -> Posterior:
    """Written down independently of TrigFlow time: x0' = scale x0, seen at noise level sigma."""

    def posterior(y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        if isinstance(gaussian, GaussianOracle):
            variance = scale**2 * gaussian.variances.to(y)
            return y * variance / (variance + sigma**2)
        means, variances = scale * gaussian.means.to(y), scale**2 * gaussian.variances.to(y)
        total = variances + sigma**2  # (b, k)
        offset = y[:, None] - means
        logits = gaussian.weights.to(y).log() - offset.square().sum(2) / (2 * total)
        logits = logits - y.shape[1] / 2 * total.log()
        if label is not None:
            other = torch.arange(len(means)) != label[:, None]
            logits = logits.masked_fill(other & (label != gaussian.null_label)[:, None], -torch.inf)
        weights = torch.softmax(logits, dim=1)[:, :, None]
        return (weights * (means + (variances / total)[:, :, None] * offset)).sum(1)

    return posterior


def flow(posterior: Posterior, sign: float, noise_at: int, time_scale: float) -> Exact:
    def u(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        s = time / time_scale if noise_at else 1 - time / time_scale
        x0 = posterior(x / (1 - s), s / (1 - s), label)
        return sign * ((x - (1 - s) * x0) / s - x0)

    return Exact(u)


def vp(posterior: Posterior, predicts: str, amplitude: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Exact:
    def prediction(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        a, b = amplitude(time)
        x0 = posterior(x / a, b / a, label)
        n = (x - a * x0) / b
        return {"epsilon": n, "v": a * n - b * x0, "x0": x0}[predicts]

    return Exact(prediction)


def steps(time: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the 1000 steps of DDPM; between them, the angle is linear."""
    angles = torch.acos(ALPHAS.sqrt()).to(time)
    i = time.floor().long().clamp(0, 998)
    angle = angles[i] + (time - i) * (angles[i + 1] - angles[i])
    return torch.cos(angle), torch.sin(angle)


def score_sde(time: Tensor) -> tuple[Tensor, Tensor]:
    s = time / 999
    log_a = -(20 - 0.1) * s**2 / 4 - 0.1 * s / 2
    return torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a))


def cosine(time: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(math.pi / 2 * time), torch.sin(math.pi / 2 * time)


def edm(posterior: Posterior, sd: float) -> Exact:
    """`D = c_skip y + c_out F(c_in y, log(sigma) / 4)`, solved for F."""

    def raw(x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        sigma = torch.exp(4 * c_noise)
        total = sigma**2 + sd**2
        y = x * total.sqrt()
        return (posterior(y, sigma, label) - sd**2 / total * y) * total.sqrt() / (sigma * sd)

    return Exact(raw)


Make = Callable[[Posterior, TrigFlow, float], Bridge]

BRIDGES: dict[str, Make] = {
    "edm": lambda p, process, scale: EDMBridge(edm(p, scale * process.sigma_data), process, scale=scale, null={"label": 3}),
    "edm, sd 0.66": lambda p, process, scale: EDMBridge(edm(p, 0.66), process, sigma_data=0.66, scale=scale, null={"label": 3}),
    "denoiser": lambda p, process, scale: DenoiserBridge(Exact(p), process, scale=scale, null={"label": 3}),
    "flow, noise at 1": lambda p, process, scale: FlowBridge(flow(p, 1, 1, 1.0), process, scale=scale, null={"label": 3}),
    "flow, noise at 0": lambda p, process, scale: FlowBridge(
        flow(p, -1, 0, 1.0), process, noise_at=0, scale=scale, null={"label": 3}
    ),
    "flow, noise at 1, data - noise": lambda p, process, scale: FlowBridge(
        flow(p, -1, 1, 1000.0), process, velocity="data - noise", time_scale=1000.0, scale=scale, null={"label": 3}
    ),
    "flow, noise at 0, noise - data": lambda p, process, scale: FlowBridge(
        flow(p, 1, 0, 1.0), process, noise_at=0, velocity="noise - data", scale=scale, null={"label": 3}
    ),
}
for kind in ("epsilon", "v", "x0"):
    BRIDGES[f"steps, {kind}"] = lambda p, process, scale, kind=kind: VPBridge(  # type: ignore[misc]
        vp(p, kind, steps), process, ALPHAS, predicts=kind, scale=scale, null={"label": 3}
    )
    BRIDGES[f"score sde, {kind}"] = lambda p, process, scale, kind=kind: VPBridge(  # type: ignore[misc]
        vp(p, kind, score_sde), process, LinearSchedule(time_scale=999.0), predicts=kind, scale=scale, null={"label": 3}
    )
    BRIDGES[f"cosine, {kind}"] = lambda p, process, scale, kind=kind: VPBridge(  # type: ignore[misc]
        vp(p, kind, cosine), process, CosineSchedule(), predicts=kind, scale=scale, null={"label": 3}
    )
ALL = list(BRIDGES)


def gaussian(sd: float) -> GaussianOracle:
    return GaussianOracle(torch.tensor([0.02, 0.3, 1.7], dtype=torch.float64), sd)


def mixture(sd: float) -> MixtureOracle:
    means = torch.tensor([[-0.6, 0.3], [0.1, -0.5], [0.8, 0.2]], dtype=torch.float64)
    return MixtureOracle(means, torch.tensor([0.02, 0.05, 0.1]), torch.tensor([3.0, 2.0, 5.0]).double(), sd)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inside(bridge: Bridge, times: Tensor) -> Tensor:
    """Times moved into the range that the model knows."""
    low, high = bridge.sigma_range
    sigma = bridge.process.sigma_data * torch.tan(times)
    return torch.atan(sigma.clamp(low * 1.0001, high * 0.9999) / bridge.process.sigma_data)


# Exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sd", "scale"), DATA)
@pytest.mark.parametrize("name", ALL)
def test_a_gaussian_model_is_the_exact_network(name: str, sd: float, scale: float) -> None:
    oracle, process = gaussian(sd), TrigFlow(sd)
    bridge = BRIDGES[name](posterior_of(oracle, scale), process, scale)
    t = inside(bridge, torch.linspace(0.01, 1.56, 40, dtype=torch.float64))
    x = draw(40, 3)
    torch.testing.assert_close(bridge(x, t), oracle.F_velocity(x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_a_labelled_mixture_model_is_the_exact_network(name: str) -> None:
    oracle, process = mixture(0.4), TrigFlow(0.4)
    bridge = BRIDGES[name](posterior_of(oracle, 1.9), process, 1.9)
    t = inside(bridge, torch.linspace(0.02, 1.55, 24, dtype=torch.float64))
    x, label = draw(24, 2), torch.arange(24) % 4
    torch.testing.assert_close(bridge(x, t, label=label), oracle.F_velocity(x, t, label), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bridge(x, t), oracle.F_velocity(x, t), rtol=1e-10, atol=1e-10)  # the null label


@pytest.mark.parametrize("name", ALL)
def test_images_and_one_time_for_all(name: str) -> None:
    oracle, process = GaussianOracle(0.1 + draw(2, 4, 4).abs(), 0.5), TrigFlow(0.5)
    bridge = BRIDGES[name](posterior_of(oracle, 2.0), process, 2.0)
    x, t = draw(3, 2, 4, 4), torch.tensor(0.9, dtype=torch.float64)
    torch.testing.assert_close(bridge(x, t), oracle.F_velocity(x, t), rtol=1e-10, atol=1e-10)


def test_the_steps_of_a_discrete_schedule_are_exact_and_its_ends_hold() -> None:
    schedule = DiscreteSchedule(ALPHAS)
    angles = torch.acos(ALPHAS.sqrt())
    torch.testing.assert_close(schedule(angles), torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-7)
    ends = schedule(torch.tensor([0.0, 1.57], dtype=torch.float64))
    assert ends.tolist() == [0, 999]
    spaced = DiscreteSchedule(ALPHAS[::100], times=torch.arange(1000)[::100])
    torch.testing.assert_close(spaced(angles[300:301]), torch.tensor([300.0], dtype=torch.float64))


def test_a_schedule_that_ends_without_any_signal() -> None:
    schedule = DiscreteSchedule(torch.tensor([0.99, 0.5, 0.0]))
    between = schedule(torch.tensor([math.pi / 4, (math.pi / 4 + math.pi / 2) / 2, math.pi / 2]))
    torch.testing.assert_close(between, torch.tensor([1.0, 1.5, 2.0]))


def test_float32_finds_its_place_between_late_steps() -> None:
    """The angles of the last steps differ by 1e-4 only."""
    t = torch.linspace(1.5, 1.56, 200)
    schedule = DiscreteSchedule(ALPHAS)
    assert (schedule(t).double() - schedule(t.double())).abs().max() < 0.02


@pytest.mark.parametrize("schedule", [LinearSchedule(), LinearSchedule(4.0, 4.0), CosineSchedule(7.0)])
def test_continuous_schedules_invert_their_process(schedule: Any) -> None:
    s = torch.linspace(1e-3, 0.999, 50, dtype=torch.float64)
    if isinstance(schedule, CosineSchedule):
        angle = math.pi / 2 * s
    else:
        log_a = -(schedule.beta_max - schedule.beta_min) * s**2 / 4 - schedule.beta_min * s / 2
        angle = torch.atan2(torch.sqrt(-torch.expm1(2 * log_a)), torch.exp(log_a))
    torch.testing.assert_close(schedule(angle), schedule.time_scale * s, rtol=1e-12, atol=1e-12)
    low, high = schedule.angle_range
    assert low == 0
    assert high > float(angle[-1])


def test_noise_levels_a_model_knows() -> None:
    process = TrigFlow(0.5)
    bridge = VPBridge(nn.Identity(), process, ALPHAS, scale=2.0)
    low, high = bridge.sigma_range
    assert low == pytest.approx(math.sqrt(1 / float(ALPHAS[0]) - 1) / 2)
    assert high == pytest.approx(math.sqrt(1 / float(ALPHAS[-1]) - 1) / 2)
    assert FlowBridge(nn.Identity(), process).sigma_range == (0, math.inf)
    asked: list[Tensor] = []
    bridge = VPBridge(nn.Identity(), process, ALPHAS, adapter=lambda model, x, time: asked.append(time) or x)
    bridge(torch.ones(2, 1), torch.atan(torch.tensor([0.001, 1000.0]) / 0.5))
    assert asked[0].tolist() == [0, 999]


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_float32_stays_close_from_the_first_time_to_the_last(name: str) -> None:
    """Away from where a parameterization is ill-conditioned, to 1e-4; there, to its error over sin or cos."""
    oracle, process = gaussian(0.5), TrigFlow(0.5)
    bridge = BRIDGES[name](posterior_of(oracle, 1.0), process, 1.0)
    t = torch.tensor(EXTREMES)
    x = draw(len(t), 3).float()
    result = bridge.float()(x, t)
    assert result.dtype == torch.float32
    assert bool(result.isfinite().all())
    known = inside(bridge, t.double()) == t.double()
    exact = oracle.F_velocity(x.double(), t.double())
    # The models here are themselves differences in float32: their rounding, divided as the formulas divide it.
    bound = 2e-6 * (1 + 1 / torch.sin(t) + 1 / torch.cos(t))[:, None]
    assert bool(((result - exact).abs() < bound)[known].all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_very_ends_are_finite(name: str, dtype: torch.dtype) -> None:
    process = TrigFlow(0.5)
    bridge = BRIDGES[name](lambda y, sigma, label: y / (1 + sigma**2), process, 1.0)
    bridge.model = Exact(lambda x, time, label: torch.tanh(x) + 0 * time)
    t = torch.tensor([0.0, math.pi / 2], dtype=dtype)
    assert bool(bridge.to(dtype)(torch.ones(2, 3, dtype=dtype), t).isfinite().all())


@pytest.mark.parametrize("name", ["denoiser", "cosine, x0"])
def test_a_jump_to_zero_is_told_a_velocity_and_no_rounding(name: str) -> None:
    """The Lagrangian residual asks a teacher where jumps end. There D is its input but for a rounding."""
    bridge = BRIDGES[name](lambda y, sigma, label: y / (1 + sigma**2), TrigFlow(0.5), 1.37).float()
    x = draw(64, 16).float()
    assert float(bridge(x, torch.zeros(64)).abs().max()) < 0.01


# Tangents ------------------------------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """Something to differentiate, of every input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.tanh(self.linear(torch.cat([x, torch.cos(time)[:, None]], dim=1)))


@pytest.mark.parametrize("name", ALL)
def test_tangents_equal_those_of_torch(name: str) -> None:
    bridge = BRIDGES[name](lambda y, sigma, label: y, TrigFlow(0.5), 1.4)
    torch.manual_seed(0)
    bridge.model, bridge.takes, bridge.null = Smooth(), frozenset(), {}
    x, t, dx = draw(6, 3), torch.linspace(0.05, 1.5, 6, dtype=torch.float64), draw(6, 3, seed=1)
    dt = torch.linspace(-1, 1, 6, dtype=torch.float64)
    out, derivative = tangent.jvp(bridge, (x, t), (dx, dt))
    expected, exact = torch.func.jvp(lambda x, t: bridge(x, t), (x, t), (dx, dt))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(derivative, exact, rtol=1e-9, atol=1e-9)
    assert exact.abs().max() > 1e-3
    out.sum().backward()
    assert bridge.model.linear.weight.grad is not None


# Modules and adapters ------------------------------------------------------------------------------------------------


def test_a_bridge_is_a_module_around_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    bridge = FlowBridge(model, TrigFlow(), adapter=lambda model, x, time: model(x))
    assert list(bridge.parameters()) == list(model.parameters())
    bridge.eval()
    assert not model.training
    assert (bridge.takes, bridge.null) == (frozenset(), {})
    twin = copy.deepcopy(bridge)
    with torch.no_grad():
        twin.model[0].weight.zero_()
        twin.model[0].bias.zero_()
    x, t = torch.ones(2, 3), torch.tensor([0.3, 0.9])
    assert not torch.equal(twin(x, t), bridge(x, t))  # each calls its own model


def test_labels_and_guidance_reach_the_model() -> None:
    seen: list[dict[str, Tensor]] = []

    def adapter(model: nn.Module, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        seen.append(told)
        return x

    x, t, label = torch.ones(2, 3), torch.tensor([0.3, 0.9]), torch.tensor([1, 4])
    bridge = FlowBridge(nn.Identity(), TrigFlow(), adapter=adapter, null={"label": 10}, takes=("label", "guidance"))
    bridge(x, t, label=label, guidance=torch.tensor([1.0, 2.0]))
    assert torch.equal(seen[0]["label"], label)
    assert seen[0]["guidance"].tolist() == [1.0, 2.0]
    bridge(x, t, guidance=torch.ones(2))
    assert seen[1]["label"].tolist() == [10, 10]
    with pytest.raises(UserError, match="no guidance for a network that takes it"):
        bridge(x, t, label=label)
    with pytest.raises(UserError, match="guidance for a network that takes no conditions"):
        FlowBridge(nn.Identity(), TrigFlow(), adapter=adapter)(x, t, guidance=torch.ones(2))


@pytest.mark.parametrize(
    ("old", "now"),
    [({"null_label": 10}, "null = {"), ({"takes_guidance": True}, "guidance"), ({"takes_end": True}, "end"), ({"nul": 1}, "")],
)
def test_arguments_of_earlier_versions_are_named_with_what_says_it_now(old: dict[str, Any], now: str) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(old))} for a bridge; expected .*null or takes") as caught:
        FlowBridge(nn.Identity(), TrigFlow(), **old)
    assert now in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_condition_reaches_the_model_and_is_none_where_it_is_not_told() -> None:
    seen: list[dict[str, Tensor]] = []

    def adapter(model: nn.Module, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        seen.append(told)
        return x

    none = {"wind": torch.tensor([0.5, -0.5])}
    bridge = FlowBridge(nn.Identity(), TrigFlow(), adapter=adapter, null=none, takes=("depth",))
    assert bridge.takes == {"wind", "depth"}
    x, t, depth, wind = (torch.ones(2, 3), torch.tensor([0.3, 0.9]), torch.ones(2, 4, 4), torch.tensor([[1.0, 2], [3, 4]]))
    bridge(x, t, depth=depth, wind=wind)
    bridge(x, t, depth=depth)
    assert torch.equal(seen[0]["wind"], wind)
    assert torch.equal(seen[1]["depth"], depth)
    assert seen[1]["wind"].tolist() == [[0.5, -0.5]] * 2
    with pytest.raises(UserError, match="no depth for a network that takes it"):
        bridge(x, t, wind=wind)


def test_plain_adapter_calls_with_what_there_is() -> None:
    calls: list[tuple[Any, ...]] = []
    x, time, label, scale = torch.ones(1, 1), torch.ones(1), torch.ones(1, dtype=torch.int64), torch.ones(1)

    def model(*args: Any) -> Tensor:
        calls.append(args)
        return x

    plain(model, x, time)
    plain(model, x, time, label=label)
    plain(model, x, time, guidance=scale)
    plain(model, x, time, guidance=scale, label=label)
    plain(model, x, time, wind=x, depth=time, guidance=scale)
    expected = [(x, time), (x, time, label), (x, time, scale), (x, time, label, scale), (x, time, scale, time, x)]
    assert [[id(a) for a in call] for call in calls] == [[id(a) for a in call] for call in expected]


def test_one_hot_labels() -> None:
    rows: list[Tensor] = []
    adapter = OneHot(3)
    for label in (torch.tensor([0, 2, 3]), None):
        told = {} if label is None else {"label": label}
        adapter(lambda x, time, row: rows.append(row), torch.ones(3, 2), torch.ones(3), **told)
    assert rows[0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert rows[1].tolist() == [[0, 0, 0]] * 3
    assert rows[0].dtype == torch.float32


def randomized(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def of_diffusers(model: Any, x: Tensor, time: Tensor, label: Tensor) -> Any:
    """How a model of diffusers is called; of epsilon and variance, the first is taken."""
    found = model(x.to(model.dtype), timestep=time, class_labels=label, return_dict=False)[0]
    return found[:, : x.shape[1]].to(x.dtype)


@pytest.fixture(scope="module")
def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it is a development dependency")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=5,
    )  # fmt: skip
    return randomized(net)


def test_a_unet_of_diffusers(unet: Any) -> None:
    import diffusers

    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type="epsilon")
    bridge = VPBridge(unet, TrigFlow(0.5), scheduler.alphas_cumprod, adapter=of_diffusers, scale=2.0, null={"label": 4})
    x0, n, label = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), torch.tensor([1, 4])
    step = torch.tensor([150, 800])
    noisy = scheduler.add_noise(x0, n, step)  # theirs: a x0' + b n
    a = scheduler.alphas_cumprod[step].double().sqrt()
    t = torch.atan((1 - a**2).sqrt() / a)  # sd scale = 1: the same circle
    with torch.no_grad():
        epsilon = unet(noisy, step, class_labels=label).sample
        clean = (noisy - (1 - a**2).sqrt()[:, None, None, None] * epsilon) / a[:, None, None, None]
        cos, sin = (f(t)[:, None, None, None] for f in (torch.cos, torch.sin))
        expected = cos * epsilon - sin * clean
        torch.testing.assert_close(bridge(noisy, t, label=label), expected, rtol=1e-4, atol=1e-4)  # their embedding is float32
        wrong = bridge(noisy, t, label=label.flip(0))
    assert (wrong - expected).abs().max() > 1e-3


def test_tangent_through_a_unet_of_diffusers(unet: Any) -> None:
    bridge = VPBridge(unet, TrigFlow(0.5), ALPHAS, adapter=of_diffusers, null={"label": 4})
    from tangent.diffusers_cases import exact
    from tangent.steps import directions

    inputs = (draw(2, 3, 8, 8), torch.tensor([0.6, 1.2], dtype=torch.float64))
    _, derivative = tangent.jvp(bridge, inputs, directions(inputs))
    torch.testing.assert_close(derivative, exact(bridge, inputs), rtol=1e-4, atol=1e-4)
    assert derivative.abs().max() > 1e-2


def test_a_transformer_of_diffusers_that_predicts_its_variance_too() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it is a development dependency")
    torch.manual_seed(0)
    dit = randomized(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=5, norm_num_groups=4,
        )
    )  # fmt: skip
    bridge = VPBridge(dit.float(), TrigFlow(0.5), ALPHAS, adapter=of_diffusers, null={"label": 5})
    x, t, label = draw(2, 4, 8, 8), torch.tensor([0.5, 1.4], dtype=torch.float64), torch.tensor([0, 3])
    with torch.no_grad():
        F = bridge(x, t, label=label)
        r = torch.sqrt(torch.cos(t) ** 2 + 0.25 * torch.sin(t) ** 2)[:, None, None, None]
        time = DiscreteSchedule(ALPHAS)(torch.atan2(0.5 * torch.sin(t), torch.cos(t)))
        epsilon = dit((0.5 * x / r).float(), timestep=time, class_labels=label).sample[:, :4].double()
    assert F.shape == x.shape
    cos, sin = (f(t)[:, None, None, None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(F, (epsilon - sin * x) / cos, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.0, -0.5, math.nan, math.inf])
def test_a_deviation_that_is_none(sigma_data: float) -> None:
    with pytest.raises(UserError, match=r"sigma_data .* of a model; expected a positive number"):
        EDMBridge(nn.Identity(), TrigFlow(), sigma_data=sigma_data)
