"""EDM2 in both forms: against its formula and published values, what it promises, and training in bfloat16."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks.helpers import draw
from trigflow.networks import EDM2, ConditioningConfig, EDM2Config, build
from trigflow.networks.edm2 import SIZES, EDM2Block, edm2_config
from trigflow.networks.magnitude import MPConv
from trigflow.objectives import AdaptiveWeight, Loss, diffusion_loss, flow_map_loss, objective_of
from trigflow.process import Proposal, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers.guidance import network_velocity
from trigflow.tangent import coverage, jvp

FIXTURES = Path(__file__).parents[1] / "fixtures"

FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper with shift": {"shift": True},
    "published": {"modulation": "gain", "time_map": "log", "time_embedding": "fourier", "fourier_scale": 1.0},
}


def network(seed: int = 0, *, gains: float = 0.5, **settings: Any) -> EDM2:
    """A small EDM2 for 16x16 images of 3 channels; settings of the network and of its conditioning, mixed.

    All gains (output, modulation, guidance), zero at first, are set to `gains`.
    """
    inner = {k: v for k, v in settings.items() if k in ConditioningConfig.__dataclass_fields__ and k != "width"}
    outer = {k: v for k, v in settings.items() if k in EDM2Config.__dataclass_fields__}
    assert len(inner) + len(outer) == len(settings), settings
    sizes = {"channels": 3, "resolution": 16, "width": 8, "mult": (1, 2), "blocks": 1, "attention": (8,), "head_width": 8}
    conditioning = ConditioningConfig(width=16, **{"num_classes": 3, **inner})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = EDM2(EDM2Config(**{**sizes, "conditioning": conditioning, **outer}))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 0:
                p.fill_(gains)
    return net


def inputs(b: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """`(x, t, label)`, the null label among them."""
    return draw(1, b, 3, 16, 16, dtype=dtype), torch.linspace(0.05, 1.54, b, dtype=dtype), torch.arange(b) % 4


# The published network -----------------------------------------------------------------------------------------------


def denoise(net: EDM2, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """EDM's `D(x; sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4)`."""
    sd = net.sigma_data
    raw = net(x / (sigma**2 + sd**2).sqrt()[:, None, None, None], torch.atan(sigma / sd), label=label)
    sigma = sigma[:, None, None, None]
    return sd**2 / (sigma**2 + sd**2) * x + sigma * sd / (sigma**2 + sd**2).sqrt() * raw


def test_published_values() -> None:
    """A small network with NVIDIA's names: D(x; sigma) with and without class, and the log variance."""
    with safe_open(FIXTURES / "edm2_tiny.safetensors", "pt") as file:
        given = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    conditioning = ConditioningConfig(
        "log", "fourier", fourier_scale=1.0, width=given["model_channels"], num_classes=given["label_dim"]
    )
    config = EDM2Config(
        channels=given["img_channels"],
        resolution=given["img_resolution"],
        width=given["model_channels"],
        mult=tuple(given["channel_mult"]),
        blocks=given["num_blocks"],
        attention=tuple(given["attn_resolutions"]),
        head_width=given["channels_per_head"],
        log_variance_width=given["logvar_channels"],
        modulation="gain",
        conditioning=conditioning,
    )
    net = EDM2(config, given["sigma_data"]).eval()
    net.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("state.")})
    x, sigma, label = tensors["in.x"], tensors["in.sigma"], tensors["in.class_labels"].argmax(1)
    with torch.no_grad():
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(denoise(net, x, sigma, label), tensors["out.denoised"], **close)
        torch.testing.assert_close(denoise(net, x, sigma, None), tensors["out.denoised_unconditional"], **close)
        t = torch.atan(sigma / net.sigma_data)
        torch.testing.assert_close(net.log_variance(t), tensors["out.logvar"].flatten(), **close)


def test_published_names_and_shapes() -> None:
    expected = json.loads((FIXTURES / "edm2_img64-s_state_shapes.json").read_text())
    with torch.device("meta"):
        net = EDM2(edm2_config("img64-s", "published"))
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == expected


PUBLISHED = {
    "img64-s": 280_209_381,
    "img512-s": 280_212_837,
    "img512-m": 497_807_781,
    "img512-l": 777_498_085,
    "img512-xl": 1_119_283_749,
    "img512-xxl": 1_523_164_773,
}
PAPER = {"s": 280.2, "m": 497.8, "l": 777.6, "xl": 1119.4, "xxl": 1523.4}
"""Millions of parameters in the sCM paper's table of ImageNet 512."""


