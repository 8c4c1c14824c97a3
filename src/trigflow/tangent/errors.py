"""The engine's error, and where in the network it happened."""

import inspect
import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__
_HERE = __name__.rpartition(".")[0]


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


DERIVATIVES = "expected no derivative around or inside of jvp", "use torch.func.jvp for second derivatives"
_BATCH = "expected functions of a whole batch", "batch by hand, with torch functions that take the batch dimension"
_ITSELF = "expected the function itself", "leave the transform away, or do it outside of jvp"
_CONTROL = "expected a branch or loop of Python", "write if, for or while"
_ATTENTION = "expected score and mask functions of constants", "use torch.nn.functional.scaled_dot_product_attention"
_TRANSFORMS = (
    ("torch.func", "vmap", _BATCH),
    ("torch.func", "grad grad_and_value vjp jvp linearize jacrev jacfwd", DERIVATIVES),
    ("torch.func", "functionalize", _ITSELF),
    ("torch.jit", "trace", _ITSELF),
    ("torch.autograd.functional", "vjp jvp jacobian hessian vhp hvp", DERIVATIVES),
    ("torch._higher_order_ops", "cond while_loop scan associative_scan map", _CONTROL),
    ("torch.nn.attention.flex_attention", "flex_attention create_block_mask create_mask", _ATTENTION),
)
"""Functions of PyTorch that run others for a transform of them: module, names, and what is expected instead and to be done."""


def transform(frame: FrameType | None) -> tuple[str, str, str] | None:
    """The outermost transform of PyTorch that runs between `frame` and the `jvp` around it, read off the call stack.

    Returns:
        Its name with the file and line that called it, what `jvp` expects instead, and what to do; None if there is none.
    """
    codes: dict[Any, tuple[str, tuple[str, str]]] = {}
    for space, names, advice in _TRANSFORMS:
        for name in names.split():
            code = getattr(inspect.unwrap(getattr(sys.modules.get(space), name, lambda: None)), "__code__", None)
            if code is not None:
                inner = [c for c in code.co_consts if isinstance(c, CodeType)]
                codes.update(dict.fromkeys((code, *inner), (f"{space}.{name}", advice)))
    found = None
    while frame is not None and not (_module(frame).startswith(_HERE) and frame.f_code.co_name in ("_exact", "coverage")):
        caller = frame.f_back
        if frame.f_code in codes and _module(caller) != f"{_HERE}.dispatch":
            name, advice = codes[frame.f_code]
            inside, _ = codes.get(getattr(frame.f_locals.get("func"), "__code__", None), (None, None))
            if (name, inside) == ("torch.func.jacfwd", "torch.func.jacrev"):
                name = "torch.func.hessian"
            elif hasattr(torch, name.rpartition(".")[2]):
                name = name.replace("torch._higher_order_ops", "torch")
            while _module(caller).startswith((_HERE, "torch._dynamo")):
                caller = caller.f_back  # type: ignore[union-attr]
            place = f" called at {caller.f_code.co_filename}:{caller.f_lineno}" if caller is not None else ""
            found = name + place, *advice
        frame = frame.f_back
    return found


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "")


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
    """A `TangentError` that also says in which module the offending call was made.

    Inside of a transform of PyTorch the call is part of something that takes no tangents as a whole, which is named instead.
    """
    found = transform(sys._getframe(1))
    if found is not None:
        what, expected, remedy = found
        what, remedy = f"a tensor that carries a tangent in {what}", f"{remedy}, or choose method='finite-difference'"
    path = module_path()
    where = f" in module {path}" if path else ""
    return TangentError(f"{what}{where}; {expected}; {remedy}".replace("\n", " "))
