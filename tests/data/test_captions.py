"""Captions: which one is taken, what a network is told of it, and how a data set carries them."""

import pytest
import torch

from trigflow.conditions import Text
from trigflow.data.captions import Captions
from trigflow.data.dataset import ImageDataset
from trigflow.networks import TextConfig
from trigflow.runtime.errors import UserError

TEXTS = [["cat", "a cat"], ["dog"], [], ["  two\n words ", ""]]


def dataset(texts=TEXTS):
    return ImageDataset("pictures", torch.zeros(len(texts), 1, 2, 2, dtype=torch.uint8), captions=Captions.of(texts))


def test_texts_are_brought_into_plain_form():
    assert Captions.of(TEXTS).texts == [("cat", "a cat"), ("dog",), (), ("two words",)]


def test_the_first_without_a_generator():
    assert Captions.of(TEXTS).of_samples(torch.tensor([0, 2, 3, 0])) == ["cat", "", "two words", "cat"]


def test_each_of_several_is_drawn_as_often():
    captions, many = Captions.of(TEXTS), torch.zeros(4000, dtype=torch.int64)
    drawn = captions.of_samples(many, torch.Generator().manual_seed(0))
    assert {"cat", "a cat"} == set(drawn)
    assert abs(drawn.count("cat") - 2000) < 4 * 32
    assert drawn == captions.of_samples(many, torch.Generator().manual_seed(0))


def test_a_network_is_told_bytes_up_to_its_length():
    data = dataset().read_by(TextConfig(length=3).null)
    told = data.told(torch.tensor([1, 2]))
    assert told["text"].tolist() == [[1, 2 + ord("d"), 2 + ord("o")], [1, 0, 0]]
    assert told["text_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert data.conditioner({"text", "text_mask", "guidance"}).inputs == {"text": Text(3)}
    assert dataset().read_by({}).captions.input == Text()


def test_a_part_keeps_its_captions_and_another_fingerprint():
    data = dataset()
    part = data.subset(torch.tensor([3, 1]))
    assert part.captions.texts == [("two words",), ("dog",)]
    assert part.fingerprint()["captions"] != data.fingerprint()["captions"]
    assert dataset([["cat"], ["dog"], [], ["two"]]).fingerprint()["captions"] != data.fingerprint()["captions"]
    assert "captions" not in ImageDataset("bare", data.images).fingerprint()


def test_other_numbers_of_captions_and_text_that_is_none():
    with pytest.raises(UserError, match="captions of 1 samples for 2"):
        ImageDataset("pictures", torch.zeros(2, 1, 2, 2, dtype=torch.uint8), captions=Captions.of([["a"]]))
    with pytest.raises(UserError, match=r"captions of sample 1: the text 'a\\x07'.*printed"):
        Captions.of([["a"], ["a\x07"]])