def count(config: EDM2Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in EDM2(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    assert count(edm2_config(name, "published")) == PUBLISHED[name]


@pytest.mark.parametrize("size", PAPER)
def test_paper_parameter_counts(size: str) -> None:
    """As published, within the 0.02% by which the paper's table differs from the published counts; no room for a shift."""
    config = edm2_config(f"img512-{size}")
    assert count(config) == PUBLISHED[f"img512-{size}"]
    assert count(config) / 1e6 == pytest.approx(PAPER[size], rel=2e-4)
    assert count(dataclasses.replace(config, shift=True)) / 1e6 > 1.04 * PAPER[size]


def test_forms_of_the_configuration() -> None:
    paper, published = edm2_config("img64-m"), edm2_config("img64-m", "published")
    assert (paper.channels, paper.width, paper.modulation, paper.shift) == (3, 256, "double", False)
    assert (paper.conditioning.time_map, paper.conditioning.time_embedding) == ("identity", "positional")
    assert published.modulation == "gain"
    assert (published.conditioning.time_map, published.conditioning.time_embedding) == ("log", "fourier")
    assert edm2_config("img512-xxl").channels == 4
    assert edm2_config("img512-xxl").width == SIZES["xxl"] == 448


@pytest.mark.parametrize("name", ["img64", "img64-xxxl", "img256-s", "s"])
def test_unknown_sizes_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"unknown EDM2 network '{name}'; expected img64 or img512, .*; correct the name"):
        edm2_config(name)
    with pytest.raises(UserError, match="form is 'edm'; expected published or paper; "):
        edm2_config("img64-s", "edm")  # type: ignore[arg-type]


# The formula ---------------------------------------------------------------------------------------------------------


def unit(x: Tensor, dim: int = 1) -> Tensor:
    return x / (x.square().mean(dim, keepdim=True).sqrt() + 1e-4)


def apply(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The convolution or linear layer of this name, as a product with unfolded patches."""
    w = weights[f"{name}.weight"]
    kernel, w = w.shape[-1] if w.ndim == 4 else None, unit(w.flatten(1)) / math.sqrt(w[0].numel())
    if kernel is None:
        return x @ w.T
    return (w @ F.unfold(x, kernel, padding=kernel // 2)).reshape(len(x), -1, *x.shape[2:])


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x)) / 0.596


def mix(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def attend(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Cosine attention, one head and one query at a time; a head's queries, keys and values are neighbours."""
    b, c, h, w = x.shape
    q, k, v = unit(apply(weights, f"{name}.attn_qkv", x).reshape(b, heads, c // heads, 3, h * w), 2).unbind(3)
    out = torch.zeros_like(q)
    for query in range(h * w):
        scores = (q[..., query : query + 1] * k).sum(2, keepdim=True) / math.sqrt(c // heads)
        out[..., query] = (torch.softmax(scores, dim=-1) * v).sum(-1)
    return apply(weights, f"{name}.attn_proj", out.reshape(b, c, h, w))


def reference(net: EDM2, x: Tensor, t: Tensor, label: Tensor, guidance: Tensor | None = None) -> Tensor:
    """The whole network, from its weights by name."""
    config, conditioning = net.config, net.config.conditioning
    weights = {name.removeprefix("unet."): value.detach() for name, value in net.state_dict().items()}

    def positional(value: Tensor, period: float) -> Tensor:
        half = conditioning.width // 2
        frequencies = torch.tensor([period ** (-i / half) for i in range(half)]).to(value)  # float32, as in the network
        angle = value[:, None] * frequencies
        return math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], 1)

    if conditioning.time_embedding == "fourier":
        c_noise = torch.log(0.5 * torch.tan(t)) / 4 if conditioning.time_map == "log" else t
        features = math.sqrt(2) * torch.cos(c_noise[:, None] * weights["emb_fourier.freqs"] + weights["emb_fourier.phases"])
    else:
        features = positional(t, 10_000.0)
    emb = apply(weights, "emb_noise", features)
    one_hot = torch.tensor([[float(k == i) for k in range(3)] for i in label.tolist()], dtype=x.dtype)
    emb = mix(emb, apply(weights, "emb_label", one_hot * math.sqrt(3)), 0.5)
    if guidance is not None:
        gain = weights["emb_guidance_gain"]
        emb = (emb + gain * apply(weights, "emb_guidance", positional(guidance - 1, 100.0))) / (1 + gain**2).sqrt()
    emb = silu(emb)

    def block(name: str, x: Tensor, side: str, heads: int) -> Tensor:
        if side == "enc":
            x = unit(apply(weights, f"{name}.conv_skip", x) if f"{name}.conv_skip.weight" in weights else x)
        y = apply(weights, f"{name}.conv_res0", silu(x))
        s = apply(weights, f"{name}.emb_linear", emb)[:, :, None, None]
        c = y.shape[1]
        scale = 1 + weights[f"{name}.emb_gain"] * s[:, :c]
        if config.modulation == "gain":
            y = y * scale
        elif config.shift:
            y = mix(unit(y) * unit(scale), unit(s[:, c:]), 0.5)
        else:
            y = unit(y) * unit(scale)
        y = apply(weights, f"{name}.conv_res1", silu(y))
        if side == "dec" and f"{name}.conv_skip.weight" in weights:
            x = apply(weights, f"{name}.conv_skip", x)
        x = mix(x, y, 0.3)
        if f"{name}.attn_qkv.weight" in weights:
            x = mix(x, attend(weights, name, x, heads), 0.3)
        return x.clamp(-config.clip, config.clip)

    def join(a: Tensor, b: Tensor) -> Tensor:
        n, m = a.shape[1], b.shape[1]
        root = math.sqrt(n + m) / math.sqrt(2)
        return torch.cat([a * root / math.sqrt(n), b * root / math.sqrt(m)], 1)

    first = apply(weights, "enc.16x16_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1))
    fine = block("enc.16x16_block0", first, "enc", 1)
    half = (fine[..., ::2, ::2] + fine[..., 1::2, ::2] + fine[..., ::2, 1::2] + fine[..., 1::2, 1::2]) / 4
    down = block("enc.8x8_down", half, "enc", 1)
    coarse = block("enc.8x8_block0", down, "enc", 2)
    y = block("dec.8x8_in1", block("dec.8x8_in0", coarse, "dec", 2), "dec", 2)
    y = block("dec.8x8_block0", join(y, coarse), "dec", 2)
    y = block("dec.8x8_block1", join(y, down), "dec", 2)
    y = block("dec.16x16_up", y.repeat_interleave(2, 2).repeat_interleave(2, 3), "dec", 1)
    y = block("dec.16x16_block0", join(y, fine), "dec", 1)
    y = block("dec.16x16_block1", join(y, first), "dec", 1)
    return weights["out_gain"] * apply(weights, "out_conv", y)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_formula(form: str, guided: bool) -> None:
    net = network(takes=("guidance",) if guided else (), clip=1.5, **FORMS[form]).double()
    x, t, label = inputs(dtype=torch.float64)
    scale = torch.tensor([1.0, 1.3, 2.0, 5.0], dtype=torch.float64) if guided else None
    out = net(x, t, label=label, **({} if scale is None else {"guidance": scale}))
    assert out.std() > 0.1
    torch.testing.assert_close(out, reference(net, x, t, label, scale), rtol=1e-6, atol=1e-7)


def test_log_variance_formula() -> None:
    net = network().double()
    t, w = torch.tensor([0.01, 0.7, 1.56], dtype=torch.float64), net.state_dict()
    c_noise = torch.log(0.5 * torch.tan(t)) / 4
    features = math.sqrt(2) * torch.cos(c_noise[:, None] * w["logvar_fourier.freqs"] + w["logvar_fourier.phases"])
    expected = features @ unit(w["logvar_linear.weight"])[0] / math.sqrt(128)
    torch.testing.assert_close(net.log_variance(t), expected)


# Magnitudes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_magnitudes_are_preserved_before_training(form: str) -> None:
    """Whatever the length of the weights: the embedding, every block and what reaches the output layer are near 1."""
    net = network(width=32, blocks=2, head_width=32, gains=0.0, **FORMS[form])
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(7)
    seen: dict[str, float] = {}
    for name, module in net.named_modules():
        if isinstance(module, EDM2Block):
            module.register_forward_hook(
                lambda _, given, out, name=name: seen.__setitem__(name, float(out.detach().square().mean().sqrt()))
            )
    x, t, _ = inputs(3)
    label = torch.arange(3)  # the null label would leave half of the embedding out
    net(x, t, label=label)
    assert len(seen) == 14
    assert float(net.unet.embed(t, label=label).detach().square().mean().sqrt()) == pytest.approx(1, abs=0.15)
    assert all(0.7 < value < 1.3 for value in seen.values()), seen


def test_velocity_is_zero_before_training_and_can_be_trained() -> None:
    net = network(gains=0.0)
    x, t, label = inputs()
    out = net(x, t, label=label)
    assert torch.equal(out, torch.zeros_like(out))
    (out * draw(2, *out.shape)).sum().backward()
    assert net.unet.out_gain.grad.abs() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_normalizing_weights_leaves_the_function(form: str) -> None:
    net = network(takes=("guidance",), **FORMS[form])
    x, t, label = inputs()
    told = {"label": label, "guidance": torch.tensor([1.0, 1.2, 1.5, 2.0])}
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 0:
                p.mul_(2.5)
        before, variance = net(x, t, **told), net.log_variance(t)
        net.normalize_weights()
        for module in net.modules():
            if isinstance(module, MPConv):
                magnitude = module.weight.flatten(1).square().mean(1).sqrt()
                torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=1e-3, atol=0)
        torch.testing.assert_close(net(x, t, **told), before, rtol=0, atol=2e-3 * float(before.abs().max()))
        torch.testing.assert_close(net.log_variance(t), variance, rtol=0, atol=1e-3)


def test_gradients_are_orthogonal_to_the_weights() -> None:
    net = network(takes=("guidance",))
    x, t, label = inputs()
    out = net(x, t, label=label, guidance=torch.tensor([1.0, 1.2, 1.5, 2.0]))
    (out * draw(3, *out.shape)).sum().backward()
    layers = {name: m for name, m in net.unet.named_modules() if isinstance(m, MPConv)}
    assert len(layers) > 30
    for name, layer in layers.items():
        w, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
        assert float((w * g).sum(1).abs().max()) < 1e-3 * float((w.norm(dim=1) * g.norm(dim=1)).max()), name


def test_only_normalize_weights_writes_weights() -> None:
    """Neither a forward in training mode nor the tangent pass does."""
    net = network(dropout=0.1).train()
    x, t, label = inputs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    versions = [p._version for p in net.parameters()]
    net(x, t, label=label)
    jvp(lambda x, t: net(x, t, label=label), (x, t), (torch.ones_like(x), torch.ones_like(t)))
    assert [p._version for p in net.parameters()] == versions
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.normalize_weights()
    assert not torch.equal(net.unet.out_conv.weight, before["unet.out_conv.weight"])


def test_activations_are_clipped() -> None:
    net = network(clip=0.25)
    tops: list[float] = []
    for module in net.modules():
        if isinstance(module, EDM2Block):
            module.register_forward_hook(lambda _, given, out: tops.append(float(out.detach().abs().max())))
    x, t, label = inputs()
    net(x, t, label=label)
    assert len(tops) == 10
    assert max(tops) == 0.25


# Tangents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_tangent(form: str, dtype: torch.dtype) -> None:
    """The engine's tangent is that of torch.func.jvp, and its output that of a plain run, bit for bit."""
    net = network(mult=(1, 2, 2), attention=(8, 4), takes=("guidance",), **FORMS[form]).to(dtype)
    x, t, label = inputs(dtype=dtype)
    scale = torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=dtype)
    directions = (draw(4, *x.shape, dtype=dtype), draw(5, *t.shape, dtype=dtype))

    def forward(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, label=label, guidance=scale)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(forward, (x, t), directions)
    out, tangent = jvp(forward, (x, t), directions)
    assert torch.equal(out, forward(x, t))
    assert expected.norm() > 1
    assert (tangent - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_no_part_needs_the_slow_path(form: str) -> None:
    net = network(takes=("guidance",), dropout=0.1, **FORMS[form]).train()
    x, t, label = inputs()
    report = coverage(lambda x, t: net(x, t, label=label, guidance=torch.ones(4)), x, t)
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)


# Conditions ----------------------------------------------------------------------------------------------------------


def test_null_label_is_no_label() -> None:
    net = network()
    x, t, _ = inputs()
    assert (net.null["label"].item(), net.takes) == (3, {"label"})
    null = net(x, t, label=torch.full((4,), 3))
    assert torch.equal(net(x, t), null)
    for k in range(3):
        assert (net(x, t, label=torch.full((4,), k)) - null).abs().max() > 1e-3


def test_a_network_without_classes() -> None:
    net = network(num_classes=0)
    x, t, label = inputs()
    assert (net.takes, net.null) == (frozenset(), {})
    assert torch.isfinite(net(x, t)).all()
    with pytest.raises(UserError, match=r"^label for a network that takes no conditions; expected .*; drop label$"):
        net(x, t, label=label)


def test_guidance_starts_without_effect_and_keeps_the_magnitude() -> None:
    from trigflow.training.setup import start_from

    student, teacher = network(1, gains=0.0, takes=("guidance",)), network()
    start_from(student, teacher)
    x, t, label = inputs()
    for scale in (1.0, 1.7, 9.0):
        assert torch.equal(student(x, t, label=label, guidance=torch.full((4,), scale)), teacher(x, t, label=label))
    out = student(x, t, label=label, guidance=torch.tensor([1.0, 1.2, 1.5, 2.0]))
    (out * draw(6, *out.shape)).sum().backward()
    assert student.unet.emb_guidance_gain.grad.abs() > 1e-5
    with torch.no_grad():
        student.unet.emb_guidance_gain.fill_(1.0)
    one, two = (student.unet.embed(t, label=label, guidance=torch.full((4,), scale)) for scale in (1.0, 2.0))
    assert (one - two).abs().max() > 1e-3
    assert float(one.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.25)
    with pytest.raises(UserError, match=r"^no guidance for a network that takes it; expected .*; pass guidance$"):
        student(x, t, label=label)
    with pytest.raises(UserError, match=r"^guidance for a network that takes label; expected .*; drop guidance$"):
        teacher(x, t, label=label, guidance=torch.ones(4))


# Sizes and dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 2), (4, 10), (16, 8), (32, 32)])
def test_every_size_that_the_levels_divide(size: tuple[int, int]) -> None:
    x, t, label = draw(7, 2, 3, *size), torch.tensor([0.3, 1.2]), torch.tensor([0, 1])
    out = network()(x, t, label=label)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("size", [(15, 16), (16, 1), (0, 4)])
def test_other_sizes_are_refused(size: tuple[int, int]) -> None:
    message = r"images of \d+ x \d+ for a network of 2 levels; expected sides that are multiples of 2; resize the images"
    with pytest.raises(UserError, match=message):
        network()(torch.zeros(2, 3, *size), torch.ones(2))


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 16, 16), (2, 3, 16)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"images of shape \(.*\); expected \(b, 3, h, w\); use images with 3 channels .+"):
        network()(torch.zeros(shape), torch.ones(2))


