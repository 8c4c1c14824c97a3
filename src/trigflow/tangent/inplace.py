"""Functions that write into a dual: `x += y`, `x.clamp_(0)`, `x[i] = y`, `relu(x, inplace=True)`.

The primal is written by PyTorch itself, as in a plain run. The tangent is that of the form without the underscore,
computed before the write, and takes the place of the old one, whose memory others may share and is never written.

Other duals can share the memory of the primal. PyTorch counts the writes to a memory (`Tensor._version`), each dual knows
the count at which its tangent was right, and every use of a dual compares the two:

* writes to views (`x[0] *= 2`) are kept in a journal, from which other duals of that memory bring their tangents up to date;
* after any other write (through a plain tensor such as `x.detach()`, or into the tensor of which a dual is a view) the
  tangent is lost, and the use raises.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trigflow.tangent.dual import Dual, has_dual, no_grad, run, strip, value_read
from trigflow.tangent.errors import TangentError, error, function_name
from trigflow.tangent.written import adopt, owner_of, record, tangent_of


class Write(NamedTuple):
    """A write to the memory of `base`, from one version of it to the next, where `place` lies in that memory."""

    base: Tensor
    before: int
    after: int
    place: tuple[Any, ...]
    tangent: Tensor


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.storage_offset()


def _repeats(x: Tensor) -> bool:
    """Whether some elements may lie in the same place, as those of an expanded tensor do."""
    reach = 0
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1):
        if step <= reach:
            return True
        reach += step * (size - 1)
    return False


# These may read the very tensor that they write, element by element.
_ELEMENTWISE = frozenset(
    "add_ sub_ mul_ div_ true_divide_ copy_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __setitem__".split()
)


def _check_sources(func: Any, x: Dual, sources: tuple[Any, ...]) -> None:
    """Refuse what PyTorch leaves undefined: to read from memory that the same call writes."""
    name, target = name_of(func), x.primal
    if name == "__setitem__":
        with no_grad():
            part = target[strip(sources[0])]
        target = part if _storage(part) == _storage(target) else target
    for value in sources:
        source = strip(value)
        if not isinstance(source, Tensor) or source.layout != torch.strided or _storage(source) != _storage(target):
            continue
        same = _place(source) == _place(target) and (name in _ELEMENTWISE or f"{name}_" in _ELEMENTWISE)
        if not same and _overlap(source, target):
            raise error(
                f"{function_name(func)} reads a part of the memory that it writes in place",
                "expected arguments with memory of their own",
                "pass a .clone() of the argument",
            )


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()._cdata


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have elements in common."""
    if a.dtype != b.dtype:
        return True
    with no_grad():
        memory = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool, device=a.device)
        memory.as_strided(*_place(a)[1:]).fill_(True)
        return bool(memory.as_strided(*_place(b)[1:]).any())


def refresh(x: Dual) -> None:
    """Bring the tangent of a dual up to date with the writes to its memory since it was computed.

    Raises:
        TangentError: if the tangent of one of them is not known.
    """
    tangent = tangent_of(x.primal)
    if tangent is not None:
        x.tangent, x.version = tangent, x.primal._version
        return
    here, base = _place(x.primal), owner_of(x.primal)
    version, missed = x.version, []
    for write in x.run.journal if x.run is not None else []:
        if write.base is base and write.before == version and write.place[0] == here[0]:
            version = write.after
            missed.append(write)
    if version != x.primal._version or _repeats(x.primal):
        raise error(
            "a tensor that carries a tangent was written in place through another tensor that shares its memory",
            "expected writes through the tensor that is used afterwards",
            "copy one of the two with .clone() before the write, or use the form that returns a result",
        )
    with no_grad():
        size = x.primal.untyped_storage().nbytes() // x.primal.element_size()
        memory = torch.zeros(size, dtype=x.primal.dtype, device=x.primal.device)
        tangent = memory.as_strided(*here[1:])
        tangent.copy_(x.tangent)
        for write in missed:
            memory.as_strided(*write.place[1:]).copy_(write.tangent)
        x.tangent, x.version = tangent.clone(), version


# These change what a tensor is, not what is in it.
_METADATA = frozenset(
    "t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ resize_ resize_as_ as_strided_ set_ "
    "rename_ share_memory_ resize_as_sparse_ sparse_resize_ sparse_resize_and_clear_".split()
)
CONSTANT = frozenset("zero_ normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ bernoulli_ fill_".split())
_NAMESPACES: tuple[Any, ...] = (Tensor, torch, F, torch._C._nn)


