"""The Triton kernel: every case in Triton's interpreter on Linux, compiled for a GPU, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent.attention import triton_cases
from tangent.attention.triton_cases import CASES, SPECIAL, TOLERANCE

TESTS = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def program(*arguments: str, **environment: str) -> str:
    """Output of a Python process of its own: whether Triton interprets is settled when it is imported."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bound(name: str) -> float:
    return TOLERANCE[CASES[name]["dtype"]] if name in CASES else TOLERANCE["float32"]


def within_bounds(name: str, figures: dict[str, float]) -> None:
    assert figures
    for part, error in figures.items():
        exact = name not in CASES and part in ("output", "gradients", "order")
        assert error == 0 if exact else error < bound(name), f"{part}: {error}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return json.loads(program(triton_cases.__file__, TRITON_INTERPRET="1"))


@linux
@pytest.mark.parametrize("name", [*CASES, *SPECIAL])
def test_interpreted(interpreted: dict[str, Any], name: str) -> None:
    within_bounds(name, interpreted[name])


@cuda
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name: str) -> None:
    within_bounds(name, triton_cases.errors(name, "cuda"))


@cuda
@pytest.mark.parametrize("name", SPECIAL)
def test_special_cases_on_cuda(name: str) -> None:
    within_bounds(name, triton_cases.special(name, "cuda"))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trigflow.tangent.attention.triton import LOG2_E, kernel

def build(kind, chip, warps, **constants):
    constants = dict(constants, PRECISION="tf32", WIDEN=False, LOG2_E=LOG2_E)
    types = {name: "*" + kind for name in ("q", "k", "v", "dq", "dk", "dv", "out", "tangent")}
    types |= {"keep": "*u8", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": warps, "num_stages": 1})
    assert len(built.asm["cubin"]) > 1000
    print(built.metadata.shared)

flags = dict(MOVES_Q=True, MOVES_K=True, MOVES_V=True)
size = dict(ROWS=64, COLUMNS=32)
build("bf16", 90, 4, E=64, C=64, WIDE_E=64, WIDE_C=64, CAUSAL=True, KEEP=False, STORE_OUT=True, **flags, **size)
flags["MOVES_K"] = False
build("fp16", 80, 4, E=24, C=40, WIDE_E=32, WIDE_C=64, CAUSAL=False, KEEP=True, STORE_OUT=False, **flags, **size)
"""


@linux
def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter accepts the compiler may not; no GPU is needed to see that it does."""
    shared = program("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split()
    assert len(shared) == 2
    assert all(0 < int(n) < 100_000 for n in shared)
