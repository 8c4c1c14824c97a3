"""Images in memory, with or without labels, and the checks that training asks of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trigflow.data.order import derive_seed
from trigflow.errors import UserError


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


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Equal-sized images, all of them in memory as bytes.

    Attributes:
        name: what the data is called in logs and reports.
        images: uint8, shape `(n, c, h, w)`, values 0 to 255.
        labels: int64, shape `(n,)`, in `0 ... num_classes - 1`; or None.
        class_names: one name a class, in the order of the labels; empty without labels.
        skipped: names of the corrupt files that were left out when reading, relative to the folder or zip.

    Raises:
        UserError: if shapes or types are not as above, or a label is out of range.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

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
        return len(self.images)

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
        self, indices: Tensor, *, flip: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Copies of the chosen images, uint8 `(b, c, h, w)`, and their labels, int64 `(b,)` or None.

        Args:
            indices: which images, int64, shape `(b,)`; one may come up several times.
            flip: bool, shape `(b,)`; images where it is true are mirrored left to right.
            generator: for data with randomness of its own, which images have not (see `trigflow.data.latents`).

        Raises:
            UserError: if `flip` is not a bool mask of shape `(b,)`.
        """
        indices = indices.to(self.images.device)
        images = self.images[indices]
        if flip is not None:
            if flip.dtype != torch.bool or flip.shape != indices.shape:
                raise UserError(
                    f"flip of type {flip.dtype} and shape {tuple(flip.shape)}; "
                    f"expected a bool mask of shape {tuple(indices.shape)}; pass one flag an image"
                )
            images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)
        return images, None if self.labels is None else self.labels[indices.to(self.labels.device)]

    def subset(self, indices: Tensor) -> ImageDataset:
        """The chosen images as a data set of their own, with the same classes; `indices` is int64, shape `(m,)`."""
        labels = None if self.labels is None else self.labels[indices.to(self.labels.device)]
        return replace(self, images=self.images[indices.to(self.images.device)], labels=labels)

    def split(self, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
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
