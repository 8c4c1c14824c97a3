"""Exponential moving averages of the weights."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trigflow.runtime.distributed import on_first
from trigflow.runtime.distributed.shards import piece
from trigflow.runtime.errors import UserError
from trigflow.training.compiled import compiled
from trigflow.training.config import EMAConfig
from trigflow.training.log import warn
from trigflow.training.snapshots import snapshot_path, write_snapshot

Count = int | Tensor
"""A number of updates, or one on the device, float64."""


@functools.lru_cache
def power_exponent(sigma_rel: float) -> float:
    """The exponent gamma of a power-function average whose profile has relative width `sigma_rel`.

    The average at time T weighs the past by `p(tau) ~ tau^gamma` on [0, T], of standard deviation `sqrt((gamma + 1) / ((gamma +
    2)^2 (gamma + 3)))` times T. Solved for gamma, that is the largest real root of `g^3 + 7 g^2 + (16 - sigma^-2) g + (12 -
    sigma^-2) = 0`. Source: Karras et al. 2024 (EDM2), section 3.1. Raises a UserError outside (0, 0.28), where no gamma >= 0
    exists.
    """
    if not 0 < sigma_rel < 0.28:
        raise UserError(f"relative EMA width {sigma_rel}; expected a number in (0, 0.28); set ema.sigma_rel")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def power_decay(sigma_rel: float, iteration: Count) -> Any:
    """`beta = (1 - 1 / iteration)^(gamma + 1)`, so that step k of n weighs exactly `(k/n)^(gamma+1) - ((k-1)/n)^(gamma+1)`."""
    return (1 - 1 / iteration) ** (power_exponent(sigma_rel) + 1)


def ema_decay(config: EMAConfig, iteration: Count, batch_size: int) -> Any:
    """Weight that the old average keeps in the update after step `iteration` (from 1)::

    power      beta = (1 - 1 / iteration)^(gamma + 1)
    halflife   beta = 2^(-batch_size / min(halflife, rampup images_seen))
    none       beta = 0
    """
    if config.kind == "power":
        return power_decay(config.sigma_rel, iteration)
    if config.kind == "halflife":
        longest = config.halflife_mimg * 1e6
        if not config.rampup:
            return 0.5 ** (batch_size / longest)
        ramp = config.rampup * iteration * batch_size
        return 0.5 ** (batch_size / (ramp.clamp(max=longest) if isinstance(ramp, Tensor) else min(longest, ramp)))
    if config.kind == "none":
        return 0.0
    raise UserError(f"unknown average '{config.kind}'; expected power, halflife or none; set ema.kind")


class EMA:
    """A running average `ema <- beta ema + (1 - beta) weights` of a network; buffers are copied.

    Where the configuration asks for snapshots, power-function averages of the lengths `sigma_rels` run along, from which
    `trigflow.training.posthoc` makes the average of any other length.

    Attributes:
        network: the averaged copy, in eval mode and without gradients.
        tracked: the averages for snapshots by their length; one of them is `network` where the lengths agree.
    """

    def __init__(self, config: EMAConfig, network: nn.Module, compiles: bool = False) -> None:
        self.config = config
        self.lerp: Callable[..., Any] = compiled(_lerp, "the average") if compiles else _lerp
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.tracked: dict[float, nn.Module] = {}
        for sigma_rel in config.sigma_rels if config.snapshot_every else ():
            own = config.kind == "power" and config.sigma_rel == sigma_rel
            self.tracked[sigma_rel] = self.network if own else copy.deepcopy(self.network)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every average by a name of its own, for checkpoints: `ema`, and `ema 0.05` and so on where they are not the same."""
        others = {f"ema {length:g}": net for length, net in self.tracked.items() if net is not self.network}
        return {"ema": self.network, **others}

    @torch.no_grad()
    def update(self, source: nn.Module, iteration: Count, batch_size: int, fine: Tensor | None = None) -> None:
        """Take in the weights after step `iteration` (from 1), unless `fine`, a number on the device, is 0."""
        self._blend(self.network, source, ema_decay(self.config, iteration, batch_size), fine)
        for sigma_rel, network in self.tracked.items():
            if network is not self.network:
                self._blend(network, source, power_decay(sigma_rel, iteration), fine)

    def save_snapshots(self, run: Path, iteration: int, updates: int, last: int) -> bool:
        """Write the tracked averages into `run/ema` if a snapshot is due at this iteration and not yet there; returns whether
        it is due, as at multiples of `snapshot_every` and the `last` iteration. The updates are the iterations less the
        skipped ones. A snapshot that cannot be written, as on a full disk, is warned of and left out.
        """
        every = self.config.snapshot_every
        due = every > 0 and updates > 0 and (iteration % every == 0 or iteration == last)
        for sigma_rel, network in self.tracked.items() if due else ():
            if not on_first(snapshot_path(run, iteration, sigma_rel).is_file):
                try:
                    write_snapshot(run, iteration, updates, sigma_rel, network, self.config.snapshot_dtype)
                except UserError as error:
                    warn(f"no snapshot of iteration {iteration}: {error}; training goes on")
        return due

    def _blend(self, average: nn.Module, source: nn.Module, beta: Any, fine: Tensor | None) -> None:
        """`average <- beta average + (1 - beta) source`, and copied buffers; with `fine` 0, nothing but the buffers."""
        pairs = [(a, p) for a, p in zip(average.parameters(), source.parameters(), strict=True) if a is not p]  # not shared
        mine, theirs = [piece(a) for a, _ in pairs], [piece(p.detach()) for _, p in pairs]
        if fine is None:
            torch._foreach_lerp_(mine, theirs, 1 - beta)
        else:
            self.lerp(mine, theirs, torch.where(fine > 0, 1 - beta, 0.0).float())
        for buffer, new in zip(average.buffers(), source.buffers(), strict=True):
            buffer.copy_(new)


def _lerp(mine: list[Tensor], theirs: list[Tensor], share: Tensor) -> list[Tensor]:
    """`mine <- mine + share (theirs - mine)`; no fused kernel takes the share from the device, unless it is compiled."""
    for a, b in zip(mine, theirs, strict=True):
        a.lerp_(b, share)
    return []
