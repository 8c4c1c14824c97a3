"""The instruments: what they measure, against other ways to compute it, and that they leave the run as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.tiny import TWO_LEVELS, differing, state_of, tiny_trainer, untrained_teacher
from trigflow.models.model import Model
from trigflow.networks import (
    ConditioningConfig,
    DDPMPPConfig,
    DiTConfig,
    EDM2Config,
    FourierEmbedding,
    PositionalEmbedding,
    UNetConfig,
    build,
)
from trigflow.networks.layers import full_precision
from trigflow.process import trig
from trigflow.training.ema import power_exponent
from trigflow.training.instruments import LONGER, Instruments, bin_centres, embedding_of, relative_derivative, time_arithmetic
from trigflow.training.log import TIME_BINS, read_metrics
from trigflow.training.trainer import Trainer

ON = {"loop.instruments": True, "loop.log_every": 1}
SCD = {"objective.kind": "scd", **ON}
NETWORKS = {
    "unet": UNetConfig(width=8, mult=(1,), blocks=1),
    "dit": DiTConfig(channels=1, width=16, depth=1, heads=2, conditioning=ConditioningConfig(width=8)),
    "edm2": EDM2Config(channels=1, resolution=8, width=8, mult=(1, 2), blocks=1, attention=()),
    "ddpmpp": DDPMPPConfig(channels=1, resolution=8, width=8, mult=(1, 2), blocks=1, attention=()),
}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def one_step(folder: Path, changes: dict[str, Any], teacher: Model | None = None) -> tuple[Trainer, dict[str, Any]]:
    """A trainer after one step, and what its instruments say."""
    trainer = tiny_trainer(folder, {"loop.batch_size": 16, **ON, **changes}, teacher=teacher)
    trainer.step()
    assert trainer.instruments is not None
    return trainer, trainer.instruments.read()


# The run stays as it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"objective.kind": "scd"}, {"objective.kind": "scd-vsd"}])
def test_the_weights_are_the_same_with_and_without(changes: dict[str, Any], teacher: Model, tmp_path: Path) -> None:
    states = []
    for on in (True, False):
        both = {"loop.iterations": 3, "network.dropout": 0.3, "loop.log_every": 1, "loop.instruments": on, **changes}
        trainer = tiny_trainer(tmp_path / str(on), both, teacher=teacher if changes else None)
        trainer.run()
        states.append(state_of(trainer))
    assert differing(*states) == []


def test_off_by_default_and_then_silent(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, {"loop.iterations": 2}).run()
    names = read_metrics(tmp_path)[-1]
    assert not [
        name for name in names if name.startswith(("probe", "grad_norm/", "embedding", "time_", "data_mean", "data_std"))
    ]


def test_they_can_be_switched_on_when_a_run_goes_on(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, {"loop.iterations": 2}).run()
    trainer = tiny_trainer(tmp_path, {"loop.iterations": 4, **ON}, resume=True)
    trainer.run()
    first, *_, last = read_metrics(tmp_path)
    assert "probe_error" not in first
    assert last["probe_error"] > 0
    assert "probe_start" not in last  # of the weights of a run's beginning, which are no longer there


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.kind": "sct"},
        {"objective.kind": "sct", "objective.segments": 2},
        {"objective.kind": "scd", "objective.guidance_max": 2.0},
        {"objective.kind": "vsd"},
        {"objective.kind": "meanflow-distill"},
        {"loop.precision": "bf16"},
        {"loop.accumulate": 2, "optimizer.clip": 0.1},
    ],
)
def test_every_kind_of_run_can_be_watched(changes: dict[str, Any], teacher: Model, tmp_path: Path) -> None:
    distills = changes.get("objective.kind", "sct") != "sct"
    tiny_trainer(tmp_path, {"loop.iterations": 2, **ON, **changes}, teacher=teacher if distills else None).run()
    line = read_metrics(tmp_path)[-1]
    measured = changes.get("objective.kind") not in ("vsd", "meanflow-distill")
    assert ("probe_error" in line) == measured
    assert all(value is not None for name, value in line.items() if not name.endswith("by_time"))
    assert line["grad_norm_max"] >= line["grad_norm_median"] > 0


# What they measure ---------------------------------------------------------------------------------------------------


def test_the_parts_of_the_tangent_are_those_of_autograd(teacher: Model, tmp_path: Path) -> None:
    trainer, line = one_step(tmp_path, SCD, teacher)
    assert trainer.instruments is not None
    batch = trainer.instruments.batch
    network, process = trainer.network.eval(), trainer.config.process
    t = bin_centres().repeat(2)
    cos, sin = trig(t, batch["x0"])
    x_t = cos * batch["x0"] + sin * batch["noise"]
    label = batch["condition.label"]
    dxdt = teacher.velocity({"label": label})(x_t, t)
    sd = process.sigma_data

    def along(dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """`F` and `sd dF` by the forward mode of PyTorch."""
        call = lambda x, t: network(x, t, label=label)  # noqa: E731
        prediction, derivative = torch.func.jvp(call, (x_t / sd, t), (dx / sd, dt))
        return prediction, sd * derivative

    with torch.no_grad():
        prediction, space = along(dxdt, torch.zeros_like(t))
        clock = along(torch.zeros_like(x_t), torch.ones_like(t))[1]
    parts = {
        "velocity": cos**2 * (sd * prediction - dxdt),
        "state": cos * sin * x_t,
        "derivative": cos * sin * (space + clock),
        "space": cos * sin * space,
        "clock": cos * sin * clock,
    }
    parts["error"] = parts["velocity"] + parts["state"] + parts["derivative"]
    for name, part in parts.items():
        rms = part.square().flatten(1).mean(1).sqrt()
        assert line[f"probe_{name}"] == pytest.approx(rms.mean().item(), rel=1e-4)
        assert line[f"probe_{name}_by_time"] == pytest.approx(rms.reshape(2, TIME_BINS).mean(0).tolist(), rel=1e-4)


def test_the_error_of_a_teacher_and_of_its_average(tmp_path: Path) -> None:
    trainer, line = one_step(tmp_path, {"optimizer.lr": 0.05, "ema.kind": "halflife", "ema.rampup": 0.0})
    assert trainer.instruments is not None
    batch, process = trainer.instruments.batch, trainer.config.process
    t = bin_centres().repeat(2)
    x_t, v = (f(batch["x0"], batch["noise"], t) for f in (process.interpolate, process.velocity))
    for name, network in (("", trainer.network.eval()), ("_ema", trainer.ema.network)):
        with torch.no_grad():
            error = (0.5 * network(x_t / 0.5, t, label=batch["condition.label"]) - v).square().mean().item()
        assert line[f"probe_error{name}"] == pytest.approx(error, rel=1e-4)
    assert line["probe_error_ema"] != line["probe_error"]
    assert line["probe_start"] == pytest.approx(v.square().mean().item(), rel=1e-4)  # of zero velocity


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_parts_of_the_gradient_make_the_whole(clip: float | None, tmp_path: Path) -> None:
    changes = {"network": TWO_LEVELS, "objective.adaptive_weight": False, "optimizer.clip": clip}
    trainer = tiny_trainer(tmp_path, {**ON, **changes})
    norm = float(trainer.step()[0]["grad_norm"])
    assert trainer.instruments is not None
    line = trainer.instruments.read()
    parts = {name: value for name, value in line.items() if name.startswith("grad_norm/")}
    assert set(parts) == {f"grad_norm/{name}" for name, _ in trainer.network.named_children()}
    assert math.hypot(*parts.values()) == pytest.approx(norm, rel=1e-4)


def test_weighting_data_and_average(tmp_path: Path) -> None:
    trainer, line = one_step(tmp_path, {"optimizer.lr": 0.1, "ema.kind": "halflife", "ema.rampup": 0.0})
    assert trainer.instruments is not None
    weight = trainer.student.weights["weight"](bin_centres())
    assert line["weight_by_time"] == pytest.approx(weight.tolist())
    assert weight.abs().max() > 0.01
    assert line["data_std"] == pytest.approx(trainer.instruments.batch["x0"].std(correction=0).item())
    raw, averaged = (
        torch.cat([p.detach().flatten() for p in module.parameters()]) for module in (trainer.network, trainer.ema.network)
    )
    assert line["ema_lag"] == pytest.approx((averaged - raw).norm().item() / raw.norm().item(), rel=1e-4)
    assert line["ema_lag"] > 0


def test_the_longer_average_has_a_power_profile(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, {**ON, "optimizer.lr": 0.05})
    assert trainer.instruments is not None
    seen = []
    for _ in range(5):
        trainer.step()
        trainer.instruments.read()
        seen.append(trainer.network.inp.weight.detach().clone())
    exponent = power_exponent(LONGER) + 1
    shares = [((k + 1) / 5) ** exponent - (k / 5) ** exponent for k in range(5)]
    expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    torch.testing.assert_close(trainer.instruments.longer.network.inp.weight, expected)


# The time embedding --------------------------------------------------------------------------------------------------


def test_the_relative_derivative_of_known_functions() -> None:
    t = torch.tensor([0.1, 0.7, 1.5])
    waves = lambda t: torch.stack([torch.cos(40 * t), torch.sin(40 * t)], dim=1)  # noqa: E731
    torch.testing.assert_close(relative_derivative(waves, t), torch.full((3,), 40.0))
    powers = lambda t: 7 * t[:, None] ** 3  # noqa: E731
    torch.testing.assert_close(relative_derivative(powers, t), 3 / t)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_embedding_of_each_network(name: str) -> None:
    """Its derivative against differences in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(NETWORKS[name]).double()
    embed = embedding_of(network)
    assert embed is not None
    t, h = bin_centres().double(), 1e-5
    with torch.no_grad():
        slope = (embed(t + h) - embed(t - h)).norm(dim=1) / (2 * h) / embed(t).norm(dim=1)
        found = relative_derivative(embed, t)
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-6)
    assert found.min() > 0


