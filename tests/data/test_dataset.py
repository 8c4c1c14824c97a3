from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from trigflow.conditions import Classes, Conditioner, Numbers, check_labels
from trigflow.data import ImageDataset, require_classes
from trigflow.runtime.errors import UserError


def counted(n: int, *, channels: int = 1) -> ImageDataset:
    """Image `i` is 2x3 with bytes i, i+1, ...: every pixel tells where it came from. Labels 0 1 2 0 1 2 ..."""
    pixels = torch.arange(n)[:, None] + torch.arange(channels * 6)
    images = pixels.reshape(n, channels, 2, 3).to(torch.uint8)
    return ImageDataset("counted", images, torch.arange(n) % 3, ("a", "b", "c"))


def test_properties() -> None:
    dataset = counted(5, channels=3)
    assert (len(dataset), dataset.channels, dataset.height, dataset.width) == (5, 3, 2, 3)
    assert dataset.shape == (3, 2, 3)
    assert dataset.num_classes == 3
    assert ImageDataset("bare", dataset.images).num_classes == 0


def test_batch_picks_images_and_labels() -> None:
    dataset = counted(5)
    images, labels = dataset.batch(torch.tensor([4, 0, 4]))
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [4, 0, 4]
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    assert ImageDataset("bare", dataset.images).batch(torch.tensor([0]))[1] is None


def test_batch_mirrors_left_to_right_where_asked() -> None:
    dataset = counted(2)
    before = dataset.images.clone()
    images, _ = dataset.batch(torch.tensor([0, 1, 1]), flip=torch.tensor([True, False, True]))
    assert images[:, 0].tolist() == [[[2, 1, 0], [5, 4, 3]], [[1, 2, 3], [4, 5, 6]], [[3, 2, 1], [6, 5, 4]]]
    images.zero_()
    assert torch.equal(dataset.images, before)


@pytest.mark.parametrize("flip", [torch.tensor([True]), torch.tensor([1, 0]), torch.tensor([[True, False]])])
def test_flip_must_be_one_flag_an_image(flip: Tensor) -> None:
    with pytest.raises(UserError, match=r"expected a bool mask of shape \(2,\)"):
        counted(3).batch(torch.tensor([0, 1]), flip=flip)


def test_subset_keeps_the_classes() -> None:
    part = counted(6).subset(torch.tensor([3, 0]))
    assert part.images[:, 0, 0, 0].tolist() == [3, 0]
    assert part.labels is not None
    assert part.labels.tolist() == [0, 0]
    assert part.class_names == ("a", "b", "c")


@pytest.mark.parametrize(("n", "fraction", "size"), [(10, 0.5, 5), (7, 0.5, 4), (10, 0.25, 2), (2, 0.5, 1)])
def test_split_parts_are_disjoint_and_complete(n: int, fraction: float, size: int) -> None:
    first, second = counted(n).split(fraction, seed=0)
    assert len(first) == size
    ids = first.images[:, 0, 0, 0].tolist() + second.images[:, 0, 0, 0].tolist()
    assert sorted(ids) == list(range(n))
    for part in (first, second):
        assert part.labels is not None
        assert torch.equal(part.labels, part.images[:, 0, 0, 0].long() % 3)


def test_split_depends_on_the_seed_alone() -> None:
    halves = [counted(40).split(0.5, seed)[0].images for seed in (0, 0, 1)]
    assert torch.equal(halves[0], halves[1])
    assert not torch.equal(halves[0], halves[2])
    assert not torch.equal(halves[0], counted(40).images[:20])


@pytest.mark.parametrize(
    ("n", "fraction"), [(10, 0.0), (10, 1.0), (10, -0.5), (10, 1.5), (1, 0.5), (10, 0.01), (10, float("nan"))]
)
def test_split_refuses_empty_parts(n: int, fraction: float) -> None:
    with pytest.raises(UserError, match="two parts of at least one sample"):
        counted(n).split(fraction, seed=0)


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)])
def test_images_must_be_bytes_of_four_axes(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"expected uint8 of shape \(n, c, h, w\)"):
        ImageDataset("bad", images)


