"""Counting what a computation does without doing it: floating-point operations, and memory, of tensors without values.

The tensors are PyTorch's fake tensors. They say that they are on the CPU, so that autocast and everything else goes its usual
way, and their memory is on the meta device, that is nowhere.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trigflow.tangent.attention import attention_implementation
from trigflow.tangent.dual import Dual

Target = Literal["cuda", "cpu"]
"""Whose arithmetic is counted: a GPU's, or that of the CPU, where it can be checked by measurement."""

aten = torch.ops.aten


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    """`q k^T` and `P v`."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    """`q k^T` once more, then the gradients of P, v, q and k."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _attention_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Any, dk: Any, dv: Any, *args: Any, **kwargs: Any) -> int:
    """`q k^T` and its changes, the changed weights times v, and the weights times the change of v."""
    changes = (dq is not None) + (dk is not None)
    scores, values = 1 + changes, (changes > 0) + (dv is not None)
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (scores * q.shape[-1] + values * v.shape[-1])


COUNTED: dict[Any, Callable[..., int]] = {
    **{packet: count for packet, count in flop_registry.items() if isinstance(packet, torch._ops.OpOverloadPacket)},
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.trigflow.attention_tangent: _attention_tangent,
    aten.baddbmm_: flop_registry[aten.baddbmm],
}
"""From a kernel to its number of operations: PyTorch's formulas, and what it lacks: fused attention on the CPU, the tangent of
attention, and products that are added in place."""


class Trace(TorchDispatchMode):
    """Counts every kernel that runs while it is open, those of backward passes included.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add is two.
        live: bytes of the tensors that were made while it is open and are still in use. Memory that several tensors share,
            as views do, counts once.
        peak: the largest `live` so far.
        growing: of the peak, the bytes of tensors whose size is a multiple of `batch`.

    Args:
        batch: a number of samples that divides no size but those that grow with it, such as a large prime.
    """

    def __init__(self, batch: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live = self.peak = self.growing = 0
        self._batch = batch
        self._live_growing = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = COUNTED.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        for value in _tensors(out):
            self._see(value, args)
        return out

    def _see(self, tensor: Tensor, args: Any) -> None:
        """Take note of the memory of an output, unless it is that of an argument."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or any(value.untyped_storage()._cdata == key for value in _tensors(args)):
            return  # the output is a view of an argument, or that was written in place
        size = storage.nbytes()
        growing = size if size % self._batch == 0 else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size
            self._live_growing -= growing

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self._live_growing += growing
        if self.live > self.peak:
            self.peak, self.growing = self.live, self._live_growing


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


_NAMES = "softmax log_softmax norm sum prod cumsum exp expm1 log log1p pow square rsqrt reciprocal tan".split()
FLOAT32_ON_CUDA: frozenset[Any] = frozenset(
    [F.group_norm, F.layer_norm, F.softmax, F.log_softmax, F.softplus, F.normalize, F.mse_loss, F.cosine_similarity]
    + [getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES]
    + [Tensor.__pow__, Tensor.__rpow__, Tensor.__rtruediv__]
)
"""What autocast computes in float32 on CUDA but not on the CPU, of the functions that networks call.

Source: "CUDA Ops that can autocast to float32" in the documentation of torch.amp.
"""


class TargetArithmetic(TorchFunctionMode):
    """Makes functions on fake tensors take the precision and the memory that they take on the target.

    On CUDA autocast keeps more in float32 than on the CPU, and dropout a mask of bytes. The tangent engine draws dropout masks
    twice while kernels are watched; here it draws them once, as it does otherwise.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.cuda = target == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if self.cuda and func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args, kwargs = pytree.tree_map_only(Tensor, _widened, (args, kwargs))
        if any(issubclass(kind, Dual) for kind in types):
            with self:  # the engine calls functions of primals and of tangents, which come by here in turn
                return Dual.__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        x = input.primal if isinstance(input, Dual) else input
        if self.cuda:
            y, mask = torch.native_dropout(x, p, True)
        else:
            mask = torch.empty_like(x, requires_grad=False)
            y = x * mask
        if not isinstance(input, Dual):
            return y
        with torch.no_grad():
            return Dual(y, input.tangent * mask)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@contextlib.contextmanager
def arithmetic_of(target: Target) -> Iterator[None]:
    """While open, functions on fake tensors take the precision and the memory that they take on the target."""
    # The kernel for attention tangents on CUDA keeps no scores either; of the chunked one only the result is seen here.
    with TargetArithmetic(target), attention_implementation("chunked" if target == "cuda" else "auto"):
        yield
