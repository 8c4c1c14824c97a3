"""Feature extractors: what turns images into the vectors that the metrics compare.

A feature extractor is any callable from uint8 images `(b, c, h, w)` to floating features `(b, d)`. Published numbers are made
with the Inception network of the FID and with DINOv2, whose weights are downloaded when they are first asked for. Three small
classifiers come with the package, for the scikit-learn digits, MNIST and emoji, and a pixel extractor serves data that has no
classifier; their numbers cannot be held against a published FID.
"""

from collections.abc import Callable
from importlib.resources import as_file, files
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from trigflow.runtime.errors import UserError
from trigflow.runtime.machine import in_float32

FeatureExtractor = Callable[[Tensor], Tensor]

FEATURE_NAMES = ("digits", "mnist", "emoji", "pixels", "inception", "dinov2")
DOWNLOADED = ("inception", "dinov2")
"""Features of networks whose weights do not come with the package; they take images of any size."""


class FeatureNet(nn.Module):
    """A small convolutional classifier of square images whose last hidden layer is the feature vector.

    Stages of two 3x3 convolutions with SiLU, each halving the side by averaging and doubling the channels, then::

        h = tanh(linear(flatten(x)))        (b, dim)
        features = (h - mean) / std         mean, std over the training set, one number a dimension
        logits = linear(h)                  (b, classes)

    tanh keeps the features bounded and smooth and no dimension can die; there are no normalization layers, so contrast
    and brightness reach the features.

    Args:
        size: side of the images; 8 for digits, 28 for MNIST, 48 for emoji. Must survive `stages` halvings.
        width: channels of the first stage.
        stages: number of stages.
        dim: length of the feature vector.
        classes: number of classes.
        channels: of the images.
        pool: side of the cells that images are averaged over first.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: int, width: int = 16, stages: int = 2, dim: int = 64, classes: int = 10, channels: int = 1, pool: int = 1
    ) -> None:
        super().__init__()
        inside = size // pool
        if inside >> stages < 1:
            raise UserError(f"size {size} cannot be halved {stages} times; expected size >= {2**stages}; use fewer stages")
        self.shape, self.pool = (channels, size, size), pool
        layers: list[nn.Module] = []
        c_in = channels
        for stage in range(stages):
            c_out = width * 2**stage
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)]
            c_in = c_out
        self.stages = nn.Sequential(*layers)
        self.hidden = nn.Linear(c_in * (inside >> stages) ** 2, dim)
        self.classifier = nn.Linear(dim, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, images: Tensor) -> Tensor:
        """Standardized features `(b, dim)` of uint8 images `(b, channels, size, size)`.

        Raises:
            UserError: for images of another type or shape.
        """
        return (self.penultimate(images) - self.mean) / self.std

    def logits(self, images: Tensor) -> Tensor:
        """Class scores `(b, classes)` of uint8 images `(b, channels, size, size)`."""
        return self.classify(self.penultimate(images))

    def penultimate(self, images: Tensor) -> Tensor:
        """The hidden vector `h`, in (-1, 1), before standardization."""
        check_images(images)
        if tuple(images.shape[1:]) != self.shape:
            raise UserError(
                f"images of shape {tuple(images.shape)}; this feature network expects (b, {', '.join(map(str, self.shape))}); "
                "use the features of that data set, or 'pixels' for any size"
            )
        x = F.avg_pool2d(images.to(self.mean.dtype) / 127.5 - 1, self.pool)
        return torch.tanh(self.hidden(self.stages(x).flatten(1)))

    def classify(self, hidden: Tensor) -> Tensor:
        """Class scores from the hidden vector."""
        scores: Tensor = self.classifier(hidden)
        return scores


class PixelFeatures(nn.Module):
    """Pixels as features: area-averaged to at most 8x8, scaled to [-1, 1], flattened to `(b, c * h' * w')`.

    A coarse measure. It sees brightness, contrast, colour and layout, hardly any texture and no meaning: good for comparing
    runs on one data set with each other, nothing like FID.
    """

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        height, width = images.shape[2:]
        x = images.to(torch.float32) / 127.5 - 1
        return F.adaptive_avg_pool2d(x, (min(height, 8), min(width, 8))).flatten(1)


@in_float32()
def feature_extractor(name: str, weights: str | None = None, progress: bool = False) -> nn.Module:
    """One of the extractors by name, on the CPU, in eval mode, without gradients.

    ========= =========================== ===============================================================================
    digits    1x8x8 images                a classifier that comes with the package
    mnist     1x28x28 images              the same
    emoji     3x48x48 images              the same, of every emoji as a class of its own
    pixels    any size, any channels      area-averaged pixels
    inception any size, gray or RGB       the Inception network of the FID, see `trigflow.evaluation.features.inception`
    dinov2    any size, gray or RGB       DINOv2 ViT-L/14, see `trigflow.evaluation.features.dinov2`; needs the extra `features`
    ========= =========================== ===============================================================================

    Args:
        name: one of those.
        weights: of `inception` or `dinov2`, a local copy; None downloads them once and keeps them in the cache of PyTorch, or
            of the Hugging Face hub.
        progress: show a bar while weights are downloaded.

    Raises:
        UserError: for another name, for weights of an extractor that brings its own, and for weights that cannot be had.
        MissingExtraError: for `dinov2` without transformers.
    """
    if name not in FEATURE_NAMES:
        raise UserError(f"unknown features '{name}'; expected one of {', '.join(FEATURE_NAMES)}; correct the name")
    if weights is not None and name not in DOWNLOADED:
        raise UserError(
            f"weights for the features '{name}'; expected none, they come with trigflow; drop --weights, or choose "
            f"{' or '.join(DOWNLOADED)}"
        )
    if name == "pixels":
        return PixelFeatures().eval()
    if name == "inception":
        from trigflow.evaluation.features.inception import load_inception

        return load_inception(weights, progress)
    if name == "dinov2":
        from trigflow.evaluation.features.dinov2 import load_dinov2

        return load_dinov2(weights)
    tensors, metadata = shipped_weights(name)
    settings = {"size", "width", "stages", "dim", "classes", "channels", "pool"} & metadata.keys()
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        network = FeatureNet(**{key: int(metadata[key]) for key in settings})
    network.load_state_dict({key: tensors[key].float() for key in network.state_dict()})
    return network.eval().requires_grad_(False)


def default_features(dataset_name: str) -> str:
    """Name of the features to use for a data set: its own classifier when there is one, otherwise 'pixels'."""
    own = dataset_name.removesuffix("-held-out")
    return own if own in ("digits", "mnist", "emoji") else "pixels"


def shipped_weights(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a shipped classifier, 'digits', 'mnist' or 'emoji'.

    Beside the weights (stored as float16) there is `test_indices`: the images of the data set that training never saw; of the
    emoji, each of which is a class, training saw all, and the accuracy is that on other variations of them. The metadata tells
    how the network was trained and its accuracy on those images (`test_accuracy`).
    """
    resource = files("trigflow.evaluation.features").joinpath("weights", f"{name}.safetensors")
    with as_file(resource) as path, safe_open(path, framework="pt") as file:
        opened: Any = file
        return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata())  # noqa: SIM118


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 512) -> Tensor:
    """Features of all images, in batches, without gradients: `(n, c, h, w)` uint8 to `(n, d)` on the CPU.

    A module runs in eval mode on the device of its first parameter or buffer, and is left in the mode it was in. Half
    precision features come back as float32.

    Raises:
        UserError: if the images are not uint8 `(n, c, h, w)` or there are none, or the output is not floating `(b, d)`.
    """
    check_images(images)
    if len(images) == 0 or batch_size < 1:
        raise UserError(f"{len(images)} images in batches of {batch_size}; expected at least 1 of each; check the input")
    modules = list(extractor.modules()) if isinstance(extractor, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    held = [*extractor.parameters(), *extractor.buffers()] if isinstance(extractor, nn.Module) else []
    device = (held or [images])[0].device
    for module in modules:
        module.training = False
    try:
        features = [_checked(extractor(batch.to(device)), len(batch)).cpu() for batch in images.split(batch_size)]
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(features)


def check_images(images: Tensor) -> None:
    """Raise a UserError unless `images` is a uint8 tensor `(b, c, h, w)`."""
    if not isinstance(images, Tensor):
        raise UserError(
            f"images of type {type(images).__name__}; expected a uint8 tensor of shape (b, c, h, w); "
            "convert them with torch.as_tensor"
        )
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}; expected uint8 of shape (b, c, h, w); "
            "scale to 0..255 and convert with .round().clamp(0, 255).to(torch.uint8)"
        )


def as_rgb(images: Tensor) -> Tensor:
    """Gray images three times over, RGB images as they are: uint8 `(b, 1 or 3, h, w)` to `(b, 3, h, w)`.

    Raises:
        UserError: for images of another type or number of channels.
    """
    check_images(images)
    if images.shape[1] not in (1, 3):
        raise UserError(
            f"images of {images.shape[1]} channels; expected gray or RGB, 1 or 3; choose the features 'pixels' for others"
        )
    return images.expand(-1, 3, -1, -1)


def _checked(features: Tensor, count: int) -> Tensor:
    if not isinstance(features, Tensor):
        seen = type(features).__name__
    elif features.ndim == 2 and len(features) == count and features.is_floating_point():
        return features.to(torch.promote_types(features.dtype, torch.float32))
    else:
        seen = f"shape {tuple(features.shape)} and type {features.dtype}"
    raise UserError(
        f"the feature extractor returned {seen} for {count} images; expected a floating tensor of shape ({count}, d); "
        "pool or flatten its output to one vector for each image"
    )
