"""From names to function objects: one torch function has many faces, and a rule must answer to all of them."""

from operator import attrgetter
from typing import Any

import torch
from torch.nn import functional as F

from trigflow.tangent.dual import HANDLERS, Handler

NAMES: dict[str, Handler] = {}
"""The same rules by bare name, for `torch.ops.aten` calls, whose function objects are made on demand."""

_NAMESPACES: tuple[Any, ...] = (torch, torch.Tensor, F, torch._C._nn, torch._C._VariableFunctions)


def register(handler: Handler, *names: str) -> None:
    """Let `handler` answer for every function called `name` in torch, torch.Tensor, torch.nn.functional and torch._C._nn.

    A dotted name (`linalg.vector_norm`, `Tensor.view`) stands for that one function of torch. Names that this version of
    torch does not have are passed over.
    """
    for name in names:
        if "." in name:
            try:
                found = [attrgetter(name)(torch)]
            except AttributeError:
                continue
        else:
            NAMES[name] = handler
            found = [getattr(space, name, None) for space in _NAMESPACES]
        for function in found:
            if callable(function):
                HANDLERS[function] = handler
