"""In which arithmetic a network computes its time embedding.

The consistency tangent contains the time derivative of everything between t and the scales, shifts and gates that it becomes.
That path has to be computed in float32 or higher, also where the rest of the network runs in half precision (Lu and Song 2025,
section 4.1): with 8 bits a time of 1.5 is known to 0.004 only, and the derivative is that of the rounding. A network of one's
own under autocast computes it in bfloat16 unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trigflow.conditions import Conditions

HALF = (torch.bfloat16, torch.float16)
MOVES = frozenset({"_to_copy", "copy_", "clone", "cat", "stack", "split", "detach", "_unsafe_view"})
"""Operations that compute nothing: where data goes, or its dtype. Views are recognized by their memory."""


@dataclass(frozen=True)
class Arithmetic:
    """The operations that depend on the time and not yet on the image."""

    operations: int
    """How many."""
    half: int
    """How many of them in bfloat16 or float16."""
    dtype: str
    """The coarsest dtype among them: float64, float32, float16 or bfloat16."""


def time_arithmetic(network: Callable[..., Any], x: Tensor, t: Tensor, conditions: Conditions) -> Arithmetic | None:
    """Watch one evaluation `network(x, t, **conditions)` and tell the arithmetic of its time embedding.

    Whatever is computed from t and not from x is followed by its memory, so the network may be any. A last conversion to
    half precision, for use beside the image, is no computation and does not count.

    Args:
        network: called once, without gradients.
        x: input of the image, `(b, ...)`; a sample or two suffice.
        t: times `(b,)`.
        conditions: what else the network is told.

    Returns:
        None where nothing can be seen: a network without a time, or of operations that PyTorch does not show.
    """
    watch = _Watch(x, t)
    with torch.no_grad(), watch:
        network(x, t, **conditions)
    if not watch.dtypes:
        return None
    coarsest = max(watch.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    half = sum(dtype in HALF for dtype in watch.dtypes)
    return Arithmetic(len(watch.dtypes), half, str(coarsest).removeprefix("torch."))


class _Watch(TorchDispatchMode):
    """Follows which memory depends on t and which on x, and keeps the dtype of every operation on t alone."""

    def __init__(self, x: Tensor, t: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []  # so that no memory is used twice
        self.from_t: set[int] = set()
        self.from_x: set[int] = set()
        self.dtypes: list[torch.dtype] = []
        self._note([t], from_t=True, from_x=False)
        self._note([x], from_t=False, from_x=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        memory = {_memory(x) for x in inputs}
        from_t, from_x = bool(memory & self.from_t), bool(memory & self.from_x)
        outputs = _tensors(result)
        self._note(outputs, from_t, from_x)
        if from_t and not from_x and not self._moves(func, outputs, memory):
            dtypes = [x.dtype for x in [*inputs, *outputs] if x.is_floating_point()]
            if dtypes:
                self.dtypes.append(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        return result

    def _note(self, tensors: list[Tensor], from_t: bool, from_x: bool) -> None:
        self.kept += tensors
        memory = {_memory(x) for x in tensors}
        if from_t:
            self.from_t |= memory
        if from_x:
            self.from_x |= memory

    def _moves(self, func: Any, outputs: list[Tensor], memory: set[int]) -> bool:
        view = not func._schema.is_mutable and all(_memory(x) in memory for x in outputs)
        return view or func._schema.name.split("::")[1] in MOVES


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
