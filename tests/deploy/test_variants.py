"""Variants of a network compute what the network computes."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.helpers import awake, draw
from trigflow.conditions import takes
from trigflow.deploy.fixed import FixedSizes
from trigflow.deploy.traced import Kept, Traced
from trigflow.deploy.variants import Compiled, Half, build_variant, ready_to_draw
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, NetworkConfig, UNetConfig, build
from trigflow.runtime.errors import UserError

PLAIN = ConditioningConfig(width=16)
LABELS = ConditioningConfig(width=16, num_classes=10)
ALL = ConditioningConfig(width=16, num_classes=10, takes=("guidance", "end"))
U: dict[str, Any] = {"width": 16, "mult": (1, 2), "blocks": 1}
CONFIGS: dict[str, NetworkConfig] = {
    "unet": UNetConfig(attention=(1,), conditioning=ALL, **U),
    "unet, patches": UNetConfig(patch=2, conditioning=LABELS, **U),
    "unet, unconditional": UNetConfig(conditioning=PLAIN, **U),
    "ddpmpp": DDPMPPConfig(resolution=8, attention=(4,), conditioning=ALL, **U),
    "edm2": EDM2Config(resolution=8, attention=(4,), head_width=16, conditioning=ALL, **U),
    "dit": DiTConfig(width=32, depth=2, heads=2, conditioning=ALL),
}


def small(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return awake(build(CONFIGS[name]).eval().requires_grad_(False))


def given(net: nn.Module, b: int, seed: int = 1, t: float | None = None) -> dict[str, Tensor]:
    """x, times, labels, guidance, ends and winds, as far as the network takes them."""
    channels = net.config.channels  # type: ignore[union-attr]
    times = torch.linspace(0.2, 1.5, b) if t is None else torch.full((b,), t)
    conditions = {
        "label": (torch.arange(b) * 3 + seed) % 11,
        "guidance": torch.linspace(1.0, 1.9, b),
        "end": times * 0.3,
        "wind": draw(seed + 50, b, 2),
    }
    inputs = {"x": draw(seed, b, channels, 8, 8), "t": times}  # type: ignore[arg-type]
    return inputs | {name: value for name, value in conditions.items() if name in takes(net)}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_traced_gives_the_same_numbers(name: str) -> None:
    """At every size, also a padded one and one that is cut; again from what was kept; and after other conditions."""
    net = ready_to_draw(small(name))
    variant = Traced(net, sizes=(1, 4))
    for b, seed in ((1, 1), (4, 2), (3, 3), (6, 4), (4, 2), (3, 5)):
        inputs = given(net, b, seed)
        torch.testing.assert_close(variant(**inputs), net(**inputs), rtol=1e-5, atol=1e-5)
    inputs = given(net, 4)
    assert torch.equal(variant(**inputs), variant(**inputs))


@torch.no_grad()
def test_conditioning_is_computed_once_for_the_same_conditions() -> None:
    net = small("unet")
    variant = Traced(net, sizes=(2,))
    for seed in range(3):
        inputs = given(net, 2, 1)
        variant(**{**inputs, "x": draw(seed, *inputs["x"].shape)})
    assert len(variant.kept.values) == 2  # of the comparison with the network, and ours
    variant(**given(net, 2, 1, t=0.7))
    variant(**given(net, 2, 2, t=0.7))
    assert len(variant.kept.values) == 4


@torch.no_grad()
def test_what_is_kept_is_of_one_shape_of_x() -> None:
    """A part that depends on time and the shape of x alone, at the same times."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.scale * x + t[:, None, None, None] * torch.linspace(0, 1, x.shape[-1])

    net, t = ready_to_draw(Slope()), torch.full((2,), 0.5)
    variant = Traced(net)
    for side in (4, 8):
        x = torch.ones(2, 1, side, side)
        assert torch.equal(variant(x, t), net(x, t))


def test_gradients_leave_nothing_behind() -> None:
    """A recording can be differentiated by x, and neither keeps that x nor gives gradients to calls without any."""
    net = ready_to_draw(small("unet"))
    variant = Traced(net)
    inputs = given(net, 2)
    first, *others = [inputs["x"].clone().requires_grad_() for _ in range(3)]
    left = weakref.ref(first)
    for x in (first, *others):
        found = torch.autograd.grad(variant(**{**inputs, "x": x}).square().sum(), x)[0]
        expected = torch.autograd.grad(net(**{**inputs, "x": x}).square().sum(), x)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    del first, x
    assert left() is None
    assert not variant(**inputs).requires_grad


def test_what_is_kept_stays_within_its_bytes() -> None:
    kept = Kept(100)
    for i in range(10):
        kept.put(i, (torch.full((10,), float(i)),))  # 40 bytes each
        assert kept.bytes <= 100
    assert kept.get(7) is None
    assert torch.equal(kept.get(8)[0], torch.full((10,), 8.0))  # type: ignore[index]
    kept.put(10, (torch.zeros(10),))
    assert kept.get(9) is None, "8 was used after 9"
    assert kept.get(8) is not None


@torch.no_grad()
def test_padding_and_neighbours_change_nothing() -> None:
    net = small("unet")
    variant = Traced(net, sizes=(8,))
    inputs = given(net, 8)
    whole = variant(**inputs)
    inputs["x"][5:] = 1e3
    variant(**inputs)  # leaves its last rows in the buffer
    alone = variant(**{name: value[:5] for name, value in inputs.items()})
    assert torch.equal(alone, whole[:5])


