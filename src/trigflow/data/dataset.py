"""Images, in memory or read as they are asked for, with or without labels, and the checks that training asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trigflow.data.order import Order, derive_seed
from trigflow.runtime.errors import UserError

D = TypeVar("D", bound="ImageDataset")


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


def number_classes(labels: Iterable[int]) -> tuple[str, ...]:
    """Names of classes that have none: "0", "1", ... up to the largest label."""
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))


class Rows(Protocol):
    """Images or latents that are not in memory. It can be pickled and sent to worker processes, which read for themselves."""

    @property
    def shards(self) -> tuple[int, ...] | None:
        """Lengths of the shards of a stream, each of which can only be read from its beginning; None for what is no stream."""

    @property
    def window(self) -> int:
        """How many samples of a stream, one after another, are shuffled with each other; 1 for what is no stream."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The rows at these indices `(b,)`, shape `(b, c, h, w)`, of the type that the data set has in memory."""

    def only(self, indices: Tensor) -> Any:
        """These rows alone, as another of its kind."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Equal-sized images, in memory as bytes or read and decoded as they are asked for.

    Attributes:
        name: what the data is called in logs and reports.
        images: uint8, shape `(n, c, h, w)`, values 0 to 255. With `rows`, of the same shape with n = 0.
        labels: int64, shape `(n,)`, in `0 ... num_classes - 1`; or None.
        class_names: one name a class, in the order of the labels; empty without labels.
        skipped: names of the corrupt files that were left out when reading, relative to the folder or zip.
        rows: images that stay where they are; None when they are in memory.
        counts: how often each byte occurs in each channel, int64, shape `(c, 256)`, where that is known; else None.

    Raises:
        UserError: if shapes or types are not as above, or a label is out of range.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    rows: Rows | None = None
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_images()
        if self.labels is None:
            if self.class_names:
                raise UserError(
                    f"{len(self.class_names)} class names without labels; expected both or neither; pass labels"
                )
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self),):
            raise UserError(
                f"labels of type {self.labels.dtype} and shape {tuple(self.labels.shape)}; "
                f"expected int64 of shape ({len(self)},); pass one label an image"
            )
        check_labels(self.labels, self.num_classes)

    def _check_images(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise UserError(
                f"images of type {self.images.dtype} and shape {tuple(self.images.shape)}; "
                "expected uint8 of shape (n, c, h, w); convert them to 0..255 first"
            )

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    @property
    def channels(self) -> int:
        """1 (grayscale) or 3 (RGB)."""
        return self.images.shape[1]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.images.shape[2]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.images.shape[3]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of one image."""
        return self.channels, self.height, self.width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def batch(
        self,
        indices: Tensor,
        *,
        flip: Tensor | None = None,
        generator: torch.Generator | None = None,
        rows: Tensor | None = None,
        stored: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Copies of the chosen images, uint8 `(b, c, h, w)`, and their labels, int64 `(b,)` or None.

        Args:
            indices: which images, int64, shape `(b,)`; one may come up several times.
            flip: bool, shape `(b,)`; images where it is true are mirrored left to right.
            generator: for data with randomness of its own, which images have not (see `trigflow.data.latents`).
            rows: which of the indices are wanted, int64; None for all.
            stored: what `stored` gave for the wanted indices, where that was asked for before (see `Loader`).

        Raises:
            UserError: if `flip` is not a bool mask of shape `(b,)`.
        """
        if rows is not None:
            indices, flip = indices[rows], None if flip is None else flip[rows]
        images = self.stored(indices) if stored is None else stored
        if flip is not None:
            if flip.dtype != torch.bool or flip.shape != indices.shape:
                raise UserError(
                    f"flip of type {flip.dtype} and shape {tuple(flip.shape)}; "
                    f"expected a bool mask of shape {tuple(indices.shape)}; pass one flag an image"
                )
            images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)
        return images, self._labels_of(indices)

    def stored(self, indices: Tensor) -> Tensor:
        """Copies of what is stored of the chosen images, of the type of `images`, shape `(b, c, h, w)`."""
        return self.images[indices.to(self.images.device)] if self.rows is None else self.rows[indices.cpu()]

    def chunks(self, size: int = 64) -> Iterator[Tensor]:
        """All that is stored, `size` images at a time: how to go through images that may not fit into memory."""
        for indices in torch.arange(len(self)).split(size):
            yield self.stored(indices)

    def order(self, batch_size: int, seed: int) -> Order:
        """Which samples each training step sees."""
        if self.rows is None:
            return Order(len(self), batch_size, seed)
        return Order(len(self), batch_size, seed, shards=self.rows.shards, window=self.rows.window)

    def subset(self: D, indices: Tensor) -> D:
        """The chosen images as a data set of their own, with the same classes; `indices` is int64, shape `(m,)`."""
        labels = self._labels_of(indices)
        if self.rows is not None:
            return replace(self, labels=labels, rows=self.rows.only(indices.cpu()), counts=None)
        return replace(self, labels=labels, images=self.stored(indices), counts=None)

    def _labels_of(self, indices: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[indices.to(self.labels.device)]

    def split(self: D, fraction: float, seed: int) -> tuple[D, D]:
        """Two disjoint parts, the first of `round(fraction * n)` images, that together hold every image once.

        The choice is random but depends on `(n, fraction, seed)` alone. The distance between two halves of real data is
        the floor that a distance between generated and real data is read against.

        Raises:
            UserError: if either part would be empty.
        """
        size = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise UserError(
                f"a split of {len(self)} images at fraction {fraction}; expected two parts of at least one image; "
                "choose a fraction between 0 and 1, or use more images"
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order[:size].sort().values), self.subset(order[size:].sort().values)


def require_classes(dataset: ImageDataset) -> None:
    """Require what class-conditional training needs: labels, of at least two classes.

    Raises:
        UserError: if there are no labels, or all of them are the same.
    """
    if dataset.labels is None:
        found = "no labels"
    elif len(dataset) == 0:
        found = "no images"
    elif bool((dataset.labels == dataset.labels[0]).all()):
        found = f"images of one class only, {dataset.class_names[int(dataset.labels[0])]!r}"
    else:
        return
    raise UserError(
        f"{dataset.name!r} has {found}; expected labels of at least two classes for class-conditional training; "
        "train unconditionally by pointing to the folder of the images itself, or add a sub-folder for each further class"
    )
