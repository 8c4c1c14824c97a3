"""Networks in ONNX: the one exporter, and a network that runs in onnxruntime on the CPU."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.deploy.fixed import Variant
from trigflow.runtime.errors import MissingExtraError, UserError, first_line


class Onnx(Variant):
    """The network exported to ONNX, with any batch size, and run by onnxruntime with as many threads as PyTorch has.

    Args:
        network: see `Variant`.
        inputs: for a batch of 3, by name.

    Raises:
        MissingExtraError: without onnx, onnxscript or onnxruntime.
        UserError: for a network too large for one file (2 GB of weights).
    """

    def __init__(self, network: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__(network)
        require("the variant onnx")
        import onnxruntime  # type: ignore[import-untyped]

        size = sum(p.numel() * p.element_size() for p in network.parameters())
        if size >= 2 << 30:
            raise UserError(f"{size} bytes of weights for onnx; expected less than 2 GB; use another variant")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A copy in the usual order of memory: the exporter does not know channels-last weights.
        named = Named(copy.deepcopy(network).to(memory_format=torch.contiguous_format), tuple(inputs))  # type: ignore[call-overload]
        content = exported(named.eval(), inputs, "F").model_proto.SerializeToString()
        self.session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        feed = {name: value.detach().contiguous().numpy() for name, value in {"x": x, "t": t, **conditions}.items()}
        return torch.from_numpy(self.session.run(None, feed)[0]).to(x.dtype)


class Named(nn.Module):
    """A network `F(x, t, **conditions)` with its inputs, `names`, by position."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        return self.network(given.pop("x"), given.pop("t"), **given)


def require(what: str) -> None:
    """Raise a MissingExtraError that says `what` is not possible without onnx, onnxscript and onnxruntime, if it is not."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(what, error.name or "onnx", "onnx") from error


def exported(module: nn.Module, inputs: Mapping[str, Tensor], output: str) -> Any:
    """The ONNX program of a module `forward(self, *inputs)`, for any batch size. The inputs are an example, by the names that
    they get. Raises a UserError for a network that has its batch size written into it."""
    batch = torch.export.Dim("batch")
    with quiet(), torch.no_grad():
        try:
            shapes = {"inputs": tuple({0: batch} for _ in inputs)}
            graph = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes)
        except Exception as error:  # torch raises all kinds
            raise UserError(
                f"the network cannot be exported for every batch size ({first_line(error)}); expected a forward that "
                "takes sizes from tensor.shape, not by len; correct the network, or use torchscript"
            ) from error
        return torch.onnx.export(graph, input_names=list(inputs), output_names=[output], dynamo=True, verbose=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block without torch's remarks on shapes that stay as they are, and on packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
