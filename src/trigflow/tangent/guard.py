"""Custom `torch.autograd.Function`s would swallow a tangent without a word; while `jvp` runs they refuse one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trigflow.tangent.dual import has_dual
from trigflow.tangent.errors import error

_Function = torch.autograd.Function
_lock = threading.Lock()
_depth = 0
_original = _Function.__dict__["apply"]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if has_dual(args) or has_dual(kwargs):
        raise refusal(cls)
    return _original.__get__(None, cls)(*args, **kwargs)


def refusal(cls: Any) -> Exception:
    """`Function.apply` does not ask `__torch_function__`: its forward would run without a graph."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    remedy = "write its forward with differentiable torch functions, or .detach() its input if a zero tangent is meant"
    if name == "torch.utils.checkpoint.CheckpointFunction":
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
            _Function.apply = classmethod(_apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _Function.apply = _original  # type: ignore[method-assign]
