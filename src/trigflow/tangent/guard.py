"""What of PyTorch takes tensors past every torch function: while `jvp` runs, it refuses those that carry a tangent.

These are the doors of the transforms of `torch.func` and others, TorchScript, and custom `torch.autograd.Function`s, but for
those with a forward derivative (`jvp`) of their own, for those that only run a function again in backward, and for PyTorch's
identity behind the full backward hooks of modules.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
        if recomputes(cls, args) and not kwargs:
            return recomputed(cls, args)
        known = cls is BackwardHookFunction or cls.jvp is not BASE.jvp
        if not known or kwargs or any(has_dual(a) for a in args if type(a) is not Dual):
            raise refusal(cls)
        return call(applied, (cls, *args), None)
    return plain_apply(cls, *args, **kwargs)


APPLY: ContextVar[Callable[..., Any] | None] = ContextVar("APPLY", default=None)
"""What runs `apply` in its place, called with the class, the original and the arguments; for tracing."""


def plain_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`autograd.Function.apply` as PyTorch has it, or as a tracer wants it."""
    original, traced = super(BASE, cls).apply, APPLY.get()
    return original(*args, **kwargs) if traced is None else traced(cls, original, *args, **kwargs)


@contextmanager
def applying() -> Iterator[None]:
    """While open, every `autograd.Function.apply` asks `APPLY`, outside of `jvp` too."""
    before = vars(BASE).get("apply")
    BASE.apply = classmethod(plain_apply)
    try:
        yield
    finally:
        if before is None:
            del BASE.apply
        else:
            BASE.apply = before


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


def recomputes(cls: Any, args: tuple[Any, ...]) -> bool:
    """Whether a Function looks like activation checkpointing: given one callable, it enables gradients in its backward."""
    code = getattr(inspect.unwrap(cls.backward), "__code__", None)
    codes = (code, *getattr(code, "co_consts", ()))
    names = {name for c in codes for name in getattr(c, "co_names", ())}
    callables = sum(callable(a) and not isinstance(a, Tensor) for a in args)
    return callables == 1 and bool(names & {"enable_grad", "set_grad_enabled"})


def recomputed(cls: Any, args: tuple[Any, ...]) -> Any:
    """The result of a Function that only runs its callable, which is run under non-reentrant checkpointing instead.

    Reentrant `torch.utils.checkpoint` and the `CheckpointFunction`s that others wrote are such. Their forward runs as it is,
    once, with a context that remembers nothing; it must call the callable once and return its result itself, not a copy. That
    its backward is the derivative of the callable is taken on trust: there is no other reason to run it with gradients.
    Parameters that only the callable holds get gradients too, and backward repeats its draws, even if the original did not.
    """
    place = next(i for i, a in enumerate(args) if callable(a) and not isinstance(a, Tensor))
    recording = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    results: list[Any] = []

    def body(*inputs: Any, **options: Any) -> Any:
        with torch.set_grad_enabled(recording):
            results.append(torch.utils.checkpoint.checkpoint(args[place], *inputs, use_reentrant=False, **options))
        return results[-1]

    methods = "save_for_backward save_for_forward mark_dirty mark_non_differentiable set_materialize_grads".split()
    context = types.SimpleNamespace(**dict.fromkeys(methods, lambda *args: None))
    context.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
    with torch.no_grad():
        out = cls.forward(context, *args[:place], body, *args[place + 1 :])
    if len(results) != 1 or not all(a is b for a, b in zip(_tuple(out), _tuple(results[0]), strict=True)):
        raise refusal(cls, "it does more than to run its callable once")
    return out


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


HANDLERS[applied] = _applied_to_duals


def refusal(cls: Any, why: str = "its forward runs outside the reach of any rule") -> TangentError:
    """`Function.apply` does not ask `__torch_function__`: its forward would run without a graph."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    remedy = "write its forward with differentiable torch functions, or .detach() its input if a zero tangent is meant"
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
