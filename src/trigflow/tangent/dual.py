"""A value and its derivative along one direction, passed through a network in place of the value.

Source: forward-mode differentiation with dual numbers; `Dual(x, dx)` stands for `x + dx eps` with `eps^2 = 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.errors import TangentError, error, function_name

Handler = Callable[..., Any]

HANDLERS: dict[Any, Handler] = {}
"""From a torch function to `handler(func, *args, **kwargs)`, which returns what the function should return."""

OBSERVER: ContextVar[Callable[..., Any] | None] = ContextVar("observer", default=None)
"""Stands in for `run` while a coverage report is made."""

# Facts about a tensor that do not depend on its values, read from the primal.
VALUE_FREE = frozenset(
    "shape dtype device ndim layout requires_grad is_leaf grad_fn grad output_nr itemsize nbytes names is_cuda is_cpu "
    "is_xpu is_mps is_meta is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_mtia is_hpu is_ipu is_vulkan "
    "is_maia is_xla is_ort _version _base _backward_hooks retains_grad name".split()
)

# Attributes that are linear functions of the tensor, as the method or function that computes them.
LINEAR_ATTRIBUTES: dict[str, Any] = {
    "mT": lambda x: x.transpose(-2, -1),
    "T": lambda x: x.permute(*range(x.ndim - 1, -1, -1)),
    "H": lambda x: torch.adjoint(x),
    "mH": lambda x: torch.adjoint(x),
    "real": lambda x: torch.real(x),
    "imag": lambda x: torch.imag(x),
}

_backward_in_progress = torch._C._current_graph_task_id


class Dual:
    """A tensor `primal` on the autograd graph together with its `tangent`, of the same shape and dtype, off the graph.

    Not a `torch.Tensor`: `isinstance(x, torch.Tensor)` is false. Everything else that a network does to a tensor works:
    torch functions arrive in `__torch_function__`, methods and attributes in `__getattr__`, operators below.
    """

    __slots__ = ("primal", "tangent")
    __array_priority__ = 1000
    __hash__ = object.__hash__

    def __init__(self, primal: Tensor, tangent: Tensor) -> None:
        self.primal = primal
        self.tangent = tangent

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in LINEAR_ATTRIBUTES:
            return LINEAR_ATTRIBUTES[name](self)
        function = getattr(Tensor, name, None)
        if function is None or name.startswith("__"):
            raise AttributeError(f"'Dual' object has no attribute '{name}'")
        if not callable(function):
            raise error(
                f"attribute '{name}' of a tensor that carries a tangent would lose the tangent",
                "expected torch functions and methods",
                "write it with differentiable functions, or call .detach() first if a zero tangent is meant",
            )
        method = _method(function)
        setattr(Dual, name, method)
        return method.__get__(self)

    def __repr__(self) -> str:
        return f"Dual(primal={self.primal!r}, tangent={self.tangent!r})"

    def __format__(self, spec: str) -> str:
        return self.primal.detach().__format__(spec)

    def __len__(self) -> int:
        return len(self.primal)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def __contains__(self, element: Any) -> bool:
        return strip(element) in self.primal

    def __bool__(self) -> bool:
        return bool(self.primal)

    def __int__(self) -> int:
        return int(self.primal)

    def __float__(self) -> float:
        raise value_read("float()")

    def __complex__(self) -> complex:
        raise value_read("complex()")

    def __index__(self) -> int:
        raise value_read("use as an index")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise value_read("numpy conversion")

    def item(self) -> Any:
        raise value_read(".item()")

    def tolist(self) -> Any:
        raise value_read(".tolist()")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise value_read(".numpy()")

    def data_ptr(self) -> int:
        raise value_read(".data_ptr()")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise value_read("DLPack export")

    def __dlpack_device__(self) -> Any:
        # Called by torch.tensor, torch.as_tensor and x.new_tensor, which do not ask __torch_function__.
        raise value_read("making a new tensor (torch.tensor, torch.as_tensor, new_tensor)")


def value_read(how: str) -> TangentError:
    """The error for reading the values of a dual past every rule."""
    return error(
        f"{how} of a tensor that carries a tangent would lose the tangent",
        "expected torch functions all the way from the inputs to the output",
        "leave the conversion away, or call .detach() first if a zero tangent is meant",
    )


def _method(function: Any) -> Any:
    """A method of `Dual` that hands the tensor method `function` to its rule."""

    def method(self: Dual, *args: Any, **kwargs: Any) -> Any:
        return call(function, (self, *args), kwargs)

    return method


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Run `func` on duals, unless a backward is in progress.

    Activation checkpointing runs the forward again inside backward; only primals are wanted there.
    """
    if _backward_in_progress() != -1:
        return func(*strip(args), **strip(kwargs or {}))
    observer = OBSERVER.get()
    if observer is not None:
        return observer(func, args, kwargs)
    return run(func, args, kwargs)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Run `func` by its rule. Cold cases (no rule yet, out=, in place) leave the straight line."""
    handler = HANDLERS.get(func)
    if handler is None:
        from trigflow.tangent.dispatch import resolve

        handler = resolve(func)
    if not kwargs:
        return handler(func, *args)
    if "out" in kwargs:
        if kwargs["out"] is not None:
            raise error(
                f"{function_name(func)} with out= would lose a tangent",
                "expected a function that returns its result",
                "leave out= away",
            )
        kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    if kwargs.get("inplace"):
        raise error(
            f"{function_name(func)} with inplace=True would lose a tangent",
            "expected inplace=False",
            "set module.inplace = False, which changes no value",
        )
    return handler(func, *args, **kwargs)


def strip(value: Any) -> Any:
    """`value` with every `Dual` in nested tuples, lists and dicts replaced by its primal."""
    if type(value) is Dual:
        return value.primal
    if type(value) is tuple:
        return tuple(strip(v) for v in value)
    if type(value) is list:
        return [strip(v) for v in value]
    if type(value) is dict:
        return {k: strip(v) for k, v in value.items()}
    return value


def has_dual(value: Any) -> bool:
    """Whether a `Dual` hides anywhere in nested tuples, lists and dicts."""
    if type(value) is Dual:
        return True
    if isinstance(value, (tuple, list)):
        return any(has_dual(v) for v in value)
    if isinstance(value, dict):
        return any(has_dual(v) for v in value.values())
    return False


class no_grad:
    """`torch.no_grad()` at a sixth of its price; every tangent is computed inside one."""

    __slots__ = ("before",)

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *args: object) -> None:
        torch._C._set_grad_enabled(self.before)


def pair(primal: Any, tangent: Any) -> Any:
    """Outputs of a function and their tangents as duals; integer and boolean outputs stay plain tensors.

    The tangent takes the dtype and shape of the primal.
    """
    if isinstance(primal, Tensor):
        if tangent is None or not (primal.is_floating_point() or primal.is_complex()):
            return primal
        if tangent.dtype != primal.dtype:
            tangent = tangent.to(primal.dtype)
        if tangent.shape != primal.shape:
            tangent = tangent.expand(primal.shape)
        return Dual(primal, tangent)
    if isinstance(primal, (tuple, list)):
        pairs = [pair(p, t) for p, t in zip(primal, tangent, strict=True)]
        return pairs if type(primal) is list else _like(primal, pairs)
    return primal


def _like(outputs: Any, pairs: list[Any]) -> Any:
    """A tuple of the kind of `outputs`: plain, `torch.return_types.*` or a named tuple."""
    if type(outputs) is tuple:
        return tuple(pairs)
    if hasattr(outputs, "_fields"):
        return type(outputs)(*pairs)
    return type(outputs)(pairs)


def _operator(function: Any) -> Any:
    def operator(self: Dual, *args: Any) -> Any:
        return call(function, (self, *args), None)

    return operator


for _name in VALUE_FREE:
    setattr(Dual, _name, property(attrgetter(f"primal.{_name}")))
for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs "
    "getitem setitem eq ne lt le gt ge invert and or xor iadd isub imul itruediv ifloordiv imod ipow imatmul"
).split():
    if hasattr(Tensor, f"__{_name}__"):
        setattr(Dual, f"__{_name}__", _operator(getattr(Tensor, f"__{_name}__")))
