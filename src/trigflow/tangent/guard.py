"""Custom `torch.autograd.Function`s would swallow a tangent without a word; while `jvp` runs they refuse one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import function as autograd_function

from trigflow.tangent.dual import has_dual
from trigflow.tangent.errors import TangentError, error

# Function.apply ends in super().apply, looked up at each call, which this base class does not define itself. A check
# put there is met also by names bound long before, as in `custom = Custom.apply` at the top of a module.
_BASE: Any = autograd_function._SingleLevelFunction
_lock = threading.Lock()
_depth = 0


def _checked_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if has_dual(args) or has_dual(kwargs):
        raise refusal(cls)
    return super(_BASE, cls).apply(*args, **kwargs)


def refusal(cls: Any) -> TangentError:
    """`Function.apply` does not ask `__torch_function__`: its forward would run without a graph."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    remedy = "write its forward with differentiable torch functions, or .detach() its input if a zero tangent is meant"
    if cls is torch.utils.checkpoint.CheckpointFunction:
        remedy = "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    return error(
        f"autograd.Function {name} cannot carry a tangent: its forward runs outside the reach of any rule",
        "expected torch functions",
        remedy,
    )


@contextmanager
def watched_functions() -> Iterator[None]:
    """While open, `autograd.Function.apply` raises for a dual argument; for all others it is unchanged."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _BASE.apply = classmethod(_checked_apply)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                del _BASE.apply
