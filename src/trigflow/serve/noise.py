"""Noise of a picture: a point on a torus through the noise of its seed.

With `p, q, r, s` independent noises of the seed and the two angles of the walk, `(a, b)`::

    z1 = (p + q) / sqrt(2)    z2 = r    z3 = (p - q) / sqrt(2)    z4 = s

    z = (cos a z1 + sin a z2 + cos b z3 + sin b z4) / sqrt(2)
      = (cos a + cos b) / 2 p + (cos a - cos b) / 2 q + (sin a r + sin b s) / sqrt(2)

`z1 ... z4` are independent and the squares of their coefficients add up to one, so `z ~ N(0, sd^2 I)` at every angle. The walk
has period 2 pi in a and in b, without a seam. It begins at `p`, exactly: at (0, 0) lies the picture of the seed itself.
"""

import math

from torch import Tensor

from trigflow.deploy.traced import Kept
from trigflow.models.model import Model
from trigflow.runtime.seeds import derive_seed

Walk = tuple[float, float]


def walk_weights(walk: Walk) -> tuple[float, float, float, float]:
    """Coefficients of `p, q, r, s` at the angles `(a, b)`; their squares add up to 1, and at (0, 0) they are (1, 0, 0, 0)."""
    (cos_a, cos_b), (sin_a, sin_b) = map(math.cos, walk), map(math.sin, walk)
    return (cos_a + cos_b) / 2, (cos_a - cos_b) / 2, sin_a * math.sqrt(0.5), sin_b * math.sqrt(0.5)


class NoiseSource:
    """Noise by seed and number, as `Model.sample` draws it, and on the walk of a seed. Not for several threads at once.

    Args:
        model: gives shape, standard deviation and device.
        kept: numbers to keep of noises drawn before, since the frames of a walk need the same ones again; each noise counts
            as at least 4096.
    """

    def __init__(self, model: Model, kept: int = 1 << 20) -> None:
        self.model = model
        self._drawn = Kept(4 * kept, 4 * 4096)

    def start(self, seed: int, walk: Walk, start: int, stop: int) -> Tensor:
        """Where pictures start ... stop - 1 of this seed begin, `(stop - start, c, h, w)`."""
        first, *others = walk_weights(walk)
        z = first * self.fresh(seed, 0, start, stop)
        for j, weight in enumerate(others):
            if weight:
                z.add_(self.fresh(derive_seed(seed, "walk", j), 0, start, stop), alpha=weight)
        return z

    def fresh(self, seed: int, k: int, start: int, stop: int) -> Tensor:
        """Noise k of pictures start ... stop - 1, see `Model.noise`; the same everywhere on the walk, not to be changed."""
        key = (seed, k, start, stop)
        found = self._drawn.get(key)
        if found is None:
            found = (self.model.noise(*key),)
            self._drawn.put(key, found)
        return found[0]
