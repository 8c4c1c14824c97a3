"""Functions linear in the tensors they take: the tangent goes through the same function.

Moving, copying, picking, padding, adding up: `d f(x) = f(dx)` for one tensor, `d f(x1, x2, ...) = f(dx1, dx2, ...)` for a
list of them, with zeros for those that carry no tangent.
"""

from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback, unsupported
from trigflow.tangent.dual import Dual, no_grad, pair, strip
from trigflow.tangent.table import register


def linear(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`f(x, settings)`, linear in x: tangent `f(dx, settings)`. Duals among the settings count by value (`expand_as`)."""
    for a in args:
        if type(a) is Dual:
            args = strip(args)
            break
    if kwargs:
        kwargs = strip(kwargs)
    if type(input) is not Dual:
        return func(input, *args, **kwargs)
    primal = func(input.primal, *args, **kwargs)
    if isinstance(primal, Tensor) and not (primal.is_floating_point() or primal.is_complex()):
        return primal
    with no_grad():
        try:
            tangent = func(input.tangent, *args, **kwargs)
        except RuntimeError:  # a kernel that wants certain strides, which the primal has
            tangent = func(laid_out(input), *args, **kwargs)
    return pair(primal, tangent)


def laid_out(x: Dual) -> Tensor:
    """The tangent with the strides of its primal."""
    return torch.empty_like(x.primal, requires_grad=False).copy_(x.tangent)


def view(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """A view of the primal; the tangent may have other strides, so its values are taken in the same order instead."""
    if type(input) is not Dual:
        return func(input, *strip(args), **strip(kwargs))
    primal = func(input.primal, *strip(args), **kwargs)
    if primal.dtype != input.primal.dtype:
        raise unsupported(func, "it reads the same memory as another type")
    with no_grad():
        return pair(primal, input.tangent.reshape(primal.shape))


def tangents_of(values: Any) -> list[Any]:
    """The tangent of each tensor in a list, zeros where there is none."""
    return [v.tangent if type(v) is Dual else torch.zeros_like(v) for v in values]


def joint(func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """`f([x1, x2, ...], settings)`, linear in all of them together."""
    primal = func(strip(tensors), *args, **kwargs)
    with no_grad():
        tangent = func(tangents_of(tensors), *args, **kwargs)
    return pair(primal, tangent)


def variadic(func: Any, *tensors: Any, **kwargs: Any) -> Any:
    """`f(x1, x2, ...)` or `f([x1, x2, ...])`, each output a linear function of the input in the same place."""
    one = len(tensors) == 1 and isinstance(tensors[0], (tuple, list))
    if one:
        tensors = tuple(tensors[0])
    primal = func(strip(tensors), **kwargs) if one else func(*strip(tensors), **kwargs)
    with no_grad():
        moved = tuple(tangents_of(tensors))
        tangent = func(moved, **kwargs) if one else func(*moved, **kwargs)
    if not isinstance(primal, (tuple, list)):
        return pair(primal, tangent)
    outputs = [pair(p, t) if type(x) is Dual else p for p, t, x in zip(primal, tangent, tensors, strict=True)]
    return type(primal)(outputs)


def pad(func: Any, input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """Padding with a constant pads the tangent with zeros."""
    primal = func(input.primal, pad, mode, value)
    with no_grad():
        return pair(primal, func(input.tangent, pad, mode, 0.0 if mode == "constant" else None))


def constant_pad(func: Any, input: Any, pad: Any, value: float = 0) -> Any:
    """`torch.constant_pad_nd`."""
    primal = func(input.primal, pad, value)
    with no_grad():
        return pair(primal, func(input.tangent, pad, 0.0))


def joined(place: int, name: str) -> Any:
    """Handler of functions that write a tensor or number `name`, argument number `place`, into a copy of their input.

    They are linear in both together, adding, copying or filling in.
    """

    def handler(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("reduce", "add") != "add" or (len(args) < place and name not in kwargs):
            return fallback(func, input, *args, **kwargs)
        by_name = len(args) < place
        piece = kwargs[name] if by_name else args[place - 1]

        def run(base: Any, part: Any) -> Any:
            if by_name:
                return func(base, *args, **{**kwargs, name: part})
            return func(base, *args[: place - 1], part, *args[place:], **kwargs)

        primal = run(strip(input), strip(piece))
        with no_grad():
            part = tangents_of([piece])[0] if isinstance(piece, (Dual, Tensor)) else 0
            return pair(primal, run(tangents_of([input])[0], part))

    return handler


def as_complex(func: Any, input: Any) -> Any:
    """`torch.view_as_complex`, which wants each pair of numbers side by side in memory."""
    primal = func(input.primal)
    with no_grad():
        return pair(primal, func(input.tangent.clone(memory_format=torch.contiguous_format)))


register(
    linear,
    # shape
    *"reshape flatten unflatten expand expand_as reshape_as repeat repeat_interleave tile squeeze unsqueeze".split(),
    *"permute transpose t movedim moveaxis swapaxes swapdims swap_axes adjoint narrow select index_select".split(),
    *"take take_along_dim gather masked_select diagonal diag diag_embed diagflat tril triu flip fliplr flipud rot90".split(),
    *"roll ravel unfold fold im2col col2im broadcast_to view_as_real real imag conj resolve_conj".split(),
    *"chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk unsafe_split".split(),
    *"pixel_shuffle pixel_unshuffle channel_shuffle conj_physical resolve_neg alias".split(),
    "Tensor.__getitem__",
    # copies and types
    *"contiguous clone to type type_as float double half bfloat16 cpu cuda positive neg negative".split(),
    "Tensor.__neg__",
    "Tensor.__pos__",
    # sums, averages and resampling
    *"sum mean cumsum trace sum_to_size".split(),
    *"avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split(),
    *"upsample upsample_nearest upsample_bilinear upsample_nearest1d upsample_nearest2d".split(),
    *"upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d".split(),
    *"_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d".split(),
    *"_upsample_bilinear2d_aa _upsample_bicubic2d_aa".split(),
    *"max_unpool1d max_unpool2d max_unpool3d".split(),
    # Fourier transforms
    *[f"fft.{kind}{n}" for n in ("", "2", "n") for kind in "fft ifft rfft irfft hfft ihfft".split()],
    *"fft.fftshift fft.ifftshift".split(),
    *"reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d".split(),
)
register(view, "view", "view_as", "view_copy")
register(as_complex, "view_as_complex")
register(joint, *"cat concat concatenate stack hstack vstack dstack column_stack row_stack".split())
register(variadic, *"broadcast_tensors meshgrid block_diag atleast_1d atleast_2d atleast_3d".split())
register(pad, "pad")
register(constant_pad, "constant_pad_nd")
register(joined(3, "source"), *"index_add index_copy".split())
register(joined(3, "src"), *"scatter scatter_add".split())
register(joined(3, "value"), "index_fill")
register(joined(2, "values"), *"index_put _unsafe_index_put".split())
register(joined(2, "source"), *"masked_scatter put".split())
register(joined(1, "src"), *"select_scatter slice_scatter diagonal_scatter".split())
