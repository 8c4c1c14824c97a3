"""Functions with tangents, compiled: traced to a graph of plain operators once for each kind of call, then given to inductor.

`torch.compile` put around a call of `jvp` finds values that it cannot trace, and runs it as it is. Here the order is the other:
the engine runs once, on tensors without memory, and what it did is compiled.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from trigflow.tangent.api import jvp
from trigflow.tangent.dispatch import is_traced
from trigflow.tangent.dual import RUN, Dual, check_version, pair
from trigflow.tangent.written import lifted

if TYPE_CHECKING:
    from trigflow.tangent.tracing import Traced


class Kind(NamedTuple):
    """What distinguishes the calls that need graphs of their own."""

    nest: pytree.TreeSpec
    signs: tuple[Any, ...]
    autocast: tuple[Any, ...]
    gradients: bool
    dtype: torch.dtype


_WORDS = {
    "nest": "how the arguments are nested",
    "signs": "shapes, strides, dtypes, devices, requires_grad or constants of the arguments",
    "autocast": "autocast",
    "gradients": "whether gradients are recorded",
    "dtype": "the default dtype",
}


def compile(fn: Callable[..., Any], **settings: Any) -> Compiled:
    """`jvp` of one function, compiled::

        step = compile(net)
        out, tangent = step((x, t), (dx, dt))  # as jvp(net, (x, t), (dx, dt)), on the autograd graph in the same way

    Args:
        fn: function or module, as for `trigflow.tangent.jvp`.
        settings: those of `Compiled`.

    Returns:
        A callable with the arguments `primals` and `tangents` of `jvp`, and its results.
    """
    settings.setdefault("name", _name(fn))
    return Compiled(lambda primals, tangents: jvp(fn, primals, tangents), **settings)


class Compiled:
    """`function(*args)`, traced and compiled once for each kind of call, with the values and gradients of a plain run.

    A kind of call is the shapes, strides, dtypes and devices of the tensors in the arguments and whether they have gradients,
    the values of everything else in them, the training modes of the modules that run, whether gradients are recorded, autocast,
    and the default dtype. Weights, buffers and other tensors that the function finds by itself are read for every call, by
    their names in the modules that ran, so that an optimizer step, `load_state_dict` or another tensor under the same name is
    seen. Values that it reads off tensors of integers or booleans, such as the lengths in a mask, or off constants have a graph
    for each set of them, and are compared in every call. Other values (numbers in modules, globals) are those of its first run.

    Random numbers, such as those of dropout, are those that the function draws by itself at the same state of the generator.

    Where a call cannot be traced or compiled, the function runs as it is, and a warning says why, once.

    Args:
        function: takes nested tuples, lists and dicts of tensors and of constants, and returns such of tensors. It may call
            `jvp`.
        dynamic: whether one graph serves batches of all sizes.
        mode: of `torch.compile`: None, "reduce-overhead" (CUDA graphs), "max-autotune", ...
        backend: of `torch.compile`: "inductor", "aot_eager", "eager".
        limit: kinds of calls to compile for; those after run as they are.
        recomputed: whether activation checkpointing runs the function again, without tangents, and asks for the same graph:
            where an outer `jvp` calls it, output and tangent are then computed one after the other.
        cache: folder of compiled code, from which a later process starts warm; None for that of PyTorch
            (`TORCHINDUCTOR_CACHE_DIR`).
        tell: called with the text of a warning.
        name: of the function in warnings.

    Attributes:
        kinds: what each kind of call runs: a compiled graph, or None for the function itself.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        dynamic: bool = False,
        mode: str | None = None,
        backend: str = "inductor",
        limit: int = 8,
        recomputed: bool = False,
        cache: str | Path | None = None,
        tell: Callable[[str], None] | None = None,
        name: str | None = None,
    ) -> None:
        self.function = function
        self.dynamic, self.mode, self.backend, self.limit = dynamic, mode, backend, limit
        self.recomputed = recomputed
        self.cache = None if cache is None else Path(cache)
        self.tell = tell or (lambda text: warnings.warn(text, stacklevel=4))
        self.name = name or _name(function)
        self.kinds: dict[Any, list[tuple[Traced, Callable[..., Any]] | None]] = {}
        self.told: set[str] = set()
        self.tangents: Compiled | None = None

    def __call__(self, *args: Any) -> Any:
        if is_traced():  # a part of something larger
            return self.function(*args)
        args = lifted(args)
        leaves, nest = pytree.tree_flatten(args)
        if any(type(x) is Dual for x in leaves):
            return self._on_duals(args)
        kind, tensors = self._kind(leaves, nest), _tensors(leaves)
        try:
            runs = self.kinds.get(kind, ())
        except TypeError as reason:
            self._say(f"{reason} among its arguments")
            return self.function(*args)
        for run in runs:
            if run is None:
                return self.function(*args)
            state = run[0].read(tensors)
            if state is not None:
                return self._run(*run, state, leaves)
        return self._first(kind, leaves, nest, args)

    def _on_duals(self, args: tuple[Any, ...]) -> Any:
        """A part of what another `jvp` runs: its own, compiled."""
        if self.tangents is None:
            self.tangents = copy.copy(self)
            self.tangents.function, self.tangents.kinds, self.tangents.told = self._both, {}, set()
        for x in pytree.tree_leaves(args):
            if type(x) is Dual:
                check_version(x)
        token = RUN.set(None)
        try:
            primals = pytree.tree_map(lambda x: x.primal if type(x) is Dual else x, args)
            tangents = pytree.tree_map(lambda x: x.tangent if type(x) is Dual else None, args)
            if self.recomputed:
                out = self(*primals)
                with torch.no_grad():
                    _, tangent = self.tangents(primals, tangents)
            else:
                out, tangent = self.tangents(primals, tangents)
        finally:
            RUN.reset(token)
        return pytree.tree_map(pair, out, tangent)

    def _both(self, primals: Any, tangents: Any) -> Any:
        leaves, nest = pytree.tree_flatten(primals)
        moves = pytree.tree_leaves(tangents)
        return jvp(lambda *duals: self.function(*pytree.tree_unflatten(duals, nest)), tuple(leaves), tuple(moves))

    def _kind(self, leaves: list[Any], nest: Any) -> Kind:
        devices = _devices(_tensors(leaves))
        autocast = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
        # With their types: 1, 1.0 and True are equal.
        signs = tuple(self._sign(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        return Kind(nest, signs, autocast, torch.is_grad_enabled(), torch.get_default_dtype())

    def _sign(self, x: Tensor) -> Any:
        shape = (x.shape[1:],) if self.dynamic else (x.shape, x.stride())
        return *shape, x.dtype, x.device, x.requires_grad

    def _first(self, kind: Kind, leaves: list[Any], nest: Any, args: tuple[Any, ...], real: bool = False) -> Any:
        """The first call of a kind: trace, compile, run; or, where one of them fails, the function itself."""
        from torch._functorch import config
        from torch._inductor import config as inductor

        from trigflow.tangent.tracing import Untraceable, trace  # what it imports takes half a second
        from trigflow.tangent.values import read_by

        runs, traced = self.kinds.setdefault(kind, []), None
        if sum(map(len, self.kinds.values())) >= self.limit:
            self._say(f"it is called in more than {self.limit} ways, which differ in {self._differences()}")
            runs.append(None)
            return self.function(*args)
        try:
            # The backward is compiled now too, where a failure can be caught; random numbers are those of PyTorch's kernels.
            with self._cached(), config.patch(force_non_lazy_backward_lowering=True), inductor.patch(fallback_random=True):
                # What tracing saves is for no backward: activation checkpointing is not to count it.
                with saved_tensors_hooks(_as_it_is, _as_it_is):
                    traced = trace(self.function, leaves, nest, self.dynamic, real)
                    state = traced.read(_tensors(leaves))
                    assert state is not None
                    graph = self._compile(traced.graph, state, _tensors(leaves))
                result = self._run(traced, graph, state, leaves)
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:
            if traced is not None and not (real or self.dynamic) and any(map(read_by, traced.graph.graph.nodes)):
                return self._first(kind, leaves, nest, args, real=True)  # sizes that values decide, which few compilers take
            what = str(reason).strip().split("\n")[0][:300]
            self._say(what if isinstance(reason, Untraceable) else f"{type(reason).__name__}: {what}")
            runs.append(None)
            return self.function(*args)
        runs.append((traced, graph))
        return result

    def _compile(self, graph: fx.GraphModule, state: list[Tensor], inputs: list[Tensor]) -> Callable[..., Any]:
        if self.mode is not None or self.dynamic:
            for x in state:  # is where it is: a CUDA graph need not copy it
                torch._dynamo.mark_static_address(x, guard=False)
            return torch.compile(graph, backend=self.backend, mode=self.mode)  # type: ignore[return-value]
        from torch._dynamo import lookup_backend
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # What torch.compile does for a graph, without Dynamo, whose guards `_kind` and `read` stand for.
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        with tracing(TracingContext(fake)), _unautocast(inputs):
            given: list[Any] = [fake.from_tensor(x, static_shapes=True) for x in (*state, *inputs)]
            if self.backend == "inductor" and not any(x.is_cuda for x in given):
                from torch._inductor.compile_fx import compile_fx

                # On a CPU inductor would have the images of convolutions channels-last in forwards with tangents, and each
                # of them copied for the backward.
                compiled: Any = compile_fx(graph, given, config_patches={"layout_optimization": False})
                return compiled
            return lookup_backend(self.backend)(graph, given)

    def _run(self, traced: Traced, graph: Callable[..., Any], state: list[Tensor], leaves: list[Any]) -> Any:
        tensors = _tensors(leaves)
        with _unautocast(tensors):
            if self.mode is None:
                outputs = graph(*state, *tensors)
            else:  # the memory of a CUDA graph is written anew in the next call
                torch.compiler.cudagraph_mark_step_begin()
                outputs = [x.clone() for x in graph(*state, *tensors)]
            return pytree.tree_unflatten(outputs, traced.nest)

    @contextmanager
    def _cached(self) -> Iterator[None]:
        """Let compiled code be kept in the folder."""
        if self.cache is None:
            yield
            return
        name, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        self.cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.cache).close()  # can it be written to?
        os.environ[name] = str(self.cache)
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    def _differences(self) -> str:
        """What has changed from one kind to another, in words."""
        kinds = list(self.kinds)
        names = [field for field in Kind._fields if len({getattr(kind, field) for kind in kinds}) > 1]
        return ", ".join(_WORDS[name] for name in names) or "the modules, their weights, or values that decide what runs"

    def _say(self, why: str) -> None:
        if why not in self.told:
            self.told.add(why)
            self.tell(f"{self.name} runs without compilation: {why}")


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _devices(tensors: list[Tensor]) -> dict[str, None]:
    return dict.fromkeys(x.device.type for x in tensors)


@contextmanager
def _unautocast(tensors: list[Tensor]) -> Iterator[None]:
    """The casts of autocast are in the graph."""
    with ExitStack() as stack:
        for device in _devices(tensors):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
