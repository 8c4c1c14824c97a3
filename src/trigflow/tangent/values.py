"""Values of tensors that decide what a function does, in the graph of one run: they become constants of it, under a guard.

Only what comes from tensors of integers and booleans can be held fixed so, such as the lengths of texts, which are read off a
mask: values of floating-point tensors are others in every call.
"""

from typing import Any

import torch
from torch import Tensor, fx

aten: Any = torch.ops.aten
MASKS = (torch.bool, torch.uint8)


class Undecided(Exception):
    """The values that decide what runs come from floating-point tensors, random numbers, or graphs inside the graph."""


def fix_values(graph: fx.GraphModule, inputs: list[Tensor]) -> dict[fx.Node, Tensor]:
    """Put the values that a function read while it was traced on real tensors into its graph as constants.

    Args:
        graph: of the run, on inputs with the values of `inputs`.
        inputs: one for each placeholder.

    Returns:
        The placeholders and held tensors that these values were computed from, with copies of what is in them.

    Raises:
        Undecided: where such a tensor is no tensor of integers or booleans.
    """
    nodes: Any = graph.graph.nodes
    reads = {node: read for node in nodes if (read := _read_by(node))}
    needed = sources_of([source for read in reads.values() for source in read], graph.graph)
    given = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
    known: dict[fx.Node, Any] = {}
    roots: dict[fx.Node, Tensor] = {}
    for node in [node for node in nodes if node in needed or node in reads]:
        if node.op in ("placeholder", "get_attr"):
            value = given[node] if node in given else getattr(graph, node.target)
            if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
                raise Undecided
            roots[node], known[node] = value.clone(), value.clone()
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Undecided
        elif all(source in known for source in node.all_input_nodes):
            with torch.no_grad():
                known[node] = node.target(*fx.map_arg(node.args, known.get), **fx.map_arg(node.kwargs, known.get))
    for number, (node, read) in enumerate(reads.items()):
        with graph.graph.inserting_before(node):
            if node.target is aten.index.Tensor:
                indices: list[Any] = []
                for axis, index in enumerate(node.args[1]):
                    places = known[index].nonzero().unbind(1) if index in read else ()
                    names = [(f"places_{number}_{axis}_{i}", place) for i, place in enumerate(places)]
                    indices += [_constant(graph, *named) for named in names] if index in read else [index]
                node.args = (node.args[0], indices)
            elif isinstance(known.get(node), Tensor):
                node.replace_all_uses_with(_constant(graph, f"value_{number}", known[node]))
        if not node.users and node in known:
            graph.graph.erase_node(node)
    written = _writes(graph.graph)
    for node in nodes:
        if node.target is aten.view.default and _base(node) not in written:
            node.target = aten.reshape.default  # a compiler may give what it is a view of in another order
    return roots


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph.register_buffer(name, value)
    return graph.graph.get_attr(name)


def _read_by(node: Any) -> list[fx.Node]:
    """The tensors whose values decide the result in Python, or the shape, of an operator."""
    tags = getattr(node.target, "tags", ())
    if node.target is aten.index.Tensor:
        return [index for index in node.args[1] if index is not None and index.meta["val"].dtype in MASKS]
    if node.target is aten.masked_select.default:
        return [node.args[1]]
    return node.all_input_nodes if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*tags} else []


def sources_of(nodes: list[fx.Node], graph: fx.Graph, end: Any = None) -> set[fx.Node]:
    """All that tensors were computed from, without what comes before calls of `end`; with what was written into them, or into
    what they are views of."""
    written = _writes(graph)
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and node.target is not end:
            found.add(node)
            waiting += [*node.all_input_nodes, *written.get(_base(node), ())]
    return found


def _writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The writes into each tensor, or into its views."""
    written: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            written.setdefault(_base(node), []).append(node)
    return written


def _base(node: Any) -> fx.Node:
    """What a node is a view of, or was written into."""
    while node.all_input_nodes:
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        if not any(x.alias_info is not None for x in returns) and getattr(node.target, "__name__", "") != "getitem":
            break
        node = node.all_input_nodes[0]
    return node
