"""Editing: a sampler that begins at a picture or keeps a part of it, and what lies between noises or velocities.

Picture to picture begins at the picture y with noise, not at noise alone, and goes on at the times that are left::

    x_t = cos(t) y + sin(t) z,      t = strength * (where sampling starts)

What is known of y is an orthogonal projection P: pixels outside a mask, luminance, means of blocks. Algorithm 4 of consistency
models takes it from y in every estimate of x0 (there as coordinates of A x0, A orthogonal) and adds noise to the whole. As
`x0 = cos(t) x_t - sin(t) v`, the velocity can be told so::

    x0 <- x0 + P (y - x0),      v <- v + P ((cos(t) x_t - y) / sin(t) - v)

Then the known part of every state is that of y with noise, whatever leads from one to the next: fresh noise (algorithm 4),
jumps without it (students of segments or of any jump), solvers of the PF-ODE (teachers). At the end it is put in once more.

Source: Song et al. 2023 (Consistency Models, arXiv 2303.01469); for the start Meng et al. 2022 (SDEdit, arXiv 2108.01073).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import number
from trigflow.samplers.guidance import JumpFunction

Noise = Callable[[int], Tensor]
"""`noise(k)`: k = 0 where sampling starts, k > 0 the fresh noise of later steps."""
Sampler = Callable[[JumpFunction, Noise], Tensor]
"""`sampler(velocity, noise) -> x0`."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601, as in Pillow); they add up to 1."""


@dataclass(frozen=True, eq=False)
class Known:
    """An orthogonal projection P: what of a picture y is known. x and y are `(b, *shape)`."""

    put: Callable[[Tensor, Tensor], Tensor]
    """`x + P (y - x)`: x with the known part of y."""
    least: Callable[[Tensor], Tensor] | None = None
    """The smallest of the numbers that P sums over, in the place of each; None where it sums nothing."""
    bounds: tuple[Tensor, ...] = ()
    """x0 of the lowest and of the highest byte, `(1, *shape)`; used with `least`."""

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The last x0: `put`, drawn in toward y, `y + s (x - y)` with the largest `s <= 1` that leaves it in the range of bytes
        as y is, one s for all that P sums over, so that there is nothing to clip and P of it is P y."""
        x = self.put(x, y)
        if self.least is None:
            return x
        d, still, (low, high) = x - y, x == y, (bound.to(x) for bound in self.bounds)
        room = (torch.where(d < 0, low, high) - y) / d.masked_fill(still, 1)
        return y + self.least(room.masked_fill(still, 1)).clamp(0, 1) * d


def outside(mask: Tensor) -> Known:
    """What lies outside a mask, bool, True where to draw: inpainting, or outpainting where that is a smaller picture."""
    return Known(lambda x, y: torch.where(mask, x, y))


def gray(*bounds: Tensor) -> Known:
    """The luminance of RGB: colouring. `P d = l (l . d) / |l|^2` at every pixel; y is gray."""
    unit = F.normalize(torch.tensor(LUMINANCE, device=bounds[0].device), dim=0)[:, None, None]
    return Known(lambda x, y: x + unit * (unit * (y - x)).sum(1, True), lambda s: s.amin(1, True), bounds)


def blocks(side: int, *bounds: Tensor) -> Known:
    """The means of blocks of `side` x `side` pixels: super-resolution. `P d` is the mean; y is constant in each block."""

    def spread(means: Tensor) -> Tensor:
        return means.repeat_interleave(side, 2).repeat_interleave(side, 3)

    return Known(lambda x, y: x + spread(F.avg_pool2d(y - x, side)), lambda s: -spread(F.max_pool2d(-s, side)), bounds)


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture, x0 `(1, *shape)`, and what to keep of it, if anything. Sampling starts at `strength`, in (0, 1], of its first
    time: 1 is noise alone, as without a picture, and close to 0 the picture comes back.

    Raises:
        UserError: for a strength out of range.
    """

    picture: Tensor
    strength: float = 1.0
    known: Known | None = None

    def __post_init__(self) -> None:
        number(strength=self.strength)
        if not 0 < self.strength <= 1:
            raise UserError(f"strength {self.strength:g}; expected a number above 0 and at most 1; correct the strength")

    def times(self, schedule: Sequence[float]) -> tuple[float, ...]:
        """`strength * schedule[0]`, no less than a trace of noise, and those of the later times that lie below it."""
        first = max(self.strength * schedule[0], 1e-4)
        return (first, *(t for t in schedule[1:] if t < first))

    def around(self, sampler: Sampler, process: TrigFlow, first: float) -> Sampler:
        """A sampler that starts at the time `first`, with this edit around it."""

        def draw(velocity: JumpFunction, noise: Noise) -> Tensor:
            z, known = noise(0), self.known
            y = self.picture.to(z).expand_as(z)
            start = process.interpolate(y, z, first)
            if self.strength == 1:
                start = z if known is None else known.put(z, start)

            def keeping(x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
                v = velocity(x, t, *end)
                return v if known is None else known.put(v, process.convert(y, x, t, "x0", "velocity"))

            x = sampler(keeping, lambda k: noise(k) if k else start)
            return x if known is None else known.finish(x, y.to(x))

        return draw


def weighed(velocities: Sequence[tuple[float, JumpFunction]]) -> JumpFunction:
    """`sum_j w_j v_j`, weights adding up to 1, at every evaluation; so are weighed the expected data, in which v is linear."""
    if len(velocities) == 1:
        return velocities[0][1]
    return lambda *at: torch.stack([weight * velocity(*at) for weight, velocity in velocities]).sum(0)


def spherical(first: Tensor, second: Tensor, share: float) -> Tensor:
    """`cos(a) z1 + sin(a) z2`, `a = share pi/2`, share in [0, 1]: as likely as the independent noises z1 and z2 are."""
    if not 0 <= share <= 1:
        raise UserError(f"a share of {share:g} of another noise; expected a number from 0 to 1; correct it")
    here, there = math.sin((1 - share) * math.pi / 2), math.sin(share * math.pi / 2)  # at the ends 0 and 1 exactly
    return here * first + there * second
