"""Texts as conditions: bytes, their form, and what is no prompt."""

import pytest
import torch

from trigflow.conditions import Conditioner, Text, said_of
from trigflow.conditions.text import plain, shortened, tokens
from trigflow.runtime.errors import UserError

WORDS = Conditioner({"text": Text(16)})


def test_tokens_are_the_bytes():
    rows = tokens(["ab", "", "é"], 6)
    assert rows.tolist() == [[1, 99, 100, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 2 + 0xC3, 2 + 0xA9, 0, 0, 0]]


def test_what_is_too_long_is_cut_between_characters():
    assert shortened("aéé", 5) == "aé"  # four bytes: a, é, and half of another
    assert tokens(["aéé"], 5)[0].tolist() == [1, 99, 2 + 0xC3, 2 + 0xA9, 0]


def test_one_form_for_one_text():
    assert plain("  e\u0301\t x\n") == "é x"
    said = WORDS.conditions({"text": ["cafe\u0301 ", "café"]}, 2)
    assert torch.equal(said["text"][0], said["text"][1])


def test_prompts_in_turn_and_nothing_is_the_empty_one():
    told = WORDS.conditions({"text": ["a", "b"]}, num=3, first=1)
    assert told["text"][:, 1].tolist() == [100, 99, 100]
    assert told["text_mask"].dtype == torch.bool
    none = WORDS.conditions({}, num=2)
    assert none["text_mask"].tolist() == [[True] + [False] * 15] * 2
    assert WORDS.counts({"text": ["a", "b"]}) == {"text": 2}


def test_state():
    assert Conditioner.from_state(WORDS.state()) == WORDS


@pytest.mark.parametrize("text", ["🍎", "שלום", "ไทย", "a" * 15, "👩‍🚀"])
def test_any_language(text):
    row = WORDS.conditions({"text": text})["text"][0]
    assert bytes(row[row > 1].sub(2).tolist()).decode() == text


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        (3, ("3 is no text", "list of them")),
        ([], ("[] is no text",)),
        (["a", 2], ("is no text",)),
        ("a" * 16, ("16 bytes, 'aaa", "at most 15", "shorten")),
        ("é" * 8, ("16 bytes",)),
        ("a" * 10_000_000, ("10000000 bytes", "at most 15")),
        ("a\x00", ("printed", "remove")),
        ("a\udc80", ("printed",)),
        (b"abc", ("is no text",)),
    ],
)
def test_what_is_no_prompt(said, parts):
    with pytest.raises(UserError) as error:
        WORDS.conditions({"text": said})
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_prompt_for_a_model_without_words():
    with pytest.raises(UserError, match=r"^prompt for an unconditional model.*leave prompt out"):
        Conditioner().conditions({"text": "a"})
    with pytest.raises(UserError, match=r"^labels for a model.*expected prompt"):
        WORDS.conditions({"label": 3})


def test_a_prompt_is_said_once():
    assert said_of(None, {"size": 1}, "a") == {"text": "a", "size": 1}
    with pytest.raises(UserError, match="prompt, and a text among the conditions"):
        said_of(None, {"text": "b"}, "a")


@pytest.mark.parametrize("length", [0, 1, 5000])
def test_lengths(length):
    with pytest.raises(UserError, match="2 to 4096"):
        Text(length)
