"""The one operation of this package."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent import rules as rules
from trigflow.tangent.dual import RUN, Dual, check_version, dict_like, dispatch_modes, like
from trigflow.tangent.errors import DERIVATIVES, TangentError, transform
from trigflow.tangent.finite import central_difference
from trigflow.tangent.surroundings import prepared, uncompiled
from trigflow.tangent.written import lifted

METHODS = ("exact", "finite-difference")


def jvp(
    fn: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    method: str = "exact",
    step: float | None = None,
) -> tuple[Any, Any]:
    """Output of `fn` at `x` and its derivative along `dx`: `(f(x), Df(x) dx)`.

    `fn` runs once. The output is the one that `fn(*primals)` would give, on the autograd graph in the same way, bit for
    bit, and so are the gradients that flow back from it; random draws, buffers and hooks act as in a plain run. The
    tangent comes along without a graph, at about the cost of one more forward.

    Args:
        fn: function or module of tensors, returning a tensor or nested tuples, lists and dicts of tensors. Inside it
            the inputs are `Dual` values, which answer to torch functions, tensor methods and operators.
        primals: arguments of `fn`; anything where the tangent is None.
        tangents: for each primal a tensor of its shape, dtype and device, or None if it is constant.
        method: "exact" for forward-mode differentiation; "finite-difference" for the central difference
            `(f(x + h dx) - f(x - h dx)) / 2h` of two more runs of `fn` on the same random draws, which goes through
            any function, with about two thirds of the digits (see `trigflow.tangent.finite`).
        step: relative step of the finite difference; None for `eps^(1/3)` of the coarsest dtype involved.

    Returns:
        `(out, tangent)`, the tangent nested like the output, in its dtypes, zero where an output depends on no primal.

    Raises:
        TangentError: if a tangent does not match its primal, if `fn` does something through which a tangent would be
            lost (reads values, writes into tensors from outside, calls a function without a derivative), inside a backward,
            another jvp or a transform of `torch.func`, or for an unknown method.
    """
    if method not in METHODS:
        raise TangentError(f"method {method!r}; expected one of {', '.join(map(repr, METHODS))}; choose one of them")
    if step is not None and method == "exact":
        raise TangentError(
            f"step {step} with the exact method; expected none; leave it away or choose method='finite-difference'"
        )
    check_surroundings("jvp")
    if method == "finite-difference":
        inputs(primals, tangents)
        out, tangent = central_difference(fn, tuple(primals), tuple(tangents), step)
        split(out)
        return out, tangent
    with prepared():
        return uncompiled(_exact)(fn, primals, tangents)


def check_surroundings(name: str) -> None:
    """Raise a `TangentError` where the function `name` of this package cannot work: in a backward, a jvp or a transform."""
    if torch._C._current_graph_task_id() != -1:
        raise TangentError(
            f"{name} called during a backward pass; expected a call in the forward, because recomputed forwards carry no "
            "tangents; move it out of hooks and checkpointed regions"
        )
    if RUN.get() is not None:
        raise TangentError(
            f"{name} called inside jvp; expected a call outside, because the tangents of the two would mix; use "
            "torch.func.jvp for second derivatives"
        )
    level = torch._C._functorch.peek_interpreter_stack()
    if level is not None and level.key() != torch._C._functorch.TransformType.Functionalize:
        what, expected, remedy = transform(sys._getframe(2)) or ("a transform of torch.func", *DERIVATIVES)
        raise TangentError(f"{name} called inside {what}; {expected}; {remedy}")


def _exact(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    duals = inputs(primals, tangents)
    given = [d.tangent for d in duals if type(d) is Dual]
    if torch.is_inference_mode_enabled() and any(t.is_inference() for t in given):
        raise TangentError(
            "a tangent given to jvp was made in inference mode, where PyTorch counts no writes to it; expected "
            "torch.no_grad(); replace torch.inference_mode() by it"
        )
    versions = [t._version for t in given]
    result = split(fn(*duals))
    if versions != [t._version for t in given]:
        raise TangentError(
            "a tangent given to jvp was written in place by fn; expected tangents that stay as they are; pass a .clone()"
        )
    return result


def inputs(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments for the function: duals where there is a tangent, which must match its primal."""
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise TangentError(
            f"primals of type {type(primals).__name__} and tangents of type {type(tangents).__name__}; "
            "expected two tuples; write (x,) for a single tensor"
        )
    if len(primals) != len(tangents):
        raise TangentError(
            f"{len(primals)} primals and {len(tangents)} tangents; expected one tangent, or None, for each primal; "
            "pass None where a primal is constant"
        )
    return tuple(p if t is None else _dual(p, t, i) for i, (p, t) in enumerate(zip(primals, tangents, strict=True)))


def _dual(primal: Any, tangent: Any, index: int) -> Dual:
    if type(primal) is Dual or type(tangent) is Dual:
        raise TangentError(
            f"primal {index} already carries a tangent; expected plain tensors; second derivatives are not supported, "
            "use torch.func.jvp for them"
        )
    if not isinstance(primal, Tensor) or not isinstance(tangent, Tensor):
        raise TangentError(
            f"primal {index} is {type(primal).__name__} with a tangent of type {type(tangent).__name__}; expected two "
            "tensors; pass None as the tangent of what is not a tensor"
        )
    if not (primal.is_floating_point() or primal.is_complex()):
        raise TangentError(
            f"primal {index} has dtype {primal.dtype}, which has no tangents; expected floating point; pass None"
        )
    if primal.shape != tangent.shape or primal.dtype != tangent.dtype or primal.device != tangent.device:
        raise TangentError(
            f"tangent {index} is {tangent.dtype} {tuple(tangent.shape)} on {tangent.device}; expected "
            f"{primal.dtype} {tuple(primal.shape)} on {primal.device} like its primal; "
            "convert it with .to(primal) and .expand_as(primal)"
        )
    tangent = tangent.detach()
    if primal.layout != torch.strided:
        return Dual(primal, tangent)
    if tangent.untyped_storage()._cdata == primal.untyped_storage()._cdata:
        tangent = tangent.clone()
    if tangent.stride() != primal.stride():
        # Kernels are fastest, and memory formats kept, when both have the same order in memory.
        tangent = torch.empty_like(primal, requires_grad=False).copy_(tangent)
    return Dual(primal, tangent)


def split(value: Any) -> tuple[Any, Any]:
    """Primals and tangents of a nested output; zeros for tensors that carry none.

    Raises:
        TangentError: if something in it is not a tensor.
    """
    value = lifted(value)
    if type(value) is Dual:
        check_version(value)
        tangent = value.tangent
        if tangent.stride() != value.primal.stride():
            with torch.no_grad():
                tangent = torch.empty_like(value.primal, requires_grad=False).copy_(tangent)
        # A tracer records operators, and not that no gradient flowed through these.
        return value.primal, tangent.detach() if dispatch_modes() else tangent
    if isinstance(value, Tensor):
        return value, torch.zeros_like(value, requires_grad=False)
    if isinstance(value, dict):
        pairs = {k: split(v) for k, v in value.items()}
        first, second = ({k: both[i] for k, both in pairs.items()} for i in (0, 1))
        return dict_like(value, first), dict_like(value, second)
    if isinstance(value, (tuple, list)):
        items = [split(v) for v in value]
        return like(value, [p for p, _ in items]), like(value, [t for _, t in items])
    raise TangentError(
        f"fn returned {'None' if value is None else 'a value of type ' + type(value).__name__}; expected a tensor or "
        "nested tuples, lists and dicts of tensors; return only tensors from fn"
    )
