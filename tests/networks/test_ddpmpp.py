"""The DDPM++ network: its published weights, an independent reading of its formulas, and the paper's changes to it."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks.helpers import awake, draw
from networks.test_tangent import check
from trigflow.networks import DDPMPP, ConditioningConfig, DDPMPPConfig, build, name_of
from trigflow.networks.ddpmpp import DDPMPPBlock
from trigflow.networks.layers import ConditioningLinear
from trigflow.runtime.errors import UserError
from trigflow.tangent import coverage, jvp
from trigflow.training.config import RunConfig, from_dict, to_dict
from trigflow.training.muon import hidden_matrices
from trigflow.training.setup import start_from

REFERENCE = Path(__file__).parents[1] / "fixtures"
NORMS = ("add", "adagn", "double")
PUBLISHED = DDPMPPConfig(norm="add", augment=9, conditioning=ConditioningConfig(width=128, time_map="log"))


def config(**settings: Any) -> DDPMPPConfig:
    """Two levels, 8 and 4 pixels; settings of the network and of its conditioning, mixed."""
    inner = {k: v for k, v in settings.items() if k in ConditioningConfig.__dataclass_fields__ and k != "width"}
    outer = {k: v for k, v in settings.items() if k not in inner}
    sizes = {"channels": 2, "resolution": 8, "width": 8, "mult": (1, 2), "blocks": 1, "attention": (4,)}
    return DDPMPPConfig(**{**sizes, "conditioning": ConditioningConfig(width=8, **inner), **outer})


def network(seed: int = 0, **settings: Any) -> DDPMPP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DDPMPP(config(**settings))


def inputs(dtype: torch.dtype = torch.float32, b: int = 3) -> tuple[Tensor, Tensor]:
    return draw(1, b, 2, 8, 8, dtype=dtype), torch.linspace(0.2, 1.5, b, dtype=dtype)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def on_meta(config: DDPMPPConfig) -> DDPMPP:
    with torch.device("meta"):
        return DDPMPP(config)


# The published network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoiser_of_the_published_code(dtype: torch.dtype) -> None:
    """`D(x; sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4)`, the network being given `t = atan(sigma / sd)`."""
    values = load_file(REFERENCE / "edm_ddpmpp_tiny.safetensors")
    settings = {"channels": 3, "resolution": 16, "width": 16, "mult": (1, 2), "blocks": 1, "attention": (8,)}
    conditioning = ConditioningConfig(width=16, time_map="log")
    net = DDPMPP(DDPMPPConfig(**settings, norm="add", augment=9, dropout=0.13, conditioning=conditioning)).eval()  # type: ignore[arg-type]
    net.load_state_dict({name[6:]: value for name, value in values.items() if name.startswith("state.")})
    x, sigma, sd = values["in.x"].to(dtype), values["in.sigma"].to(dtype)[:, None, None, None], 0.5
    scale = torch.rsqrt(sigma**2 + sd**2)
    with torch.no_grad():
        raw = net.to(dtype)(scale * x, torch.atan(sigma.flatten() / sd))
    denoised = (sd * scale) ** 2 * x + sigma * sd * scale * raw
    torch.testing.assert_close(denoised.float(), values["out.denoised"], rtol=1e-5, atol=1e-5)


def test_names_and_shapes_of_the_published_weights() -> None:
    expected = json.loads((REFERENCE / "edm_cifar10_ddpmpp_state_shapes.json").read_text())
    assert {name: list(value.shape) for name, value in on_meta(PUBLISHED).state_dict().items()} == expected


def test_parameters_of_the_published_network() -> None:
    assert count(on_meta(PUBLISHED)) == 55_733_891


def test_parameters_of_the_papers_form() -> None:
    """Scale and shift in place of one summand: as many outputs again in every block, and no augmentation label."""
    published, paper = on_meta(PUBLISHED), on_meta(DDPMPPConfig())
    outputs = [m.c_out for m in published.modules() if isinstance(m, DDPMPPBlock)]
    assert len(outputs) == 33
    assert count(paper) == count(published) + sum(outputs) * (512 + 1) - 9 * 128
    assert count(paper) == 60_066_563
    shapes = {name: value.shape for name, value in published.state_dict().items()}
    other = {name: value.shape for name, value in paper.state_dict().items()}
    assert {name.split(".")[-2] for name in shapes if shapes[name] != other.get(name)} == {"affine", "map_augment"}
    assert set(other) <= set(shapes)


# An independent reading of the formulas ----------------------------------------------------------------------------------


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """At most 32 groups of at least 4 channels, each of zero mean and unit variance."""
    groups = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    y = ((groups - mean) / torch.sqrt(variance + 1e-6)).reshape(x.shape)
    return y * weight[:, None, None] + bias[:, None, None]


def resample(x: Tensor, how: str) -> Tensor:
    """Mean over 2x2 cells, or every pixel becoming a 2x2 cell, as convolutions with the filter [1, 1]."""
    c = x.shape[1]
    kernel = torch.ones(c, 1, 2, 2, dtype=x.dtype)
    if how == "down":
        return F.conv2d(x, kernel / 4, stride=2, groups=c)
    return F.conv_transpose2d(x, kernel, stride=2, groups=c) if how == "up" else x


def attention(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One head; the channels of `qkv` are q_0, k_0, v_0, q_1, k_1, ..."""
    b, c, h, w = x.shape
    y = F.conv2d(group_norm(x, p["norm2.weight"], p["norm2.bias"]), p["qkv.weight"], p["qkv.bias"])
    q, k, v = (y[:, i::3].flatten(2) for i in range(3))
    weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(c)).softmax(dim=2)
    y = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, h, w)
    return (x + F.conv2d(y, p["proj.weight"], p["proj.bias"])) / math.sqrt(2)


