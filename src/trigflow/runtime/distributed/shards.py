"""Tensors of which each process holds a part.

FSDP2 keeps a parameter as a `DTensor`: its first dimension is cut into one piece a process. Optimizers and averages work on
the pieces; files hold whole tensors, so that they do not depend on the number of processes.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from trigflow.runtime.distributed.processes import is_first

P = TypeVar("P", bound=Tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold parts of this tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # a slow import, which whoever shards has made
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes where they hold parts of it: every one of them has to call this."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def piece(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; the tensor itself where it is whole."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        return sharded.to_local()  # type: ignore[no-any-return]


def cut_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor that is whole in every process, held in parts as `model` is; nothing is sent."""
    if not is_sharded(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = model
    return distribute_tensor(tensor.to(model.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def place_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the part of a sharded tensor that this process holds begins in the whole, and its shape."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({"": tensor})
    data = planner.create_local_plan().items[0].tensor_data
    assert data is not None
    return tuple(data.chunk.offsets), tuple(data.chunk.sizes)


def from_piece(local: Tensor, model: Tensor) -> Tensor:
    """The tensor of which every process has its part, `local`, held as `model` is; nothing is sent."""
    from torch.distributed.tensor import DTensor

    sharded: Any = model
    return DTensor.from_local(
        local.to(model.device), sharded.device_mesh, sharded.placements, shape=model.shape, stride=model.stride()
    )


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in main memory, for a file. Every process has to call this; all but the first get an empty dict."""
    result = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if is_first():
            result[name] = gathered.cpu()
    return result


def by_kind(parameters: Iterable[P]) -> list[list[P]]:
    """Sharded tensors and whole ones apart, as operations on lists take no mixture; without empty lists."""
    parameters = list(parameters)
    kinds = [[p for p in parameters if is_sharded(p) is sharded] for sharded in (True, False)]
    return [kind for kind in kinds if kind]
