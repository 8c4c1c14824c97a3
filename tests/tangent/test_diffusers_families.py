"""More families of diffusers, in the configurations of `benchmarks/networks.py`: tangents against differences."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from scripts import BENCHMARKS, load_script
from tangent.diffusers_cases import CASES, exact
from tangent.helpers import relative_error
from tangent.steps import assert_same_step
from trigflow.tangent import coverage

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
def test_traced_and_checkpointed(networks: ModuleType, family: str) -> None:
    test = configuration(networks, family)
    assert networks.traced(test, compile=False)["traced"] < networks.EXACT
    assert networks.checkpointed(test)["checkpointed"]
    assert networks.bfloat16(test)["bfloat16"]


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