def block(x: Tensor, emb: Tensor, p: dict[str, Tensor], norm: str, how: str) -> Tensor:
    h = resample(F.silu(group_norm(x, p["norm0.weight"], p["norm0.bias"])), how)
    h = F.conv2d(h, p["conv0.weight"], p["conv0.bias"], padding=1)
    a = (emb @ p["affine.weight"].T + p["affine.bias"])[:, :, None, None]
    if norm == "add":
        h = group_norm(h + a, p["norm1.weight"], p["norm1.bias"])
    else:
        scale, shift = a[:, : h.shape[1]], a[:, h.shape[1] :]
        if norm == "double":
            scale, shift = (s / torch.sqrt((s * s).mean(1, keepdim=True) + 1e-4) for s in (scale, shift))
        else:
            scale = 1 + scale
        h = group_norm(h, p["norm1.weight"], p["norm1.bias"]) * scale + shift
    h = F.conv2d(F.silu(h), p["conv1.weight"], p["conv1.bias"], padding=1)
    x = resample(x, how)
    if "skip.weight" in p:
        x = F.conv2d(x, p["skip.weight"], p["skip.bias"])
    x = (x + h) / math.sqrt(2)
    return attention(x, p) if "qkv.weight" in p else x


def reference(net: DDPMPP, x: Tensor, t: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
    """Two levels of 8 and 4 pixels with one block each, written out."""
    state = {name.removeprefix("model."): value for name, value in net.state_dict().items()}

    def parts(name: str) -> dict[str, Tensor]:
        return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(name + ".")}

    def run(x: Tensor, name: str, how: str = "") -> Tensor:
        return block(x, emb, parts(name), net.config.norm, how)

    n = net.config.conditioning.width // 2
    noise = t if net.config.conditioning.time_map == "identity" else torch.log(0.5 * torch.tan(t)) / 4
    angle = noise[:, None] * torch.tensor([10_000 ** (-i / (n - 1)) for i in range(n)], dtype=torch.float32).to(t)
    emb = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    classes = net.config.conditioning.num_classes
    if classes:
        one_hot = torch.zeros(len(t), classes, dtype=t.dtype)
        for i, k in enumerate([] if label is None else label.tolist()):
            if k < classes:
                one_hot[i, k] = math.sqrt(classes)
        emb = emb + one_hot @ state["map_label.weight"].T + state["map_label.bias"]
    if augment is not None:
        emb = emb + augment @ state["map_augment.weight"].T
    for name in ("map_layer0", "map_layer1"):
        emb = F.silu(emb @ state[f"{name}.weight"].T + state[f"{name}.bias"])

    h0 = F.conv2d(x, state["enc.8x8_conv.weight"], state["enc.8x8_conv.bias"], padding=1)
    h1 = run(h0, "enc.8x8_block0")
    h2 = run(h1, "enc.4x4_down", "down")
    h3 = run(h2, "enc.4x4_block0")
    h = run(run(h3, "dec.4x4_in0"), "dec.4x4_in1")
    h = run(torch.cat([h, h3], dim=1), "dec.4x4_block0")
    h = run(torch.cat([h, h2], dim=1), "dec.4x4_block1")
    h = run(h, "dec.8x8_up", "up")
    h = run(torch.cat([h, h1], dim=1), "dec.8x8_block0")
    h = run(torch.cat([h, h0], dim=1), "dec.8x8_block1")
    h = F.silu(group_norm(h, state["dec.8x8_aux_norm.weight"], state["dec.8x8_aux_norm.bias"]))
    return F.conv2d(h, state["dec.8x8_aux_conv.weight"], state["dec.8x8_aux_conv.bias"], padding=1)


