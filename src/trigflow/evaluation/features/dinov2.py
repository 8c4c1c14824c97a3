"""DINOv2 features, for the distance FD-DINOv2: ViT-L/14, its class token after the last norm, 1,024 features.

Images of any size are scaled to 224x224, bicubic with antialiasing, and normalized with the mean and deviation of ImageNet, as
EDM2 does it. Networks were trained at 518x518; their 37x37 position embeddings become 16x16 as in the code of DINOv2, which
tells the interpolation a scale of `16.1 / 37`, slightly other than the ratio of the sizes, which transformers takes.

Source: Stein et al., *Exposing flaws of generative model evaluation metrics*, NeurIPS 2023, arXiv 2306.04675; Oquab et al.,
*DINOv2*, arXiv 2304.07193; Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, CVPR 2024.
"""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.evaluation.features.extractors import as_rgb
from trigflow.runtime.errors import MissingExtraError, UserError, first_line

NAME = "facebook/dinov2-large"
"""ViT-L/14 on the Hugging Face hub."""
SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
OFFSET = 0.1
"""Added to the side of the position embeddings before the scale of their interpolation is taken."""


class Dinov2(nn.Module):
    """Features of images, uint8 `(b, 1 or 3, h, w)` to float32 `(b, d)`; gray is taken for RGB.

    Args:
        network: a `Dinov2Model` of transformers; its position embeddings are fitted to 224x224.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        table = network.embeddings.position_embeddings
        side = SIZE // network.config.patch_size
        network.embeddings.position_embeddings = nn.Parameter(fit_positions(table.detach(), side))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(as_rgb(images).float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
        hidden = self.network(pixel_values=(x / 255 - self.mean) / self.std).last_hidden_state
        return hidden[:, 0].float()


def fit_positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings `(1, 1 + n^2, d)`, the class token first, for `side` x `side` patches: `(1, 1 + side^2, d)`.

    Bicubic, at a scale of `(side + 0.1) / n`.

    Source: `interpolate_pos_encoding` of DINOv2.
    """
    n = math.isqrt(table.shape[1] - 1)
    if n == side:
        return table
    grid = table[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2).float()
    scale = (side + OFFSET) / n
    fitted = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], fitted.permute(0, 2, 3, 1).reshape(1, side * side, -1).to(table)], dim=1)


def load_dinov2(weights: str | None = None) -> Dinov2:
    """The network with its trained weights, in float32 and eval mode, without gradients.

    Args:
        weights: a folder that transformers wrote, which needs no connection, or an id of the Hugging Face hub; None for `NAME`.
            Only safetensors files are read.

    Raises:
        MissingExtraError: without transformers.
        UserError: when they cannot be had, or are not of a DINOv2 network for RGB images.
    """
    try:
        from transformers import Dinov2Model  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("the features 'dinov2'", "transformers", "features") from error
    path = os.path.expanduser(weights or NAME)
    try:
        with torch.random.fork_rng(devices=[]):  # fresh weights, about to be replaced, draw from the default generator
            loaded: Any = Dinov2Model.from_pretrained(path, use_safetensors=True, output_loading_info=True)
            network, report = loaded
    except MemoryError:
        raise
    except Exception as error:  # transformers and the hub raise all kinds
        raise UserError(
            f"the DINOv2 weights '{path}' cannot be loaded ({first_line(error)}); expected an id of the Hugging Face hub, or a "
            "folder that transformers wrote, with safetensors; check the connection, or pass a folder with --weights FOLDER"
        ) from None
    absent = sorted(report["missing_keys"])
    sizes = (network.config.num_channels, SIZE % network.config.patch_size)
    if absent or sizes != (3, 0):
        fault = f"lack '{absent[0]}'" if absent else "are of a network for images of another kind"
        raise UserError(
            f"the DINOv2 weights '{path}' {fault}; expected a Dinov2Model for RGB images with patches that divide {SIZE}; use "
            f"{NAME}"
        )
    return Dinov2(network.float()).eval().requires_grad_(False)
