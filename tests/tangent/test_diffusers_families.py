"""More families of diffusers, in the configurations of `benchmarks/networks.py`: tangents against differences.

And all families, those of test_diffusers.py among them, as compiled: the traced graph against the engine.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scripts import BENCHMARKS, load_script
from tangent.diffusers_cases import CASES, exact
from tangent.helpers import relative_error
from tangent.steps import assert_same_step, directions
from trigflow.tangent import Compiled, compile, coverage, jvp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.compile has no effect"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:.*BlockMask"),
]

FAMILIES = (
    "QwenImage21Transformer2DModel Cosmos3OmniTransformer AnyFlowFARTransformer3DModel Kandinsky6SRTransformer3DModel "
    "Kandinsky5Transformer3DModel Kandinsky6Transformer3DModel HunyuanImageTransformer2DModel Flux3Transformer2DModel "
    "StableAudioDiTModel StableCascadeUNet T5FilmDecoder Transformer2DModel SanaWMTransformer3DModel"
).split()


@pytest.fixture(scope="module")
def networks() -> Iterator[ModuleType]:
    with mock.patch.object(sys, "path", [*sys.path, str(BENCHMARKS)]):
        module = load_script("networks")
        with mock.patch.dict(sys.modules, {module.__name__: module}):  # where the compiler looks for it
            yield module


ALIKE = ("num_layers", "num_hidden_layers", "num_visual_blocks")
UNLIKE = ("SD3Transformer2DModel", "SanaWMTransformer3DModel")
"""Families whose two layers are of different kinds."""


def shallow(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The same with one layer in place of several that are alike: a graph takes its time with every operation."""
    return settings if family in UNLIKE else {name: 1 if name in ALIKE else value for name, value in settings.items()}


def configuration(networks: ModuleType, family: str) -> Any:
    found = [test for kind, _, test in networks.cases() if kind == family]
    if not found:
        pytest.skip("the installed diffusers has no such class")
    networks.runs(found[0])
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(networks: ModuleType, family: str) -> None:
    row = networks.eager(configuration(networks, family))
    assert networks.exact(row), row
    # Both have no time of their own: one takes none, the other rounds it.
    assert (row["time"] > 0) == (family not in ("Transformer2DModel", "SanaWMTransformer3DModel"))


@pytest.mark.parametrize("family", ["QwenImage21Transformer2DModel", "Kandinsky6SRTransformer3DModel"])
def test_checkpointed(networks: ModuleType, family: str) -> None:
    test = configuration(networks, family)
    assert networks.checkpointed(test)["checkpointed"]
    assert networks.bfloat16(test)["bfloat16"]


def test_traced(networks: ModuleType) -> None:
    row = networks.traced(configuration(networks, "T5FilmDecoder"), compile=False)
    assert row["traced"] < networks.EXACT
    assert row["nodes"] > 100


def test_time_that_is_rounded(networks: ModuleType) -> None:
    case = networks.Case(configuration(networks, "SanaWMTransformer3DModel"), torch.float32)
    report = coverage(case.fn, *case.inputs, time=1)
    assert report.complete
    assert report.follows == 0
    assert "the tangent misses the time" in str(report)


def test_attention_in_slices() -> None:
    """Each slice is written into zeros made inside."""
    case = CASES["UNet2DConditionModel"]
    net = case.build()
    net.set_attention_slice(1)
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < 1e-6


def quiet(fn: Any) -> Compiled:
    """Compiled, where a fallback is an error."""

    def tell(text: str) -> None:
        raise AssertionError(text)

    return compile(fn, backend="eager", tell=tell)


def assert_as_the_engine(step: Compiled, fn: Any, inputs: Any, moves: Any, parameters: list[Tensor]) -> None:
    """Output, tangent and gradients of a compiled call are those of `jvp`; gradients where there are parameters."""
    results = []
    for call in (step, lambda *given: jvp(fn, *given)):
        out, tangent = map(pytree.tree_leaves, call(inputs, moves))
        total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in out)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
        results.append(([*out, *tangent], gradients))
    (values, gradients), (expected, right) = results
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert [g is None for g in gradients] == [g is None for g in right]
    pairs = [(a, b) for a, b in zip(gradients, right, strict=True) if a is not None and b is not None]
    if pairs:
        found, exact = (torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True))
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("family", [family for family in CASES if family != "Lumina2Transformer2DModel"])
def test_compiled(family: str) -> None:
    case = dataclasses.replace(CASES[family], settings=shallow(family, CASES[family].settings))
    net, inputs = case.build(torch.float32), case.inputs(torch.float32)
    fn = case.fn(net)
    step = quiet(fn)
    assert_as_the_engine(step, fn, inputs, directions(inputs), list(net.parameters()))
    moved = tuple(x + 0.125 for x in inputs)
    assert_as_the_engine(step, fn, moved, directions(inputs), list(net.parameters()))
    assert sum(map(len, step.kinds.values())) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_too(networks: ModuleType, family: str) -> None:
    """Flexible attention has no backward on a CPU: the parameters of two families are frozen here."""
    test = configuration(networks, family)
    test.settings = shallow(family, test.settings)
    case = networks.Case(test, torch.float32)
    parameters = [p for p in case.net.parameters() if p.requires_grad]
    assert bool(parameters) == (family not in ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel"))
    assert_as_the_engine(quiet(case.fn), case.fn, case.inputs, case.directions(), parameters)


def test_compiled_for_lengths_that_change() -> None:
    """Lumina 2 reads the lengths of its texts off the mask: one graph for each set of them."""
    case = CASES["Lumina2Transformer2DModel"]
    case = dataclasses.replace(case, settings=shallow(case.kind, case.settings))
    net, (x, t) = case.build(torch.float32), case.inputs(torch.float32)
    text = torch.randn(2, 5, 12)

    def fn(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return net(x, timestep=t, encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False)[0]  # type: ignore[no-any-return]

    step, moves = quiet(fn), (*directions((x, t)), None)
    masks = [torch.arange(5) < torch.tensor([[a], [b]]) for a, b in ((5, 3), (2, 4), (5, 3))]
    for mask in masks:
        assert_as_the_engine(step, fn, (x, t, mask), moves, list(net.parameters()))
    assert [len(runs) for runs in step.kinds.values()] == [2]
