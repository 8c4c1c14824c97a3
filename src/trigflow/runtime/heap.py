"""Freed memory, kept for the next training step instead of handed back to the system.

On Linux, glibc gives the top of the heap back to the system whenever a few dozen megabytes of it are free, and maps large
blocks anew each time. A training step on a CPU frees and takes hundreds of megabytes many times over, and each time the system
has to clear the pages again. PyTorch's advice is another allocator (jemalloc, tcmalloc); two settings of the one that is there
do the same for a process that is about to train.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names in malloc.h
KEPT_BYTES = 2_000_000_000
"""Free bytes at the top of the heap that are kept."""
MAPPED_BYTES = 1 << 25
"""Larger blocks are mapped by themselves; the largest value that glibc accepts, and where its own, which adapts, ends."""
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
"""Environment variables by which a user has chosen already."""


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """While open, up to 2 GB of freed memory stay with the process; on leaving, what is free goes back to the system.

    Yields whether that is so: it is on Linux with glibc, unless an environment variable says how to allocate (MALLOC_... or
    GLIBC_TUNABLES). With another allocator preloaded it has no effect. The settings are those of the whole process.
    """
    libc = None if any(name in os.environ for name in CHOICES) else glibc()
    if libc is None:
        yield False
        return
    kept = bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
    try:
        yield kept
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MAPPED_BYTES)  # where glibc's own would be after a block of that size
        libc.malloc_trim(0)


def glibc() -> Any:
    """The C library of this process if it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    except (OSError, TypeError):  # no such thing on Windows
        return None
