"""A function as a graph of plain operators, which gives the same values and gradients when it is run in its place.

`make_fx` records every operator that a function calls, those of tangents among them. What it does not record is put back:

* results of `torch.no_grad()` and of `jvp`'s tangents are detached, so that no gradient flows where none did;
* tensors that the function finds by itself (weights, buffers, constants) become inputs, read anew for every run;
* a custom `torch.autograd.Function` whose gradient is wanted stays one call, with its own backward;
* tensors that the functions of flexible attention hold become arguments of theirs.

Values read off masks and other integers, or off constants, are constants of the graph, which is for calls with these.
What depends on other values, or acts on the gradient from outside of the graph, cannot be traced.
"""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from trigflow.tangent import dual, guard
from trigflow.tangent.dual import Dual
from trigflow.tangent.errors import function_name
from trigflow.tangent.values import fix_values, sources_of

_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad"}
_UNSEEN = {"tolist", "numpy", "__array__", "__dlpack__", "tensor_split", "_pack_padded_sequence"}
"""Functions that read real tensors and record no operator: one that reads them too stands in."""

_BUFFERS = "buffers before the trace"


class Untraceable(Exception):
    """A function that is no graph of operators; the message says at which operation."""


@dataclass
class Traced:
    """A graph in the place of a function.

    Attributes:
        graph: takes the `state`, then the tensors of the call; returns a flat list.
        state: where each tensor that the function found by itself is read: a dict of a module, and a name in it.
        signs: shape, dtype, device and `requires_grad` of each of them.
        modules: that ran, with the training mode of each.
        moving: for each of the state whether a gradient can flow to it.
        values: what the function read: where a tensor is among the state and the tensors of the call, and what was in it.
        nest: a `TreeSpec` of what the function returns.
    """

    graph: fx.GraphModule
    state: list[tuple[dict[str, Any], str]]
    signs: list[Any]
    modules: list[tuple[nn.Module, bool]]
    moving: list[bool]
    values: list[tuple[int, Tensor]]
    nest: Any = None

    def read(self, inputs: list[Tensor]) -> list[Tensor] | None:
        """The tensors of the state as they are now; None where they, modules or values that are read are of other kinds."""
        if any(module.training is not mode for module, mode in self.modules):
            return None
        found: list[Any] = [place.get(name) for place, name in self.state]
        if any(_sign(x) != sign for x, sign in zip(found, self.signs, strict=True)):
            return None
        if any(not torch.equal([*found, *inputs][i], value) for i, value in self.values):
            return None
        pairs: Any = zip(found, self.moving, strict=True)
        return [x if moves else x.detach() for x, moves in pairs]