@pytest.mark.parametrize("time_map", ["identity", "log"])
@pytest.mark.parametrize("norm", NORMS)
def test_formulas(norm: str, time_map: str) -> None:
    net = awake(network(norm=norm, time_map=time_map, num_classes=3, augment=4)).double()
    assert isinstance(net, DDPMPP)
    x, t = inputs(torch.float64)
    label, augment = torch.tensor([1, 3, 0]), draw(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            net(x, t, label=label, augment=augment), reference(net, x, t, label, augment), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(net(x, t), reference(net, x, t, None, None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", [(), (4,), (8,), (8, 4), (16,)])
def test_attention_sits_where_published(attention: tuple[int, ...]) -> None:
    """In every encoder block and the last decoder block of a resolution; always in the first block of the middle."""
    net = network(blocks=2, attention=attention)
    found = {name for name, m in net.named_modules() if isinstance(m, DDPMPPBlock) and m.attention}
    expected = {"model.dec.4x4_in0"}
    for side in {4, 8} & set(attention):
        expected |= {f"model.enc.{side}x{side}_block{k}" for k in (0, 1)} | {f"model.dec.{side}x{side}_block2"}
    assert found == expected


# What it takes -----------------------------------------------------------------------------------------------------------


def test_no_label_is_the_null_label() -> None:
    net = awake(network(num_classes=4))
    x, t = inputs()
    assert net.null["label"].item() == 4
    assert torch.equal(net(x, t, label=torch.full((3,), 4)), net(x, t))
    outs = [net(x[:1], t[:1], label=torch.tensor([k])) for k in range(5)]
    assert all((outs[i] - outs[j]).abs().max() > 1e-4 for i in range(5) for j in range(i))


def test_no_augmentation_is_zeros() -> None:
    net = awake(network(augment=5))
    x, t = inputs()
    assert torch.equal(net(x, t, augment=torch.zeros(3, 5)), net(x, t))
    assert (net(x, t, augment=torch.ones(3, 5)) - net(x, t)).abs().max() > 1e-3


def test_guidance_starts_without_effect() -> None:
    """A student that takes the scale starts as its teacher, whatever the scale, and learns to use it."""
    teacher, student = awake(network(num_classes=2)), network(seed=1, num_classes=2, takes=("guidance",))
    start_from(student, teacher)
    x, t = inputs()
    label, scale = torch.tensor([0, 2, 1]), torch.tensor([1.0, 1.5, 9.0])
    assert torch.equal(student(x, t, label=label, guidance=scale), teacher(x, t, label=label))
    student(x, t, label=label, guidance=scale).square().sum().backward()
    assert student.guidance is not None
    assert student.guidance.weight.grad is not None
    assert student.guidance.weight.grad.abs().max() > 1e-4
    awake(student)
    assert (student(x, t, label=label, guidance=scale) - student(x, t, label=label, guidance=scale + 1)).abs().max() > 1e-4
    assert (student.takes, teacher.takes) == ({"label", "guidance"}, {"label"})


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 6), (16, 16)])
def test_other_sizes(size: tuple[int, int]) -> None:
    net = awake(network(mult=(1, 2, 1))).double()
    x = draw(3, 2, 2, *size, dtype=torch.float64).requires_grad_()
    out = net(x, torch.tensor([0.4, 1.2], dtype=torch.float64))
    assert out.shape == x.shape
    (slope,) = torch.autograd.grad((out * draw(4, *out.shape, dtype=torch.float64)).sum(), x)
    assert torch.all(slope != 0)


@pytest.mark.parametrize("norm", NORMS)
def test_velocity_is_zero_before_training_and_can_be_trained(norm: str) -> None:
    net = network(norm=norm, num_classes=2)
    x, t = inputs()
    out = net(x, t)
    assert torch.equal(out, torch.zeros_like(x))
    (out - x).square().sum().backward()
    assert net.model.dec["8x8_aux_conv"].weight.grad.abs().max() > 1e-3  # type: ignore[union-attr, operator]
    awake(net)
    net.zero_grad()
    (net(x, t, label=torch.tensor([0, 1, 2])) - x).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