def name_of(func: Any) -> str:
    """The bare name of a function, also for operators of `torch.ops`."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name.split("::")[-1]
    return getattr(func, "__name__", "")


def writes(func: Any) -> bool:
    """Whether the name of a function says that it writes into its first argument."""
    name = name_of(func)
    return name == "__setitem__" or _twin_operator(name) is not None or (name.endswith("_") and not name.endswith("__"))


def _twin_operator(name: str) -> Any:
    """`Tensor.__add__` for `__iadd__`."""
    if not (name.startswith("__i") and name.endswith("__")):
        return None
    return getattr(Tensor, f"__{'truediv' if name == '__idiv__' else name[3:-2]}__", None)


def twin(func: Any) -> Any:
    """The function that returns what `func` writes, or None."""
    name = name_of(func)
    if name in _METADATA:
        return None
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return getattr(torch.ops.aten, name[:-1], None)
    spaces = [space for space in _NAMESPACES if callable(getattr(space, name[:-1], None))]
    return _twin_operator(name) or (getattr(spaces[0], name[:-1]) if spaces else None)


def in_place(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Handler of the functions that write into their first argument."""
    name = name_of(func)
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if type(x) is not Dual:
        x = adopt(func, x)
        rest = {k: v for k, v in kwargs.items() if k not in ("input", "self")}
        return _adopted(x, func, (x, *args[1:]), rest)
    if name == "__setitem__":
        _write(func, x, args, kwargs, lambda: _assigned(x, *args[1:]))
        return None
    if name == "copy_":
        return _write(func, x, args, kwargs, lambda: _tangent(args[1] if len(args) > 1 else kwargs["src"], x))
    if name in CONSTANT:
        if name not in ("fill_", "bernoulli_") and (has_dual(args[1:]) or has_dual(kwargs)):
            raise value_read(f"{function_name(func)}: use as a plain number")
        value = kwargs.get("value", args[1] if len(args) > 1 else None) if name == "fill_" else None
        return _write(func, x, args, kwargs, lambda: _tangent(value, x))
    if name == "requires_grad_":
        func(x.primal, *args[1:], **kwargs)
        return x
    if name == "detach_":
        func(x.primal)
        x.tangent = torch.zeros_like(x.tangent)
        record(x.primal, x.tangent)
        return x
    other = twin(func)
    if other is None:
        raise refused(func)
    return _write(func, x, args, kwargs, lambda: _tangent(run(other, args, kwargs), x))


def inplace_setting(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`f(x, inplace=True)` of torch.nn.functional."""
    x = args[0] if args else kwargs.get("input")
    if type(x) is not Dual:
        raise refused(func)
    return _write(func, x, args, kwargs, lambda: _tangent(run(func, args, {**kwargs, "inplace": False}), x))


def _adopted(x: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write into a tensor that was plain before, or is one of integers."""
    if type(x) is not Dual:
        return func(*strip(args), **strip(kwargs))
    return x.run.watch.run(func, args, kwargs)  # type: ignore[union-attr]


def into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`f(x, out=y)`: the tangent is that of the form that returns its result."""
    x = kwargs["out"]
    if type(x) is not Dual:
        x = adopt(func, x)
        return _adopted(x, func, args, {**kwargs, "out": x})
    rest = {name: value for name, value in kwargs.items() if name != "out"}
    moving = has_dual(args) or has_dual(rest)

    def tangent() -> Tensor:
        result = run(func, args, rest) if moving else x
        if result.shape != x.shape:
            raise refused(func)
        return _tangent(result if moving else None, x)

    return _write(func, x, args, {**rest, "out": x}, tangent)


def refused(func: Any) -> TangentError:
    """The error for a function that changes a tensor in a way no tangent can follow."""
    return error(
        f"{function_name(func)} changes a tensor that carries a tangent in place, where it would be lost",
        "expected a function that returns its result",
        "use the form without the underscore",
    )


def _assigned(x: Dual, index: Any, value: Any) -> Tensor:
    """Tangent of `x` after `x[index] = value`."""
    tangent = x.tangent.clone()
    tangent[strip(index)] = value.tangent.to(tangent.dtype) if type(value) is Dual else 0.0
    return tangent


def _tangent(value: Any, x: Dual) -> Tensor:
    """Tangent of a value that is about to be written into all of x; zero if it carries none."""
    if type(value) is not Dual:
        return torch.zeros_like(x.tangent)
    return value.tangent.to(x.primal.dtype).expand(x.primal.shape)


def _write(func: Any, x: Dual, args: tuple[Any, ...], kwargs: dict[str, Any], tangent_of: Any) -> Any:
    """Let `func` write the primal, with the tangent computed before, from the same random draws."""
    from trigflow.tangent.dispatch import replayed_draws

    if _repeats(x.primal):
        raise error(
            f"{function_name(func)} writes into a tensor whose elements share memory, such as an expanded one",
            "expected memory of its own for each element",
            "copy it with .clone() or .contiguous() before the write",
        )
    _check_sources(func, x, (*args[0 if "out" in kwargs else 1 :], *[v for k, v in kwargs.items() if k != "out"]))
    generators = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
    with replayed_draws(x.primal.device, generators) as draws:
        # PyTorch runs no function that writes under autocast.
        with no_grad(), torch.autocast(x.primal.device.type, enabled=False):
            tangent = tangent_of()
        draws.rewind()
        before, place = x.primal._version, _place(x.primal)
        written = func(*strip(args), **strip(kwargs))
    if written is NotImplemented:
        return written
    if _place(x.primal) != place:
        raise refused(func)
    x.tangent, x.version = tangent, x.primal._version
    if x.primal._base is not None and x.run is not None:
        x.run.journal.append(Write(x.primal._base, before, x.version, place, tangent))
    record(x.primal, tangent)
    return x