def _sign(x: Any) -> Any:
    return (x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else None


def trace(function: Callable[..., Any], leaves: list[Any], nest: Any, dynamic: bool = False, real: bool = False) -> Traced:
    """Run `function` once on tensors without memory and record what it does.

    Args:
        function: of the arguments that `leaves` and `nest` are flattened from.
        leaves: tensors, which become inputs of the graph, and others, which become constants of it.
        nest: a `TreeSpec`.
        dynamic: whether the first axis of tensors may have another size later.
        real: whether it runs on tensors with values, as it does by itself where it fails without.

    Raises:
        Untraceable: if it depends on values, or calls something that is no operator.
    """
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    marks = _Marks(real)
    outputs: Any = None
    mode: Any = None

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return function(*pytree.tree_unflatten(filled, nest))

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal outputs, mode
        mode = proxy_tensor.get_proxy_mode()
        with marks:
            values, outputs = pytree.tree_flatten(call(*tensors))
        if not all(isinstance(value, Tensor) for value in values):
            raise Untraceable("the function returns something else than tensors")
        return [value if value.requires_grad else value.detach() for value in values]

    inputs: list[Tensor] = [leaves[i] for i in places]
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    table = {torch.ops.aten.upsample_nearest2d.default: _enlarged}
    how: Any = {"tracing_mode": "real" if real else "fake", "_error_on_data_dependent_ops": not real}
    drawn, first = [x.device for x in inputs if x.is_cuda], _Marks()
    try:
        if not real:  # caches that no module holds keep what they get: let it have values
            with _unchanged(first.modules), torch.random.fork_rng(drawn), first, torch.no_grad():
                call(*copies)
        with _unchanged(marks.modules), torch.random.fork_rng(drawn):
            trace_of = proxy_tensor.make_fx(flat, table, _allow_non_fake_inputs=True, **how)
            graph = trace_of(*(_of_any_batch(inputs) if dynamic else copies if real else inputs))
        _pass_held(graph, mode.tracer)
        values = fix_values(graph, inputs) if real else {}
    except Untraceable:
        raise
    except Exception as reason:
        if not (dynamic or real):
            with suppress(Untraceable):
                return trace(function, leaves, nest, real=True)
        raise Untraceable(_words(reason, marks.last)) from reason
    traced = _lifted(graph, list(marks.modules), values)
    traced.nest = outputs
    return traced


def _pass_held(graph: fx.GraphModule, tracer: Any) -> None:
    """Tensors that the functions of flexible attention hold become arguments of theirs, made where they are made outside."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention):
        args: list[Any] = list(node.args)
        for place, part in ((-2, args[3]), (-1, args[4][-1])):
            function = getattr(graph, part.target)
            for inner in function.graph.find_nodes(op="get_attr"):
                value = getattr(function, inner.target)
                found = tracer.tensor_tracker.get(value)
                with graph.graph.inserting_before(node):
                    args[place] = (*args[place], tracer.create_arg(value) if found is None else found.proxy.node)
                with function.graph.inserting_after(function.graph.find_nodes(op="placeholder")[-1]):
                    inner.replace_all_uses_with(function.graph.placeholder(inner.name))
                function.graph.erase_node(inner)
            function.recompile()
        node.args = tuple(args)


def _enlarged(x: Tensor, size: list[int], *scales: float | None) -> Any:
    """Nearest-neighbour enlargement by whole factors as a broadcast, whose gradient is a sum.

    Inductor of PyTorch 2.13 gives wrong gradients, without a word, where the gradient of `upsample_nearest2d` reaches
    attention on a CPU, as in EDM2.
    """
    b, c, h, w = x.shape
    rows, columns = size[0] // h, size[1] // w
    if (rows * h, columns * w) != tuple(size):
        return NotImplemented
    return x[:, :, :, None, :, None].expand(-1, -1, -1, rows, -1, columns).reshape(b, c, *size)


def _words(reason: Exception, last: Any) -> str:
    """Why a trace ended: the torch function at which it did, the line of the user that called it, and what it said."""
    what = str(reason).strip().split("\n")[0][:200] or type(reason).__name__
    if type(reason).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException"):
        what = "the value of a tensor decides what runs, as after .item()"
    frames = [f for f in traceback.extract_tb(reason.__traceback__) if not _OWN.search(f.filename)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{what} (in {function_name(last)}{where})" if last is not None else what + where


_OWN = re.compile(r"[/\\](torch|trigflow[/\\]tangent)[/\\]|<")
"""Files that are not the user's."""


def _of_any_batch(inputs: list[Tensor]) -> list[Tensor]:
    """The tensors without memory, the first axis of any size."""
    free, fixed = DimDynamic.DYNAMIC, DimDynamic.STATIC
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    return [
        mode.from_tensor(x, symbolic_context=StatelessSymbolicContext([free, *[fixed] * (x.ndim - 1)][: x.ndim]))
        for x in inputs
    ]


class _Marks(TorchFunctionMode):
    """Sees every torch function that the traced function calls, and detaches what it gives under `torch.no_grad()`."""

    def __init__(self, real: bool = False) -> None:
        super().__init__()
        self.real = real
        self.modules: dict[nn.Module, dict[str, Any]] = {}
        self.last: Any = None
        self.busy = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.busy:
            return func(*args, **(kwargs or {}))
        self._about(func)
        if self.real and func.__name__ in _UNSEEN:
            for x in filter(torch.is_tensor, args):
                torch.equal(x, x)
        return self._seen(args, kwargs or {}, func(*args, **(kwargs or {})))

    def _of_dual(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Observes the methods and operators of duals, which no function mode sees."""
        if self.busy:
            return dual.run(func, args, kwargs)
        self._about(func)
        self.busy = True
        try:
            result = dual.run(func, args, kwargs)
        finally:
            self.busy = False
        return self._seen(args, kwargs or {}, result)

    def _about(self, func: Any) -> None:
        """What is about to run, unless no graph can have it."""
        name = getattr(func, "__name__", "")
        if name in _HOOKS:
            raise Untraceable(f"{function_name(func)} acts on the backward pass")
        if name not in ("__get__", "__set__"):
            self.last = func

    def _seen(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if torch.is_grad_enabled() or not isinstance(result, (Tensor, Dual, tuple, list)):
            return result
        given = {id(x) for x in (*args, *kwargs.values())}
        return pytree.tree_map(lambda x: x if id(x) in given else _detached(x), result)

    def __enter__(self) -> Any:
        self.hook = register_module_forward_pre_hook(self._note)
        self.tokens = dual.OBSERVER.set(self._of_dual), guard.APPLY.set(_kept_function)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _note(self, module: nn.Module, inputs: Any) -> None:
        if module not in self.modules:
            buffers = [x for x in module._buffers.values() if x is not None and not isinstance(x, FakeTensor)]
            with proxy_tensor.disable_proxy_modes_tracing(), unset_fake_temporarily(), torch.no_grad():
                copies = [(x, x.clone()) for x in buffers]
            self.modules[module] = {**vars(module), _BUFFERS: copies}

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)  # type: ignore[no-untyped-call]
        dual.OBSERVER.reset(self.tokens[0])
        guard.APPLY.reset(self.tokens[1])
        self.hook.remove()


def _detached(x: Any) -> Any:
    if type(x) is Dual:
        return Dual(x.primal.detach(), x.tangent)
    return x.detach() if isinstance(x, Tensor) and x.is_floating_point() else x


@contextmanager
def _unchanged(modules: dict[nn.Module, dict[str, Any]]) -> Iterator[None]:
    """Afterwards modules have the attributes that they had before they ran: what they keep of a trace has no memory.

    Buffers get their numbers back: a write that concerns no input of the trace is done, beside being recorded.
    """
    with guard.applying():
        try:
            yield
        finally:
            for module, before in modules.items():
                for buffer, copy in before.pop(_BUFFERS):
                    buffer.data.copy_(copy)  # not a change to what has saved it for its backward
                now = vars(module)
                for name in [name for name, value in now.items() if value is not before.get(name, now)]:
                    del now[name]
                now.update(before)


def _kept_function(cls: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`cls.apply` as one node of the graph, where it has a gradient; its body otherwise."""
    mode: Any = proxy_tensor.get_proxy_mode()
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    if mode is None or not wanted or cls.__module__.startswith("torch._library"):  # the last are operators, recorded as such
        return original(*args, **kwargs)
    if kwargs or cls is BackwardHookFunction:
        raise Untraceable(f"autograd.Function {cls.__qualname__} acts on the backward pass")

    def call(*args: Any) -> Any:
        return cls.apply(*args)

    call.__name__ = call.__qualname__ = f"apply_{cls.__name__}"
    proxies = pytree.tree_map_only(Tensor, mode.tracer.unwrap_proxy, args)
    with proxy_tensor.disable_proxy_modes_tracing():
        result = original(*args)
    node = mode.tracer.create_proxy("call_function", call, proxies, {})
    return proxy_tensor.track_tensor_tree(result, node, constant=None, tracer=mode.tracer)


def _lifted(graph: fx.GraphModule, modules: list[nn.Module], values: dict[fx.Node, Tensor]) -> Traced:
    """The graph with the tensors that it holds as inputs, and where in the modules each of them lives."""
    homes: dict[int, tuple[dict[str, Any], str]] = {}
    for module in modules:
        for place in (vars(module), module._buffers, module._parameters):
            homes.update({id(value): (place, name) for name, value in place.items() if isinstance(value, Tensor)})
    first = next(iter(graph.graph.nodes))
    inputs: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        value: Any = graph
        for part in node.target.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            continue  # a graph inside the graph
        if isinstance(value, FakeTensor):
            raise Untraceable("a tensor that an earlier trace left behind")
        if id(value) not in inputs:
            with graph.graph.inserting_before(first):
                inputs[id(value)] = graph.graph.placeholder(f"state_{len(inputs)}"), value
        node.replace_all_uses_with(inputs[id(value)][0])
        if node in values:
            values[inputs[id(value)][0]] = values.pop(node)
        graph.graph.erase_node(node)
    graph._parameters.clear()
    graph._buffers.clear()
    graph.graph.lint()
    graph.recompile()
    moving = sources_of(graph.graph.output_node().all_input_nodes, graph.graph, torch.ops.aten.detach.default)
    return Traced(
        graph,
        [homes.get(id(value), ({"": value}, "")) for _, value in inputs.values()],
        [_sign(value) for _, value in inputs.values()],
        [(module, module.training) for module in modules],
        [node in moving for node, _ in inputs.values()],
        [(i, values[node]) for i, node in enumerate(graph.graph.nodes) if node in values],
    )
