"""Values of tensors that decide what a function does, in the graph of one run: they become constants of it, under a guard.

Only what comes from tensors of integers and booleans, such as the lengths of texts, which are read off a mask, and from
constants can be held fixed so: floating-point arguments and weights are others in every call.
"""

from typing import Any

import torch
from torch import Tensor, fx

aten: Any = torch.ops.aten


def fix_values(graph: fx.GraphModule, inputs: list[Tensor]) -> dict[fx.Node, Tensor]:
    """Put the values that a function read while it was traced on real tensors into its graph as constants.

    Args:
        graph: of the run, on inputs with the values of `inputs`.
        inputs: one for each placeholder.

    Returns:
        The placeholders and held tensors that these values were computed from, with copies of what is in them.

    Raises:
        ValueError: where one of these is a floating-point argument or weight, or random numbers decide.
    """
    nodes: Any = graph.graph.nodes
    for node in graph.graph.find_nodes(op="get_attr"):
        node.meta.setdefault("val", getattr(graph, node.target))
    reads = {node: read for node in nodes if (read := read_by(node))}
    needed = sources_of([source for read in reads.values() for source in read], graph.graph)
    given = dict(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True))
    known: dict[fx.Node, Any] = {}
    roots: dict[fx.Node, Tensor] = {}
    for node in [node for node in nodes if node in needed or node in reads]:
        if node.op in ("placeholder", "get_attr"):
            value: Any = given[node] if node in given else getattr(graph, node.target)
            if (value.is_floating_point() or value.is_complex()) and (node in given or value.requires_grad):
                raise ValueError("values of floating-point tensors")
            roots[node], known[node] = value.clone(), value.clone()
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError("random numbers")
        elif all(source in known for source in node.all_input_nodes):
            known[node] = node.target(*fx.map_arg(node.args, known.get), **fx.map_arg(node.kwargs, known.get))

    def constant(value: Tensor) -> fx.Node:
        name = f"fixed_{len(graph._buffers)}"
        graph.register_buffer(name, value)
        return graph.graph.get_attr(name)

    for node, read in reads.items():
        with graph.graph.inserting_before(node):
            if node.target is aten.index.Tensor:
                places = {index: [constant(place) for place in known[index].nonzero().unbind(1)] for index in read}
                node.args = (node.args[0], [x for index in node.args[1] for x in places.get(index, [index])])
            elif isinstance(known.get(node), Tensor):
                node.replace_all_uses_with(constant(known[node]))
        if not node.users and node in known:
            graph.graph.erase_node(node)
    written = _writes(graph.graph)
    for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
        if _base(node) not in written:
            node.target = aten.reshape.default  # a compiler may give what it is a view of in another order
    return roots


def read_by(node: Any) -> list[fx.Node]:
    """The tensors whose values decide the result in Python, or the shape, of an operator: an index may be a mask."""
    if node.target is aten.index.Tensor:
        types = (torch.bool, torch.uint8, None)
        return [x for x in node.args[1] if x is not None and getattr(x.meta.get("val"), "dtype", None) in types]
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(getattr(node.target, "tags", ()))
    return node.all_input_nodes if tags else []


def sources_of(nodes: list[fx.Node], graph: fx.Graph, end: Any = None) -> set[fx.Node]:
    """All that tensors, or what they are views of, were computed from, writes included, back to calls of `end`."""
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
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    part = any(x.alias_info is not None for x in returns) or getattr(node.target, "__name__", "") == "getitem"
    return _base(node.all_input_nodes[0]) if part and node.all_input_nodes else node
