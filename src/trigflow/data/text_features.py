"""Captions as a frozen encoder reads them, kept on disk: training never loads the encoder once all are there."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


@dataclass(frozen=True)
class TextFeatures:
    """Features of captions, `$TRIGFLOW_CACHE/text/ENCODER/*.safetensors`: float16 `(n, features)` of each, its tokens alone.

    Attributes:
        encoder: what made them.
        places: file of each caption, by its digest.
    """

    encoder: Encoded
    places: dict[str, Path]

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`text` and `text_mask` of these captions, float32 `(b, length, features)` and bool `(b, length)`; see `Encoded`."""
        encoder = self.encoder
        states = torch.zeros(len(texts), encoder.length, encoder.features, dtype=torch.float32)
        mask = torch.zeros(len(texts), encoder.length, dtype=torch.bool)
        for row, text in enumerate(texts):
            if text:
                name = digest_of_text(text)
                found = _file(self.places[name]).get_tensor(name)
                states[row, : len(found)], mask[row, : len(found)] = found.float(), True
        mask[:, 0] = True
        return {"text": states, "text_mask": mask}


def encode_captions(captions: Sequence[str], name: str, states: States, length: int, *, progress: bool = False) -> TextFeatures:
    """The features of these captions, each of which is encoded unless it has been before; what is there is kept when this is
    stopped. Where all are there, the encoder is not loaded.

    Args:
        captions: in plain form; longer ones are cut at the length.
        name: folder or id of the encoder; it, the states and the length are those of `Encoded`.
        progress: draw a bar.

    Raises:
        UserError: when the encoder cannot be read, or the cache not be written.
        MissingExtraError: without transformers.
    """
    found = remembered(["encoder", name, states, length], _identity(name), lambda: _known(Encoded(name, length, states)))
    encoder = Encoded(name, int(found["length"]), states, int(found["features"]), str(found["digest"]))
    said = f"{encoder.digest} {encoder.states} {encoder.length}"
    folder = ensure_folder(cache_folder() / "text" / digest_of_text(said))
    clear_leftovers(folder, lambda name: name.endswith(".safetensors"))
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    missing = [text for text in dict.fromkeys(captions) if text and digest_of_text(text) not in places]
    for start in tqdm(range(0, len(missing), SHARD), desc="reading captions", disable=not progress or not missing):
        kept = {}
        for begin in range(start, min(start + SHARD, len(missing)), 32):
            texts = missing[begin : min(begin + 32, start + SHARD)]
            told = encoder.encode(texts, cut=True)
            for text, rows, mask in zip(texts, told["text"], told["text_mask"], strict=True):
                kept[digest_of_text(text)] = rows[mask].half()
        path = folder / f"{digest_of_text(repr([*kept]))}.safetensors"
        write_tensors(path, kept)
        places |= dict.fromkeys(kept, path)
    return TextFeatures(encoder, places)


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
