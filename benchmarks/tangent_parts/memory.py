"""Peak memory of a function, in a process of its own.

On the CPU the kernel's own figure is taken: the peak of the resident memory (`VmHWM`), set back before the function runs, less
the resident memory before. It holds everything, the scratch memory of the kernels and the holes in the heap included, where a
count of tensors would miss both, and it is what a user runs out of. Two things can spoil it, and are met as follows.

* The allocator remembers who came before: each figure comes from a fresh process, warmed up with a batch of one, which loads
  code and starts threads and leaves next to nothing on the heap; what is left is handed back before the figure is taken.
* How much of the heap are holes depends on glibc more than on the function. Hence two figures. `resident` is taken over two
  steps in a row, because the allocator adapts to the first. `live` is taken with every
  block of 64 KiB or more mapped by itself and unmapped when freed: what is really in use, without the holes.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def can_measure() -> bool:
    """Whether the system tells, and sets back, the peak of the resident memory: Linux does."""
    return RESET.exists() and STATUS.exists()


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a new process, forked from one that has imported the library and run nothing.

    It has imported what PyTorch does at a first tangent, too: a second or two for each process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._decomp.decompositions_for_jvp", "torch._dynamo", "trigflow.lab.demo", "trigflow.tangent"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak) of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def added_peak(function: Callable[[], Any], times: int = 1) -> int:
    """Peak resident bytes while `function` runs `times` in a row, less those resident before."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    RESET.write_text("5")
    before = resident("VmRSS")
    for _ in range(times):
        function()
    return resident("VmHWM") - before


def map_large_blocks() -> None:
    """Have glibc map every block of 64 KiB or more by itself and unmap it when freed; for a process with an empty heap."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD


def added_peak_on_cuda(function: Callable[[], Any]) -> int:
    """Peak bytes of tensors on the GPU while `function` runs, less those there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
