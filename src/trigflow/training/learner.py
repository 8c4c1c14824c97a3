"""A network that learns, with everything that belongs to one update of it."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trigflow.runtime.distributed.shards import by_kind, is_sharded, piece, whole
from trigflow.training.config import OptimizerConfig
from trigflow.training.optimizer import build_optimizer, learning_rate
from trigflow.training.scaling import LossScale

T = TypeVar("T")


def _call(function: Callable[..., Any], *args: Any, last: bool = True) -> Any:
    return function(*args)


class Learner:
    """A network, the weightings of its losses, and their optimizer. The schedule has `iterations` steps; `replicate` is that of
    `Parallel`.

    Attributes:
        parameters: everything that the optimizer changes.
        fine: a number on the device, 0 where the next update is to change nothing; None for no such number.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: dict[str, nn.Module],
        config: OptimizerConfig,
        iterations: int,
        replicate: Callable[[list[nn.Module]], Callable[..., Any]] | None = None,
        compiles: bool = False,
    ) -> None:
        self.network = network
        self.weights = weights
        self.config = config
        self.iterations = iterations
        modules = [network, *weights.values()]
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config, modules, compiles)
        self.fine: Tensor | None = None
        self.call = _call if replicate is None else replicate(modules)

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

    def compute(self, function: Callable[..., T], *args: Any, last: bool = True) -> T:
        """`function(*args)`, which uses the network and the weightings. The backward pass through a result that is the `last`
        before the update is, with several processes, the one in which gradients are averaged over them."""
        return self.call(function, *args, last=last)  # type: ignore[no-any-return]

    def clip_gradient(self, scale: LossScale | None = None) -> Tensor:
        """Bound the global norm of the gradient by `clip`, where one is set; returns the norm before, on the device. The
        gradient is divided by the `scale` of the loss first."""
        bound = math.inf if self.config.clip is None else self.config.clip
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if scale is not None:
            torch._foreach_mul_([piece(gradient) for gradient in gradients], 1 / scale.value)
        kinds = by_kind(gradients)
        if not any(is_sharded(kind[0]) for kind in kinds):
            return nn.utils.clip_grad_norm_(self.parameters, bound)
        norm = torch.stack([whole(nn.utils.get_total_norm(kind)) for kind in kinds]).norm()
        torch._foreach_mul_([piece(gradient) for gradient in gradients], (bound / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @property
    def skips(self) -> bool:
        """Whether the optimizer can leave a step out by a number on the device."""
        return not isinstance(self.optimizer, torch.optim.RAdam)

    def update(self) -> None:
        """One step of the optimizer; where `fine` is 0, it changes nothing."""
        found = None if self.fine is None else 1 - self.fine
        self.optimizer.found_inf = found  # type: ignore[attr-defined]  # as GradScaler has it
        self.optimizer.step()
