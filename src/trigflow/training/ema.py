"""Exponential moving averages of the weights."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from torch import Tensor, nn

from trigflow.errors import UserError
from trigflow.training.config import EMAConfig


@functools.lru_cache
def power_exponent(sigma_rel: float) -> float:
    """The exponent gamma of a power-function average whose profile has relative width `sigma_rel`.

    The average at time T weighs the past by `p(tau) ~ tau^gamma` on [0, T], of standard deviation
    `sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))` times T. Solved for gamma, that is the largest real root of
    `g^3 + 7 g^2 + (16 - sigma^-2) g + (12 - sigma^-2) = 0`. Source: Karras et al. 2024 (EDM2), section 3.1.

    Raises:
        UserError: outside (0, 0.28), where no gamma >= 0 exists.
    """
    if not 0 < sigma_rel < 0.28:
        raise UserError(f"relative EMA width {sigma_rel}; expected a number in (0, 0.28); set ema.sigma_rel")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def ema_decay(config: EMAConfig, iteration: int, batch_size: int) -> float:
    """Weight that the old average keeps in the update after step `iteration` (from 1)::

    power      beta = (1 - 1 / iteration)^(gamma + 1)
    halflife   beta = 2^(-batch_size / min(halflife, rampup images_seen))
    none       beta = 0
    """
    if config.kind == "power":
        return float((1 - 1 / iteration) ** (power_exponent(config.sigma_rel) + 1))
    if config.kind == "halflife":
        halflife = min(config.halflife_mimg * 1e6, config.rampup * iteration * batch_size) if config.rampup else (
            config.halflife_mimg * 1e6
        )  # fmt: skip
        return float(0.5 ** (batch_size / halflife))
    if config.kind == "none":
        return 0.0
    raise UserError(f"unknown average '{config.kind}'; expected power, halflife or none; set ema.kind")


class EMA:
    """A running average `ema <- beta ema + (1 - beta) weights` of a network; buffers are copied.

    `network` is the averaged copy, in eval mode and without gradients.
    """

    def __init__(self, config: EMAConfig, network: nn.Module) -> None:
        self.config = config
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, iteration: int, batch_size: int) -> None:
        """Take in the weights after step `iteration` (from 1)."""
        beta = ema_decay(self.config, iteration, batch_size)
        averaged: list[Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in source.parameters()], 1 - beta)
        for mine, theirs in zip(self.network.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)
