"""What it costs to find out what the files of a large data set are, beside listing them once.

A folder of empty files named as images is made, in ten class folders or with a `.cls` beside each, listed and asked for its
labels. Reading labels and images is not part of it. Both are timed in turn, several times, and the medians are compared::

    python benchmarks/listing.py --files 1000000 --json benchmarks/results/listing.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trigflow.data.labels import find_labels, label_files, pair
from trigflow.data.sources.files import Files, FolderFiles

CLASSES = 10


def make(folder: Path, count: int, beside: bool) -> None:
    """Empty files, in class folders or beside their labels."""
    for number in range(count):
        at = folder if beside else folder / f"class{number % CLASSES}"
        if number < CLASSES:
            at.mkdir(parents=True, exist_ok=True)
        for ending in (".png", ".cls") if beside else (".png",):
            os.close(os.open(at / f"{number:08d}{ending}", os.O_CREAT))


def checks_of(files: Files, beside: bool) -> Callable[[], Any]:
    """What is done with the names before anything is read."""
    images = files.only(files.images()).names
    if beside:
        return lambda: pair(images, [files.names[index] for index in label_files(files)], files.where)
    return lambda: find_labels(files, images)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(count: int, rounds: int, beside: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), count, beside)
        files = FolderFiles.of(folder)
        checks = checks_of(files, beside)
        listing, checking = [], []
        for _ in range(rounds):
            listing.append(seconds(lambda: FolderFiles.of(folder)))
            checking.append(seconds(checks))
        pairs = zip(checking, listing, strict=True)
        return {
            "files": len(files),
            "listing_seconds": statistics.median(listing),
            "checks_seconds": statistics.median(checking),
            "checks_over_listing": statistics.median(check / once for check, once in pairs),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000, help="images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    results = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "class folders": measure(args.files, args.rounds, beside=False),
        "labels beside images": measure(args.files, args.rounds, beside=True),
    }
    text = json.dumps(results, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
