"""The Triton kernels: every case in Triton's interpreter on Linux, compiled for a GPU, and on a GPU where there is one."""

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
from tangent.attention.triton_cases import CASES, LARGE, SPECIAL, TOLERANCE

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


def within_bounds(name: str, figures: dict[str, float]) -> None:
    assert figures
    case = CASES.get(name) or LARGE.get(name) or {"dtype": "float32"}
    for part, error in figures.items():
        exact = name in SPECIAL and part in ("output", "gradients", "order")
        bound = case.get("bound", TOLERANCE.get(part.split()[0], TOLERANCE[case["dtype"]]))
        assert error == 0 if exact else error < bound, f"{part}: {error}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return json.loads(program(triton_cases.__file__, TRITON_INTERPRET="1"))


@linux
@pytest.mark.parametrize("name", [*CASES, *SPECIAL])
def test_interpreted(interpreted: dict[str, Any], name: str) -> None:
    within_bounds(name, interpreted[name])


@cuda
@pytest.mark.parametrize("name", [*CASES, *LARGE])
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
from trigflow.tangent.attention import triton as forward, triton_backward as backward

def build(kernel, kind, chip, strided, packed, whole, **constants):
    floats = "*" + kind
    types = tuple({"f": floats, "m": "*u8", "i": "*i32", "s": "*fp32"}[letter] for letter in strided + packed)
    form = forward.Form(EVEN=False, PRECISION="tf32", WIDEN=False, **constants)
    signature = {"tensors": types, "strides": (("i32",) * 4,) * len(strided), "numbers": ("i32",) * whole + ("fp32",)}
    source = ASTSource(fn=kernel, signature=signature | {"FORM": "constexpr"}, constexprs={"FORM": form})
    built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4, "num_stages": 1})
    assert len(built.asm["cubin"]) > 1000
    print(built.metadata.shared)

flags = dict(MOVES_Q=True, MOVES_K=True, MOVES_V=True)
size = dict(E=32, C=32, WIDE_E=32, WIDE_C=32, ROWS=64, COLUMNS=32)
odd = dict(E=12, C=24, WIDE_E=16, WIDE_C=32, ROWS=32, COLUMNS=32)
dense = dict(CAUSAL=True, MASK="none", TABLE=False)
sparse = dict(CAUSAL=False, MASK="boolean", TABLE=True)
build(forward.kernel, "bf16", 90, "fffffffiff", "s", 5, **size, **dense, **flags, STORE_OUT=True)
build(forward.kernel, "fp16", 80, "ffffffmiff", "s", 5, **odd, **sparse, **flags | {"MOVES_K": False})
build(backward.kernel, "bf16", 90, "fffffiff", "ss", 5, **size, **dense)
build(backward.kernel, "fp16", 80, "ffffmiff", "ss", 5, **odd, **sparse, ACROSS=True)
"""


@linux
def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter accepts the compiler may not; no GPU is needed to see that it does."""
    shared = program("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split()
    assert len(shared) == 4
    assert all(0 < int(n) < 100_000 for n in shared)
