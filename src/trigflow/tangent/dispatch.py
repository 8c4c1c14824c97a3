"""What to do with a function that has no rule: refuse, take apart, or differentiate by `torch.func.jvp`."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trigflow.tangent.dual import HANDLERS, RUN, Dual, Handler, dispatch_modes, no_grad, pair, strip, value_read
from trigflow.tangent.errors import DERIVATIVES, TangentError, error, function_name
from trigflow.tangent.inplace import in_place, name_of, writes
from trigflow.tangent.table import NAMES

_WRITERS = {"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"}
_WRITERS |= {"_batch_norm_with_update", "batch_norm_update_stats"}
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def resolve(func: Any) -> Handler:
    """The handler of a function met for the first time, entered into the table for the next."""
    handler = _find(func)
    HANDLERS[func] = handler
    return handler


def _find(func: Any) -> Handler:
    name = name_of(func)
    if writes(func):
        return in_place
    if name in _WRITERS:
        return writer
    if name in ("backward", "_make_dual", "_unpack_dual") or func is torch.autograd.grad:
        return gradient
    if isinstance(func, torch._C.ScriptMethod):
        return scripted
    if isinstance(func, torch._ops.HigherOrderOperator):
        return NAMES.get(f"higher_order.{func.name()}", opaque)
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        known = str(func).startswith("aten") or "aten::" in str(getattr(func, "_qualified_op_name", ""))
        if known and name in NAMES:
            return NAMES[name]
        if not known and not _composite(func):
            return opaque
    body = _body(func)
    return fallback if body is None else Decomposed(body)


def renamed(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with `dim` and `keepdim`, which rules know, for NumPy's names, which PyTorch's functions in C take too."""
    if isinstance(func, types.FunctionType) or HANDLERS[func] is fallback:
        return kwargs
    return {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}


def _composite(func: Any) -> bool:
    """Whether a custom operator is made of others that PyTorch differentiates one by one."""
    names = [func.name()] if isinstance(func, torch._ops.OpOverload) else [getattr(func, o).name() for o in func.overloads()]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CompositeImplicitAutograd") for n in names)


