"""The variants by name, and which of them work here.

==========  =====================================================================================  ===================
name        what it is                                                                             pixels
==========  =====================================================================================  ===================
plain       the network as it is; weights normalized once where it has `for_sampling`              the reference
traced      operations recorded, conditioning kept; see `trigflow.deploy.traced`                the same
graph       CUDA graphs, one for each batch size                                                   the same
graph-bf16  CUDA graphs of bf16                                                                    as bf16
compiled    `torch.compile`                                                                        a few by one level
onnx        onnxruntime on the CPU (extra `onnx`)                                                  a few by one level
bf16        convolutions and linear layers in bfloat16, conditioning in float32                    some by a few levels
fp16        the same in float16, on CUDA                                                           some by a few levels
int8        linear layers in int8, conditioning and convolutions in float32, on the CPU            some by a few levels
fp8         weights of linear layers in 8-bit floating point, the rest in float32                  some by a few levels
==========  =====================================================================================  ===================
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.conditions import in_order, null, null_rows, takes
from trigflow.deploy.fixed import FixedSizes, Replay, Variant
from trigflow.deploy.traced import Traced
from trigflow.models.model import Model
from trigflow.networks.embeddings import Conditioning
from trigflow.networks.layers import AdaptiveNorm
from trigflow.networks.magnitude import FixedConv
from trigflow.runtime.errors import UserError, first_line


def ready_to_draw(network: nn.Module) -> nn.Module:
    """The network itself in eval mode and frozen, or where it offers one, a copy without what only training needs."""
    settled = getattr(network, "for_sampling", None)
    ready: nn.Module = network if settled is None else settled()
    return ready.eval().requires_grad_(False)


def require_float32(model: Model) -> None:
    """Raise a UserError for a network in half or double precision, which variants and exports are not made of."""
    if model.dtype != torch.float32:
        raise UserError(f"a network of {model.dtype}; expected float32; convert it with model.network.float()")


class CudaGraph(FixedSizes):
    """The whole network as one CUDA graph for each batch size: one launch in place of hundreds."""

    def record(self, call: Callable[..., Tensor], buffer: Tensor, held: list[Tensor]) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(buffer, *held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(buffer, *held)

        def replay(x: Tensor, values: list[Tensor]) -> Tensor:
            graph.replay()
            return result.clone()  # the next replay writes to the same place

        return replay


class Compiled(Variant):
    """The network through `torch.compile`, once for all batch sizes from 2 on; a batch of 1 is computed as one of 2."""

    def __init__(self, network: nn.Module, backend: str = "inductor") -> None:
        super().__init__(network)
        self.lock = threading.Lock()
        self.compiled = torch.compile(network, dynamic=True, backend=backend)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        rows = max(2, len(x))

        def full(value: Tensor) -> Tensor:
            return (value if len(value) == rows else value.expand(rows, *value.shape[1:])).contiguous()

        with self.lock:
            told = {name: full(value) for name, value in conditions.items()}
            return self.compiled(full(x), full(t), **told)[: len(x)]


class Half(Variant):
    """Convolutions and linear layers in half precision by autocast, the weights of convolutions kept in it; the conditioning
    path turns autocast off for itself and stays in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(copy.deepcopy(network))
        self.dtype = dtype
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d) or (isinstance(module, FixedConv) and module.fixed.ndim == 4):
                module.to(dtype)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return super().forward(x.to(self.dtype), t, **conditions).to(x.dtype)


class Quantized(Variant):
    """Linear layers in int8: weights beforehand, activations as they come. Convolutions stay in float32, and so does the path
    from time, label and guidance to scales and shifts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        names = linear_layers(network, "int8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = dict.fromkeys(names, torch.ao.quantization.default_dynamic_qconfig)
            self.quantized = torch.ao.quantization.quantize_dynamic(network, chosen, dtype=torch.qint8)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        return self.quantized(x, t, **conditions)


class Float8(Variant):
    """Weights of linear layers in float8_e4m3 with a scale for each row, 3 significant bits in a quarter of the memory.

    A draw at batch 1 mostly waits for weights. Activations stay as they are, and so does what `Quantized` leaves out.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(copy.deepcopy(network))
        for name in linear_layers(network, "fp8"):
            self.network.set_submodule(name, Linear8(self.network.get_submodule(name)))


