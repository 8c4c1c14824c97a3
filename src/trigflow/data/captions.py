"""What is written of each sample, for networks that read words; and what a frozen encoder makes of it.

That is kept on disk: training never loads the encoder once all are there.
"""

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from trigflow.conditions.encoded import Encoded, States
from trigflow.conditions.text import Text, plain, tokens
from trigflow.conditions.told import quoted
from trigflow.data.cache import Arrays, cache_folder, digest_of_text, remembered
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import clear_leftovers, ensure_folder, write_tensors

KEYS = ("captions", "caption", "text", "prompt")
"""What captions are called in tables and JSON files; the first of these that there is."""
SHARD = 512
"""Captions that are kept in one file."""


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


class Reader(Protocol):
    """Reads texts into conditions, by encoders that are frozen; see `trigflow.conditions.Encoded`."""

    @property
    def digest(self) -> str:
        """Of the encoders."""

    @property
    def names(self) -> frozenset[str]:
        """Of the conditions."""

    def kept(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What is kept on disk of each text, by name."""

    def joined(self, kept: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The conditions of texts, `(n, ...)`, from what is kept of each; nothing of the empty text."""

    def state(self) -> dict[str, Any]:
        """Plain JSON types, which tell it from others."""


@dataclass(frozen=True)
class TextFeatures:
    """What is kept of captions, `FOLDER/*.safetensors`; see `Reader`.

    Attributes:
        encoder: what made it.
        places: file of each caption, by its digest.
    """

    encoder: Reader
    places: dict[str, Path]

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of these captions, `(b, ...)` by name."""
        return self.encoder.joined([self._kept(text) if text else {} for text in texts])

    def _kept(self, text: str) -> dict[str, Tensor]:
        digest = digest_of_text(text)
        file = _file(self.places[digest])
        names = {"text"} if isinstance(self.encoder, Encoded) else self.encoder.names
        return {name: file.get_tensor(_key(digest, name)) for name in names}


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


# What an encoder makes of them ---------------------------------------------------------------------------------------


def encode_captions(
    captions: Sequence[str], encoder: Reader, folder: Path | None = None, *, progress: bool = False
) -> TextFeatures:
    """The features of these captions, each of which is encoded unless it has been before; what is there is kept when this is
    stopped. Where all are there, the encoder is not loaded.

    Args:
        captions: in plain form; longer ones are cut.
        encoder: what reads them.
        folder: where they are kept; `$TRIGFLOW_CACHE/text/ENCODER` by default.
        progress: draw a bar.

    Raises:
        UserError: when the encoder cannot be read, or the cache not be written.
        MissingExtraError: without transformers.
    """
    said = repr(encoder.state())
    if isinstance(encoder, Encoded):  # pooled states of earlier versions were of two tokens alone
        said = f"{encoder.digest} {encoder.states} {'whole' if encoder.states == 'pooled' else encoder.length}"
    folder = ensure_folder(folder or cache_folder() / "text" / digest_of_text(said))
    clear_leftovers(folder, lambda name: name.endswith(".safetensors"))
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        # What is in a damaged file is read again, by other names or in its place.
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            places |= {key.partition(".")[0]: path for key in file.keys()}  # noqa: SIM118
    missing = [text for text in dict.fromkeys(captions) if text and digest_of_text(text) not in places]
    for start in tqdm(range(0, len(missing), SHARD), desc="reading captions", disable=not progress or not missing):
        kept: dict[str, Tensor] = {}
        for begin in range(start, min(start + SHARD, len(missing)), 32):
            texts = missing[begin : begin + 32]
            for text, rows in zip(texts, encoder.kept(texts), strict=True):
                kept |= {_key(digest_of_text(text), name): row for name, row in rows.items()}
        path = folder / f"{digest_of_text(repr([*kept]))}.safetensors"
        write_tensors(path, kept)
        places |= {key.partition(".")[0]: path for key in kept}
    return TextFeatures(encoder, places)


def encoder_named(name: str, states: States, length: int) -> Encoded:
    """The encoder of a folder or id; where it is known from before, it is not loaded. Raises as `Encoded`."""

    def known() -> Arrays:
        read = Encoded(name, length, states).known()
        return {key: np.array(getattr(read, key)) for key in ("length", "features", "digest")}

    found = remembered(["encoder", name, states, length], _identity(name), known)
    return Encoded(name, int(found["length"]), states, int(found["features"]), str(found["digest"]))


def _key(digest: str, name: str) -> str:
    return digest if name == "text" else f"{digest}.{name}"


def _identity(name: str) -> list[object]:
    """What changes when an encoder does: names, sizes and times of a folder's files; of an id, the commit in the cache."""
    folder = Path(name)
    if folder.is_dir():
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir()) if path.exists()]
    try:
        from huggingface_hub import try_to_load_from_cache

        return [str(try_to_load_from_cache(name, "config.json"))]
    except (ImportError, ValueError):  # which `Encoded` says better
        return []


@functools.lru_cache(maxsize=64)
def _file(path: Path) -> Any:
    return safe_open(path, framework="pt")
