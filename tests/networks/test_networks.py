"""What every network promises, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.helpers import KINDS, SWITCHES, awake, draw, inputs, network
from trigflow.networks import MLP, NETWORKS, ConditioningConfig, MLPConfig, UNet, UNetConfig, build, name_of
from trigflow.networks.embeddings import Conditioning
from trigflow.networks.layers import AdaptiveNorm
from trigflow.runtime.errors import UserError

pytestmark = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def gradients(net: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the output."""
    net.zero_grad()
    (out * draw(11, *out.shape).to(out)).sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_gives_finite_output_and_gradients(kind: str, switch: str) -> None:
    net = awake(network(kind, **SWITCHES[switch]))
    x, _ = inputs(kind, 4)
    t = torch.tensor([1e-4, 0.5, 1.3, 1.5707])
    out = net(x, t)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    grads = gradients(net, out)
    assert grads.keys() == dict(net.named_parameters()).keys()
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("switch", SWITCHES)
def test_velocity_is_zero_before_training_and_can_be_trained(kind: str, switch: str) -> None:
    net = network(kind, **SWITCHES[switch])
    x, t = inputs(kind)
    out = net(x, t)
    assert torch.equal(out, torch.zeros_like(x))
    assert gradients(net, out)["out.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_make_a_difference(kind: str, switch: str) -> None:
    """Time moves the output, and another setting gives another network."""
    net = awake(network(kind, **SWITCHES[switch]))
    x, t = inputs(kind)
    assert (net(x, t) - net(x, t * 0.5)).abs().max() > 1e-4
    others = [awake(network(kind, **SWITCHES[name]))(x, t) for name in SWITCHES if name != switch]
    assert all((net(x, t) - other).abs().max() > 1e-4 for other in others)


def test_samples_do_not_see_each_other(kind: str) -> None:
    net = awake(network(kind, num_classes=3, **({"attention": (0, 1)} if kind == "unet" else {}))).eval()
    x, t = inputs(kind, 4)
    label = torch.tensor([0, 3, 1, 2])
    out = net(x, t, label=label)
    for i in range(4):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1], label=label[i : i + 1])[0], out[i], rtol=1e-4, atol=1e-5)
    other_x, other_t, other_label = x.flip(0) * 3, t.flip(0), label.flip(0)
    other_x[1], other_t[1], other_label[1] = x[1], t[1], label[1]
    torch.testing.assert_close(net(other_x, other_t, label=other_label)[1], out[1], rtol=1e-5, atol=1e-6)


def test_dropout_works_in_training_only(kind: str) -> None:
    net, without = awake(network(kind, dropout=0.4)), awake(network(kind))
    x, t = inputs(kind)
    net.eval()
    assert torch.equal(net(x, t), without.eval()(x, t))
    net.train()
    with seeded(0):
        first, second = net(x, t), net(x, t)
    with seeded(0):
        again = net(x, t)
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(without.train()(x, t), without.eval()(x, t))


# Labels and guidance -------------------------------------------------------------------------------------------------


def test_null_label_is_no_label(kind: str) -> None:
    net = awake(network(kind, num_classes=4))
    x, t = inputs(kind)
    assert net.null["label"].item() == 4
    assert torch.equal(net(x, t, label=torch.full((3,), 4)), net(x, t))
    assert torch.equal(net(x, t, label=torch.full((3,), 4)), net(x, t))


def test_every_label_matters(kind: str) -> None:
    net = awake(network(kind, num_classes=4))
    x, t = inputs(kind, 1)
    outs = [net(x, t, label=torch.tensor([k])) for k in range(5)]
    for i in range(5):
        for j in range(i):
            assert (outs[i] - outs[j]).abs().max() > 1e-4
    mixed = net(x.repeat(3, *[1] * (x.ndim - 1)), t.repeat(3), label=torch.tensor([2, 0, 4]))
    torch.testing.assert_close(mixed, torch.cat([outs[2], outs[0], outs[4]]), rtol=1e-4, atol=1e-5)


def test_guidance_starts_without_effect(kind: str) -> None:
    """A student that takes the scale begins as the teacher that does not, and learns to use it."""
    student, teacher = network(kind, num_classes=2, takes=("guidance",)), network(kind, num_classes=2)
    missing = teacher.load_state_dict(student.state_dict(), strict=False)
    assert set(missing.unexpected_keys) == {"conditioning.guidance.weight", "conditioning.guidance.bias"}
    with torch.no_grad():
        for net in (student, teacher):
            net.out.weight.fill_(0.1)
    x, t = inputs(kind)
    label = torch.tensor([0, 1, 2])
    for scale in (1.0, 2.0, 9.0):
        out = student(x, t, label=label, guidance=torch.full((3,), scale))
        assert torch.equal(out, teacher(x, t, label=label))
        assert out.abs().max() > 0.01
    scales = torch.tensor([1.0, 1.5, 2.0])
    assert gradients(student, student(x, t, label=label, guidance=scales))["conditioning.guidance.weight"].abs().max() > 0
    awake(student)
    assert (student(x, t, label=label, guidance=scales) - student(x, t, label=label, guidance=scales + 1)).abs().max() > 1e-4


