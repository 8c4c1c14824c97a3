"""The Inception network of the FID: ImageNet classifier of December 2015, its last pooled layer, 2,048 features.

This is the network that the authors of the FID took from TensorFlow's `inception-2015-12-05`, whose weights torch-fidelity has
converted and publishes. It differs from later Inception-v3 networks, and the distances with it: average pooling leaves the
border out of the mean, the last block takes a maximum where the others average, and the images are scaled to 299x299 as
TensorFlow 1 scaled them (`resize_like_tensorflow`), then to `(byte - 128) / 128`.

Source: Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, arXiv 1512.00567; Heusel et al., NeurIPS
2017, arXiv 1706.08500; names of the weights: torch-fidelity.
"""

import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.evaluation.features.extractors import as_rgb
from trigflow.runtime.errors import UserError, first_line
from trigflow.runtime.files import read_tensors

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""Where the weights are; the last part of the name is the beginning of their SHA-256, which is checked."""
SIZE = 299

Kernel = int | tuple[int, int]
Pooling = Literal["average", "max", "halve"]


def resize_like_tensorflow(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation as `tf.image.resize_bilinear` of TensorFlow 1, without `align_corners`, did it.

    Output pixel i is read at position `i * in / out` of the input, between its two neighbours. Corners meet corners at the
    top left only, and nothing is averaged when an image shrinks::

        2x2 to 4x4    1 2    ->    1.0 1.5 2.0 2.0
                      3 4          2.0 2.5 3.0 3.0
                                   3.0 3.5 4.0 4.0
                                   3.0 3.5 4.0 4.0

    Args:
        images: floating `(b, c, h, w)`.
        height, width: of the output.

    Returns:
        `(b, c, height, width)`; positions in float32, as TensorFlow's.

    Source: TensorFlow, `resize_bilinear_op.cc`, and the figures of `resize_bilinear_op_test.cc` (`TestBilinear2x2To4x4`).
    """
    return _interpolate(_interpolate(images, 3, width), 2, height)


def _interpolate(x: Tensor, dim: int, size: int) -> Tensor:
    scale = torch.tensor(x.shape[dim], dtype=torch.float32) / size
    position = torch.arange(size, dtype=torch.float32) * scale
    lower = position.floor().long().clamp(max=x.shape[dim] - 1)
    upper = (lower + 1).clamp(max=x.shape[dim] - 1).to(x.device)
    weight = (position - lower).to(x).reshape([size] + [1] * (3 - dim))
    first = x.index_select(dim, lower.to(x.device))
    return first + (x.index_select(dim, upper) - first) * weight


