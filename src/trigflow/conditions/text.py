"""Words as a condition: what somebody writes becomes the bytes of it, which every language and emoji has.

A text is read as one token for its beginning and one for each byte of its UTF-8 form::

    text        int64 (b, length)    1, then 2 + byte, then 0 to the end
    text_mask   bool  (b, length)    True for all but the zeros

The empty text, which is its beginning alone, means "none": what a network is told for guidance and for dropped captions.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trigflow.conditions.told import quoted
from trigflow.runtime.errors import UserError

TOKENS = 258
"""Different tokens: padding, beginning, and 256 bytes."""
LENGTHS = (2, 4096)
"""Fewest and most tokens that a text may have."""


def plain(text: str) -> str:
    """A text in Unicode's composed form (NFC), without space around it, and with single spaces and no line breaks in it. Raises
    a UserError for control characters, and for halves of characters, which bytes that are no UTF-8 become."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs"):
            raise UserError(f"the text {quoted(text)} has {letter!r} in it; expected text that can be printed; remove it")
    return text


def texts_of(said: Any, what: str) -> Sequence[str]:
    """The texts said, as they are, at least one. Raises a UserError for what is no text, or none at all."""
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts) or not texts:
        raise UserError(f"{what}: {quoted(said)} is no text; expected a text or a list of them; correct the {what}")
    return texts


def shortened(text: str, length: int) -> str:
    """As much of a plain text as `length` tokens hold, whole characters."""
    return text.encode()[: length - 1].decode(errors="ignore")


def tokens(texts: Sequence[str], length: int) -> Tensor:
    """The tokens of plain texts, int64 `(n, length)`; what is too long is cut.

    Texts of any length up to `length` give the same first tokens: the rest is padding.
    """
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    rows[:, 0] = 1
    for row, text in zip(rows, texts, strict=True):
        content = shortened(text, length).encode()
        if content:
            row[1 : 1 + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(torch.int64) + 2
    return rows


@dataclass(frozen=True)
class Text:
    """A text, read byte by byte: `text` and `text_mask`; see the module.

    Attributes:
        length: tokens of a row; a text has at most one byte less.

    Raises:
        UserError: for a length out of range.
    """

    length: int = 64
    kind = "text"

    def __post_init__(self) -> None:
        if not LENGTHS[0] <= self.length <= LENGTHS[1]:
            raise UserError(f"text of {self.length} tokens; expected {LENGTHS[0]} to {LENGTHS[1]}; correct the length")

    def rows(self, said: Any, num: int, first: int, what: str = "prompt") -> dict[str, Tensor]:
        """The texts said, in turn; without any, the empty one."""
        chosen = self.numbers("" if said is None else said, what)
        return self.told(chosen[torch.arange(first, first + num) % len(chosen)])

    def numbers(self, said: Any, what: str = "prompt") -> Tensor:
        """Tokens of one text or several, int64 `(n, length)`, n at least 1; tokens as they are. Raises a UserError for what is
        no text, none at all, one that cannot be printed, or one that is too long."""
        if isinstance(said, Tensor) and said.shape[1:] == (self.length,) and said.dtype == torch.int64 and len(said):
            return said
        texts = texts_of(said, what)
        for text in texts:
            size = len(text) if len(text) > 4 * LENGTHS[1] else len(plain(text).encode())
            if size >= self.length:
                raise UserError(
                    f"a {what} of {size} bytes, {quoted(text)}; expected at most {self.length - 1}; shorten the {what}"
                )
        return tokens([plain(text) for text in texts], self.length)

    @staticmethod
    def told(rows: Tensor) -> dict[str, Tensor]:
        """The two conditions of these tokens."""
        return {"text": rows, "text_mask": rows > 0}

    def state(self) -> dict[str, Any]:
        return {"length": self.length}
