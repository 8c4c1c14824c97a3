"""Freed memory is kept while asked for, and given back afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trigflow.runtime.heap import CHOICES, freed_memory_kept, glibc

needs_glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or glibc() is None, reason="only glibc on Linux has these settings"
)

# Blocks of 1 MB lie on the heap, not mapped one by one; the one kept alive below them stops nothing from being trimmed.
PROGRAM = """
import contextlib, re, sys
from trigflow.runtime.heap import freed_memory_kept

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

def take_and_free():
    blocks = [bytearray(b"x") * (1 << 20) for _ in range(300)]
    return len(blocks)

with freed_memory_kept() if sys.argv[1] == "kept" else contextlib.nullcontext():
    before = resident()
    take_and_free()
    inside = resident() - before
print(inside, resident() - before)
"""


def megabytes(how: str) -> tuple[int, int]:
    """Resident megabytes that 300 freed ones leave behind, within the block and after it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    inside, after = map(int, done.stdout.split())
    return inside, after


@needs_glibc
def test_freed_memory_stays_and_then_goes() -> None:
    inside, after = megabytes("kept")
    assert inside > 250
    assert after < 50
    assert megabytes("default")[0] < 150


@needs_glibc
@pytest.mark.parametrize("name", CHOICES)
def test_a_users_own_choice_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with freed_memory_kept() as kept:
        assert kept
    monkeypatch.setenv(name, "65536")
    with freed_memory_kept() as kept:
        assert not kept


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trigflow.runtime.heap.glibc", lambda: None)
    with freed_memory_kept() as kept:
        assert not kept
