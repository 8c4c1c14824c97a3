"""Products, linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tangent.helpers import check, draw, no_fallback

PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "matmul": (torch.matmul, ((2, 3, 4), (4, 5))),
    "operator": (lambda a, b: a @ b, ((2, 3, 4), (2, 4, 5))),
    "reflected": (lambda a, b: b @ a, ((4, 5), (3, 4))),
    "mm": (torch.mm, ((3, 4), (4, 5))),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 5))),
    "mv": (torch.mv, ((3, 4), (4,))),
    "dot": (torch.dot, ((4,), (4,))),
    "outer": (torch.outer, ((4,), (3,))),
    "inner": (torch.inner, ((2, 4), (3, 4))),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), ((2, 3, 4), (2, 5, 4))),
    "einsum three": (lambda a, b, c: torch.einsum("ij,jk,kl->il", [a, b, c]), ((2, 3), (3, 4), (4, 5))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=1), ((2, 3), (3, 4))),
    "linear": (F.linear, ((2, 3, 4), (5, 4), (5,))),
    "linear without bias": (F.linear, ((2, 4), (5, 4))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), ((2, 3, 7), (4, 3, 3), (4,))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), ((2, 4, 7, 7), (4, 4, 3, 3), (4,))),
    "conv2d groups": (lambda x, w: F.conv2d(x, w, padding="same", groups=2), ((2, 4, 5, 5), (6, 2, 3, 3))),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, bias=b, dilation=1), ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,))),
    "conv_transpose1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), ((2, 3, 5), (3, 4, 3), (4,))),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        ((2, 3, 5, 5), (3, 4, 3, 3), (4,)),
    ),
    "conv_transpose3d": (F.conv_transpose3d, ((1, 2, 3, 3, 3), (2, 3, 2, 2, 2), (3,))),
    "addmm": (lambda m, a, b: torch.addmm(m, a, b, beta=0.5, alpha=2), ((3, 5), (3, 4), (4, 5))),
    "addmm bias": (torch.addmm, ((5,), (3, 4), (4, 5))),
    "baddbmm": (lambda m, a, b: torch.baddbmm(m, a, b, alpha=0.3), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    "multi_dot": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), ((2, 3), (3, 4), (4, 5))),
    "lerp": (torch.lerp, ((3, 4), (3, 4), (3, 4))),
    "addcdiv": (lambda x, a, b: torch.addcdiv(x, a, 3 + b.square(), value=2), ((3, 4), (4,), (3, 1))),
    "addcmul": (lambda x, a, b: torch.addcmul(x, a, b, value=2), ((3, 4), (4,), (3, 1))),
    "bilinear": (F.bilinear, ((2, 3), (2, 4), (5, 3, 4), (5,))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    fn, shapes = PRODUCTS[name]
    values = tuple(draw(40 + i, *shape) for i, shape in enumerate(shapes))
    for bits in range(1, 2 ** len(shapes)):
        check(fn, values, tuple(bool(bits >> i & 1) for i in range(len(shapes))))
    if name != "bilinear":
        no_fallback(fn, *values)