def test_dropout_up_to_a_resolution_and_in_training_only() -> None:
    net = network(dropout=0.4, dropout_up_to=8)
    rates = {name: m.dropout for name, m in net.named_modules() if isinstance(m, EDM2Block)}
    assert rates == {name: 0.4 if ".8x8" in name else 0.0 for name in rates}
    assert set(rates.values()) == {0.0, 0.4}
    x, t, label = inputs()
    assert torch.equal(net.eval()(x, t, label=label), network()(x, t, label=label))
    assert not torch.allclose(net.train()(x, t, label=label), net(x, t, label=label))


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 0},
        {"mult": ()},
        {"blocks": 0},
        {"resolution": 15},
        {"head_width": 0},
        {"modulation": "adagn"},
        {"shift": True, "modulation": "gain"},
        {"dropout": 1.0},
        {"clip": 0.0},
        {"num_classes": -1},
        {"takes": ("size",)},
        {"time_map": "Log"},
        {"time_embedding": "sinus"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(settings))} is .*; expected .*; correct the network settings"):
        network(**settings)


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_time_path_stays_float32_under_autocast(form: str) -> None:
    net = network(takes=("guidance",), **FORMS[form])
    x, t, label = inputs()
    told = {"label": label, "guidance": torch.tensor([1.0, 1.2, 1.5, 2.0])}
    exact, seen = net(x, t, **told), {}
    for name, module in net.unet.named_modules():
        if "emb_" in name or name == "out_conv":
            module.register_forward_hook(lambda _, given, out, name=name: seen.__setitem__(name, out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, **told)
        assert net.log_variance(t).dtype == torch.float32
    assert out.dtype == seen.pop("out_conv") == torch.bfloat16
    assert len(seen) == 15
    assert set(seen.values()) == {torch.float32}
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_half_precision_without_autocast() -> None:
    """Inputs in bfloat16 are enough, and weights in bfloat16 give nearly the same."""
    net = network()
    x, t, label = inputs()
    exact = net(x, t, label=label)
    for module in (net, copy.deepcopy(net).to(torch.bfloat16)):
        out = module(x.bfloat16(), t, label=label)
        assert out.dtype == torch.bfloat16
        assert (out - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_copy_for_sampling(form: str) -> None:
    """The same function without weights to normalize; in bfloat16 the time path stays as it was."""
    net = network(takes=("guidance",), **FORMS[form])
    x, t, label = inputs()
    told = {"label": label, "guidance": torch.tensor([1.0, 1.2, 1.5, 2.0])}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fixed, half = net.for_sampling(), net.for_sampling(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(isinstance(m, MPConv) for m in fixed.modules())
    exact = net(x, t, **told)
    torch.testing.assert_close(fixed(x, t, **told), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed.log_variance(t), net.log_variance(t))
    assert torch.equal(half.unet.embed(t, **told), fixed.unet.embed(t, **told))
    out = half(x.bfloat16(), t, **told)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = EDM2(edm2_config("img512-xxl"))
        out = net(torch.empty(2, 4, 64, 64), torch.empty(2), label=torch.empty(2, dtype=torch.int64))
    assert out.shape == (2, 4, 64, 64)


def test_build() -> None:
    config = EDM2Config(channels=1, resolution=8, width=8, mult=(1,), blocks=1, conditioning=ConditioningConfig(width=8))
    net = build(config, 1.5)
    assert isinstance(net, EDM2)
    assert net.config == config
    assert net.sigma_data == net.unet.sigma_data == 1.5


# Training ------------------------------------------------------------------------------------------------------------


def test_bf16_distillation_from_a_converged_teacher_stays_finite() -> None:
    """Flat images of one of two brightnesses: a teacher in float32, then 200 steps of sCD under bfloat16 autocast."""
    process, proposal = TrigFlow(), Proposal(0.0, 1.2)
    generator = torch.Generator().manual_seed(0)
    net = network(channels=1, resolution=4, mult=(1,), attention=(4,), num_classes=2)
    weight = AdaptiveWeight(process)

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        label = torch.randint(2, (8,), generator=generator)
        x0 = (label - 0.5)[:, None, None, None].expand(8, 1, 4, 4).contiguous()
        t = proposal.sample(process, 8, generator)
        return {"x0": x0, "noise": process.sample_noise(x0, generator), "t": t}, label

    def optimize(lr: float, steps: int, loss_of: Callable[[int], Loss]) -> Tensor:
        """Train with a rate that falls to zero; the mean of every figure at every step, the first of them the error."""
        optimizer, history = torch.optim.Adam([*net.parameters(), *weight.parameters()], lr, (0.9, 0.99)), []
        for step in range(steps):
            net.normalize_weights()
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.value.backward()
            assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None), step
            optimizer.step()
            history.append(torch.stack([loss.figures[name].mean() for name in sorted(loss.figures)]))
        return torch.stack(history)

    def teach(step: int) -> Loss:
        values, label = batch()
        return diffusion_loss(net, process, **values, conditions={"label": label})

    def distill(step: int) -> Loss:
        values, label = batch()
        with torch.autocast("cpu", torch.bfloat16):
            velocity, r = network_velocity(teacher, process, {"label": label}), min(1.0, step / 50)
            return flow_map_loss(
                net, process, **values, conditions={"label": label}, teacher=velocity, config=objective_of("scd"),
                weight=weight, r=r,
            )  # fmt: skip

    def distance() -> float:
        """Mean squared error of one-step samples."""
        x, label = 0.5 * draw(8, 16, 1, 4, 4), torch.arange(16) % 2
        t = torch.full((16,), process.t_max)
        x0 = process.denoise(x, 0.5 * net(x / 0.5, t, label=label), t)
        return float((x0 - (label - 0.5)[:, None, None, None]).detach().square().mean())

    errors = optimize(5e-2, 120, teach)[:, 0]
    assert errors[-20:].mean() < 0.08  # 0.25 with zero velocity
    teacher, before = copy.deepcopy(net).requires_grad_(False), distance()

    history = optimize(1e-3, 200, distill)
    assert torch.isfinite(history).all()
    assert history[100:, 2].max() < 0.5  # the size of the tangent, before it is normalized
    assert distance() < before