def opaque(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A custom operator with its own kernel: PyTorch would take its forward derivative to be zero without a word."""
    raise unsupported(func, "it is an operator without a forward derivative")


def scripted(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A module in TorchScript, by `torch.func.jvp` as long as PyTorch runs it operation by operation.

    Where it has learnt to differentiate a group of them at once (`prim::DifferentiableGraph`), tangents end there.
    """
    try:
        result = fallback(func, *args, **kwargs)
    except TangentError as reason:
        raise torchscript(func.name) from reason
    if "DifferentiableGraph" in str(torch._C._last_executed_optimized_graph()):
        raise torchscript(func.name)
    return result


def torchscript(name: str) -> TangentError:
    """The error for code that was compiled by `torch.jit.script` or `torch.jit.trace`."""
    return error(
        f"TorchScript cannot carry a tangent, in '{name}'",
        "expected code in Python",
        "pass the module or function as it was before torch.jit.script, or choose method='finite-difference'",
    )


def _body(func: Any) -> Any:
    """A Python-level torch function without its first question "is one of my arguments no tensor?".

    Such a function asks `has_torch_function` once, at its top, and hands itself to `__torch_function__`. A copy to which
    the answer is always no runs its body, whose inner calls meet the rules one by one.
    """
    if isinstance(getattr(func, "__wrapped__", None), types.FunctionType):
        return func.__wrapped__
    if not isinstance(func, types.FunctionType) or not any(check in func.__code__.co_names for check in _CHECKS):
        return None
    scope = {**func.__globals__, **dict.fromkeys(_CHECKS, _never)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*args: Any) -> bool:
    return False


class Decomposed:
    """Handler that runs the body of a Python-level function on the duals."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __call__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        now = RUN.get()
        if now is None or now.watch is None:
            return self.body(*args, **kwargs)
        lifting, now.lifting = now.lifting, True
        try:
            with now.watch:
                return self.body(*args, **kwargs)
        finally:
            now.lifting = lifting


def unsupported(func: Any, why: str) -> TangentError:
    """The error for a function that cannot carry a tangent."""
    return error(
        f"{function_name(func)} cannot carry a tangent: {why}",
        "expected a function with a derivative rule or a forward derivative in PyTorch",
        "replace it by differentiable torch functions, or .detach() its input if a zero tangent is meant",
    )


def writer(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that updates the buffers it is given, which a second run for the tangent would do again."""
    raise unsupported(func, "it updates its buffers and has no rule, unlike torch.nn.functional.batch_norm")


def gradient(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A gradient taken inside the function, whose derivative would be a second one."""
    raise error(f"{function_name(func)}: a gradient taken inside fn would need second derivatives", *DERIVATIVES)


def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Primal by `func` itself, tangent by `torch.func.jvp` of this one function.

    It costs one more forward of `func`. A function that draws random numbers sees the same draws both times.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if type(leaf) is Dual]
    if not places:
        return func(*args, **kwargs)
    plain = strip(leaves)
    a, k = pytree.tree_unflatten(plain, tree)
    generators = [leaf for leaf in plain if isinstance(leaf, torch.Generator)]
    with replayed_draws(plain[places[0]].device, generators) as draws:
        primal = func(*a, **k)
        outputs, nest = pytree.tree_flatten(primal)
        moving = [i for i, leaf in enumerate(outputs) if _continuous(leaf)]
        if not moving:
            if all(isinstance(leaf, _HARMLESS) for leaf in outputs):
                return primal
            raise value_read(function_name(func))
        draws.rewind()

        def again(*inputs: Tensor) -> list[Tensor]:
            values = list(plain)
            for i, value in zip(places, inputs, strict=True):
                values[i] = value
            a, k = pytree.tree_unflatten(values, tree)
            found = pytree.tree_leaves(func(*a, **k))
            return [found[i] for i in moving]

        primals = tuple(leaves[i].primal.detach() for i in places)
        tangents = tuple(leaves[i].tangent for i in places)
        try:
            with no_grad():
                # Strict: an output that PyTorch does not differentiate has no tangent, which is not a tangent of zero.
                second, found, *_ = torch.func.jvp(again, primals, tangents, strict=True)
                reads = _reads_values(again, primals, tangents)
                lost = _one_is_lost((func, *places, *map(_kind, plain)), again, primals, tangents)
        except Exception as reason:
            first = str(reason).strip().split("\n")[0][:200]
            if "strict=True" in first:
                first = "an output does not depend on the inputs, or has no derivative"
            raise unsupported(func, f"it has no rule, and PyTorch says '{first}'") from reason
        if reads:
            raise unsupported(func, "it reads an argument as a plain number")
        if lost:
            raise unsupported(func, "PyTorch gives one of its moving arguments no derivative")
        if draws.used and not same_values([outputs[i] for i in moving], second):
            raise unsupported(func, "it has no rule and does not repeat its random draws")
    for i, tangent in zip(moving, found, strict=True):
        outputs[i] = pair(outputs[i], tangent)
    return pytree.tree_unflatten(outputs, nest)


_HARMLESS: tuple[Any, ...] = (Tensor, bool, int, str, type(None), type(NotImplemented), torch.dtype, torch.device)
_HARMLESS += (torch.layout, torch.memory_format)


def _continuous(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.numel() > 0


def _reads_values(again: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> bool:
    """Whether a one-element argument is turned into a Python number, in a run of its own.

    Only such an argument can be, and what is computed below a dispatch mode is not always right: PyTorch 2.13 takes the
    pseudo-inverse of complex matrices wrong there.
    """
    if all(x.numel() != 1 for x in primals):
        return False
    with ValueReads(primals) as reads:
        torch.func.jvp(again, primals, tangents)
    return reads.found


_CHECKED: set[Any] = set()


def _one_is_lost(call: Any, again: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> bool:
    """Whether one of several moving arguments leaves no trace in any output, as the target of some losses does.

    Each is tried alone, once for each way `call` of calling the function.
    """
    if len(primals) == 1 or call in _CHECKED:
        return False
    for i, (x, dx) in enumerate(zip(primals, tangents, strict=True)):
        with forward_ad.dual_level():
            outputs = again(*primals[:i], forward_ad.make_dual(x, dx), *primals[i + 1 :])
            if all(forward_ad.unpack_dual(y).tangent is None for y in outputs):
                return True
    _CHECKED.add(call)
    return False


def _kind(value: Any) -> Any:
    """What may decide whether a function is differentiable: the type of a tensor or number, a mode by its value."""
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    return value if isinstance(value, (bool, int, str)) else type(value)


class ValueReads(TorchDispatchMode):
    """Notices when one of the given tensors is turned into a Python number, where its tangent ends."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = {x.data_ptr() for x in inputs if x.numel() == 1}
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr() in self.places:
            self.found = True
        if func is torch.ops.aten._efficientzerotensor.default:
            # Such a tensor has no memory; some kernels that meet one below a dispatch mode end the process.
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def same_values(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-5, equal_nan=True) for x, y in pairs if isinstance(x, Tensor))


def traced() -> Any:
    """The graph in which `make_fx` records what runs; None where it does not."""
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) if dispatch_modes() else None
    return None if mode is None else mode.tracer.graph


def is_traced() -> bool:
    """Whether what runs is being recorded, as for `trigflow.tangent.compile`: values of tensors cannot be read."""
    return traced() is not None


class replayed_draws:
    """Let a function run twice on the same random draws, `rewind` between them, leaving the generators as after one run.

    Args:
        device: that it may draw on, beside the CPU.
        generators: that it was given.

    Attributes:
        used: whether the first run drew anything, known after `rewind`.
    """

    def __init__(self, device: torch.device, generators: list[torch.Generator]) -> None:
        self.generators = [torch.default_generator, *generators]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.generators.append(torch.cuda.default_generators[index])
        self.used = False

    def __enter__(self) -> replayed_draws:
        self.before = self.after = self._states()
        graph = traced()
        self.recorded = 0 if graph is None else len(graph.nodes)
        return self

    def rewind(self) -> None:
        """Back to where the states were at the start.

        Raises:
            TangentError: if a tracer records what runs, and has recorded a draw: a graph draws anew each time.
        """
        graph = traced()
        new = [] if graph is None else list(graph.nodes)[self.recorded :]
        if any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in new):
            raise error(
                "a function whose random draws would be needed twice, in a trace",
                "expected dropout, or no draws",
                "run it without compilation",
            )
        self.after = self._states()
        self.used = any(not torch.equal(x, y) for x, y in zip(self.before, self.after, strict=True))
        self._set(self.before)

    def __exit__(self, *reason: object) -> None:
        self._set(self.after)

    def _states(self) -> list[Tensor]:
        return [g.get_state() for g in self.generators]

    def _set(self, states: list[Tensor]) -> None:
        if self.used:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