def test_a_module_without_a_known_embedding() -> None:
    assert embedding_of(nn.Linear(2, 2)) is None


class Timed(nn.Module):
    """A network of the user's own: features of the time, a layer, added to the image; in full precision or not."""

    def __init__(self, embed: Callable[..., nn.Module] = PositionalEmbedding, *, careful: bool = False) -> None:
        super().__init__()
        self.features = embed(16)
        self.careful = careful
        self.layer = nn.Linear(16, 1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.careful:
            with full_precision(x):
                shift = self.layer(self.features(t))
        else:
            shift = self.layer(self.features(t))
        return self.conv(x) + shift[:, :, None, None].to(x.dtype)


X, T = torch.ones(2, 1, 8, 8), torch.tensor([0.3, 1.2])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_this_package_embed_the_time_in_full_precision(name: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[name])
    with torch.autocast("cpu", dtype):
        found = time_arithmetic(network, X, T, {})
    assert found is not None
    assert (found.half, found.dtype) == (0, "float32")
    assert found.operations >= 8


@pytest.mark.parametrize("embed", [PositionalEmbedding, FourierEmbedding])
def test_half_precision_is_seen(embed: type[nn.Module]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        careless, careful = (time_arithmetic(Timed(embed, careful=careful), X, T, {}) for careful in (False, True))
    assert careless is not None
    assert careful is not None
    assert (careless.dtype, careful.dtype) == ("bfloat16", "float32")
    assert 0 < careless.half < careless.operations  # the layer; the features are sines of float32
    assert careful.half == 0


def test_weights_and_times_in_half_precision_are_seen() -> None:
    found = time_arithmetic(Timed().bfloat16(), X.bfloat16(), T.bfloat16(), {})
    assert found is not None
    assert found.half == found.operations


def test_arithmetic_of_the_image_alone_does_not_count() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert time_arithmetic(lambda x, t: nn.functional.conv2d(x, torch.ones(1, 1, 3, 3)), X, T, {}) is None


def test_memory_written_in_place_is_followed() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        features = torch.zeros(2, 4, dtype=torch.bfloat16)
        features[:, 1] = t  # a move
        features.mul_(3)
        return x + features.sum()

    found = time_arithmetic(network, X, T, {})
    assert found is not None
    assert (found.operations, found.half) == (2, 2)


def test_instruments_tell_the_arithmetic_in_the_log(tmp_path: Path) -> None:
    _, line = one_step(tmp_path, {"loop.precision": "bf16"})
    assert line["time_dtype"] == "float32"
    assert line["time_half"] == 0
    assert line["time_operations"] > 8


def test_the_probe_needs_no_full_batch(teacher: Model, tmp_path: Path) -> None:
    _, line = one_step(tmp_path, {**SCD, "loop.batch_size": 3}, teacher)
    assert sum(value is not None for value in line["probe_error_by_time"]) == 3


def test_what_is_documented_is_what_is_logged(teacher: Model, tmp_path: Path) -> None:
    _, line = one_step(tmp_path, SCD, teacher)
    text = str(Instruments.read.__doc__)
    for name in line:
        stem = name.removesuffix("_by_time").split("/")[0]
        assert stem in text, name
