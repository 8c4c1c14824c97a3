"""What of PyTorch takes tensors past every torch function: while `jvp` runs, it refuses those that carry a tangent.

These are the doors of the transforms of `torch.func` and others, TorchScript, and custom `torch.autograd.Function`s, but for
those with a forward derivative (`jvp`) of their own and for PyTorch's identity behind the full backward hooks of modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import function as autograd_function
from torch.nn.modules._functions import BackwardHookFunction

from trigflow.tangent.dispatch import replayed_draws, same_values, torchscript
from trigflow.tangent.dual import HANDLERS, Dual, call, has_dual, no_grad, pair, strip
from trigflow.tangent.errors import DERIVATIVES, TangentError, error
from trigflow.tangent.written import lifted

# Function.apply ends in super().apply, looked up at each call, which this base class does not define itself. A check
# put there is met also by names bound long before, as in `custom = Custom.apply` at the top of a module.
BASE: Any = autograd_function._SingleLevelFunction


def checked_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`autograd.Function.apply` for all arguments but duals, and for duals where the derivative is known."""
    args, kwargs = lifted(args), lifted(kwargs)
    if has_dual(args) or has_dual(kwargs):
        known = cls is BackwardHookFunction or cls.jvp is not BASE.jvp
        if not known or kwargs or any(has_dual(a) for a in args if type(a) is not Dual):
            raise refusal(cls)
        return call(applied, (cls, *args), None)
    return super(BASE, cls).apply(*args, **kwargs)


def applied(cls: Any, *args: Any) -> Any:
    """`cls.apply` as a function with a handler."""
    return cls.apply(*args)


applied.__qualname__ = "torch.autograd.Function.apply"


def _applied_to_duals(func: Any, cls: Any, *args: Any) -> Any:
    """The output of a plain run, and the tangent by the Function's own `jvp` in a second run, off the graph."""
    if cls is BackwardHookFunction:
        primals = func(cls, *strip(args))
        return tuple(pair(p, x.tangent) if type(x) is Dual else p for p, x in zip(primals, args, strict=True))
    duals = [x for x in args if type(x) is Dual]
    given = [t for x in duals for t in (x.primal, x.tangent)]
    versions = [t._version for t in given]
    with replayed_draws(duals[0].primal.device, []) as draws:
        primal = func(cls, *strip(args))
        draws.rewind()
        try:
            with no_grad(), forward_ad.dual_level():
                again = [forward_ad.make_dual(x.primal.detach(), x.tangent) if type(x) is Dual else x for x in args]
                second = func(cls, *again)
                tangents = [forward_ad.unpack_dual(y).tangent if isinstance(y, Tensor) else y for y in _tuple(second)]
        except Exception as reason:
            raise refusal(cls, f"its jvp fails with '{str(reason).strip()[:200]}'") from reason
        if draws.used and not same_values(primal, second):
            raise refusal(cls, "it does not repeat its random draws")
    if versions != [t._version for t in given]:
        raise refusal(cls, "it writes into its inputs or their tangents")
    outputs = tuple(pair(p, t) for p, t in zip(_tuple(primal), tangents, strict=True))
    return outputs if isinstance(primal, tuple) else outputs[0]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


HANDLERS[applied] = _applied_to_duals


def refusal(cls: Any, why: str = "its forward runs outside the reach of any rule") -> TangentError:
    """`Function.apply` does not ask `__torch_function__`: its forward would run without a graph."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    remedy = "write its forward with differentiable torch functions, or .detach() its input if a zero tangent is meant"
    if cls is torch.utils.checkpoint.CheckpointFunction:
        remedy = "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    return error(
        f"autograd.Function {name} cannot carry a tangent: {why}",
        "expected torch functions, or a static jvp of its own",
        remedy,
    )


def without_duals(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, through which a transform of PyTorch takes its tensors, for all arguments but duals."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        if has_dual(lifted(args)) or has_dual(lifted(kwargs)):
            raise error("a tensor that carries a tangent in a transform of PyTorch", *DERIVATIVES)
        return original(*args, **kwargs)

    return checked


def scripted(original: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a function under `torch.jit.script` for all arguments but duals."""

    def checked(function: Any, *args: Any, **kwargs: Any) -> Any:
        if has_dual(lifted(args)) or has_dual(lifted(kwargs)):
            raise torchscript(function.name)
        return original(function, *args, **kwargs)

    return checked


def lifting(original: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a method in TorchScript, which asks no torch function mode."""
    return lambda method, *args, **kwargs: original(method, *lifted(args), **lifted(kwargs))
