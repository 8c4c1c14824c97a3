"""Seeds: one for each purpose, derived from the one of a run; and the generators of PyTorch that they are for."""

import hashlib
import json
import operator
from contextlib import AbstractContextManager

import torch


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed of its own for each purpose: `blake2b([seed, *path])`, an integer in [0, 2^63).

    The same on every machine and in every version of Python. Integers and strings are kept apart: `derive_seed(0, 1)` and
    `derive_seed(0, "1")` differ, as do `("a", "bc")` and `("ab", "c")`.

    Args:
        seed: the seed of the run, any integer.
        path: what the derived seed is for, for example `"order", epoch`.
    """
    parts = [part if isinstance(part, str) else operator.index(part) for part in (seed, *path)]
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators_kept() -> AbstractContextManager[None]:
    """A block after which PyTorch's default generators, of all devices, are as they were."""
    gpus = torch.cuda.device_count()
    return torch.random.fork_rng(range(gpus) if gpus > 1 else None)  # which warns of several unless it is told them
