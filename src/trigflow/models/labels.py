"""Labels: class indices that a model or a data set knows."""

from __future__ import annotations

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Require every label to be an integer in `0 ... num_classes - 1`.

    Args:
        labels: class indices of any shape.
        num_classes: number of classes of the data set or the network; 0 means that there are none.

    Raises:
        UserError: naming the first label out of range, and the range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"labels of type {labels.dtype}; expected integers; convert them with labels.long()")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel() == 0:
        return
    if num_classes < 1:
        raise UserError(f"label {int(outside[0])} where there are no classes; expected no labels; leave the labels out")
    raise UserError(
        f"label {int(outside[0])} is out of range; expected 0 to {num_classes - 1} for {num_classes} classes; "
        "correct the labels or the number of classes"
    )
