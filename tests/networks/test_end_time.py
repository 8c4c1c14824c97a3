"""The input for the end of a jump, in every network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks.helpers import awake, draw
from trigflow import tangent
from trigflow.networks import (
    ConditioningConfig,
    DDPMPPConfig,
    DiTConfig,
    EDM2Config,
    MLPConfig,
    NetworkConfig,
    UNetConfig,
    build,
)
from trigflow.runtime.errors import UserError
from trigflow.training.setup import start_from


def config(kind: str, **conditioning: Any) -> NetworkConfig:
    given = ConditioningConfig(width=8, num_classes=3, **conditioning)
    return {
        "mlp": MLPConfig(5, 16, depth=1, conditioning=given),
        "unet": UNetConfig(2, 8, mult=(1, 2), blocks=1, conditioning=given),
        "dit": DiTConfig(channels=2, patch=2, width=16, depth=1, heads=2, conditioning=given),
        "edm2": EDM2Config(2, 8, 16, mult=(1, 2), blocks=1, attention=(), head_width=8, conditioning=given),
        "ddpmpp": DDPMPPConfig(2, 8, 8, mult=(1, 2), blocks=1, attention=(), conditioning=given),
    }[kind]  # type: ignore[return-value]


KINDS = ("mlp", "unet", "dit", "edm2", "ddpmpp")
LABEL = torch.tensor([0, 3, 1])
TIMES = torch.tensor([0.3, 0.9, 1.5])


def network(kind: str, seed: int = 0, **conditioning: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config(kind, **conditioning))


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, *((3, 5) if kind == "mlp" else (3, 2, 8, 8)), dtype=dtype), TIMES.to(dtype), LABEL


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_without_effect_in_a_student_of_any_teacher_and_can_be_learned(kind: str) -> None:
    teacher, student = awake(network(kind)), network(kind, seed=1, takes=("end",))
    start_from(student, teacher)
    x, t, label = inputs(kind)
    for end in (torch.zeros(3), 0.5 * t, t):
        assert torch.equal(student(x, t, label=label, end=end), teacher(x, t, label=label))
    out = student(x, t, label=label, end=torch.zeros(3))
    (out * draw(2, *out.shape)).sum().backward()
    grads = {name: p.grad.abs().max() for name, p in student.named_parameters() if "end_time" in name}
    assert max(grads.values()) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_parameters_of_its_name_and_no_others(kind: str) -> None:
    with_end, without = (network(kind, **given).state_dict() for given in ({"takes": ("end",)}, {}))
    added = set(with_end) - set(without)
    assert added
    assert all("end_time" in name for name in added)
    assert not any("end_time" in name for name in without)
    assert {name: value.shape for name, value in with_end.items() if name not in added} == {
        name: value.shape for name, value in without.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_of_a_jump_is_told_apart(kind: str) -> None:
    net, (x, t, label) = awake(network(kind, takes=("end",)), scale=0.3).eval(), inputs(kind)
    with torch.no_grad():
        outs = [net(x, t, label=label, end=share * t) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for i, a in enumerate(outs):
        assert all((a - b).abs().flatten(1).max(dim=1).values.min() > 1e-4 for b in outs[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_and_end_go_together(kind: str) -> None:
    net, (x, t, label) = awake(network(kind, takes=("guidance", "end"))), inputs(kind)
    assert net.takes == {"label", "guidance", "end"}
    with torch.no_grad():
        outs = [
            net(x, t, label=label, guidance=torch.full((3,), scale), end=torch.full((3,), end))
            for scale in (1.0, 2.0)
            for end in (0, 0.3)
        ]
    for i, a in enumerate(outs):
        assert all((a - b).abs().max() > 1e-4 for b in outs[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_the_tangent_passes_through_it(kind: str) -> None:
    """The time derivative at a fixed end, against that of autograd."""
    net, (x, t, label) = awake(network(kind, takes=("end",))).double(), inputs(kind, torch.float64)
    end, v = 0.4 * t, draw(3, *x.shape, dtype=torch.float64)

    def forward(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, label=label, end=end)

    out, derivative = tangent.jvp(forward, (x, t), (v, torch.ones_like(t)))
    with sdpa_kernel(SDPBackend.MATH):  # the one that autograd differentiates twice
        expected, reference = torch.autograd.functional.jvp(forward, (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(derivative, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_float32_under_autocast(kind: str) -> None:
    net, (x, t, label) = awake(network(kind, takes=("end",))), inputs(kind)
    seen: list[torch.dtype] = []
    for name, module in net.named_modules():
        if name.endswith("end_time"):
            module.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(net(x, t, label=label, end=t / 2)).all()
    assert seen == [torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_superfluous_ends(kind: str) -> None:
    x, t, label = inputs(kind)
    with pytest.raises(UserError, match=r"^no end for a network that takes it; expected .*; pass end$"):
        network(kind, takes=("end",))(x, t, label=label)
    with pytest.raises(UserError, match=r"^end for a network that takes label; expected .*; drop end$"):
        network(kind)(x, t, label=label, end=t)


def test_edm2_keeps_the_magnitude_of_its_embedding() -> None:
    net, (_, t, label) = network("edm2", takes=("end",)), inputs("edm2")
    plain = net.unet.embed(t, label=label, end=torch.zeros(3))
    with torch.no_grad():
        net.unet.emb_end_time_gain.fill_(1.0)
    told = net.unet.embed(t, label=label, end=torch.zeros(3))
    assert (plain - told).abs().max() > 1e-2
    sizes = [float(emb.detach().square().mean().sqrt()) for emb in (plain, told)]
    assert sizes == pytest.approx([1, 1], abs=0.35)
