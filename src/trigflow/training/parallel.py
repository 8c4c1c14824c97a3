"""Parallelism applied from outside: networks and objectives stay what they are in a single process.

    ddp     every process has all weights; gradients are averaged while they are computed (DistributedDataParallel)
    fsdp    every process keeps its part of each weight, and gathers those of one block at a time (FSDP2, `fully_shard`)

Either way each process works on its share of every batch, and the gradient is that of the whole batch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trigflow.networks.layers import AdaptiveNorm, ConditioningLinear
from trigflow.runtime.distributed import world_size
from trigflow.runtime.distributed.processes import averaging
from trigflow.runtime.distributed.shards import is_sharded
from trigflow.runtime.errors import UserError
from trigflow.training.compiled import compiled
from trigflow.training.config import ParallelConfig


@dataclass(frozen=True)
class Share:
    """Which samples of a batch a process works on, when each of its `parts` is divided evenly among the processes.

    Attributes:
        batch_size: samples of the whole batch.
        parts: parts that the batch is accumulated over.
        processes: how many there are.
        rank: which one this is.

    Raises:
        UserError: for a batch that cannot be divided evenly.
    """

    batch_size: int
    parts: int = 1
    processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % (self.parts * self.processes):
            raise UserError(
                f"a batch of {self.batch_size} in {self.parts} part(s) (loop.accumulate) on {self.processes} processes; "
                f"expected a multiple of {self.parts * self.processes}; change --loop.accumulate or the number of processes, "
                "or the batch size"
            )

    def rows(self) -> Tensor:
        """Positions in the batch, int64: of every part, the same share. In order, so that the parts can be split again."""
        positions = torch.arange(self.batch_size).view(self.parts, self.processes, -1)
        return positions[:, self.rank].flatten()

    def of(self, values: Tensor) -> Tensor:
        """The rows of `values` `(batch_size, ...)` that are this process's."""
        return values if self.processes == 1 else values[self.rows()]


class Parallel:
    """How the networks of a run are laid out over its processes.

    Args:
        config: the settings.
        device: that of this process.
        compiles: whether networks are to be compiled.

    Attributes:
        compiles_blocks: whether that is done block by block, and not for whole losses: the blocks of sharded networks are
            gathered one by one, and those that are recomputed are called by the backward pass.

    Raises:
        UserError: for a number of shards that does not divide the processes.
    """

    def __init__(self, config: ParallelConfig, device: torch.device, compiles: bool = False) -> None:
        self.config = config
        self.device = device
        self.processes = world_size()
        self.sharded = config.mode == "fsdp" and self.processes > 1
        self.compiles_blocks = compiles and (self.sharded or config.recompute)
        self.mesh = self._mesh() if self.sharded else None

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        shards = self.config.shards or self.processes
        if self.processes % shards:
            raise UserError(
                f"parallel.shards is {shards} for {self.processes} processes; expected a divisor of their number; change it"
            )
        if shards == self.processes:
            return init_device_mesh(self.device.type, (shards,))
        return init_device_mesh(self.device.type, (self.processes // shards, shards), mesh_dim_names=("replicate", "shard"))

    def place(
        self,
        network: nn.Module,
        memory_format: torch.memory_format | None = None,
        *,
        trained: bool = False,
        sharded: bool = True,
    ) -> nn.Module:
        """The network on the device of this process, whole or, with fsdp, its part of it.

        Args:
            network: changed in place. Copies are to be made before: a sharded network cannot be copied.
            memory_format: of its weights where they are whole; None to leave it.
            trained: whether there is a backward pass, for which gathered weights may be kept.
            sharded: false keeps it whole in any case.
        """
        if self.mesh is None or not sharded:
            network.to(self.device)
            return network if memory_format is None else network.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]
        if any(is_sharded(p) for p in network.parameters()):
            return network
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        scalars = {p for p in network.parameters() if p.ndim == 0}  # FSDP2 takes none; they stay whole
        for scalar in scalars:
            scalar.data = scalar.data.to(self.device)
        for parameter in network.parameters():  # a loaded network may be channels-last, which FSDP2 does not shard
            parameter.data = parameter.data.contiguous()
        settings: Any = {"mesh": self.mesh, "ignored_params": scalars}
        half = self.config.dtype == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,
        )
        reshard = self.config.reshard or not trained
        for block in blocks_of(network):
            exact: list[nn.Module] = [m for m in block.modules() if isinstance(m, AdaptiveNorm | ConditioningLinear)]
            if half and exact:  # what is computed in float32 keeps its weights so
                fully_shard(exact, reshard_after_forward=reshard, **settings)
            fully_shard(block, reshard_after_forward=reshard, mp_policy=policy, **settings)
        # The rest of the weights is given back after a forward pass in any case: the average is taken of the parts.
        fully_shard(network, reshard_after_forward=True, **settings)
        return network

    def ease(self, network: nn.Module, *, trained: bool = False) -> None:
        """Have the blocks of a network, in place, compiled or, if it is `trained`, computed again in the backward pass, as is
        configured.

        The blocks get a `forward` of that kind, in a class below their own; their names and parameters stay. This goes before
        `place`. Denoisers of diffusers have a switch of their own for the first, which is turned where nothing is compiled.
        Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
        """
        recompute, compiles = self.config.recompute and trained, self.compiles_blocks
        if recompute and not compiles and recomputes_by_itself(network, functools.partial(checkpoint, use_reentrant=False)):
            return
        classes: dict[type, type] = {}
        for block in blocks_of(network) if recompute or compiles else ():
            kind = type(block)
            if isinstance(block, _Eased) or any(is_sharded(p) for p in block.parameters()):
                continue  # a teacher that has been here before
            if kind not in classes:
                how: Any = functools.partial(_recomputed, compiles=compiles) if recompute else _compiled
                forward = functools.partialmethod(how, kind.forward)
                classes[kind] = type(kind.__name__, (_Eased, kind), {"forward": forward})
            block.__class__ = classes[kind]

    def replicate(self, modules: list[nn.Module]) -> Callable[..., Any]:
        """A function `call(function, *args, last)` that calls `function(*args)`, in which these modules are used.

        When what it returns is differentiated, the gradients of the modules become means over the processes, once an update:
        in the backward pass of the call with `last` true. Before that they are added up in each process alone.
        """
        if self.processes == 1:
            return lambda function, *args, last=True: function(*args)
        return _Reduced(modules, self.sharded, self.device)


