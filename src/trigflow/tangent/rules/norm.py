"""Normalization layers.

For one group of elements, `xhat = (x - mu) r` with `r = 1 / sqrt(var + eps)`::

    dxhat = r (dx - mean(dx) - xhat mean(dx xhat))

a symmetric matrix times dx: the backward kernels of PyTorch, given no weight, compute it in one fused pass. The output
`y = w xhat + b` then has the tangent `w dxhat + dw xhat + db`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trigflow.tangent.dispatch import unsupported
from trigflow.tangent.dual import Dual, Handler, no_grad, pair, strip
from trigflow.tangent.table import register

aten = torch.ops.aten
_FIRST = [True, False, False]


def group_norm(func: Any, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Mean and variance over each group of channels and all positions.

    For a packed input `func` is `native_group_norm` and nothing else, so that is called instead: it hands over the mean
    and the deviation that it computed.
    """
    x, w, b = _autocast(strip(input), strip(weight), strip(bias))
    n, c = x.shape[:2]
    sizes = (n, c, x.numel() // max(n * c, 1), num_groups)
    if c % num_groups == 0 and x.numel() > n * num_groups and _native_takes(x):
        y, mean, rstd = torch.native_group_norm(x, w, b, *sizes, eps)
    else:
        y = func(x, num_groups, w, b, eps)
        x = x.contiguous()
        with no_grad():
            _, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
    with no_grad():
        t = None
        if type(input) is Dual:
            dx = input.tangent
            if dx.dtype != x.dtype:
                dx = dx.to(x.dtype)
            if dx.stride() != x.stride():
                dx = torch.empty_like(x).copy_(dx)
            t = aten.native_group_norm_backward.default(dx, x, mean, rstd, None, *sizes, _FIRST)[0]
        shape = (-1, *[1] * (x.ndim - 2))
        xhat = func(x, num_groups, None, None, eps) if type(weight) is Dual else None
        return pair(y, _scale_and_shift(t, xhat, weight, bias, shape))


def _native_takes(x: Tensor) -> bool:
    """Whether group_norm hands x as it is to its kernel: dense, and on the CPU in either order of axes."""
    if x.is_contiguous():
        return True
    last = x.ndim == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return last and x.stride(0) >= x[0].numel()  # the stride of an only sample may be anything; the kernel looks at it


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """On accelerators autocast runs normalizations in float32; the CPU keeps the dtype of the input."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if device == "cpu" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors)


def _scale_and_shift(t: Tensor | None, xhat: Tensor | None, weight: Any, bias: Any, shape: Any) -> Tensor | None:
    """`w dxhat + dw xhat + db`, into the memory of `t`, with weights viewed in `shape`."""
    w = strip(weight)
    if t is not None and w is not None:
        t = t.mul_(w if shape is None else w.view(shape))
    if type(weight) is Dual and xhat is not None:
        dw = weight.tangent if shape is None else weight.tangent.reshape(shape)
        t = xhat * dw if t is None else t.addcmul_(xhat, dw)
    if type(bias) is Dual:
        db = bias.tangent if shape is None else bias.tangent.reshape(shape)
        t = db if t is None else t.add_(db)
    return t


def layer_norm(
    func: Any, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, *rest: Any, **kwargs: Any
) -> Any:
    """Mean and variance over the last axes; `func` is `native_layer_norm`, which hands both over."""
    eps = rest[0] if rest else kwargs.get("eps", 1e-5)
    x, w, b = _autocast(strip(input), strip(weight), strip(bias))
    shape = list(normalized_shape)
    y, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
    with no_grad():
        t = None
        if type(input) is Dual:
            dx = input.tangent
            if dx.dtype != x.dtype:
                dx = dx.to(x.dtype)
            values = x
            if w is not None and w.dtype != x.dtype:  # half inputs beside float32 weights, on the CPU: so are mean and rstd
                dx, values = dx.to(w.dtype), x.to(w.dtype)
            t = aten.native_layer_norm_backward.default(dx, values, shape, mean, rstd, None, None, _FIRST)[0]
        xhat = torch.native_layer_norm(x, shape, None, None, eps)[0] if type(weight) is Dual else None
        return pair(y, _scale_and_shift(t, xhat, weight, bias, None))


def rms_norm(func: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """`y = w x r` with `r = 1 / sqrt(mean(x^2) + eps)`, so `dy = w r (dx - x r^2 mean(x dx)) + dw x r`."""
    x, w = strip(input), strip(weight)
    primal = func(x, normalized_shape, w, eps)
    with no_grad():
        work = torch.promote_types(x.dtype, torch.float32)
        x = x.to(work)
        dims = tuple(range(-len(normalized_shape), 0))
        eps = torch.finfo(work).eps if eps is None else eps
        r = x.square().mean(dims, keepdim=True).add_(eps).rsqrt_()
        t = None
        if type(input) is Dual:
            dx = input.tangent.to(work)
            along = (x * dx).mean(dims, keepdim=True).mul_(r).mul_(r)
            t = torch.addcmul(dx, x, along, value=-1).mul_(r)
        xhat = x * r if type(weight) is Dual else None
        return pair(primal, _scale_and_shift(t, xhat, weight, None, None))


def _fixed(func: Any, *record: Any) -> None:
    """Statistics on record are buffers, written in place."""
    if any(type(r) is Dual for r in record):
        raise unsupported(func, "its record of mean and variance, which it writes in place, carries one")


def batch_norm(
    func: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Mean and variance over batch and positions, or those on record. `func` updates the record, once."""
    _fixed(func, running_mean, running_var)
    x, w, b = strip(input), strip(weight), strip(bias)
    mean, var = running_mean, running_var
    if not training and mean is not None:
        mean, var = mean.clone(), var.clone()
    primal = func(x, running_mean, running_var, w, b, training, momentum, eps)
    shape = (-1, *[1] * (x.ndim - 2))
    with no_grad():
        x, t, xhat = x.to(primal.dtype), None, None
        dx = input.tangent.to(primal.dtype) if type(input) is Dual else None
        if x.numel() == 0:
            t = None if dx is None else dx.clone()
        elif training or mean is None:
            xhat, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
            if dx is not None:
                t = aten.native_batch_norm_backward.default(dx, x, None, None, None, mean, rstd, True, eps, _FIRST)[0]
        else:
            rstd = torch.rsqrt(var + eps).view(shape)
            xhat = (x - mean.view(shape)) * rstd if type(weight) is Dual else None
            t = None if dx is None else dx * rstd.to(dx.dtype)
        return pair(primal, _scale_and_shift(t, xhat, weight, bias, shape))


def instance_norm(
    func: Any,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Mean and variance over the positions of each channel: a group norm with one channel to a group."""
    if not use_input_stats:
        return batch_norm(
            lambda x, m, v, w, b, training, momentum, eps: func(x, m, v, w, b, False, momentum, eps),
            *(input, running_mean, running_var, weight, bias, False, momentum, eps),
        )
    _fixed(func, running_mean, running_var)
    x = strip(input)
    primal = func(x, running_mean, running_var, strip(weight), strip(bias), True, momentum, eps)
    with no_grad():
        x = x.to(primal.dtype).contiguous()
        n, c = x.shape[:2]
        sizes = (n, c, x.numel() // max(n * c, 1), c)
        xhat, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
        t = None
        if type(input) is Dual:
            dx = input.tangent.to(primal.dtype).contiguous()
            t = aten.native_group_norm_backward.default(dx, x, mean, rstd, None, *sizes, _FIRST)[0]
        return pair(primal, _scale_and_shift(t, xhat, weight, bias, (-1, *[1] * (x.ndim - 2))))


def weight_norm(func: Any, v: Any, g: Any, dim: int = 0) -> Any:
    """`w = g v / |v|`, the norm over all axes but `dim`, or over all if it is -1; `dw = (g dvhat + dg v) / |v|`."""
    (x, gain), dims = strip((v, g)), tuple(i for i in range(v.ndim) if i != dim)
    primal = func(x, gain, dim)
    with no_grad():
        r, t = torch.linalg.vector_norm(x, dim=dims, keepdim=True).reciprocal_(), None
        if type(v) is Dual:
            along = (x * v.tangent).sum(dims, keepdim=True).mul_(r).mul_(r)
            t = torch.addcmul(v.tangent, x, along, value=-1).mul_(gain * r)
        if type(g) is Dual:
            term = x * (g.tangent * r)
            t = term if t is None else t.add_(term)
        return pair(primal, t)


def torch_group_norm(func: Any, input: Any, num_groups: int, *args: Any, **kwargs: Any) -> Any:
    """`torch.group_norm`, which ends in a switch for cuDNN."""
    kwargs.pop("cudnn_enabled", None)
    return group_norm(F.group_norm, input, num_groups, *args[:3], **kwargs)


def torch_order(rule: Handler, function: Any) -> Handler:
    """`torch.batch_norm` and `torch.instance_norm`, which take weight and bias before the record of statistics."""

    def handler(func: Any, input: Any, weight: Any, bias: Any, mean: Any, var: Any, *settings: Any) -> Any:
        return rule(function, input, mean, var, weight, bias, *settings[:3])  # the last is a switch for cuDNN

    return handler


register(torch_group_norm, "group_norm")
register(torch_order(batch_norm, F.batch_norm), "batch_norm")
register(torch_order(instance_norm, F.instance_norm), "instance_norm")
register(layer_norm, "layer_norm")
register(rms_norm, "rms_norm")
register(weight_norm, "_weight_norm")
# A bare name also claims the function of torch.nn.functional, which has its own order of arguments.
register(group_norm, "nn.functional.group_norm")
register(batch_norm, "nn.functional.batch_norm")
register(instance_norm, "nn.functional.instance_norm")
