"""What real images score against real images: the figures of docs/metrics.md.

    python benchmarks/noise_floor.py            # a minute on one core; needs the extras digits and mnist

Writes benchmarks/results/noise_floor.json. `floors`: for each data set and its features the distance between random halves
(`fd_real`), and precision and recall of the first half of one random order against the second. `subsets`: the distance
between two disjoint sets of n digits, mean over random orders. `without_nines`: MNIST without its nines against all of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from trigflow.data import open_dataset
from trigflow.evaluation import Reference, evaluate, feature_extractor
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine

PAIRS = (("digits", "digits"), ("digits", "pixels"), ("mnist", "mnist"), ("mnist", "pixels"))


def shuffled(images: Tensor, seed: int) -> Tensor:
    """The images in a random order."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def floor(source: str, features: str) -> dict[str, Any]:
    """The noise floor of a data set, and one half of it against the other."""
    images, extractor = open_dataset(source).images, feature_extractor(features)
    order, half = shuffled(images, 0), len(images) // 2
    scores = evaluate(order[:half], order[half : 2 * half], extractor)
    fd_real = Reference(images, extractor).fd_real
    return {
        "data": source,
        "images": len(images),
        "features": features,
        "fd_real": fd_real,
        "precision": scores.precision,
        "recall": scores.recall,
    }


def subset(n: int, repeats: int = 8) -> dict[str, Any]:
    """Two disjoint sets of n digits each."""
    images, extractor = open_dataset("digits").images, feature_extractor("digits")
    orders = [shuffled(images, seed) for seed in range(repeats)]
    return {"images": n, "fd": mean(evaluate(o[:n], o[n : 2 * n], extractor).fd for o in orders), "repeats": repeats}


def without_nines(features: str) -> dict[str, Any]:
    """How far leaving a class out moves the distance."""
    dataset = open_dataset("mnist")
    assert dataset.labels is not None
    reference = Reference(dataset.images, feature_extractor(features))
    return {"features": features, "fd": reference.score(dataset.images[dataset.labels != 9]).fd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "noise_floor.json")
    args = parser.parse_args()
    result = {
        "command": "python benchmarks/noise_floor.py",
        "machine": machine(),
        "floors": [floor(*pair) for pair in PAIRS],
        "subsets": [subset(n) for n in (100, 500)],
        "without_nines": [without_nines(features) for features in ("mnist", "pixels")],
    }
    for entry in (*result["floors"], *result["subsets"], *result["without_nines"]):
        print(entry)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
