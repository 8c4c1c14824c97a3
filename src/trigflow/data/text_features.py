"""Captions as a frozen encoder reads them, kept on disk: training never loads the encoder once all are there."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from trigflow.conditions.encoded import Encoded, States
from trigflow.data.cache import Arrays, cache_folder, remembered
from trigflow.runtime.files import clear_leftovers, ensure_folder, write_tensors

SHARD = 512
"""Captions in one file."""


def digest_of_text(text: str) -> str:
    """The name of a caption in the cache."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
        return {name: file.get_tensor(_key(digest, name)) for name in _kept_names(self.encoder)}


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
        with safe_open(path, framework="pt") as file:
            places |= {key.partition(".")[0]: path for key in file.keys()}  # noqa: SIM118
    missing = [text for text in dict.fromkeys(captions) if text and digest_of_text(text) not in places]
    for start in tqdm(range(0, len(missing), SHARD), desc="reading captions", disable=not progress or not missing):
        kept: dict[str, Tensor] = {}
        for begin in range(start, min(start + SHARD, len(missing)), 32):
            texts = missing[begin : min(begin + 32, start + SHARD)]
            for text, rows in zip(texts, encoder.kept(texts), strict=True):
                kept |= {_key(digest_of_text(text), name): row for name, row in rows.items()}
        path = folder / f"{digest_of_text(repr([*kept]))}.safetensors"
        write_tensors(path, kept)
        places |= {key.partition(".")[0]: path for key in kept}
    return TextFeatures(encoder, places)


def encoder_named(name: str, states: States, length: int) -> Encoded:
    """The encoder of a folder or id; where it is known from before, it is not loaded. Raises as `Encoded`."""
    found = remembered(["encoder", name, states, length], _identity(name), lambda: _known(Encoded(name, length, states)))
    return Encoded(name, int(found["length"]), states, int(found["features"]), str(found["digest"]))


def _key(digest: str, name: str) -> str:
    return digest if name == "text" else f"{digest}.{name}"


def _kept_names(encoder: Reader) -> frozenset[str]:
    return frozenset({"text"}) if isinstance(encoder, Encoded) else encoder.names


def _known(encoder: Encoded) -> Arrays:
    known = encoder.known()
    return {name: np.array(getattr(known, name)) for name in ("length", "features", "digest")}


def _identity(name: str) -> list[object]:
    """What changes when an encoder does: names, sizes and times of a folder's files; of an id, the commit in the cache."""
    folder = Path(name)
    if folder.is_dir():
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]
    try:
        from huggingface_hub import try_to_load_from_cache

        return [str(try_to_load_from_cache(name, "config.json"))]
    except (ImportError, ValueError):  # which `Encoded` says better
        return []


@functools.lru_cache(maxsize=64)
def _file(path: Path) -> Any:
    return safe_open(path, framework="pt")
