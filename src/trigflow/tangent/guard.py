"""Custom `torch.autograd.Function`s would swallow a tangent without a word; while `jvp` runs they refuse one.

But for one of PyTorch's own, the identity behind the full backward hooks of modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import function as autograd_function
from torch.nn.modules._functions import BackwardHookFunction

from trigflow.tangent.dual import HANDLERS, Dual, call, has_dual, pair, strip
from trigflow.tangent.errors import TangentError, error

# Function.apply ends in super().apply, looked up at each call, which this base class does not define itself. A check
# put there is met also by names bound long before, as in `custom = Custom.apply` at the top of a module.
BASE: Any = autograd_function._SingleLevelFunction


def checked_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`autograd.Function.apply` for all arguments but duals."""
    if has_dual(args) or has_dual(kwargs):
        if cls is BackwardHookFunction:
            return call(hooked, args, None)
        raise refusal(cls)
    return super(BASE, cls).apply(*args, **kwargs)


def hooked(*tensors: Any) -> Any:
    """The identity by which the full backward hooks of a module get their place on the graph."""
    return BackwardHookFunction.apply(*tensors)  # type: ignore[no-untyped-call]


def _hooked_duals(func: Any, *tensors: Any) -> Any:
    primals = func(*strip(tensors))
    return tuple(pair(p, x.tangent) if type(x) is Dual else p for p, x in zip(primals, tensors, strict=True))


HANDLERS[hooked] = _hooked_duals


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
