"""Tangents in plain tensors: `y = torch.zeros(n, d)`, `y[mask] = f(x)`, and whatever reads `y` afterwards.

The variables of a function go on pointing at the plain tensor, so the tangent is kept beside it: the run has a `Shadow` for
the tensor that owns the memory, and a view of it has the same view of the shadow. From the first such write to the end of
the run a torch function mode gives every function a `Dual` in place of a plain tensor with a shadow. A network that never
writes so never meets the mode.

Only a tensor made inside the call may take a tangent; with one that outlives it (a parameter, a buffer, a constant input, a
variable outside) it would be lost. PyTorch does not say when a tensor was made, Python does: its garbage collector lists
young objects in the order in which they were made, and does not move them while `jvp` runs, because it is switched off. A
tensor was made inside if it comes after its `Run` in that list, and no tensor that does not has a part in its memory, as
there is behind `parameter.detach()`. After a `gc.collect()` of its own, a function cannot write into what it made before.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, overrides

from trigflow.tangent import dual
from trigflow.tangent.dual import OWN, RUN, VALUE_FREE, Dual, Run, has_dual, like, no_grad
from trigflow.tangent.errors import TangentError, error, function_name


class Shadow(NamedTuple):
    """The tangent of the tensor `owner` of a memory, in the same layout, right for one version of it."""

    owner: Callable[[], Tensor | None]
    tangent: Tensor
    version: int


def owner_of(x: Tensor) -> Tensor:
    """The tensor of which `x` is a view, or itself."""
    return x if x._base is None else x._base


def _shadow(x: Tensor) -> Shadow | None:
    now, owner = RUN.get(), owner_of(x)
    found = None if now is None else now.shadows.get(id(owner))
    return found if found is not None and found.owner() is owner else None


def _part(tangent: Tensor, x: Tensor) -> Tensor:
    """The view of the tangent of its owner that corresponds to `x`."""
    owner = owner_of(x)
    if x is owner:
        return tangent
    return tangent.as_strided(x.shape, x.stride(), x.storage_offset() - owner.storage_offset())


def adopt(func: Any, x: Any) -> Any:
    """A plain tensor into which `func` is about to write a tangent, as a `Dual` with a tangent of zeros.

    Tensors of integers take none: what is written into them is rounded.
    """
    now = RUN.get()
    if not isinstance(x, Tensor) or now is None or x.layout != torch.strided:
        raise _refused(func, "that carries none")
    if not (x.is_floating_point() or x.is_complex()):
        return x
    owner = owner_of(x)
    if _shadow(x) is None:
        if owner.dtype != x.dtype or owner.is_conj() != x.is_conj() or owner.is_neg() != x.is_neg():
            raise _refused(func, "of another type")
        if not _made_inside(now, owner):
            raise _refused(func, "made outside of the call")
        with no_grad():
            zeros = torch.empty_strided(owner.shape, owner.stride(), dtype=owner.dtype, device=owner.device).zero_()
        now.shadows[id(owner)] = Shadow(weakref.ref(owner), zeros, owner._version)
        if now.watch is None:
            now.watch = Watch(now)
            # Below all others: their contexts take the topmost mode away when they end.
            _restack([now.watch, *overrides._get_current_function_mode_stack()])
    return Dual(x, tangent_of(x))  # type: ignore[arg-type]


def _made_inside(now: Run, owner: Tensor) -> bool:
    young = gc.get_objects(generation=0)
    places = {id(thing): place for place, thing in enumerate(young)}
    start = places.get(id(now), -1)  # if it has grown old, all that are young were made since
    memory = owner.untyped_storage()
    others = torch._C._storage_Use_Count(memory._cdata) - 2  # beside `memory` and `owner`
    if others > 0:
        tensors = (t for t in young[start + 1 :] if isinstance(t, Tensor) and type(t) is not Dual and t.layout == torch.strided)
        others -= sum(t is not owner and t.untyped_storage()._cdata == memory._cdata for t in tensors)
    return places.get(id(owner), -1) > start and others <= 0


def _refused(func: Any, which: str) -> TangentError:
    return error(
        f"{function_name(func)} writes a tangent into a tensor {which}, where it would be lost",
        "expected a tensor made inside the call",
        "write into a .clone() of it or into torch.zeros(...), or use a function that returns its result",
    )


def record(x: Tensor, tangent: Tensor) -> None:
    """Note the tangent of `x` after a write to it, if its memory has a shadow."""
    found = _shadow(x)
    if found is not None:
        with no_grad():
            whole = found.tangent.clone()  # the old one is lent to values that were read before
            _part(whole, x).copy_(tangent)
        RUN.get().shadows[id(owner_of(x))] = Shadow(found.owner, whole, x._version)  # type: ignore[union-attr]


def tangent_of(x: Tensor) -> Tensor | None:
    """The tangent of what the memory of `x` holds now, if it has a shadow."""
    found = _shadow(x)
    if found is None:
        return None
    if found.version != x._version or x.dtype != found.tangent.dtype:
        raise error(
            "a tensor that carries a tangent was written in place or is read through another tensor that shares its memory",
            "expected writes through the tensor that is used afterwards, and one type",
            "copy one of the two with .clone() before the write, or use the form that returns a result",
        )
    return _part(found.tangent, x)


def lifted(value: Any) -> Any:
    """`value` with each plain tensor that has a shadow, in tuples, lists and dicts, as a `Dual`; `value` inside of a rule."""
    now = RUN.get()
    if now is None or not now.lifting:
        return value
    now.lifting = False
    try:
        return _lifted(value)
    finally:
        now.lifting = True


def _lifted(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        items = [_lifted(v) for v in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else like(value, items)
    if type(value) is dict:
        return {k: _lifted(v) for k, v in value.items()}
    tangent = tangent_of(value) if isinstance(value, Tensor) and type(value) is not Dual else None
    return value if tangent is None else Dual(value, tangent)


class Watch(overrides.TorchFunctionMode):
    """Gives torch functions the duals of plain tensors; does nothing while `run.lifting` is false, inside of a rule."""

    def __init__(self, run: Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        field = getattr(func.__self__, "__name__", None) if name in ("__get__", "__set__") else None
        if not self.owner.lifting or (name == "__get__" and field in VALUE_FREE):
            return func(*args, **kwargs)
        given, options = lifted(args), lifted(kwargs)
        if not has_dual(given) and not has_dual(options):
            return func(*args, **kwargs)
        if field is not None and type(given[0]) is Dual:
            return getattr(given[0], field) if name == "__get__" else setattr(given[0], field, *given[1:])
        if name in OWN and getattr(Tensor, name, None) is func:
            return getattr(Dual, name)(*given, **options)
        return dual.call(func, given, options)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """`dual.run`, on duals alone, with the mode out of the way of what a rule calls."""
        hidden = overrides._get_current_function_mode() is self
        if hidden:
            overrides._pop_mode()
        try:
            args, kwargs = lifted(args), lifted(kwargs)
            self.owner.lifting = False
            return dual.run(func, args, kwargs)
        finally:
            self.owner.lifting = True
            if hidden:
                overrides._push_mode(self)


def _restack(modes: list[Any]) -> None:
    """Make `modes` the torch function modes of this thread, the lowest first."""
    while torch._C._len_torch_function_stack():
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)


def end(run: Run) -> None:
    """Take the mode of a run off the stack, and let go of its tangents."""
    if run.watch is not None:
        _restack([mode for mode in overrides._get_current_function_mode_stack() if mode is not run.watch])
        run.watch, run.lifting = None, False
        run.shadows.clear()
