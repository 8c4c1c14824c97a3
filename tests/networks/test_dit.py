"""The diffusion transformer: an independent reading of its formulas, sizes, positions, tangents and precision."""

from __future__ import annotations

import cmath
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks.helpers import awake, draw
from networks.test_tangent import check
from training.tiny import all_digits, change
from trigflow.networks import ConditioningConfig, DiT, DiTConfig, build, dit_config, name_of
from trigflow.networks.dit import DiTBlock, Gate, rotary_positions, rotate, sine_positions
from trigflow.networks.layers import ConditioningLinear
from trigflow.objectives import TangentConfig, objective_of
from trigflow.runtime.errors import UserError
from trigflow.tangent import coverage, jvp
from trigflow.training.config import EMAConfig, LoopConfig, OptimizerConfig, RunConfig, from_dict, to_dict
from trigflow.training.muon import hidden_matrices
from trigflow.training.setup import start_from
from trigflow.training.trainer import Trainer

NORMS = ("double", "adaln")
POSITIONS = ("rotary", "sine")
PUBLISHED = {"s": 32.96, "b": 130.51, "l": 458.10, "xl": 675.13}
"""Millions of parameters of DiT-S/2 to DiT-XL/2 with a predicted variance, Peebles and Xie 2023."""


def config(**settings: Any) -> DiTConfig:
    """Two blocks of two heads; settings of the network and of its conditioning, mixed."""
    inner = {k: v for k, v in settings.items() if k in ConditioningConfig.__dataclass_fields__ and k != "width"}
    outer = {k: v for k, v in settings.items() if k not in inner}
    sizes = {"channels": 2, "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    return DiTConfig(**{**sizes, "conditioning": ConditioningConfig(width=8, **inner), **outer})


def network(seed: int = 0, **settings: Any) -> DiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(config(**settings))


def inputs(dtype: torch.dtype = torch.float32, b: int = 3) -> tuple[Tensor, Tensor]:
    return draw(1, b, 2, 6, 8, dtype=dtype), torch.linspace(0.2, 1.5, b, dtype=dtype)


# An independent reading of the formulas ----------------------------------------------------------------------------------


def turned(x: Tensor, columns: int) -> Tensor:
    """Rotary positions by complex numbers; x `(b, heads, n, d)`, features (i, i + d/2) one number."""
    n, d = x.shape[2], x.shape[3]
    z = torch.complex(x[..., : d // 2], x[..., d // 2 :])
    for k in range(n):
        for i in range(d // 2):
            place = k // columns if i < d // 4 else k % columns
            z[:, :, k, i] *= cmath.exp(1j * place * 100 ** (-(i % (d // 4)) / (d // 4)))
    return torch.cat([z.real, z.imag], dim=3)


def sines(rows: int, columns: int, width: int) -> Tensor:
    """`[sin(w r), cos(w r), sin(w c), cos(w c)]` of every row r and column c."""
    w = [10_000 ** (-i / (width // 4)) for i in range(width // 4)]
    tokens = [
        [f(w_i * place) for place in (r, c) for f in (math.sin, math.cos) for w_i in w]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.tensor(tokens, dtype=torch.float64)


def reference(net: DiT, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Patches of 2 x 2, heads of attention one by one."""
    config, p = net.config, dict(net.named_parameters())
    b, c, height, w = x.shape
    rows, columns, width = height // 2, w // 2, config.width

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def pnorm(y: Tensor) -> Tensor:
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-4)

    def modulated(name: str, h: Tensor) -> Tensor:
        y = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-6)
        scale, shift = linear(f"{name}.affine", emb)[:, None].split(width, dim=2)
        return y * pnorm(scale) + pnorm(shift) if config.norm == "double" else y * (1 + scale) + shift

    def gate(name: str) -> Tensor:
        value = linear(f"{name}.affine", emb)[:, None]
        return p[f"{name}.gain"] * pnorm(value) if config.norm == "double" else value

    def attention(name: str, y: Tensor) -> Tensor:
        q, k, v = (
            z.reshape(b, -1, config.heads, width // config.heads).transpose(1, 2)
            for z in linear(f"{name}.qkv", y).split(width, dim=2)
        )
        if config.qk_norm:
            q = q / torch.sqrt(q.square().mean(-1, keepdim=True) + 1e-6) * p[f"{name}.q_norm.weight"]
            k = k / torch.sqrt(k.square().mean(-1, keepdim=True) + 1e-6) * p[f"{name}.k_norm.weight"]
        if config.positions == "rotary":
            q, k = turned(q, columns), turned(k, columns)
        y = (q @ k.transpose(2, 3) / math.sqrt(width // config.heads)).softmax(-1) @ v
        return linear(f"{name}.proj", y.transpose(1, 2).reshape(b, -1, width))

    emb = net.conditioning(t, label=label)
    cells = x.reshape(b, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, 4 * c)
    h = linear("inp", cells)
    if config.positions == "sine":
        h = h + sines(rows, columns, width)
    for i in range(config.depth):
        name = f"blocks.{i}"
        h = h + gate(f"{name}.gate1") * attention(f"{name}.attention", modulated(f"{name}.norm1", h))
        y = F.gelu(linear(f"{name}.mlp.linear1", modulated(f"{name}.norm2", h)), approximate="tanh")
        h = h + gate(f"{name}.gate2") * linear(f"{name}.mlp.linear2", y)
    h = linear("out", modulated("out_norm", h))
    return h.reshape(b, rows, columns, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_formulas(norm: str, positions: str, qk_norm: bool) -> None:
    net = awake(network(norm=norm, positions=positions, qk_norm=qk_norm, num_classes=3)).double()
    assert isinstance(net, DiT)
    x, t = inputs(torch.float64)
    label = torch.tensor([1, 3, 0])
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, label=label), reference(net, x, t, label), rtol=1e-9, atol=1e-9)


def test_attention_sees_distances_only() -> None:
    """Rotary: the product of a turned query and key depends on the difference of their rows and of their columns."""
    q, k = draw(2, 1, 1, 1, 16, dtype=torch.float64), draw(3, 1, 1, 1, 16, dtype=torch.float64)
    rotation = rotary_positions(5, 6, 16, q)
    one, two = rotate(q.expand(1, 1, 30, 16), rotation)[0, 0], rotate(k.expand(1, 1, 30, 16), rotation)[0, 0]
    products = (one @ two.T).reshape(5, 6, 5, 6)
    torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2])
    assert products[0, 0].flatten().sort().values.diff().min() > 1e-4  # and no two distances are alike
    torch.testing.assert_close(one.norm(dim=1), q.norm().expand(30))


def test_sine_positions_tell_every_place_apart() -> None:
    positions = sine_positions(7, 9, 16, torch.zeros(0, dtype=torch.float64))
    torch.testing.assert_close(positions, sines(7, 9, 16))
    assert (torch.cdist(positions, positions) + torch.eye(63)).min() > 0.5


@pytest.mark.parametrize("positions", POSITIONS)
def test_places_matter(positions: str) -> None:
    """Exchanging two patches does more than exchange the two results."""
    net = awake(network(positions=positions))
    x, t = inputs(b=1)
    other = x.clone()
    other[..., :2, :2], other[..., 4:6, 6:8] = x[..., 4:6, 6:8], x[..., :2, :2]
    moved = net(other, t)
    exchanged = moved.clone()
    exchanged[..., :2, :2], exchanged[..., 4:6, 6:8] = moved[..., 4:6, 6:8], moved[..., :2, :2]
    assert (exchanged - net(x, t)).abs().max() > 1e-2


# Sizes -------------------------------------------------------------------------------------------------------------------


def parameters(config: DiTConfig) -> int:
    """Counted layer by layer."""
    w, features, hidden = config.width, config.conditioning.width, round(config.mlp_ratio * config.width)
    e, c, classes = 4 * features, config.channels * config.patch**2, config.conditioning.num_classes
    norm, gate = (e + 1) * 2 * w, (e + 1) * w + (w if config.norm == "double" else 0)
    attention = (w + 1) * 3 * w + (w + 1) * w + (2 * w // config.heads if config.qk_norm else 0)
    block = 2 * (norm + gate) + attention + (w + 1) * hidden + (hidden + 1) * w
    conditioning = (features + 1) * e + (e + 1) * e + ((classes + 1) * features if classes else 0)
    return (c + 1) * w + conditioning + config.depth * block + norm + (w + 1) * c


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters(size: str) -> None:
    """As many as published to 2%: time and label features are a quarter as wide here, and no variance is predicted."""
    chosen = dit_config(size, num_classes=1000)
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(chosen).parameters())
    assert count == parameters(chosen)
    assert abs(count / 1e6 - PUBLISHED[size]) < 0.02 * PUBLISHED[size]


def test_sizes_by_name() -> None:
    assert dit_config("b") == DiTConfig()
    chosen = dit_config("xl", patch=4, channels=3, num_classes=10)
    assert (chosen.width, chosen.depth, chosen.heads, chosen.patch, chosen.channels) == (1152, 28, 16, 4, 3)
    assert chosen.conditioning == ConditioningConfig(width=288, num_classes=10)
    with pytest.raises(UserError, match=r"^DiT size is 'xxl'; expected one of s, b, l, xl; "):
        dit_config("xxl")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 4)])
def test_every_size_comes_back(size: tuple[int, int], patch: int, positions: str) -> None:
    """One network takes them all, and pads by repeating the edge."""
    net = awake(network(patch=patch, positions=positions)).double()
    x, t = draw(4, 2, 2, *size, dtype=torch.float64).requires_grad_(), torch.tensor([0.4, 1.2], dtype=torch.float64)
    out = net(x, t)
    assert out.shape == x.shape
    (slope,) = torch.autograd.grad((out * draw(5, *out.shape, dtype=torch.float64)).sum(), x)
    assert torch.all(slope != 0)
    rows = [min(i, size[0] - 1) for i in range(math.ceil(size[0] / patch) * patch)]
    columns = [min(j, size[1] - 1) for j in range(math.ceil(size[1] / patch) * patch)]
    whole = net(x[:, :, rows][:, :, :, columns], t)
    torch.testing.assert_close(out, whole[:, :, : size[0], : size[1]], rtol=1e-9, atol=1e-9)


# The start ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_velocity_is_zero_before_training_and_can_be_trained(norm: str) -> None:
    net = network(norm=norm, num_classes=2)
    x, t = inputs()
    out = net(x, t)
    assert torch.equal(out, torch.zeros_like(x))
    (out - x).square().sum().backward()
    assert net.out.weight.grad is not None
    assert net.out.weight.grad.abs().max() > 1e-2
    awake(net)
    net.zero_grad()
    (net(x, t, label=torch.tensor([0, 1, 2])) - x).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("norm", NORMS)
def test_blocks_begin_as_the_identity_and_can_leave_it(norm: str) -> None:
    layer = DiTBlock(config(norm=norm), 32)
    h, emb = draw(6, 2, 5, 16), draw(7, 2, 32)
    out = layer(h, emb, None)
    assert torch.equal(out, h)
    (out * draw(8, *out.shape)).sum().backward()
    for gate in (layer.gate1, layer.gate2):
        grad = gate.affine.weight.grad if gate.gain is None else gate.gain.grad
        assert grad is not None
        assert grad.abs().min() > 0


def test_gate_is_bounded() -> None:
    """Double: never more than its gain in the root mean square, however large the embedding."""
    gate = awake(Gate(16, 32, "double"))
    assert isinstance(gate, Gate)
    assert gate.gain is not None
    with torch.no_grad():
        rms = (gate(1e3 * draw(9, 4, 32)) / gate.gain).square().mean(dim=2)
    torch.testing.assert_close(rms, torch.ones(4, 1), rtol=1e-3, atol=1e-3)


# What it takes -----------------------------------------------------------------------------------------------------------


def test_no_label_is_the_null_label() -> None:
    net = awake(network(num_classes=4))
    x, t = inputs()
    assert net.null["label"].item() == 4
    assert torch.equal(net(x, t, label=torch.full((3,), 4)), net(x, t))
    outs = [net(x[:1], t[:1], label=torch.tensor([k])) for k in range(5)]
    assert all((outs[i] - outs[j]).abs().max() > 1e-4 for i in range(5) for j in range(i))


def test_guidance_starts_without_effect() -> None:
    """A student that takes the scale starts as its teacher, whatever the scale, and learns to use it."""
    teacher, student = awake(network(num_classes=2)), network(seed=1, num_classes=2, takes=("guidance",))
    start_from(student, teacher)
    x, t = inputs()
    label, scale = torch.tensor([0, 2, 1]), torch.tensor([1.0, 1.5, 9.0])
    assert torch.equal(student(x, t, label=label, guidance=scale), teacher(x, t, label=label))
    student(x, t, label=label, guidance=scale).square().sum().backward()
    grad = student.conditioning.guidance.weight.grad
    assert grad is not None
    assert grad.abs().max() > 1e-4
    awake(student)
    assert (student(x, t, label=label, guidance=scale) - student(x, t, label=label, guidance=scale + 1)).abs().max() > 1e-4
    assert (student.takes, teacher.takes) == ({"label", "guidance"}, {"label"})


# Tangents ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_map", ["identity", "log"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_tangent(norm: str, positions: str, time_map: str) -> None:
    net = awake(network(norm=norm, positions=positions, time_map=time_map)).double()
    check(net, *inputs(torch.float64))


def test_tangent_with_labels_guidance_and_dropout() -> None:
    net = awake(network(num_classes=3, takes=("guidance",), dropout=0.2, qk_norm=False)).double().train()
    scales = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64)
    check(net, *inputs(torch.float64), label=torch.tensor([0, 3, 1]), guidance=scales)
    check(net, *inputs(torch.float64), guidance=scales)


def test_tangent_of_padded_images() -> None:
    net = awake(network(patch=3)).double()
    check(net, draw(10, 2, 2, 7, 5, dtype=torch.float64), torch.tensor([0.4, 1.3], dtype=torch.float64))


def test_tangent_in_float32() -> None:
    net = awake(network(num_classes=3, takes=("guidance",)))
    x, t = inputs()
    conditions = {"label": torch.tensor([0, 3, 1]), "guidance": torch.tensor([1.0, 1.4, 2.0])}
    directions = draw(11, *x.shape), draw(12, *t.shape)
    copy = deepcopy(net)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(lambda x, t: copy(x, t, **conditions), (x, t), directions)
    _, tangent = jvp(lambda x, t: net(x, t, **conditions), (x, t), directions)
    assert (tangent - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_part_needs_the_slow_path(norm: str, positions: str) -> None:
    settings = {"norm": norm, "positions": positions, "patch": 3, "dropout": 0.1, "num_classes": 2}
    net = awake(network(**settings, time_map="log", takes=("guidance",))).train()
    conditions = {"label": torch.tensor([0, 1, 2]), "guidance": torch.ones(3)}
    report = coverage(lambda x, t: net(x, t, **conditions), *inputs())
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)


# Precision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_embedding_and_modulation_stay_float32_under_autocast(norm: str, positions: str) -> None:
    net = awake(network(norm=norm, positions=positions, num_classes=2, takes=("guidance",)))
    x, t = inputs()
    told = {"label": torch.tensor([0, 1, 2]), "guidance": torch.tensor([1.0, 1.5, 2.0])}
    exact = net(x, t, **told)
    seen: dict[str, torch.dtype] = {}

    def watch(name: str) -> Any:
        return lambda module, given, out: seen.__setitem__(name, out.dtype)

    kinds = (ConditioningLinear, Gate)
    watched = [n for n, m in net.named_modules() if isinstance(m, kinds) or n.startswith("conditioning.")]
    for name in (*watched, "blocks.0.attention.qkv", "out"):
        net.get_submodule(name).register_forward_hook(watch(name))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, **told)
    assert len(watched) >= 2 * 6 + 1 + 5
    assert {seen[name] for name in watched} == {torch.float32}
    assert seen["blocks.0.attention.qkv"] == seen["out"] == torch.bfloat16  # autocast was on everywhere else
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_autocast_tangent_is_finite_and_near() -> None:
    net = awake(network())
    x, t = inputs()
    directions = (draw(13, *x.shape), draw(14, *t.shape))
    _, exact = jvp(net, (x, t), directions)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(x, t)
        out, tangent = jvp(net, (x, t), directions)
    assert torch.equal(out, plain)
    assert (tangent.float() - exact).norm() < 0.05 * exact.norm()


def test_float64_all_the_way() -> None:
    net, double = awake(network(num_classes=2)), awake(network(num_classes=2)).double()
    x, t = inputs()
    out = double(x.double(), t.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), net(x, t), rtol=1e-3, atol=1e-4)


def test_distillation_in_bfloat16_stays_finite(tmp_path: Path) -> None:
    """200 steps of sCD from a trained teacher: no step is skipped, and one step of the student comes closer to its teacher."""
    conditioning = ConditioningConfig(width=8)
    run = RunConfig(
        network=DiTConfig(width=16, depth=1, heads=2, conditioning=conditioning),
        optimizer=OptimizerConfig(lr=3e-3),
        ema=EMAConfig(kind="none"),
        loop=LoopConfig(iterations=200, batch_size=16, sample_every=0, checkpoint_every=0, device="cpu"),
    )
    teacher = Trainer(run, tmp_path / "teacher", dataset=all_digits(), progress=False).run()
    changes = {
        "objective": objective_of("scd", tangent=TangentConfig(warmup=50)),
        "network": teacher.spec,
        "teacher": "teacher",
        "optimizer.lr": 3e-4,
        "loop.iterations": 200,
        "loop.precision": "bf16",
        "loop.log_every": 1,
    }
    trainer = Trainer(change(run, changes), tmp_path / "student", teacher=teacher, dataset=all_digits(), progress=False)
    exact = teacher.sample(64, steps=8).float()

    def distance() -> float:
        return float((trainer.model().sample(64, steps=1).float() - exact).square().mean())

    before = distance()
    trainer.run()
    assert trainer.skipped == 0
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 200
    assert all(math.isfinite(line["grad_norm"]) and math.isfinite(line["loss"]) for line in lines)
    assert distance() < 0.5 * before


# Building ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [DiTConfig(), dit_config("xl", 4, 3, 10), config(norm="adaln", takes=("guidance",))])
def test_configuration_goes_through_json(chosen: DiTConfig) -> None:
    raw = json.loads(json.dumps(to_dict(RunConfig(network=chosen))))
    assert from_dict(raw).network == chosen
    assert name_of(chosen) == "dit"
    with torch.device("meta"):
        net = build(chosen)
    assert type(net) is DiT
    assert net.config == chosen


def test_weights_decide_everything() -> None:
    one, two = awake(network(time_embedding="fourier")), network(seed=3, time_embedding="fourier")
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(*inputs()), two(*inputs()))


def test_muon_leaves_the_conditioning_path_to_adam() -> None:
    net = network(width=32, num_classes=10)
    left = {id(m.weight) for m in net.modules() if isinstance(m, ConditioningLinear)}
    found = {id(p) for p in hidden_matrices(net)}
    assert id(net.get_submodule("blocks.0.attention.qkv").weight) in found
    assert not left & found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 0}, "patch is 0; expected at least 1; correct"),
        ({"depth": 0}, "depth is 0; expected at least 1; correct"),
        ({"channels": 0}, "channels is 0; expected at least 1; correct"),
        ({"heads": 3}, "heads is 3; expected a divisor of the width 16; correct"),
        ({"heads": 8}, "width / heads is 2; expected a multiple of 4 for rotary positions; correct"),
        ({"width": 18, "positions": "sine"}, "width is 18; expected a multiple of 4 for sine positions; correct"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0; expected a hidden layer of at least 1; correct"),
        ({"positions": "learned"}, "positions is 'learned'; expected rotary or sine; correct"),
        ({"norm": "adagn"}, "norm is 'adagn'; expected double or adaln; correct"),
        ({"dropout": 1.0}, r"dropout is 1.0; expected a number in \[0, 1\); correct"),
        ({"time_map": "Log"}, "time_map is 'Log'; expected identity or log; correct"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        network(**settings)
    assert "\n" not in str(caught.value)


def test_impossible_inputs_are_refused() -> None:
    net, full = network(), network(num_classes=2, takes=("guidance",))
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
