"""Samples, in memory or read as they are asked for, with or without labels, and the checks that training asks of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from trigflow.codecs import Codec, Pixels
from trigflow.codecs.pixels import count_all, count_values
from trigflow.conditions import (
    ORDER,
    Classes,
    Conditioner,
    Encoded,
    Input,
    Numbers,
    Text,
    check_class_names,
    check_labels,
    in_order,
    named,
    printable,
)
from trigflow.data.captions import Captions
from trigflow.data.order import BucketOrder, Order
from trigflow.runtime.errors import UserError
from trigflow.runtime.seeds import derive_seed
from trigflow.runtime.tensors import content

D = TypeVar("D", bound="Dataset")


def number_classes(labels: Iterable[int]) -> tuple[str, ...]:
    """Names of classes that have none: "0", "1", ... up to the largest label."""
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))


def digest_of(values: Tensor) -> str:
    """A digest of the numbers of a tensor on any device, in memory in their order."""
    return hashlib.blake2b(content(values), digest_size=16).hexdigest()


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
class Dataset:
    """Equal-sized samples, in memory as they are stored or read as they are asked for.

    Data of another kind are a subclass that says what is stored (`_check_values`) and which codec makes x0 of it (`codec`).

    Attributes:
        name: what the data is called in logs and reports.
        values: what is stored, shape `(n, ...)`. With `rows`, of the same shape with n = 0.
        labels: int64, shape `(n,)`, in `0 ... num_classes - 1`; or None.
        class_names: one name a class, in the order of the labels; empty without labels.
        skipped: names of the corrupt files that were left out when reading, relative to the folder or zip.
        rows: samples that stay where they are; None when they are in memory.
        digest: of the contents of the files that the samples are from, in order; empty where that is not known.
        conditions: what else is known of each sample, by name: tensors `(n, ...)`, for networks that take them.
        captions: what is written of each sample, for networks that read words; None for nothing.

    Raises:
        UserError: if shapes or types are not as above, or a label is out of range.
    """

    name: str
    values: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    rows: Rows | None = None
    digest: str = ""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    captions: Captions | None = None

    def __post_init__(self) -> None:
        self._check_values()
        for name, value in self.conditions.items():
            if name in ORDER or not isinstance(value, Tensor) or not value.ndim or len(value) != len(self):
                raise UserError(
                    f"the condition {name} of {len(self)} samples; expected a tensor with a row for each, and a name that is "
                    f"none of {', '.join(ORDER)}; correct conditions"
                )
        if self.captions is not None and len(self.captions) != len(self):
            raise UserError(
                f"captions of {len(self.captions)} samples for {len(self)}; expected those of each sample; correct the captions"
            )
        if self.labels is None:
            if self.class_names:
                raise UserError(f"{len(self.class_names)} class names without labels; expected both or neither; pass labels")
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self),):
            raise UserError(
                f"labels of type {self.labels.dtype} and shape {tuple(self.labels.shape)}; "
                f"expected int64 of shape ({len(self)},); pass one label a sample"
            )
        check_class_names(self.class_names, f"'{self.name}'")
        object.__setattr__(self, "class_names", tuple(map(printable, self.class_names)))
        check_labels(self.labels, self.num_classes)

    def _check_values(self) -> None:
        """Raise a UserError if `values` are not what this kind of data stores."""

    def __len__(self) -> int:
        return len(self.values if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, as the network sees it."""
        return tuple(self.values.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def codec(self, normalize: Literal["measured", "symmetric", "edm2"], sigma_data: float) -> Codec:
        """The codec that makes x0 of standard deviation `sigma_data` of these data.

        Args:
            normalize: measured on the data, or one of the fixed ones; see `DataConfig.normalize`.
            sigma_data: standard deviation of x0.

        Raises:
            UserError: if there is no such codec for data of this kind.
        """
        raise UserError(
            f"data of the kind {type(self).__name__} without a codec; expected a method codec(normalize, sigma_data); write one"
        )

    def check_flip(self) -> None:
        """Raise a UserError if samples cannot be mirrored left to right, as images can."""
        raise UserError(f"data.flip for {type(self).__name__}; expected images, which can be mirrored; turn it off")

    def check_codec(self, codec: object, name: str) -> None:
        """Raise a UserError if samples are not what the codec of the model called `name` was made for."""

    def batch(
        self,
        indices: Tensor,
        *,
        flip: Tensor | None = None,
        generator: torch.Generator | None = None,
        rows: Tensor | None = None,
        stored: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Copies of the chosen samples as they are stored, `(b, ...)`, and their labels, int64 `(b,)` or None.

        Args:
            indices: which samples, int64, shape `(b,)`; one may come up several times.
            flip: bool, shape `(b,)`; samples where it is true are mirrored left to right.
            generator: for data with randomness of its own, which most have not (see `vary`).
            rows: which of the indices are wanted, int64; None for all.
            stored: what `stored` gave for the wanted indices, where that was asked for before (see `Loader`).

        Raises:
            UserError: if `flip` is not a bool mask of shape `(b,)`, or samples cannot be mirrored.
        """
        count = len(indices)
        if rows is not None:
            indices, flip = indices[rows], None if flip is None else flip[rows]
        values = self.stored(indices) if stored is None else stored
        if flip is not None:
            self.check_flip()
            if flip.dtype != torch.bool or flip.shape != indices.shape:
                raise UserError(
                    f"flip of type {flip.dtype} and shape {tuple(flip.shape)}; "
                    f"expected a bool mask of shape {tuple(indices.shape)}; pass one flag a sample"
                )
            mask = flip.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
            values = torch.where(mask, values.flip(-1), values)
        return self.vary(values, count, rows, generator), self._labels_of(indices)

    def vary(self, values: Tensor, count: int, rows: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """What is drawn of stored samples each time they come up, for data with randomness of its own; else `values`.

        The numbers of all `count` samples of a batch are drawn, whatever `rows` of it are wanted (None for all).
        """
        return values

    def told(self, indices: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The conditions of the chosen samples, by name, each `(b, ...)`: `label`, those of `conditions`, and a caption.

        Args:
            indices: which samples, int64, shape `(b,)`.
            generator: draws among several captions of a sample; without it the first is taken.
        """
        labels = self._labels_of(indices)
        rows = {name: value[indices.to(value.device)] for name, value in self.conditions.items()}
        if self.captions is not None:
            rows |= self.captions.rows(indices, generator)
        return rows if labels is None else {"label": labels, **rows}

    def said(self, indices: Tensor, names: Iterable[str]) -> dict[str, Any]:
        """What of these names is known of the chosen samples beside classes, as a `Conditioner` takes it."""
        told = self.told(indices)
        said: dict[str, Any] = {name: told[name] for name in names if name in told and name != "label"}
        if "text" in said and self.captions and self.captions.features and not isinstance(self.captions.input, Encoded):
            said["text"] = {name: told[name] for name in self.captions.names}
        return said

    def conditioner(self, names: Iterable[str]) -> Conditioner:
        """What turns words into the conditions of these names, for a model that was trained on these data.

        Classes are said by number or name, texts as they are, and other conditions as numbers; data of which more is to be
        said have a method of their own.
        """
        inputs: dict[str, Input] = {}
        for name in in_order(names):
            if name == "label":
                inputs[name] = Classes(self.num_classes, self.class_names)
            elif name == "text" and self.captions is not None:
                inputs[name] = self.captions.input
            elif name in self.conditions:
                inputs[name] = Numbers(name, tuple(self.conditions[name].shape[1:]))
        return Conditioner(inputs)

    def read_as(self: D, conditioner: Conditioner | None, progress: bool = False) -> D:
        """The same with captions read by the encoders of this model, where it has some and nothing else has read them."""
        reader: Any = conditioner.inputs.get("text") if conditioner else None
        if self.captions is None or self.captions.features is not None or not hasattr(reader, "kept"):
            return self
        return replace(self, captions=self.captions.encoded(reader, progress=progress))

    def read_by(self: D, none: Mapping[str, Tensor]) -> D:
        """The same for a network that reads texts of as many tokens as its `null` has; without a text there, as it is."""
        if "text" not in none or self.captions is None or self.captions.features is not None:
            return self
        return replace(self, captions=replace(self.captions, input=Text(len(none["text"]))))

    def check_tells(self, names: Iterable[str]) -> None:
        """Raise a UserError unless the data have these conditions."""
        words = frozenset() if self.captions is None else self.captions.names
        missing = in_order(set(names) - self.conditions.keys() - words)
        if missing:
            raise UserError(
                f"the network takes {missing[0]} and the data have no such condition; expected one row of it for each sample; "
                f"pass a data set with conditions={{'{missing[0]}': ...}}"
            )

    def stored(self, indices: Tensor) -> Tensor:
        """Copies of what is stored of the chosen samples, of the type of `values`, shape `(b, ...)`."""
        return self.values[indices.to(self.values.device)] if self.rows is None else self.rows[indices.cpu()]

    def chunks(self, size: int = 64) -> Iterator[Tensor]:
        """All that is stored, up to `size` samples of one shape at a time: for data that may not fit into memory."""
        groups = getattr(self.rows, "groups", torch.zeros(len(self), dtype=torch.int64))
        for group in groups.unique():
            for indices in (groups == group).nonzero()[:, 0].split(size):
                yield self.stored(indices)

    def order(self, batch_size: int, seed: int) -> Order:
        """Which samples each training step sees."""
        if self.rows is None:
            return Order(len(self), batch_size, seed)
        if (groups := getattr(self.rows, "groups", None)) is not None:
            return BucketOrder(groups, batch_size, seed)
        return Order(len(self), batch_size, seed, shards=self.rows.shards, window=self.rows.window)

    def numbered_as(self: D, names: tuple[str, ...], whose: str) -> D:
        """The same samples with their classes numbered as in `names`, by name.

        Names that are but numbers, "0", "1", ..., say nothing, and leave the data as they are; so does no name at all. Raises a
        UserError naming the first class that is not among the names, or the other way round; `whose` names the latter.
        """
        if self.labels is None or names == self.class_names or not (named(names) and named(self.class_names)):
            return self
        if odd := [*(n for n in self.class_names if n not in names), *(n for n in names if n not in self.class_names)]:
            raise UserError(
                f"the class '{odd[0]}' is not in both '{self.name}' and {whose}; expected the same {len(names)} names; use the "
                "data that it was trained on"
            )
        number = torch.tensor([names.index(name) for name in self.class_names])
        return replace(self, labels=number[self.labels.cpu()].to(self.labels.device), class_names=names)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others, in plain types: how many samples there are and of what shape, the names of the
        classes, and digests of the labels, the other conditions and the contents (None where these are not known)."""
        contents = self.digest or (None if self.rows is not None else digest_of(self.values))
        return {
            "number of samples": len(self),
            "shape": list(self.shape),
            "class names": list(self.class_names),
            "labels": None if self.labels is None else digest_of(self.labels),
            **{f"condition {name}": digest_of(value) for name, value in sorted(self.conditions.items())},
            **({} if self.captions is None else {"captions": self.captions.digest()}),
            "contents": contents,
        }

    def subset(self: D, indices: Tensor) -> D:
        """The chosen samples as a data set of their own, with the same classes; `indices` is int64, shape `(m,)`."""
        labels = self._labels_of(indices)
        told = {name: value[indices.to(value.device)] for name, value in self.conditions.items()}
        digest = self.digest and f"{self.digest}/{digest_of(indices)}"
        kept = {"values": self.stored(indices)} if self.rows is None else {"rows": self.rows.only(indices.cpu())}
        captions = None if self.captions is None else self.captions.only(indices)
        return replace(self, labels=labels, conditions=told, digest=digest, captions=captions, **kept)  # type: ignore[arg-type]

    def _labels_of(self, indices: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[indices.to(self.labels.device)]

    def split(self: D, fraction: float, seed: int) -> tuple[D, D]:
        """Two disjoint parts, the first of `round(fraction * n)` samples, that together hold every sample once.

        The choice is random but depends on `(n, fraction, seed)` alone. The distance between two halves of real data is the
        floor that a distance between generated and real data is read against. Raises a UserError if either part would be empty.
        """
        size = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise UserError(
                f"a split of {len(self)} samples at fraction {fraction}; expected two parts of at least one sample; "
                "choose a fraction between 0 and 1, or use more samples"
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order[:size].sort().values), self.subset(order[size:].sort().values)


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset):
    """Equal-sized images, in memory as bytes or read and decoded as they are asked for.

    Attributes:
        values: uint8, shape `(n, c, h, w)`, values 0 to 255. With `rows`, of the same shape with n = 0.
        counts: how often each byte occurs in each channel, int64, shape `(c, 256)`, where that is known; else None.

    The other attributes, and what is raised, are those of `Dataset`.
    """

    counts: Tensor | None = None

    def _check_values(self) -> None:
        if self.values.dtype != torch.uint8 or self.values.ndim != 4:
            raise UserError(
                f"images of type {self.values.dtype} and shape {tuple(self.values.shape)}; "
                "expected uint8 of shape (n, c, h, w); convert them to 0..255 first"
            )

    @property
    def images(self) -> Tensor:
        """The images in memory, uint8 `(n, c, h, w)`."""
        return self.values

    @property
    def channels(self) -> int:
        """1 (grayscale) or 3 (RGB)."""
        return self.values.shape[1]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.values.shape[2]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.values.shape[3]

    def check_flip(self) -> None:
        """Images can be mirrored."""

    def codec(self, normalize: Literal["measured", "symmetric", "edm2"], sigma_data: float) -> Pixels:
        """Pixels measured or in [-1, 1]; see `Dataset.codec`."""
        if normalize == "edm2":
            raise UserError(
                f"data.normalize is edm2 and {self.name!r} holds images; expected latents; set it to measured or "
                "symmetric, or encode the images with: trigflow encode"
            )
        if normalize == "symmetric":
            return Pixels.symmetric(self.shape)
        counts = self.counts
        if counts is None:
            counts = count_values(self.values) if self.rows is None else count_all(self.chunks(), self.channels)
        return Pixels.measured(self.shape, counts, sigma_data, self.name)

    def subset(self, indices: Tensor) -> ImageDataset:
        """The chosen images as a data set of their own; how often each byte occurs is counted anew."""
        return replace(super().subset(indices), counts=None)


def require_classes(dataset: Dataset) -> None:
    """Require what class-conditional training needs: labels, of at least two classes. Raises a UserError if there are no
    labels, or all of them are the same."""
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
