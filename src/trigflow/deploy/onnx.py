"""A network in onnxruntime on the CPU."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.deploy.fixed import Variant
from trigflow.runtime.errors import MissingExtraError, UserError

NAMES = ("x", "t", "label", "guidance", "end")


class Onnx(Variant):
    """The network exported to ONNX, with any batch size, and run by onnxruntime with as many threads as PyTorch has.

    Args:
        network: see `Variant`.
        shape: of one x0.

    Raises:
        MissingExtraError: without onnx, onnxscript or onnxruntime.
        UserError: for a network too large for one file (2 GB of weights).
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__(network)
        try:
            import onnx  # noqa: F401
            import onnxruntime  # type: ignore[import-untyped]
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("the variant onnx", error.name or "onnx", "onnx") from error
        size = sum(p.numel() * p.element_size() for p in network.parameters())
        if size >= 2 << 30:
            raise UserError(f"{size} bytes of weights for onnx; expected less than 2 GB; use another variant")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(
            exported(network, self.example(shape)), options, providers=["CPUExecutionProvider"]
        )

    def example(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The inputs that the network takes, for a batch of 3."""
        t = torch.full((3,), 0.8)
        given = {"x": torch.zeros(3, *shape), "t": t}
        if self.null_label is not None:
            given["label"] = torch.arange(3) % self.null_label
        if self.takes_guidance:
            given["guidance"] = torch.ones_like(t)
        if self.takes_end:
            given["end"] = t / 2
        return given

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        given = zip(NAMES, (x, t, label, guidance, end), strict=True)
        feed = {name: value.detach().contiguous().numpy() for name, value in given if value is not None}
        return torch.from_numpy(self.session.run(None, feed)[0]).to(x.dtype)


class Named(nn.Module):
    """The network with the conditions in use as positional inputs."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        end = (given["end"],) if "end" in given else ()
        return self.network(given["x"], given["t"], given.get("label"), given.get("guidance"), *end)


def exported(network: nn.Module, example: dict[str, Tensor]) -> bytes:
    """An ONNX file, in memory, of the network with these inputs and any batch size."""
    names, batch = list(example), torch.export.Dim("batch")
    # A copy in the usual order of memory: the exporter does not know channels-last weights.
    named = Named(copy.deepcopy(network).to(memory_format=torch.contiguous_format), names).eval()  # type: ignore[call-overload]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                named,
                tuple(example.values()),
                input_names=names,
                output_names=["F"],
                dynamic_shapes={"values": tuple({0: batch} for _ in names)},
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model_proto.SerializeToString()
