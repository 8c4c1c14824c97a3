"""Optimizers and learning-rate schedules, by name."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trigflow.runtime.distributed.shards import by_kind
from trigflow.runtime.errors import UserError
from trigflow.training.compiled import compiled
from trigflow.training.config import OptimizerConfig
from trigflow.training.muon import Muon, hidden_matrices, orthogonalize

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}


def build_optimizer(config: OptimizerConfig, modules: Iterable[nn.Module], compiles: bool = False) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `modules`; its learning rate is set before every step from `learning_rate`.

    With `compiles` the update of Muon is compiled. The others are kernels over all weights at once in any case.

    Sharded parameters and whole ones are groups of their own. The `positions` of a group say which of all parameters it has, so
    that a checkpoint numbers them the same whether they are sharded or not. Raises a UserError for an unknown name.
    """
    modules = list(modules)
    parameters = [p for module in modules for p in module.parameters()]
    position = {id(p): i for i, p in enumerate(parameters)}
    kinds = by_kind([p for p in parameters if p.requires_grad])
    groups = [{"params": kind, "positions": [position[id(p)] for p in kind]} for kind in kinds]
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
    if config.name == "muon":
        matrices = [p for module in modules for p in hidden_matrices(module)]
        turn = compiled(orthogonalize, "the update of Muon", limit=64) if compiles else orthogonalize
        return Muon(groups, matrices, momentum=config.momentum, turn=turn, **settings)
    if config.name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer '{config.name}'; expected one of {', '.join(OPTIMIZERS)}, muon; set optimizer.name")
    settings["foreach" if config.name == "radam" else "fused"] = True  # RAdam has no fused implementation
    return OPTIMIZERS[config.name](groups, **settings)


def learning_rate(config: OptimizerConfig, iteration: int, iterations: int) -> float:
    """Learning rate of step `iteration` (from 0) of `iterations`::

        constant       lr
        inverse_sqrt   lr / sqrt(max(iteration / t_ref, 1))         Lu and Song 2025, appendix; Karras et al. 2024
        cosine         lr (1 + cos(pi iteration / iterations)) / 2

    times `min(1, (iteration + 1) / warmup)`.

    Raises:
        UserError: for an unknown schedule.
    """
    lr = config.lr
    if config.schedule == "inverse_sqrt":
        lr /= math.sqrt(max(iteration / config.t_ref, 1.0))
    elif config.schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * min(iteration / max(iterations, 1), 1.0)))
    elif config.schedule != "constant":
        raise UserError(
            f"unknown schedule '{config.schedule}'; expected constant, inverse_sqrt or cosine; set optimizer.schedule"
        )
    return lr * min(1.0, (iteration + 1) / config.warmup) if config.warmup > 0 else lr
