"""What is written of each sample, for networks that read words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from trigflow.conditions.text import Text, plain, tokens
from trigflow.conditions.told import quoted
from trigflow.data.cache import digest_of_text
from trigflow.data.text_features import Reader, TextFeatures, encode_captions
from trigflow.runtime.errors import UserError

KEYS = ("captions", "caption", "text", "prompt")
"""What captions are called in tables and JSON files; the first of these that there is."""


def said(row: Mapping[str, Any]) -> Any:
    """What a row of a table or the content of a JSON file has under the first of `KEYS`; None for nothing."""
    return next((row[key] for key in KEYS if row.get(key) is not None), None)


def captions_in(value: Any, where: str) -> tuple[str, ...]:
    """One text or a list of them, each in plain form, without those that are empty. Raises a UserError naming where the value
    is from, if it is none of these or cannot be printed."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise no_caption(where, f"holds {quoted(value)}", "a text or a list of texts")
    try:
        return tuple(filter(None, map(plain, texts)))
    except UserError as error:
        wrong = f"cannot be printed ({str(error).split('; expected')[0]})"
        raise no_caption(where, wrong, "text without control characters") from None


def no_caption(where: str, wrong: str, expected: str) -> UserError:
    """The error for a caption that is none."""
    return UserError(
        f"the caption in {where} {wrong}; expected {expected}; correct it, or leave captions out with --data.no-captions"
    )


@dataclass(frozen=True, eq=False)
class Captions:
    """One text of each sample, or several of which one is drawn each time; a sample without any has the empty text.

    Attributes:
        texts: of each sample, brought into the form of `trigflow.conditions.text.plain`.
        input: how they are read: as bytes, or by a frozen encoder. Longer texts are cut (`trigflow data check` names them).
        features: what the encoder made of them, where there is one.
        folder: where that is kept; None for the user's cache.
        reader: the state of the only encoder whose features are kept there.

    Raises:
        UserError: for text that cannot be printed.
    """

    texts: Sequence[tuple[str, ...]]
    input: Any = field(default_factory=Text)
    features: TextFeatures | None = None
    folder: Path | None = None
    reader: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Self:
        """These, each in plain form, without those that are empty. Raises a UserError naming the sample whose text cannot be
        printed."""
        read = []
        for number, several in enumerate(texts):
            try:
                read.append(tuple(filter(None, map(plain, several))))
            except UserError as error:
                raise UserError(f"captions of sample {number}: {error}") from None
        return cls(read)

    def __len__(self) -> int:
        return len(self.texts)

    def of_samples(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        """A caption of each: of several the first, or with a generator one drawn, by one number a sample."""
        several = [self.texts[index] or ("",) for index in indices.tolist()]
        if generator is None:
            return [texts[0] for texts in several]
        places = torch.rand(len(several), generator=generator, dtype=torch.float64).tolist()
        return [texts[min(int(place * len(texts)), len(texts) - 1)] for texts, place in zip(several, places, strict=True)]

    @property
    def names(self) -> frozenset[str]:
        """Of the conditions that `rows` gives."""
        return frozenset({"text", "text_mask"}) if self.features is None else self.features.encoder.names

    def rows(self, indices: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`text`, `text_mask` and whatever else an encoder says of the chosen samples, each `(b, ...)`; see `of_samples`."""
        texts = self.of_samples(indices, generator)
        return Text.told(tokens(texts, self.input.length)) if self.features is None else self.features.rows(texts)

    def encoded(self, encoder: Reader, *, progress: bool = False) -> Self:
        """The same, read by frozen encoders: what they make of the texts is made, or found in the cache; see
        `encode_captions`."""
        if self.reader is not None and self.reader != json.loads(json.dumps(encoder.state())):
            raise UserError(
                f"the captions in '{self.folder}' were read by other encoders than those of the teacher; expected the same; "
                "encode the data again: trigflow encode IMAGES --with RUN"
            )
        captions = [text for texts in self.texts for text in texts]
        features = encode_captions(captions, encoder, self.folder, progress=progress)
        return replace(self, input=encoder, features=features)

    def only(self, indices: Tensor) -> Self:
        """Those of the chosen samples."""
        return replace(self, texts=[self.texts[index] for index in indices.tolist()])

    def digest(self) -> str:
        """Tells these captions from others."""
        return digest_of_text(repr([*map(tuple, self.texts)]))
