"""Words as a frozen encoder of transformers reads them: CLIP, T5, or a language model such as Gemma.

::

    text        float32 (b, length, features)    states of the encoder, zeros where there is no token
    text_mask   bool    (b, length)              True where there is one

The empty text is not encoded: it is one state of zeros, which means "none".
"""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trigflow.conditions.text import LENGTHS, plain, texts_of
from trigflow.conditions.told import quoted
from trigflow.runtime.errors import MissingExtraError, UserError, on_one_line
from trigflow.runtime.machine import in_float32

States = Literal["last", "penultimate", "pooled"]
MOST_BYTES = 16_384
"""Of one text."""


@dataclass(frozen=True)
class Encoded:
    """A text, read by a frozen encoder; see the module.

    Attributes:
        encoder: a folder written by `save_pretrained` with tokenizer and weights, or an id of the hub. Code that comes with it
            is never run.
        length: tokens of a row; a text has at most so many, of pooled states as many as the encoder reads.
        states: of the last layer; of the one before; or one for the whole text: what the encoder pools, or the mean.
        features: of a state, 0 for what the encoder has.
        digest: of the encoder's weights, where known; another encoder under the same name is refused.

    Raises:
        UserError: for settings that make no sense.
    """

    encoder: str
    length: int = 77
    states: States = "last"
    features: int = 0
    digest: str = ""
    kind = "encoded"

    def __post_init__(self) -> None:
        if self.states not in get_args(States) or not LENGTHS[0] <= self.length <= LENGTHS[1] or not self.encoder:
            raise UserError(
                f"the text encoder {self.encoder!r} with {self.states!r} states of {self.length} tokens; expected a folder or "
                f"id, one of {', '.join(get_args(States))}, and {LENGTHS[0]} to {LENGTHS[1]} tokens; correct the settings"
            )

    def rows(self, said: Any, num: int, first: int, what: str = "prompt") -> dict[str, Tensor]:
        """The texts said, in turn; without any, the empty one. Each is encoded once."""
        if isinstance(said, Tensor) and said.shape[1:] == (self.length, self.features) and len(said):
            chosen = said[torch.arange(first, first + num) % len(said)]
            mask = (chosen != 0).any(2)
            mask[:, 0] = True  # of the empty text, too
            return {"text": chosen, "text_mask": mask}
        texts = self.numbers("" if said is None else said, what)
        chosen = torch.arange(first, first + num) % len(texts)
        return {name: value[chosen] for name, value in self.encode(texts).items()}

    def numbers(self, said: Any, what: str = "prompt") -> Sequence[str]:
        """The texts said, in plain form; see `texts_said`."""
        return texts_said(said, what)

    def encode(self, texts: Sequence[str], *, cut: bool = False) -> dict[str, Tensor]:
        """`text` and `text_mask` of plain texts, float32 `(n, length, features)` and bool `(n, length)`, on the CPU.

        Args:
            texts: at least one.
            cut: read only the first `length` tokens of a longer text instead of raising an error.

        Raises:
            UserError: for a text of more tokens, or an encoder that cannot be read or is another than `digest` says.
            MissingExtraError: without transformers.
        """
        if not any(texts) and self.features:  # nothing to read
            shape = (len(texts), self.length)
            found = torch.zeros(*shape, self.features, dtype=torch.float32), torch.zeros(shape, dtype=torch.bool)
        else:
            loaded = opened(self.encoder)
            if self.digest and loaded.digest != self.digest:
                raise UserError(
                    f"the text encoder '{self.encoder}' is another than the model was trained with; expected the same weights; "
                    "restore it"
                )
            found = loaded.states(texts, self.length, self.states, cut)
        states, mask = found
        mask[:, 0] = True  # of the empty text, too
        return {"text": states * mask[:, :, None], "text_mask": mask}

    @property
    def names(self) -> frozenset[str]:
        """Of the conditions."""
        return frozenset({"text", "text_mask"})

    def kept(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What is kept on disk of each text, cut at the length: float16 `(n, features)`, of its tokens alone; see `halved`."""
        told = self.encode(texts, cut=True)
        return [{"text": halved(rows[mask])} for rows, mask in zip(told["text"], told["text_mask"], strict=True)]

    def joined(self, kept: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`text` and `text_mask` of texts, from what is kept of each; nothing of the empty text."""
        states = torch.zeros(len(kept), self.length, self.features, dtype=torch.float32)
        mask = torch.zeros(len(kept), self.length, dtype=torch.bool)
        for row, found in enumerate(kept):
            if found:
                count = len(found["text"])
                states[row, :count], mask[row, :count] = found["text"].float(), True
        mask[:, 0] = True
        return {"text": states, "text_mask": mask}

    def known(self) -> "Encoded":
        """The same with the features and the digest of the encoder as it is."""
        loaded = opened(self.encoder)
        length = 2 if self.states == "pooled" else self.length
        return Encoded(self.encoder, length, self.states, loaded.features(self.states), loaded.digest)

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def halved(states: Tensor) -> Tensor:
    """States in float16, or as they are where one is too large for that, as those before a last norm may be."""
    half = states.half()
    return half if bool(half.isfinite().all()) else states


def texts_said(said: Any, what: str = "prompt") -> Sequence[str]:
    """The texts said, in plain form, at least one. Raises a UserError for what is no text, none at all, a very long one, or one
    that cannot be printed."""
    texts = texts_of(said, what)
    for text in texts:
        if len(text) > MOST_BYTES:
            raise UserError(
                f"a {what} of {len(text)} letters; expected at most {MOST_BYTES}, of which an encoder reads the first tokens; "
                f"shorten the {what}"
            )
    return [plain(text) for text in texts]


@dataclass(frozen=True)
class Loaded:
    """An encoder in memory: tokenizer and network of transformers, and a digest of its weights."""

    tokenizer: Any
    network: Any
    digest: str

    def features(self, states: States) -> int:
        """Numbers of one state."""
        return self.states(["a"], 8, states, True)[0].shape[2]

    @torch.no_grad()
    @in_float32()
    def states(self, texts: Sequence[str], length: int, states: States, cut: bool) -> tuple[Tensor, Tensor]:
        """States `(n, length, features)` and the mask of those that are no padding, `(n, length)`; none of an empty text."""
        most = length
        if states == "pooled":  # of the whole text, as far as the encoder reads
            places = getattr(self.network.config, "max_position_embeddings", None)
            most = min(self.tokenizer.model_max_length, places or LENGTHS[1], LENGTHS[1])
        read = self.tokenizer(list(texts), padding=True, return_tensors="pt", truncation=cut, max_length=most if cut else None)
        tokens, mask = read["input_ids"], read["attention_mask"].bool()
        for text, count in zip(texts, mask.sum(1).tolist(), strict=True):
            if count > most:
                raise UserError(f"{quoted(text)} has {count} tokens; expected at most {most}; shorten the prompt")
        out = self.network(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
        mask = mask & torch.tensor([[bool(text)] for text in texts])
        if states == "pooled":
            pooled = getattr(out, "text_embeds", None)
            pooled = getattr(out, "pooler_output", None) if pooled is None else pooled
            if pooled is None:
                pooled = (out.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            found, mask, length = pooled[:, None], mask.any(1, keepdim=True), 2
        else:
            found = out.last_hidden_state if states == "last" else out.hidden_states[-2]
        room = length - found.shape[1]
        pad = torch.nn.functional.pad
        found, mask = pad(found, (0, 0, 0, max(room, 0))), pad(mask, (0, max(room, 0)))
        return found[:, :length].float() * mask[:, :length, None], mask[:, :length]


@functools.lru_cache(maxsize=2)
def opened(name: str) -> Loaded:
    """The encoder in a folder or under an id of the hub, on the CPU in float32; of an encoder and decoder, or of CLIP, the
    part that reads text.

    Raises:
        UserError: for a folder without tokenizer or weights, an unknown kind, or an id that does not lead anywhere.
        MissingExtraError: without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("a text encoder", "transformers", "text") from error
    local = {"local_files_only": True} if os.path.isdir(name) else {}
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **local)
        kinds = {
            "clip": "CLIPTextModel",
            "clip_text_model": "CLIPTextModel",
            "t5": "T5EncoderModel",
            "umt5": "UMT5EncoderModel",
        }
        kind = getattr(transformers, kinds.get(config.model_type, "AutoModel"))
        network = kind.from_pretrained(name, trust_remote_code=False, dtype=torch.float32, **local)
    except MemoryError:
        raise
    except Exception as error:  # transformers and the hub raise all kinds
        raise UserError(
            f"the text encoder {name!r} cannot be read ({on_one_line(error)}); expected a folder with tokenizer, config.json "
            "and weights, or an id of the hub; correct it"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    network.eval().requires_grad_(False)
    digest = hashlib.blake2b(digest_size=16)
    for weight in network.state_dict().values():
        digest.update(weight.flatten()[:4096].contiguous().view(torch.uint8).numpy().tobytes())
    return Loaded(tokenizer, network, digest.hexdigest())