class Convolution(nn.Module):
    """Convolution without bias, batch normalization (eps 0.001) with stored moments, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Layer = tuple[int, Kernel]
"""Channels and kernel of a convolution."""
Branches = Mapping[str, Sequence[Layer | tuple[Layer, Layer]]]
"""Convolutions one after another, called `name_1`, `name_2`, ..., or `name` where there is one; a pair, which can only stand
last, takes the same input, and its outputs are joined: `name_3a` and `name_3b`."""


class Mixed(nn.Module):
    """Branches side by side and a pooling, their outputs joined along the channels.

    Convolutions keep the size of the image, `(b, c_in, h, w)` to `(b, c, h, w)`. Where the pooling is `halve`, a maximum with
    stride 2, the last convolution of each branch has stride 2 as well, without padding.

    Args:
        c_in: channels of the input.
        branches: of convolutions, in the order of the output.
        pool: pooling over 3x3 of the last branch.
        c_pool: channels of the convolution behind it; 0 for none.
    """

    def __init__(self, c_in: int, branches: Branches, pool: Pooling, c_pool: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        for branch, layers in branches.items():
            c, steps = c_in, list[list[str]]()
            for number, layer in enumerate(layers, 1):
                stride_and_padding = (2, 0) if pool == "halve" and number == len(layers) else None
                pair, ends = (layer, "ab") if isinstance(layer[0], tuple) else ((layer,), [""])
                names = [f"{branch}_{number}{end}" if len(layers) > 1 else branch for end in ends]
                for name, (c_out, kernel) in zip(names, pair, strict=True):
                    self.add_module(name, Convolution(c, c_out, kernel, *(stride_and_padding or (1, _same(kernel)))))
                c = sum(c_out for c_out, _ in pair)
                steps.append(names)
            self.branches.append(steps)
        self.branch_pool = Convolution(c_in, c_pool, 1) if c_pool else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 2) if self.pool == "halve" else F.max_pool2d(x, 3, 1, 1)
        outputs.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
        return torch.cat(outputs, dim=1)


def _same(kernel: Kernel) -> Kernel:
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


def _block_35(c_in: int, c_pool: int) -> Mixed:
    """At 35x35: 224 + c_pool channels."""
    branches: Branches = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return Mixed(c_in, branches, "average", c_pool)


def _block_17(c: int) -> Mixed:
    """At 17x17: 768 channels to 768, through `c`."""
    branches: Branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
    }
    return Mixed(768, branches, "average", 192)


def _block_8(c_in: int, pool: Pooling) -> Mixed:
    """At 8x8: 2,048 channels."""
    crossed = ((384, (1, 3)), (384, (3, 1)))
    branches: Branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), crossed],
        "branch3x3dbl": [(448, 1), (384, 3), crossed],
    }
    return Mixed(c_in, branches, pool, 192)


class Inception(nn.Module):
    """Features of images of any size, uint8 `(b, 1 or 3, h, w)` to float32 `(b, 2048)`; gray is taken for RGB."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "halve")
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        sevens: Branches = {
            "branch3x3": [(192, 1), (320, 3)],
            "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
        }
        self.Mixed_7a = Mixed(768, sevens, "halve")
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "max")

    def forward(self, images: Tensor) -> Tensor:
        x = as_rgb(images).to(self.Conv2d_1a_3x3.conv.weight.dtype)
        x = (resize_like_tensorflow(x, SIZE, SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # 64 x 147 x 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # 192 x 71 x 71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # 288 x 35 x 35
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # 768 x 17 x 17
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # 2048 x 8 x 8
        return x.mean(dim=(2, 3)).float()


def load_inception(weights: str | None = None, progress: bool = False) -> Inception:
    """The network with its trained weights, in eval mode, without gradients.

    Args:
        weights: a file of them, `.pth` or `.safetensors`, with the names of torch-fidelity; None takes `URL` through PyTorch's
            hub, which keeps a copy in its cache and checks it.
        progress: show a bar while they are downloaded.

    Raises:
        UserError: when they cannot be had, or are not of this network.
    """
    state = _download(progress) if weights is None else _read(Path(weights).expanduser())
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        network = Inception()
    wanted = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    found = state if isinstance(state, dict) else {}
    chosen = {name: found[name] for name in wanted if isinstance(found.get(name), Tensor)}
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    wrong = [name for name in sorted(wanted) if name not in chosen or chosen[name].shape != shapes[name]]
    if wrong:
        raise UserError(
            f"the weights '{weights or URL}' are not of the Inception network of the FID ('{wrong[0]}' is missing or of "
            "another shape); expected those that torch-fidelity publishes; download them from " + URL
        )
    network.load_state_dict({name: tensor.float() for name, tensor in chosen.items()}, strict=False)
    return network.eval().requires_grad_(False)


def _download(progress: bool) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(
            URL, map_location="cpu", check_hash=True, progress=progress, weights_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # no network, a proxy's page, a full disk, a damaged file in the cache
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"the weights of the Inception network cannot be downloaded ({first_line(reason)}); expected to find {URL}; check "
            "the connection, or pass a copy with --weights FILE"
        ) from None


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_tensors(path, "weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises all kinds for files that are no weights
        missing = isinstance(error, FileNotFoundError)
        fault = "do not exist" if missing else f"cannot be read ({first_line(error)})"
        raise UserError(
            f"the weights '{path}' {fault}; expected a file of tensors (.pth or .safetensors); download them from {URL}"
        ) from None