def test_attributes_tell_what_a_network_takes(kind: str) -> None:
    plain, full = network(kind), network(kind, num_classes=7, takes=("guidance",))
    assert (plain.takes, plain.null) == (frozenset(), {})
    assert full.takes == {"label", "guidance"}
    assert {name: row.item() for name, row in full.null.items()} == {"label": 7}
    ended = network(kind, takes=("guidance", "end"))
    assert (ended.takes, ended.null) == ({"guidance", "end"}, {})


def test_missing_and_superfluous_conditions(kind: str) -> None:
    x, t = inputs(kind)
    label, scale = torch.tensor([0, 1, 0]), torch.ones(3)
    with pytest.raises(UserError, match=r"^label for a network that takes no conditions; expected .*; drop label$"):
        network(kind)(x, t, label=label)
    with pytest.raises(UserError, match=r"^guidance for a network that takes no conditions; expected .*; drop guidance$"):
        network(kind)(x, t, guidance=scale)
    with pytest.raises(UserError, match=r"^no guidance for a network that takes it; expected .*; pass guidance$"):
        network(kind, takes=("guidance",))(x, t)


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["double", "adagn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conditioning_and_modulation_stay_float32_under_autocast(kind: str, dtype: torch.dtype, norm: str) -> None:
    net = awake(network(kind, num_classes=2, takes=("guidance",), norm=norm))
    x, t = inputs(kind)
    told = {"label": torch.tensor([0, 1, 2]), "guidance": torch.tensor([1.0, 1.5, 2.0])}
    exact = net(x, t, **told)
    seen: dict[str, torch.dtype] = {}

    def watch(name: str) -> Any:
        return lambda module, given, out: seen.__setitem__(name, out.dtype)

    watched = [name for name, m in net.named_modules() if isinstance(m, Conditioning) or name.startswith("conditioning.")]
    watched += [f"{name}.affine" for name, m in net.named_modules() if isinstance(m, AdaptiveNorm)]
    for name in (*watched, "out"):
        net.get_submodule(name).register_forward_hook(watch(name))
    with torch.autocast("cpu", dtype):
        out = net(x, t, **told)
    assert len(watched) >= 8
    assert {seen[name] for name in watched} == {torch.float32}
    assert seen["out"] == dtype  # autocast was on everywhere else
    assert torch.isfinite(out).all()
    assert (out - exact).norm() < 0.05 * exact.norm()
    grads = gradients(net, out.float())
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert all(g.dtype == torch.float32 for g in grads.values())


def test_float64_all_the_way(kind: str) -> None:
    net = awake(network(kind)).double()
    x, t = inputs(kind, dtype=torch.float64)
    single = awake(network(kind))(x.float(), t.float())
    out = net(x, t)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), single, rtol=1e-3, atol=1e-4)


# Building ------------------------------------------------------------------------------------------------------------


def test_build_knows_every_configuration(kind: str) -> None:
    config_type, module_type = NETWORKS[kind]
    config = config_type(conditioning=ConditioningConfig(num_classes=3))
    assert name_of(config) == kind
    net = build(config)
    assert type(net) is module_type
    assert net.config == config
    assert net.null["label"].item() == 3


def test_build_hands_sigma_data_to_the_time_map(kind: str) -> None:
    """`log(sd tan t)`: the same noise level is another time for another sd."""
    small = UNetConfig(width=8, blocks=1, conditioning=ConditioningConfig(time_map="log"))
    config = MLPConfig(features=5, conditioning=ConditioningConfig(time_map="log")) if kind == "mlp" else small
    with seeded(0):
        one = awake(build(config, 0.5))
    with seeded(0):
        two = awake(build(config, 2.0))
    x = draw(3, 2, 5) if kind == "mlp" else draw(3, 2, 1, 4, 4)
    sigma = torch.tensor([0.1, 5.0])
    torch.testing.assert_close(one(x, torch.atan(sigma / 0.5)), two(x, torch.atan(sigma / 2.0)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one(x, sigma.atan()), two(x, sigma.atan()), atol=1e-3)


def test_weights_decide_everything(kind: str) -> None:
    """A state dict from one network makes another its equal, Fourier features included."""
    settings = SWITCHES["log, fourier 16, adagn"]
    one, two = awake(network(kind, seed=1, **settings), seed=5), network(kind, seed=2, **settings)
    x, t = inputs(kind)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x, t), two(x, t))


def test_unknown_configurations_are_refused(kind: str) -> None:
    class Other(MLPConfig if kind == "mlp" else UNetConfig):  # type: ignore[misc]
        pass

    with pytest.raises(UserError, match=r"no network for a Other; expected one of unet, mlp, .*; pass a network configuration"):
        build(Other())


def test_classes_are_what_the_names_say(kind: str) -> None:
    assert isinstance(network(kind), {"mlp": MLP, "unet": UNet}[kind])


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "group"},
        {"time_map": "Log"},
        {"time_embedding": "sinus"},
        {"num_classes": -1},
        {"takes": ("size",)},
        {"takes": ("end", "guidance")},
        {"dropout": 1.5},
        {"dropout": -0.1},
    ],
)
def test_impossible_settings_are_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(settings))}.*; expected .*; .+"):
        network(kind, **settings)
