"""The one operation of this package, and a report on what it would do to a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent import rules as rules
from trigflow.tangent.dual import Dual
from trigflow.tangent.errors import TangentError


def jvp(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Output of `fn` and its derivative along `tangents`: `(f(x), Df(x) dx)`."""
    if len(primals) != len(tangents):
        raise TangentError(
            f"{len(primals)} primals and {len(tangents)} tangents; expected one tangent, or None, for each primal; "
            "pass None where a primal is constant"
        )
    inputs = [p if t is None else Dual(p, t.detach()) for p, t in zip(primals, tangents, strict=True)]
    return split(fn(*inputs))


def split(value: Any) -> tuple[Any, Any]:
    """Primals and tangents of a nested output, zeros for tensors that carry none."""
    if type(value) is Dual:
        return value.primal, value.tangent
    if isinstance(value, Tensor):
        with torch.no_grad():
            return value, torch.zeros_like(value)
    if isinstance(value, dict):
        pairs = {k: split(v) for k, v in value.items()}
        return {k: p for k, (p, _) in pairs.items()}, {k: t for k, (_, t) in pairs.items()}
    if isinstance(value, (tuple, list)):
        items = [split(v) for v in value]
        kind = type(value)
        return kind(p for p, _ in items), kind(t for _, t in items)
    raise TangentError(f"fn returned {type(value).__name__}; expected tensors; return the tensors only")
