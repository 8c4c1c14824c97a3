"""From a picture and a mask, as bytes, to an edit of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trigflow.conditions import quoted
from trigflow.runtime.errors import UserError
from trigflow.samplers.editing import LUMINANCE, Edit, blocks, gray, outside

if TYPE_CHECKING:
    from trigflow.models.model import Model


def edit_of(
    model: Model, picture: Tensor, strength: float | None = None, mask: Tensor | None = None, keep: str | int | None = None
) -> Edit:
    """The edit that `Model.edit` draws; arguments and errors as there."""
    _check(model, picture, mask, keep)
    c, h, w = size = model.codec.drawn_shape
    shown, also, picture = tuple(picture.shape), "", picture.to(model.device)[None]
    if keep == "gray":
        also, weights = f" or (1, {h}, {w})", torch.tensor(LUMINANCE, device=picture.device)[:, None, None]
        if picture.shape[1] in (1, c):  # the weights add up to 1
            picture = (weights * picture).sum(1, keepdim=True).round().to(torch.uint8).repeat(1, c, 1, 1)
    elif isinstance(keep, int):
        small = (h // keep, w // keep)
        also = f" or {(c, *small)}"
        if picture.shape[2:] == (h, w):
            picture = F.avg_pool2d(picture.float(), keep).round().to(torch.uint8)
        if picture.shape[2:] == small:
            picture = picture.repeat_interleave(keep, 2).repeat_interleave(keep, 3)
    if picture.shape[1:] != size:
        raise UserError(f"a picture of shape {shown}; expected {size}{also}; resize it, or convert its channels")
    known = None if mask is None else outside(_anew(mask, (h, w), model.shape[1:]).to(model.device))
    if keep is not None:
        bounds = [model.codec.seen(torch.full_like(picture, level)) for level in (0, 255)]
        known = blocks(keep, *bounds) if isinstance(keep, int) else gray(*bounds)
    return Edit(model.codec.seen(picture), (0.5 if known is None else 1.0) if strength is None else strength, known)


def _check(model: Model, picture: Tensor, mask: Tensor | None, keep: str | int | None) -> None:
    """What is wrong before sizes are looked at."""
    if len(shape := model.shape) != 3:
        raise UserError(f"a picture for a model of data of shape {shape}; expected one that draws pictures; use sample")
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.ndim != 3:
        found = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
        raise UserError(f"a picture of type {found}; expected a tensor, uint8 (c, h, w); convert it")
    if keep is not None and mask is not None:
        raise UserError("a mask and something to keep inside it; expected one of them; drop the mask, or keep")
    if isinstance(keep, bool) or not (keep in (None, "gray") or isinstance(keep, int)):
        raise UserError(f"keep {quoted(keep)}; expected gray, or a whole number for the side of blocks; correct keep")
    if keep is not None and not model.codec.pictured:
        raise UserError(f"keep {keep} for a model of latents; expected a model of pixels; use a mask, or strength alone")
    if keep == "gray" and shape[0] != 3:
        raise UserError(f"keep gray for pictures of shape {shape}; expected 3 channels; use a mask, or strength alone")
    if isinstance(keep, int) and (keep < 2 or shape[1] % keep or shape[2] % keep):
        raise UserError(f"blocks of side {keep} for pictures of shape {shape}; expected a divisor above 1; correct keep")


def _anew(mask: Tensor, size: tuple[int, int], inner: tuple[int, ...]) -> Tensor:
    """A mask of pixels as bool `(1, 1, h, w)` of x0, True where to draw, also where that is but a part."""
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.uint8) or tuple(mask.shape) != size:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"a mask of type {found}; expected a tensor, bool or uint8, of the picture's size {size}; resize it")
    anew = mask if mask.dtype == torch.bool else mask >= 128
    return F.max_pool2d(anew[None, None].float(), (size[0] // inner[0], size[1] // inner[1])) > 0