class Linear8(nn.Module):
    """`x (s W8)^T + b`: row i of W8 is that of a linear layer over `s_i = max_j |W_ij| / 448`, rounded to float8_e4m3."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: Any) -> None:
        super().__init__()
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = linear.weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(self.scale.dtype) * self.scale, self.bias)


def linear_layers(network: nn.Module, variant: str) -> list[str]:
    """Names of the linear layers beside the path from time, label and guidance to scales and shifts."""
    apart = (Conditioning, AdaptiveNorm)
    exact = {id(inner) for module in network.modules() if isinstance(module, apart) for inner in module.modules()}
    names = [name for name, module in network.named_modules() if type(module) is nn.Linear and id(module) not in exact]
    if not names:
        raise UserError(
            f"{variant} for a network without linear layers beside its conditioning; expected one that has some, such as a "
            "dit; use another variant"
        )
    return names


def _half(dtype: torch.dtype) -> Builder:
    def build(network: nn.Module, inputs: Mapping[str, Tensor]) -> Variant:
        device = inputs["x"].device
        if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError(f"bfloat16 on {torch.cuda.get_device_name(device)}; expected a GPU that has it; use fp16")
        return Half(network, dtype)

    return build


def _onnx(network: nn.Module, inputs: Mapping[str, Tensor]) -> Variant:
    from trigflow.deploy.onnx import Onnx

    return Onnx(network, inputs)


Told = Callable[[int], Mapping[str, Tensor]]
"""Conditions for so many samples, by name."""
Builder = Callable[[nn.Module, Mapping[str, Tensor]], Variant]

VARIANTS: dict[str, Builder] = {
    "plain": lambda network, inputs: Variant(network),
    "traced": lambda network, inputs: Traced(network),
    "graph": lambda network, inputs: CudaGraph(network),
    "graph-bf16": lambda network, inputs: CudaGraph(_half(torch.bfloat16)(network, inputs)),
    "compiled": lambda network, inputs: Compiled(network),
    "onnx": _onnx,
    "bf16": _half(torch.bfloat16),
    "fp16": _half(torch.float16),
    "int8": lambda network, inputs: Quantized(network),
    "fp8": lambda network, inputs: Float8(network),
}
"""From the name to what makes it of a network that is ready to draw and inputs for a batch of 3."""
DEVICES = {"graph": "cuda", "graph-bf16": "cuda", "fp16": "cuda", "onnx": "cpu", "int8": "cpu"}
"""The only kind of device that a variant works on, where there is one."""


def build_variant(name: str, network: nn.Module, shape: tuple[int, ...], told: Told | None = None) -> Variant:
    """The variant of this name, tried once with a batch of 1.

    Args:
        name: one of `VARIANTS`, or `auto`: graph on CUDA, otherwise traced, and plain where that is not possible.
        network: `F(x, t, **conditions)`; it is put into eval mode and frozen.
        shape: of one x0.
        told: conditions to try it with, for so many samples; those of the package's networks by default.

    Raises:
        MissingExtraError: for onnx without onnxruntime.
        UserError: for an unknown name, or a variant that does not work with this network on this machine, and why.
    """
    ready = ready_to_draw(network)
    device = next(ready.parameters()).device
    if name == "auto":
        try:
            return _tried("graph" if device.type == "cuda" else "traced", ready, shape, device, told)
        except UserError:
            return _tried("plain", ready, shape, device, told)
    if name not in VARIANTS:
        raise UserError(f"unknown variant '{name}'; expected auto or one of {', '.join(VARIANTS)}; correct --variant")
    return _tried(name, ready, shape, device, told)


def _tried(name: str, ready: nn.Module, shape: tuple[int, ...], device: torch.device, told: Told | None = None) -> Variant:
    """The variant, after one call."""
    if device.type != DEVICES.get(name, device.type):
        expected = {"cuda": "a CUDA device", "cpu": "the CPU"}[DEVICES[name]]
        raise UserError(f"the variant {name} on {device}; expected {expected}; use another variant")
    try:
        with torch.no_grad():
            variant = VARIANTS[name](ready, example(ready, shape, 3, device, told)).eval().requires_grad_(False)
            inputs = example(ready, shape, 1, device, told)
            variant(inputs.pop("x"), inputs.pop("t"), **inputs)
    except UserError:
        raise
    except Exception as error:  # compilers and runtimes raise what they like
        raise UserError(
            f"the variant {name} cannot be built here ({type(error).__name__}: {first_line(error)[:120]}); expected one "
            "that works with this network and machine; use plain"
        ) from error
    return variant


def example(
    network: nn.Module, shape: tuple[int, ...], n: int, device: torch.device, told: Told | None = None
) -> dict[str, Tensor]:
    """Inputs of a batch of n by name: x of unit variance at half the way, and the first classes or what is told."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n), dtype=torch.float32).to(device)
    t = torch.full((n,), 0.8, device=device, dtype=torch.float32)
    known: dict[str, Tensor] = {"guidance": torch.ones_like(t), "end": t / 2, **null_rows(network, x)}
    if told is not None:
        known |= {name: value.to(device) for name, value in told(n).items()}
    elif "label" in null(network):
        known["label"] = (torch.arange(n) % int(null(network)["label"])).to(device)
    return {"x": x, "t": t, **{name: known[name] for name in in_order(takes(network)) if name in known}}