@torch.no_grad()
def test_threads_do_not_mix_their_batches() -> None:
    net = small("unet, patches")
    variant = Traced(net, sizes=(1, 2, 4))
    inputs = {seed: given(net, 1 + seed % 4, seed) for seed in range(8)}
    expected = {seed: net(**inputs[seed]) for seed in inputs}
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.allclose(variant(**inputs[seed]), expected[seed], rtol=1e-5, atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Few(nn.Module):
    """A network of a few layers that takes everything, and two numbers more: quick to compile and to export."""

    takes = frozenset({"label", "guidance", "end", "wind"})

    def __init__(self) -> None:
        super().__init__()
        self.null = {"label": torch.tensor(10), "wind": torch.tensor([0.5, -0.5])}
        self.label = nn.Embedding(11, 4)
        self.linear = nn.Linear(9, 4)
        self.inp = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, guidance: Tensor, end: Tensor, wind: Tensor) -> Tensor:
        told = torch.cat([self.label(label), torch.stack([t, guidance, end], dim=1), wind], dim=1)
        return self.out(torch.tanh(self.inp(x)) * self.linear(told)[:, :, None, None])


def few() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Few().eval().requires_grad_(False)
    net.config = UNetConfig(channels=1)  # type: ignore[assignment]
    return net


class Deciding(nn.Module):
    """Another function for late times than for early ones, decided in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x if float(t.detach().numpy()[0]) > 0.5 else -self.weight * x


def test_a_network_that_cannot_be_recorded_is_refused_and_auto_takes_it_as_it_is() -> None:
    net = Deciding()
    with pytest.raises(UserError, match=r"variant plain|use plain"):
        build_variant("traced", net, (1, 8, 8))
    variant = build_variant("auto", net, (1, 8, 8))
    assert not isinstance(variant, FixedSizes)
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(variant(x, torch.tensor([0.2])), -x)
    assert torch.equal(variant(x, torch.tensor([1.0])), x)


@pytest.mark.parametrize("name", ["plain", "traced"])
@torch.no_grad()
def test_a_condition_of_several_numbers_goes_through_padded_and_cut(name: str) -> None:
    """At its own rows, also where the last call has room for more; and at others than the recorded ones."""
    net = few()
    variant = build_variant(name, net, (1, 8, 8))
    for b, seed in ((1, 1), (3, 2), (3, 3), (17, 4)):
        inputs = given(net, b, seed)
        expected = net(**inputs)
        torch.testing.assert_close(variant(**inputs), expected, rtol=1e-5, atol=1e-5)
        other = {**inputs, "wind": inputs["wind"].flip(1)}
        assert (net(**other) - expected).abs().amax((1, 2, 3)).min() > 1e-3
        torch.testing.assert_close(variant(**other), net(**other), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiled_computes_a_batch_of_one_as_one_of_two() -> None:
    net = few()
    variant = Compiled(net, backend="eager")
    for b in (1, 3):
        inputs = given(net, b)
        result = variant(**inputs)
        assert result.shape == inputs["x"].shape
        torch.testing.assert_close(result, net(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "edm2", "dit"])
@torch.no_grad()
def test_bf16_is_close_and_leaves_the_network_alone(name: str) -> None:
    net = ready_to_draw(small(name))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    variant = Half(net, torch.bfloat16)
    inputs = given(net, 3)
    expected, result = net(**inputs), variant(**inputs)
    assert result.dtype == torch.float32
    error = float((result - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    after = net.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bits_are_close(name: str) -> None:
    net = small("dit")
    variant = build_variant(name, net, (4, 8, 8))
    inputs = given(net, 3)
    expected = net(**inputs)
    error = float((variant(**inputs) - expected).norm() / expected.norm())
    assert 0 < error < 0.1


@torch.no_grad()
def test_onnx_gives_the_same_numbers_at_every_batch_size() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = few()
    variant = build_variant("onnx", net, (1, 8, 8))
    for b in (1, 2, 5):
        inputs = given(net, b)
        torch.testing.assert_close(variant(**inputs), net(**inputs), rtol=1e-4, atol=1e-4)


def test_onnx_without_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"trigflow\[onnx\]"):
        build_variant("onnx", small("unet"), (1, 8, 8))


@pytest.mark.parametrize(
    ("name", "net", "said"),
    [
        ("quick", "unet", "unknown variant 'quick'"),
        ("int8", "edm2", "without linear layers"),
        ("fp16", "unet", "CUDA"),
        ("graph", "unet", "CUDA"),
        ("graph-bf16", "unet", "CUDA"),
        ("int8", "unet", "without linear layers"),
        ("fp8", "unet", "without linear layers"),
    ],
)
def test_what_does_not_work_here_says_why(name: str, net: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build_variant(name, small(net), (1, 8, 8))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") == 2


def test_variants_keep_the_attributes_of_the_network() -> None:
    net = small("unet")
    for name in ("plain", "traced", "bf16"):
        variant = build_variant(name, net, (1, 8, 8))
        assert variant.takes == {"label", "guidance", "end"}
        assert {key: row.tolist() for key, row in variant.null.items()} == {"label": 10}
        assert next(variant.parameters()).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("name", "tolerance"), [("graph", 1e-4), ("graph-bf16", 0.05)])
@torch.no_grad()
def test_cuda_graphs_give_the_numbers_of_the_network(name: str, tolerance: float) -> None:
    net = small("unet").cuda()
    variant = build_variant(name, net, (1, 8, 8))
    for b, seed in ((1, 1), (5, 2), (3, 3), (1, 4)):
        inputs = {key: value.cuda() for key, value in given(net, b, seed).items()}
        expected = net(**inputs)
        assert float((variant(**inputs) - expected).norm() / expected.norm()) < tolerance
