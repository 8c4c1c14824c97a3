"""Pictures of many shapes, each brought to the nearest of several sizes of about equal area: aspect-ratio buckets.

For a square of side S the sizes have a short side `s = S, S - q, S - 2q, ...` and a long side l, one either way round::

    q = largest power of two that is at most 64 and S / 8, but at least 1
    l = q floor(S^2 / (q s)),        l <= 2.5 s

so for S = 64: 64x64, 56x72, 48x80 and 40x96. A picture goes to the size whose ratio is nearest to its own, as a
quotient; as much of its middle is kept as has that ratio, and scaled.
"""

import functools

from trigflow.runtime.errors import UserError


@functools.cache
def bucket_sizes(side: int) -> list[tuple[int, int]]:
    """Width and height of all buckets of the square of this side, from the narrowest to the widest; see the module. Raises a
    UserError if the side is no multiple of their step."""
    step = next(q for q in (64, 32, 16, 8, 4, 2, 1) if q <= side / 8 or q == 1)
    if side % step:
        raise UserError(f"resize {side} with buckets; expected a multiple of {step}; use --resize {side - side % step}")
    pairs = [(short, step * (side**2 // (step * short))) for short in range(side, 0, -step)]
    upright = [(short, long) for short, long in pairs if long <= 2.5 * short]
    return sorted({*upright, *(size[::-1] for size in upright)})


def nearest_bucket(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The bucket whose ratio is nearest to that of an image of this width and height; of two as near the squarer one."""

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        one, other = size[0] * bucket[1], size[1] * bucket[0]
        return max(one, other) / min(one, other), abs(bucket[0] - bucket[1])

    return min(bucket_sizes(side), key=distance)