# Tangents ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_map", ["identity", "log"])
@pytest.mark.parametrize("norm", NORMS)
def test_tangent(norm: str, time_map: str) -> None:
    net = awake(network(norm=norm, time_map=time_map)).double()
    check(net, *inputs(torch.float64))


def test_tangent_with_labels_guidance_and_dropout() -> None:
    net = awake(network(num_classes=3, takes=("guidance",), dropout=0.2, attention=(8, 4))).double().train()
    scales = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64)
    check(net, *inputs(torch.float64), label=torch.tensor([0, 3, 1]), guidance=scales)
    check(net, *inputs(torch.float64), guidance=scales)


def test_tangent_of_odd_sizes() -> None:
    net = awake(network(mult=(1, 2, 1))).double()
    check(net, draw(5, 2, 2, 7, 5, dtype=torch.float64), torch.tensor([0.4, 1.3], dtype=torch.float64))


def test_tangent_in_float32() -> None:
    net = awake(network(num_classes=3, takes=("guidance",)))
    x, t = inputs()
    conditions = {"label": torch.tensor([0, 3, 1]), "guidance": torch.tensor([1.0, 1.4, 2.0])}
    directions = draw(6, *x.shape), draw(7, *t.shape)
    copy = deepcopy(net)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(lambda x, t: copy(x, t, **conditions), (x, t), directions)
    _, tangent = jvp(lambda x, t: net(x, t, **conditions), (x, t), directions)
    assert (tangent - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("norm", NORMS)
def test_no_part_needs_the_slow_path(norm: str) -> None:
    net = awake(network(norm=norm, time_map="log", dropout=0.1, num_classes=2, takes=("guidance",))).train()
    conditions = {"label": torch.tensor([0, 1, 2]), "guidance": torch.ones(3)}
    report = coverage(lambda x, t: net(x, t, **conditions), *inputs())
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)


# Precision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_embedding_and_modulation_stay_float32_under_autocast(norm: str) -> None:
    net = awake(network(norm=norm, num_classes=2, takes=("guidance",), augment=3))
    x, t = inputs()
    told = {"label": torch.tensor([0, 1, 2]), "guidance": torch.tensor([1.0, 1.5, 2.0]), "augment": torch.ones(3, 3)}
    exact = net(x, t, **told)
    seen: dict[str, torch.dtype] = {}

    def watch(name: str) -> Any:
        return lambda module, given, out: seen.__setitem__(name, out.dtype)

    watched = [name for name, m in net.named_modules() if isinstance(m, ConditioningLinear)]
    for name in (*watched, "model.map_noise", "model.dec.8x8_aux_conv"):
        net.get_submodule(name).register_forward_hook(watch(name))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, **told)
    assert len(watched) == 5 + 10
    assert {seen[name] for name in (*watched, "model.map_noise")} == {torch.float32}
    assert seen["model.dec.8x8_aux_conv"] == torch.bfloat16  # autocast was on everywhere else
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_attention_runs_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = F.scaled_dot_product_attention, []

    def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend([q.dtype, k.dtype, v.dtype])
        return plain(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    with torch.autocast("cpu", torch.bfloat16):
        network()(*inputs())
    assert seen == [torch.float32] * 3 * 3


def test_autocast_tangent_is_finite_and_near() -> None:
    net = awake(network())
    x, t = inputs()
    directions = (draw(8, *x.shape), draw(9, *t.shape))
    _, exact = jvp(net, (x, t), directions)
    with torch.autocast("cpu", torch.bfloat16):
        _, tangent = jvp(net, (x, t), directions)
    assert (tangent.float() - exact).norm() < 0.05 * exact.norm()


def test_modulation_is_bounded() -> None:
    """Double normalization: scale and shift have a root mean square of one over channels, however large the embedding."""
    layer = network().model.enc["8x8_block0"]
    assert isinstance(layer, DDPMPPBlock)
    h, affine = draw(10, 2, 8, 4, 4), draw(11, 2, 16)
    with torch.no_grad():
        y = layer.modulate(h, 10 * affine)
        torch.testing.assert_close(layer.modulate(h, 1e4 * affine), y, rtol=1e-4, atol=1e-4)
        scale = layer.modulate(h, torch.cat([affine[:, :8], torch.zeros(2, 8)], dim=1)) / layer.norm1(h)
    torch.testing.assert_close(scale.square().mean(dim=1), torch.ones(2, 4, 4), rtol=1e-3, atol=1e-3)


def test_float64_all_the_way() -> None:
    net, double = awake(network(num_classes=2)), awake(network(num_classes=2)).double()
    x, t = inputs()
    out = double(x.double(), t.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), net(x, t), rtol=1e-3, atol=1e-4)


