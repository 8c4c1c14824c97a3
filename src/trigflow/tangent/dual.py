"""A value and its derivative along one direction, passed through a network in place of the value.

Source: forward-mode differentiation with dual numbers; `Dual(x, dx)` stands for `x + dx eps` with `eps^2 = 0`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _python_dispatch as python_dispatch

from trigflow.tangent.errors import TangentError, error

Handler = Callable[..., Any]

HANDLERS: dict[Any, Handler] = {}
"""From a torch function to `handler(func, *args, **kwargs)`, which returns what the function should return."""

OBSERVER: ContextVar[Callable[..., Any] | None] = ContextVar("observer", default=None)
"""Stands in for `run` while a coverage report is made."""


class Run:
    """One run of a function on duals. A dual of another run has a tangent along another direction.

    Attributes:
        journal: writes into views, see inplace.py.
        stance: of the compiler, if it was loaded in this run, see surroundings.py.
        shadows, watch, lifting: plain tensors that carry tangents, see written.py.
    """

    __slots__ = ("journal", "lifting", "shadows", "stance", "watch")

    def __init__(self) -> None:
        self.journal: list[Any] = []
        self.stance: Any = None
        self.shadows: dict[int, Any] = {}
        self.watch: Any = None
        self.lifting = False


RUN: ContextVar[Run | None] = ContextVar("run", default=None)

# Facts about a tensor that do not depend on its values, read from the primal.
VALUE_FREE = frozenset(
    "shape dtype device ndim layout requires_grad is_leaf grad_fn grad output_nr itemsize nbytes names is_cuda is_cpu "
    "is_xpu is_mps is_meta is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_mtia is_hpu is_ipu is_vulkan "
    "is_maia is_xla is_ort _version _base _backward_hooks _grad _grad_fn retains_grad name".split()
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

# What a dual shows to code that looks past every torch function: one element without memory, of a rare dtype.
_SHELL = torch.empty((), dtype=torch.uint64, device="meta")
_make_shell: Callable[..., Any] = Tensor._make_subclass


def _reads(how: str) -> Any:
    """A method that reads the values of a tensor."""

    def method(self: Dual, *args: Any, **kwargs: Any) -> Any:
        raise value_read(how)

    return method


class Dual(Tensor):
    """A tensor `primal` on the autograd graph together with its `tangent`, of the same shape and dtype, off the graph.

    An instance of `torch.Tensor`, so that code which asks for one lets it through, though without elements of its own:
    torch functions arrive in `__torch_function__`, methods, attributes and operators in the members below, and both go
    to the primal and the tangent. Whatever reaches the empty shell behind them, as `torch.tensor(x)` does, raises.

    Attributes:
        primal: the value.
        tangent: its derivative; shared with other duals, hence never written.
        version: how often the memory of the primal had been written when this tangent was computed.
        run: the run of a function of which this value is a part.
    """

    __slots__ = ("primal", "run", "tangent", "version")
    __array_priority__ = 1000
    __hash__ = object.__hash__  # type: ignore[assignment]

    primal: Tensor
    tangent: Tensor
    version: int
    run: Run | None

    def __new__(cls, primal: Tensor, tangent: Tensor) -> Dual:
        self: Dual = _make_shell(cls, _SHELL)
        self.primal = primal
        self.tangent = tangent
        self.run = RUN.get()
        try:
            self.version = primal._version
        except RuntimeError as reason:
            raise error(
                "a tensor that carries a tangent was made in inference mode, where PyTorch counts no writes to it",
                "expected torch.no_grad()",
                "replace torch.inference_mode() by it",
            ) from reason
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return call(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise value_read("use as a plain number (torch.full(n, x), alpha=x)")
        raise value_read(f"a new tensor (torch.tensor, torch.as_tensor, new_tensor) or a kernel called directly ({func})")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Dual(primal={self.primal!r}, tangent={self.tangent!r})"

    def __format__(self, spec: str) -> str:
        return self.primal.detach().__format__(spec)

    def __copy__(self) -> Dual:
        check_version(self)
        return Dual(self.primal, self.tangent)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dual:
        check_version(self)
        return Dual(copy.deepcopy(self.primal, memo), copy.deepcopy(self.tangent, memo))

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

    __float__ = _reads("float()")
    __complex__ = _reads("complex()")
    __index__ = _reads("use as an index")
    __array__ = _reads("numpy conversion")
    __reduce_ex__ = _reads("pickling")
    __dlpack__ = __dlpack_device__ = _reads("DLPack export")
    item = _reads(".item()")
    tolist = _reads(".tolist()")
    numpy = _reads(".numpy()")
    data_ptr = _reads(".data_ptr()")


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


_FLAT = frozenset((int, float, bool, str, slice, type(None), Tensor, Parameter, torch.Size, torch.dtype, torch.device))
"""Types of most arguments, which hold no duals."""


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Run `func` by its rule. Cold cases (no rule yet, out=, in place) leave the straight line."""
    now = RUN.get()
    if now is not None and now.lifting:
        return now.watch.run(func, args, kwargs)
    for a in args:
        kind = type(a)
        if kind is Dual:
            if a.version != a.primal._version or a.run is not now:
                check_version(a)
        elif kind not in _FLAT and isinstance(a, (tuple, list)):
            _check_items(a)
    handler = HANDLERS.get(func)
    if handler is None:
        from trigflow.tangent.dispatch import resolve

        handler = resolve(func)
    if not kwargs:
        return handler(func, *args)
    for a in kwargs.values():
        if type(a) is Dual:
            check_version(a)
        elif type(a) not in _FLAT and isinstance(a, (tuple, list)):
            _check_items(a)
    if "axis" in kwargs or "keepdims" in kwargs:
        from trigflow.tangent.dispatch import renamed

        kwargs = renamed(func, kwargs)
    if "out" in kwargs:
        if kwargs["out"] is not None:
            from trigflow.tangent.inplace import into

            return into(func, args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    if kwargs.get("inplace"):
        from trigflow.tangent.inplace import inplace_setting

        return inplace_setting(func, args, kwargs)
    return handler(func, *args, **kwargs)


def _check_items(values: Any) -> None:
    for x in values:
        if type(x) is Dual:
            check_version(x)


def check_version(x: Dual) -> None:
    """Make sure that the tangent of `x` is that of what the memory of its primal holds now, or raise."""
    if x.run is not RUN.get():
        raise error(
            "a tensor that carries the tangent of one jvp was kept and used after it or in another",
            "expected tensors of the same run",
            "return it from fn, or keep x.detach() instead",
        )
    if x.version != x.primal._version:
        from trigflow.tangent.inplace import refresh

        refresh(x)


def strip(value: Any) -> Any:
    """`value` with every `Dual` in nested tuples, lists and dicts replaced by its primal."""
    kind = type(value)
    if kind is Dual:
        return value.primal
    if kind in _FLAT:
        return value
    if kind is tuple:
        return tuple(strip(v) for v in value)
    if kind is list:
        return [strip(v) for v in value]
    if kind is dict:
        return {k: strip(v) for k, v in value.items()}
    return like(value, [strip(v) for v in value]) if isinstance(value, (tuple, list)) and has_dual(value) else value


def has_dual(value: Any) -> bool:
    """Whether a `Dual` hides anywhere in nested tuples, lists and dicts."""
    if type(value) is Dual:
        return True
    if isinstance(value, (tuple, list)):
        return any(has_dual(v) for v in value)
    if isinstance(value, dict):
        return any(has_dual(v) for v in value.values())
    return False


dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


class no_grad:
    """`torch.no_grad()` at a sixth of its price; every tangent is computed inside one.

    Selective activation checkpointing keeps results of functions in the order of their calls, to hand them out in that
    order when backward runs the primal's functions again. What is called for a tangent must not be among them.
    """

    __slots__ = ("before", "hidden")

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self.hidden: Any = None
        if dispatch_modes() and _selective():
            self.hidden = python_dispatch._disable_current_modes()
            self.hidden.__enter__()

    def __exit__(self, *args: object) -> None:
        if self.hidden is not None:
            self.hidden.__exit__(*args)
        torch._C._set_grad_enabled(self.before)


def _selective() -> bool:
    """Whether results are being kept for selective activation checkpointing."""
    caching = torch.utils.checkpoint._CachingTorchDispatchMode
    return any(isinstance(mode, caching) for mode in python_dispatch._get_current_dispatch_mode_stack())


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
        return like(primal, [pair(p, t) for p, t in zip(primal, tangent, strict=True)])
    return primal


def like(outputs: Any, items: list[Any]) -> Any:
    """A list or tuple of the kind of `outputs`: plain, `torch.return_types.*` or a named tuple."""
    return type(outputs)(*items) if hasattr(outputs, "_fields") else type(outputs)(items)


def dict_like(outputs: Any, items: dict[Any, Any]) -> Any:
    """A dict of the kind of `outputs`; output classes of model libraries are dataclasses, which take their fields by name."""
    if is_dataclass(outputs):
        return type(outputs)(**items)  # type: ignore[misc]
    result = copy.copy(outputs)
    result.update(items)
    return result


def _operator(function: Any) -> Any:
    def operator(self: Dual, *args: Any) -> Any:
        return call(function, (self, *args), None)

    return operator


def _reflected(function: Any) -> Any:
    """`number * x`. For `tensor * x` Python asks the subclass on the right first, which leaves it to the tensor."""

    def operator(self: Dual, other: Any) -> Any:
        return NotImplemented if isinstance(other, Tensor) else call(function, (self, other), None)

    return operator


def _refused_attribute(name: str) -> property:
    def read(self: Dual) -> Any:
        raise error(
            f"attribute '{name}' of a tensor that carries a tangent would lose the tangent",
            "expected torch functions and methods",
            "write it with differentiable functions, or call .detach() first if a zero tangent is meant",
        )

    return property(read)


_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs "
        "getitem setitem eq ne lt le gt ge invert and or xor iadd isub imul itruediv ifloordiv imod ipow imatmul"
    ).split()
)


def _member(name: str) -> Any:
    """What answers to the attribute `name` of a tensor, or None to keep that of torch.Tensor."""
    if name in VALUE_FREE:
        return property(attrgetter(f"primal.{name}"))
    if name in LINEAR_ATTRIBUTES:
        return property(LINEAR_ATTRIBUTES[name])
    of_tensor = getattr(Tensor, name)
    if name in _OPERATORS:
        return _reflected(of_tensor) if name.startswith("__r") else _operator(of_tensor)
    if name.startswith("__") or name in ("_make_subclass", "_make_wrapper_subclass", "_dtensor__new__"):
        return None
    if callable(of_tensor):
        return _method(of_tensor)
    return None if name.startswith("_") else _refused_attribute(name)


OWN = frozenset(vars(Dual)) & frozenset(dir(Tensor))
"""What a dual does in its own way, not by the rule of a torch function."""

for _name in dir(Tensor):
    if _name not in vars(Dual) and (_found := _member(_name)) is not None:
        setattr(Dual, _name, _found)
