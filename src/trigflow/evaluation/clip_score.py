"""CLIP score: how well pictures fit what was written, by a CLIP model of transformers."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.evaluation.features.extractors import as_rgb
from trigflow.runtime.errors import MissingExtraError, UserError, on_one_line

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScore(nn.Module):
    """`100 max(0, cos(image, text))` of each picture and its text, by the embeddings of CLIP.

    Pictures are scaled to the side that the model takes, bicubic with antialiasing. Texts are cut at the tokens it reads.

    Args:
        name: folder written by `save_pretrained`, or id of the hub, of a `CLIPModel` with its tokenizer.

    Raises:
        UserError: when it cannot be read.
        MissingExtraError: without transformers.

    Source: Radford et al. 2021; Hessel et al. 2021 (without its factor of 2.5, as published figures mostly are).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise MissingExtraError("the CLIP score", "transformers", "text") from error
        local: dict[str, Any] = {"local_files_only": True} if os.path.isdir(name) else {}
        try:
            network: Any = CLIPModel.from_pretrained(name, **local)
            self.clip = network.eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(name, **local)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"CLIP {name!r} cannot be read ({on_one_line(error)}); expected a folder or id of a CLIPModel with its "
                "tokenizer; correct --clip"
            ) from None
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores `(b,)` of uint8 pictures `(b, 1 or 3, h, w)` and as many texts."""
        config = self.clip.config
        size = config.vision_config.image_size
        x = F.interpolate(as_rgb(images).float(), size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)
        seen = self.clip.vision_model(pixel_values=((x / 255 - self.mean) / self.std).to(self.clip.dtype)).pooler_output
        most = config.text_config.max_position_embeddings
        read = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt").to(
            images.device
        )
        said = self.clip.text_model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).pooler_output
        fit = F.cosine_similarity(self.clip.visual_projection(seen), self.clip.text_projection(said))
        return 100 * fit.clamp(min=0).float()