def recomputes_by_itself(network: nn.Module, again: Callable[..., Any]) -> bool:
    """Have a denoiser of diffusers call its parts by `again(part, *args)` in training; False for any other network."""
    model: Any = getattr(network, "model", None)
    if not getattr(model, "_supports_gradient_checkpointing", False):
        return False
    model.enable_gradient_checkpointing(again)
    return True


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks a network is made of: members of its `ModuleList`s and `ModuleDict`s that have parts, the outermost ones."""
    for child in network.children():
        if isinstance(network, nn.ModuleList | nn.ModuleDict) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            if any(True for _ in child.children()) and any(True for _ in child.parameters()):
                yield child
        else:
            yield from blocks_of(child)


class _Eased:
    """Marks the class of a block whose `forward` was changed; see `Parallel.ease`."""


def _recomputed(self: nn.Module, forward: Callable[..., Any], *args: Any, compiles: bool, **kwargs: Any) -> Any:
    forward = functools.partial(_compiled, self, forward, again=True) if compiles else functools.partial(forward, self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _compiled(self: nn.Module, forward: Callable[..., Any], *args: Any, again: bool = False, **kwargs: Any) -> Any:
    """The block compiled for itself; blocks of one kind share the code that inductor keeps."""
    found = vars(self).get("compiled")
    if found is None:

        def call(args: Any, kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        found = vars(self)["compiled"] = compiled(call, f"a {type(self).__name__}", recomputed=again)
    return found(args, kwargs)


class _Reduced:
    """Calls functions so that gradients are reduced over the processes; see `Parallel.replicate`.

    DistributedDataParallel is put around the call of a function, not around a network: networks keep their attributes, and
    whatever an objective does with them is one forward pass. Weights that FSDP2 has sharded reduce their gradients
    themselves; beside them only those that stay whole are left to it.
    """

    def __init__(self, modules: list[nn.Module], sharded: bool, device: torch.device) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.roots = modules[:1] if sharded else []
        whole = [p for module in modules for p in module.parameters() if p.requires_grad and not is_sharded(p)]
        scope = _Scope(whole, device)
        self.scope = DistributedDataParallel(scope, find_unused_parameters=True, gradient_as_bucket_view=True)

    def __call__(self, function: Callable[..., Any], *args: Any, last: bool = True) -> Any:
        averaging.begin()
        for root in self.roots:
            root.set_requires_gradient_sync(last)  # type: ignore[operator]
        with contextlib.nullcontext() if last else self.scope.no_sync():
            result = self.scope(function, *args)
        if last:
            averaging.begin(result)
        if not torch.is_grad_enabled():  # no backward pass, after which gathered weights are given back
            for part in (part for root in self.roots for part in root.modules()):
                getattr(part, "reshard", lambda: None)()
        return result


class _Scope(nn.Module):
    """Holds parameters, and calls functions that use them."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        super().__init__()
        self.parameters_used = nn.ParameterList(parameters)
        # Where DDP finds none that is never used, it warns at length.
        self.never_used = nn.Parameter(torch.zeros(1, device=device, dtype=torch.float32))

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)
