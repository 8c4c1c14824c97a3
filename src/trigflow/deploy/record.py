"""The operations of a call, written down as a graph while it is computed.

For a network that decides nothing by a value this is what `make_fx` gives, in a tenth of its time: nothing is computed a second
time without values, and none of what `torch.compile` needs is loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from trigflow.runtime.errors import UserError


def operations(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """What `call(*inputs)` computes, as a function of the inputs; every other tensor is a constant.

    Raises:
        UserError: for a call that looks at a value, `item()` for instance: what it computes then might depend on it. Only the
            check of labels in `one_hot` is left out.
    """
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
