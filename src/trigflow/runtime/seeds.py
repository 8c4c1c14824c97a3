"""Seeds: one for each purpose, derived from the one of a run."""

import hashlib
import json
import operator


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
