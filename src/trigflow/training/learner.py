"""A network that learns, with everything that belongs to one update of it."""

from __future__ import annotations

import math

from torch import nn

from trigflow.training.config import OptimizerConfig
from trigflow.training.optimizer import build_optimizer, learning_rate


class Learner:
    """A network, the weightings of its losses, and their optimizer.

    Args:
        network: what is trained. Its method `normalize_weights`, where it has one, is called once an update.
        weights: adaptive weightings by name, trained with it.
        config: optimizer and learning rate.
        iterations: length of the run, for the schedule.

    Attributes:
        parameters: everything that the optimizer changes.
    """

    def __init__(
        self, network: nn.Module, weights: dict[str, nn.Module], config: OptimizerConfig, iterations: int
    ) -> None:
        self.network = network
        self.weights = weights
        self.config = config
        self.iterations = iterations
        modules = [network, *weights.values()]
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = build_optimizer(config, modules)

    def begin(self, iteration: int) -> float:
        """Make ready for the gradients of a step, and return its learning rate."""
        lr = learning_rate(self.config, iteration, self.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.train()
        normalize = getattr(self.network, "normalize_weights", None)  # EDM2 forces its weights to unit magnitude
        if normalize is not None:
            normalize()
        self.optimizer.zero_grad(set_to_none=True)
        return lr

    def clip_gradient(self) -> float:
        """Bound the global norm of the gradient by `clip`, where one is set; returns the norm before."""
        clip = self.config.clip
        return nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip).item()

    def update(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()
