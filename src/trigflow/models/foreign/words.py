"""Words as the text encoders of a pipeline of diffusers read them."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigflow.conditions import INPUTS
from trigflow.conditions.encoded import halved, texts_said
from trigflow.models.foreign.base import digest_of_files, open_base, reader_of
from trigflow.models.foreign.family import family_named
from trigflow.runtime.errors import UserError, on_one_line


@dataclass(frozen=True)
class Prompts:
    """A text, read by the encoders of a pipeline. They are loaded when a text is read that has not been read before.

    Attributes:
        base: folder of the pipeline, or its id on the hub.
        family: how it reads.
        size: height and width of the picture in pixels.
        shapes: of the conditions, without the batch axis, by name.
        digest: of the files of the encoders; others are refused.
    """

    base: str
    family: str
    size: tuple[int, ...]
    shapes: Mapping[str, Sequence[int]]
    digest: str
    kind = "diffusers"

    @property
    def names(self) -> frozenset[str]:
        """Of the conditions."""
        return frozenset(self.shapes)

    def rows(self, said: Any, num: int, first: int, what: str = "prompt") -> dict[str, Tensor]:
        """The texts said, in turn; without any, the empty one, which means "none"."""
        if isinstance(said, Mapping) and said.keys() == self.names:  # as a data set has them
            return {name: row[torch.arange(first, first + num) % len(row)] for name, row in said.items()}
        texts = self.numbers("" if said is None else said, what)
        return self.joined([self.encode(texts[index % len(texts)]) for index in range(first, first + num)])

    def numbers(self, said: Any, what: str = "prompt") -> Sequence[str]:
        """The texts said, in plain form, at least one; a UserError for what is none."""
        return texts_said(said, what)

    def encode(self, text: str) -> dict[str, Tensor]:
        """The conditions of one plain text, without batch axis, on the CPU. Raises a UserError for encoders that cannot be
        read, or are others than before."""
        return _encode(self.base, self.family, tuple(self.size), self.digest, text)

    def kept(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What is kept on disk of each text."""
        read = map(self.encode, texts)
        return [{name: halved(row) if row.is_floating_point() else row for name, row in one.items()} for one in read]

    def joined(self, kept: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The conditions of texts, `(n, ...)`, from what is kept of each."""
        none = {} if all(kept) else self.encode("")
        rows = {name: [(row or none)[name] for row in kept] for name in self.shapes}
        return {name: torch.stack([r.float() if r.is_floating_point() else r for r in row]) for name, row in rows.items()}

    def state(self) -> dict[str, Any]:
        return {**vars(self), "size": list(self.size), "shapes": {name: list(shape) for name, shape in self.shapes.items()}}


INPUTS[Prompts.kind] = Prompts


def digest_of_encoders(folder: Path, spots: int = 64) -> str:
    """Tells the encoders and tokenizers of a pipeline from others."""
    parts = ("text_encoder", "tokenizer", "projection_model")
    return digest_of_files((part for part in folder.iterdir() if part.name.startswith(parts)), spots)


@torch.no_grad()
def read(base: str, family: str, size: tuple[int, ...], text: str) -> dict[str, Tensor]:
    """What a text means, or the empty text with whatever else is always told in the same way, without batch axis. Raises a
    UserError where the encoders cannot be read, or fail."""
    opened = open_base(base)
    reader, told = reader_of(opened.folder, opened.component), family_named(family)
    try:
        rows = told.read(reader, [text]) if text else told.none(reader, size)
    except MemoryError:
        raise
    except Exception as error:  # encoders and tokenizers raise all kinds
        raise UserError(
            f"the encoders of '{base}' cannot read a text as the family {family} does ({on_one_line(error)}); expected a whole "
            "pipeline of that family; restore it, or correct the family"
        ) from error
    return {name: row[0].float().cpu() if row.is_floating_point() else row[0].cpu() for name, row in rows.items()}


@functools.lru_cache(maxsize=256)
def _encode(base: str, family: str, size: tuple[int, ...], digest: str, text: str) -> dict[str, Tensor]:
    folder = open_base(base).folder
    if digest not in (digest_of_encoders(folder), digest_of_encoders(folder, 0)):
        raise UserError(
            f"the text encoders of '{base}' have changed since it was imported; expected the same files; restore them, or "
            "import it again"
        )
    return read(base, family, size, text)