# Building ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [DDPMPPConfig(), PUBLISHED, config(num_classes=3, takes=("guidance",))])
def test_configuration_goes_through_json(chosen: DDPMPPConfig) -> None:
    raw = json.loads(json.dumps(to_dict(RunConfig(network=chosen))))
    assert from_dict(raw).network == chosen
    assert name_of(chosen) == "ddpmpp"
    with torch.device("meta"):
        net = build(chosen)
    assert type(net) is DDPMPP
    assert net.config == chosen


def test_build_hands_sigma_data_to_the_time_map() -> None:
    """`log(sd tan t)`: the same noise level is another time for another sd."""
    chosen = config(time_map="log")
    nets = [build(chosen, 0.5), build(chosen, 2.0)]
    nets[1].load_state_dict(awake(nets[0]).state_dict())
    x, sigma = draw(12, 2, 2, 8, 8), torch.tensor([0.1, 5.0])
    one, two = nets[0](x, torch.atan(sigma / 0.5)), nets[1](x, torch.atan(sigma / 2.0))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_fourier_features_are_saved() -> None:
    one, two = awake(network(time_embedding="fourier")), network(seed=3, time_embedding="fourier")
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(*inputs()), two(*inputs()))


def test_muon_leaves_the_conditioning_path_to_adam() -> None:
    net = network(width=16, num_classes=10, takes=("guidance",))
    left = {id(m.weight) for m in net.modules() if isinstance(m, ConditioningLinear)}
    found = {id(p) for p in hidden_matrices(net)}
    assert id(net.model.dec["4x4_in0"].conv0.weight) in found  # type: ignore[union-attr]
    assert not left & found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mult": ()}, r"mult is \(\); expected one number >= 1 for each level; correct"),
        ({"mult": (1, 0)}, r"mult is \(1, 0\); expected"),
        ({"blocks": 0}, "blocks is 0; expected at least 1; correct"),
        ({"width": 0}, "width is 0; expected at least 1; correct"),
        ({"channels": 0}, "channels is 0; expected at least 1; correct"),
        ({"resolution": 1}, "resolution is 1; expected at least 2, to be halved 1 times; correct"),
        ({"norm": "group"}, "norm is 'group'; expected add, adagn or double; correct"),
        ({"augment": -1}, "augment is -1; expected 0 or more; correct"),
        ({"dropout": 1.0}, r"dropout is 1.0; expected a number in \[0, 1\); correct"),
        ({"time_map": "Log"}, "time_map is 'Log'; expected identity or log; correct"),
        ({"num_classes": -1}, "num_classes is -1; expected 0 or more; correct"),
        ({"conditioning": ConditioningConfig(width=2)}, "conditioning.width is 2; expected an even number >= 4; correct"),
        ({"conditioning": ConditioningConfig(width=5)}, "conditioning.width is 5; expected an even number >= 2; correct"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        network(**settings)
    assert "\n" not in str(caught.value)


def test_impossible_inputs_are_refused() -> None:
    net, full = network(), network(num_classes=2, takes=("guidance",), augment=3)
    x, t = inputs()
    for shape in ((3, 3, 8, 8), (3, 2, 8), (2, 8, 8)):
        with pytest.raises(UserError, match=r"^images of shape \(.*\); expected \(b, 2, h, w\); use images with 2 chan"):
            net(torch.zeros(shape), t)
    with pytest.raises(UserError, match=r"^label for a network that takes no conditions; expected .*; drop label$"):
        net(x, t, label=torch.tensor([0, 1, 0]))
    with pytest.raises(UserError, match=r"^guidance for a network that takes no conditions; expected .*; drop guidance$"):
        net(x, t, guidance=torch.ones(3))
    with pytest.raises(UserError, match=r"^no guidance for a network that takes it; expected .*; pass guidance$"):
        full(x, t)
    with pytest.raises(UserError, match=r"^augmentation labels of shape \(3, 4\); expected \(3, 3\); drop them or set "):
        full(x, t, guidance=torch.ones(3), augment=torch.ones(3, 4))
