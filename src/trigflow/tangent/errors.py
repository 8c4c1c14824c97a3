"""The engine's error, and where in the network it happened."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__


class TangentError(ValueError):
    """A tangent would be lost or wrong: the function is named, with its module and the way out.

    The one-line message has the usual form "what was wrong; what was expected; what to do".
    """


def module_path() -> str | None:
    """Dotted path of the module whose forward is running, e.g. `encoder.blocks.3.norm`, read off the call stack.

    Nothing is kept while a network runs; only an error that is about to be raised looks for the path.
    """
    modules: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                modules.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return None
    inner, outer = modules[0], modules[-1]
    names = {id(module): name for name, module in outer.named_modules()}
    path = names.get(id(inner))
    kind = type(inner).__name__
    return f"{path} ({kind})" if path else kind


def function_name(func: Any) -> str:
    """`torch.nn.functional.silu`, `torch.Tensor.view`, ...: the name a reader would search for."""
    try:
        name = torch.overrides.resolve_name(func)
    except Exception:
        name = None
    if not name:
        name = str(getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or func)
    return name.replace("_VariableFunctionsClass.", "torch.")


def error(what: str, expected: str, remedy: str) -> TangentError:
    """A `TangentError` that also says in which module the offending call was made."""
    path = module_path()
    where = f" in module {path}" if path else ""
    return TangentError(f"{what}{where}; {expected}; {remedy}".replace("\n", " "))
