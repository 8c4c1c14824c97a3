"""A network without Python between its operations, and without its conditioning where that was computed before.

The operations of one call are written down as a graph while they are computed, and parted in two::

    kept = conditioning(t, label, guidance, end)        everything that does not depend on x
    F    = body(x, kept)                                the rest

For a network that decides nothing by a value the graph is what `make_fx` gives, in a tenth of its time: nothing is computed a
second time without values, and none of what `torch.compile` needs is loaded.

Embeddings, and the scales and shifts that every block makes of them, are in the first part: about half the operations of a
small network. A sampler visits the same few times again and again, and a viewer keeps his label, so what the first part
gives is kept, up to a number of bytes, and computed again only for conditions that are new. Both parts are then traced, and
run without the interpreter's lock where TorchScript is available.
"""

import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from trigflow.deploy.fixed import SIZES, FixedSizes, Replay
from trigflow.runtime.errors import UserError

KEPT_BYTES = 4 << 20
"""Results of the conditioning part that are kept, over all batch sizes."""


class Traced(FixedSizes):
    """The network as two recordings; see the module docstring. The same arithmetic in the same order: the same bits. At most
    `kept_bytes` are kept of the conditioning."""

    def __init__(self, network: nn.Module, sizes: Sequence[int] = SIZES, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(network, sizes)
        self.kept = Kept(kept_bytes)

    def record(self, call: Callable[..., Tensor], buffer: Tensor, held: list[Tensor]) -> Replay:
        conditioning, body = part(operations(call, [buffer, *held]))
        example = conditioning(*held)
        device = buffer.device
        first: Callable[..., Sequence[Tensor]] = script(conditioning, held) if example else conditioning
        rest = script(body, [buffer, *example])

        def replay(x: Tensor, values: list[Tensor]) -> Tensor:
            if device.type != "cpu":  # reading the conditions would wait for the device
                return rest(x, *first(*values))
            key = (conditioning, *(v.numpy().tobytes() for v in values))
            found = self.kept.get(key)
            if found is None:
                found = tuple(first(*values))
                self.kept.put(key, found)
            return rest(x, *found)

        return replay


class Kept:
    """Results by key; the ones used longest ago make room when there are more than `most` bytes, each counted as at least
    `least`. The newest always stays."""

    def __init__(self, most: int, least: int = 0) -> None:
        self.most, self.least = most, least
        self.bytes = 0
        self.values: OrderedDict[Any, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: Any) -> tuple[Tensor, ...] | None:
        """The result, or None."""
        if key not in self.values:
            return None
        self.values.move_to_end(key)
        return self.values[key]

    def put(self, key: Any, value: tuple[Tensor, ...]) -> None:
        """Keep a result."""
        self.values[key] = value
        self.bytes += self._size(value)
        while self.bytes > self.most and len(self.values) > 1:
            self.bytes -= self._size(self.values.popitem(last=False)[1])

    def _size(self, value: tuple[Tensor, ...]) -> int:
        return max(self.least, sum(tensor.numel() * tensor.element_size() for tensor in value))


def part(whole: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two graphs of one: from the inputs after the first to whatever does not depend on the first, and the rest.

    The first returns a tuple of tensors; the second takes the first input and these, and returns what `whole` returns.
    """
    nodes = list(whole.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    result = next(node for node in nodes if node.op == "output").args[0]
    of_x = {inputs[0]}
    for node in nodes:
        if any(argument in of_x for argument in node.all_input_nodes):
            of_x.add(node)
    between = [
        node
        for node in nodes
        if node not in of_x and node.op != "get_attr" and any(user in of_x or user.op == "output" for user in node.users)
    ]
    conditioning = _graph(nodes, inputs[1:], between, tuple)
    body = _graph(nodes, [inputs[0], *between], [result], lambda values: values[0])
    return fx.GraphModule(whole, conditioning), fx.GraphModule(whole, body)


def _graph(
    nodes: Iterable[fx.Node], inputs: list[fx.Node], wanted: list[fx.Node], returned: Callable[[list[fx.Node]], Any]
) -> fx.Graph:
    """The graph that computes the wanted nodes from the inputs."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    needed: set[fx.Node] = set()
    left = list(wanted)
    while left:
        node = left.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            left.extend(node.all_input_nodes)
    for node in nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(returned([copies[node] for node in wanted]))
    return graph


def script(module: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
    """The module traced by TorchScript and run until it is settled, or as it is where there is no TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module.eval(), tuple(example), check_trace=False)
        for _ in range(3):  # the first calls look for what can be fused
            traced(*example)
    except RuntimeError:
        return module
    return traced


def operations(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """What `call(*inputs)` computes, as a function of the inputs; every other tensor is a constant. Raises a UserError for a
    call that looks at a value, `item()` for instance: what it computes then might depend on it. Only the check of labels in
    `one_hot` is left out."""
    recorder = Recorder(inputs)
    with recorder, Checks(recorder):
        result = call(*inputs)
    recorder.graph.output(recorder.node_of(result))
    return fx.GraphModule(recorder.constants, recorder.graph)


class Recorder(TorchDispatchMode):
    """Adds every operation that is computed while it is open to `graph`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled: without this, the first operation loads all of torch.compile

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.may_look = False
        self.nodes = WeakIdKeyDictionary()
        for i, tensor in enumerate(inputs):
            self.nodes[tensor] = self.graph.placeholder(f"input_{i}")

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        node = self.graph.call_function(
            operation, fx.node.map_aggregate(args, self.node_of), fx.node.map_aggregate(kwargs, self.node_of)
        )
        result = operation(*args, **kwargs)
        if isinstance(result, Tensor):
            self.nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.nodes[part] = self.graph.call_function(operator.getitem, (node, i))
        elif result is not None and node.all_input_nodes and not self.may_look:
            raise UserError(
                f"a network that looks at a value ({operation}); expected one that computes the same for every input; use the "
                "variant plain"
            )
        return result

    def node_of(self, value: Any) -> Any:
        """The node of a tensor, a new constant if it has none; what is no tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        if value not in self.nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            self.nodes[value] = self.graph.get_attr(name)
        return self.nodes[value]


class Checks(TorchFunctionMode):
    """Lets `one_hot` look whether labels are in range."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.recorder.may_look = function is F.one_hot and (len(args) > 1 or "num_classes" in kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            self.recorder.may_look = False