@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32)])
def test_labels_must_be_int64_and_one_an_image(labels: Tensor) -> None:
    with pytest.raises(UserError, match=r"expected int64 of shape \(2,\)"):
        ImageDataset("bad", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), labels, ("a", "b"))


def test_labels_must_have_a_class() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="label 2 is out of range"):
        ImageDataset("bad", images, torch.tensor([0, 2]), ("a", "b"))
    with pytest.raises(UserError, match="2 class names without labels"):
        ImageDataset("bad", images, None, ("a", "b"))


def test_check_labels_accepts_the_whole_range() -> None:
    check_labels(torch.tensor([0, 9, 5]), 10)
    check_labels(torch.tensor([], dtype=torch.int64), 0)
    with pytest.raises(UserError, match=r"^label 10 is out of range; expected 0 to 9 for 10 classes; "):
        check_labels(torch.tensor([0, 10, 11]), 10)
    with pytest.raises(UserError, match=r"^label -1 is out of range; expected 0 to 9"):
        check_labels(torch.tensor([[3], [-1]]), 10)


def test_check_labels_names_what_else_is_wrong() -> None:
    with pytest.raises(UserError, match="label 3 where there are no classes"):
        check_labels(torch.tensor([3]), 0)
    for labels in (torch.tensor([0.0]), torch.tensor([True])):
        with pytest.raises(UserError, match="expected integers"):
            check_labels(labels, 10)


def test_require_classes() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    require_classes(ImageDataset("two", images, torch.tensor([0, 1]), ("a", "b")))
    refused = {
        "no labels": ImageDataset("d", images),
        "one class only, 'cats'": ImageDataset("d", images, torch.tensor([0, 0]), ("cats",)),
        "one class only, 'b'": ImageDataset("d", images, torch.tensor([1, 1]), ("a", "b")),
        "no images": ImageDataset("d", images[:0], torch.zeros(0, dtype=torch.int64), ("a", "b")),
    }
    for reason, dataset in refused.items():
        with pytest.raises(UserError, match=f"'d' has .*{reason}; expected .*; train unconditionally"):
            require_classes(dataset)


# Conditions ----------------------------------------------------------------------------------------------------------


def windy(n: int) -> ImageDataset:
    """`counted`, where image i has the wind (i, -i)."""
    wind = torch.stack([torch.arange(float(n)), -torch.arange(float(n))], dim=1)
    return dataclasses.replace(counted(n), conditions={"wind": wind})


def test_what_else_is_known_goes_with_each_sample() -> None:
    data, indices = windy(5), torch.tensor([4, 0, 4])
    told = data.told(indices)
    assert told["label"].tolist() == [1, 0, 1]
    assert told["wind"].tolist() == [[4, -4], [0, 0], [4, -4]]
    some = data.subset(torch.tensor([3, 1]))
    assert some.told(torch.tensor([1]))["wind"].tolist() == [[1, -1]]
    for part in data.split(0.4, seed=0):
        assert torch.equal(part.conditions["wind"][:, 0], part.images[:, 0, 0, 0].float())
    assert ImageDataset("bare", data.images).told(indices) == {}


def test_the_conditioner_of_a_network_has_what_it_takes() -> None:
    data = windy(5)
    assert data.conditioner({"wind", "label"}) == Conditioner(
        {"label": Classes(3, ("a", "b", "c")), "wind": Numbers("wind", (2,))}
    )
    assert data.conditioner({"label", "guidance", "end"}) == Conditioner.of_classes(3, ("a", "b", "c"))
    assert data.conditioner(()) == Conditioner()
    data.check_tells(["wind"])
    with pytest.raises(UserError, match=r"takes rain and the data have no such condition; .*conditions=\{'rain': ...\}"):
        data.check_tells(["wind", "rain"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label", torch.zeros(5)),
        ("guidance", torch.zeros(5)),
        ("end", torch.zeros(5)),
        ("wind", torch.zeros(4, 2)),
        ("wind", torch.tensor(1.0)),
        ("wind", [0.0] * 5),
    ],
)
def test_conditions_that_are_none(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"the condition {name} of 5 samples; expected a tensor .*; correct conditions"):
        dataclasses.replace(counted(5), conditions={name: value})
