"""A network without Python between its operations, and without its conditioning where that was computed before.

The operations of one call are recorded and parted in two::

    kept = conditioning(t, label, guidance, end)        everything that does not depend on x
    F    = body(x, kept)                                the rest

Embeddings, and the scales and shifts that every block makes of them, are in the first part: about half the operations of a
small network. A sampler visits the same few times again and again, and a viewer keeps his label, so what the first part
gives is kept, up to a number of bytes, and computed again only for conditions that are new. Both parts are then traced, and
run without the interpreter's lock where TorchScript is available.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from trigflow.deploy.fixed import SIZES, FixedSizes, Replay
from trigflow.deploy.record import operations

KEPT_BYTES = 4 << 20
"""Results of the conditioning part that are kept, over all batch sizes."""


class Traced(FixedSizes):
    """The network as two recordings; see the module docstring. The same arithmetic in the same order: the same bits.

    Args:
        network: see `Variant`.
        sizes: see `FixedSizes`.
        kept_bytes: bound on what is kept of the conditioning.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int] = SIZES, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(network, sizes)
        self.kept = Kept(kept_bytes)

    def record(self, call: Callable[..., Tensor], buffer: Tensor, held: list[Tensor]) -> Replay:
        conditioning, body = part(operations(call, [buffer, *held]))
        example = conditioning(*held)
        size, device = len(buffer), buffer.device
        first: Callable[..., Sequence[Tensor]] = script(conditioning, held) if example else conditioning
        rest = script(body, [buffer, *example])

        def replay(x: Tensor, values: list[Tensor]) -> Tensor:
            if device.type != "cpu":  # reading the conditions would wait for the device
                return rest(x, *first(*values))
            key = (size, *(v.numpy().tobytes() for v in values))
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
        if node not in of_x
        and node.op != "get_attr"
        and any(user in of_x or user.op == "output" for user in node.users)
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
