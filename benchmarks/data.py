"""Loading: does one core read 2,000 images of 64x64 a second out of a zip of PNGs, and what bounds it?

    python benchmarks/data.py                  # under a minute
    python benchmarks/data.py --workers 1 2 4 8 --json /tmp/data.json

Writes benchmarks/results/data.json: images a second of one process by source, with the time of each stage; of worker processes
and of threads, as ratios to one process; the share of time that training would wait for data; and each bar with what was
measured. The images are made on the spot, with the spectrum of photographs and a little noise: their PNGs are about as large as
those of ImageNet at 64x64 (8 to 9 KB), because the time to inflate a PNG grows with its size. All ways of reading take turns.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from trigflow.data import ImageDataset, Loader, open_dataset
from trigflow.data.rows import ImageRows
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine

BATCH = 256
AHEAD = 2
BAR = 2000.0
"""Images a second and core."""


def picture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Bytes `(side, side, 3)` whose amplitude falls as 1/f, as that of photographs does, with a little noise on top."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :])
    amplitude = 1 / np.maximum(frequency, 1 / side)
    gray = np.fft.ifft2(amplitude * np.fft.fft2(rng.normal(size=(side, side)))).real
    tint = np.fft.ifft2(amplitude**1.2 * np.fft.fft2(rng.normal(size=(3, side, side)))).real
    layers = gray / gray.std() + 0.4 * tint / tint.std()
    pixels = 128 + 50 * layers + rng.normal(scale=4, size=layers.shape)
    return pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def make_sources(folder: Path, count: int, side: int) -> tuple[dict[str, Path], float]:
    """The same PNGs as an uncompressed zip, a compressed one, a folder and a tar; and their mean size in bytes."""
    rng = np.random.default_rng(0)
    paths = {name: folder / name for name in ("stored.zip", "deflated.zip", "folder", "shard.tar")}
    paths["folder"].mkdir()
    total = 0
    with (
        zipfile.ZipFile(paths["stored.zip"], "w") as stored,
        zipfile.ZipFile(paths["deflated.zip"], "w", zipfile.ZIP_DEFLATED) as deflated,
        tarfile.open(paths["shard.tar"], "w") as tar,
    ):
        for index in range(count):
            buffer = io.BytesIO()
            Image.fromarray(picture(rng, side)).save(buffer, "PNG")
            content, name = buffer.getvalue(), f"{index:06d}.png"
            total += len(content)
            stored.writestr(name, content)
            deflated.writestr(name, content)
            (paths["folder"] / name).write_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return paths, total / count


def rate(read: Callable[[int], int], seconds: float, ready: int) -> tuple[float, float]:
    """Images a second of the clock, and a second of this process's time, of `read(turn)`, which reads some.

    The first `ready` turns are not counted: workers have read as much ahead while others had theirs.
    """
    count, turn = 0, 0
    for _ in range(ready):
        read(0)
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        count += read(turn)
        turn += 1
    return count / (time.perf_counter() - began), count / (time.process_time() - used)


def readers(datasets: dict[str, ImageDataset], workers: list[int]) -> dict[str, Callable[[int], int]]:
    """Every way of reading a batch, by name."""
    zipped = datasets["stored.zip"]
    assert isinstance(zipped.rows, ImageRows)
    decoder = zipped.rows.decoder
    order = zipped.order(BATCH, 0)
    found: dict[str, Callable[[int], int]] = {}

    def read(dataset: ImageDataset) -> Callable[[int], int]:
        return lambda turn: len(dataset.stored(order.indices(turn)))

    def load(count: int) -> Callable[[int], int]:
        loader = Loader(zipped, order.indices, 1 << 40, workers=count, ahead=AHEAD)
        steps = iter(range(1 << 40))

        def batch(turn: int) -> int:
            step = next(steps)
            return len(loader.read(step, order.indices(step)))

        return batch

    def bytes_only(turn: int) -> int:
        return len([decoder.files.read(index) for index in order.indices(turn).tolist()])

    def in_threads(count: int) -> Callable[[int], int]:
        pool = ThreadPoolExecutor(count)
        return lambda turn: len(list(pool.map(decoder, order.indices(turn).tolist())))

    for name, dataset in datasets.items():
        found[name] = read(dataset)
    found["stored.zip, bytes only"] = bytes_only
    for count in workers:
        found[f"stored.zip, {count} worker(s)"] = load(count)
        found[f"stored.zip, {count} thread(s)"] = in_threads(count)
    return found


def stages(dataset: ImageDataset, count: int = 1000) -> dict[str, float]:
    """Microseconds an image of each stage, in this process's time: reading, inflating and filtering, the rest of decoding."""
    assert isinstance(dataset.rows, ImageRows)
    decoder = dataset.rows.decoder
    indices = [index % len(dataset) for index in range(count)]
    contents = [decoder.files.read(index) for index in indices]

    def timed(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return (time.process_time() - began) / count * 1e6

    reading = timed(lambda: [decoder.files.read(index) for index in indices])
    pillow = timed(lambda: [Image.open(io.BytesIO(content), formats=("PNG",)).load() for content in contents])
    whole = timed(lambda: dataset.stored(torch.tensor(indices)))
    return {"read": reading, "decode in Pillow": pillow, "rest": whole - reading - pillow, "all": whole}


def waiting(dataset: ImageDataset, step_seconds: float, workers: int, steps: int = 15) -> float:
    """Share of time that a training whose steps take so long would wait for data."""
    order = dataset.order(BATCH, 0)
    loader = Loader(dataset, order.indices, steps, workers=workers)
    loader.read(0, order.indices(0))
    loader.waited()
    began = time.perf_counter()
    for step in range(1, steps):
        loader.read(step, order.indices(step))
        time.sleep(step_seconds)
    share = loader.waited() / (time.perf_counter() - began)
    loader.close()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4096, help="images made")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each way of reading in each round")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIGFLOW_CACHE"] = str(Path(folder) / "cache")
        paths, size = make_sources(Path(folder), args.count, args.side)
        datasets = {name: open_dataset(path, memory_limit_gib=0) for name, path in paths.items()}
        datasets["memory"] = open_dataset(paths["stored.zip"])
        ways = readers(datasets, args.workers)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, read in ways.items():
                ready = AHEAD * int(name.split()[1]) if "worker" in name else 0
                rates[name].append(rate(read, args.seconds, ready))
        by_stage = stages(datasets["stored.zip"])
        most = max(args.workers)
        wait = {str(count): waiting(datasets["stored.zip"], 2 * BATCH / BAR, count) for count in (0, most)}
    clock = {name: median(c for c, _ in found) for name, found in rates.items()}
    own = {name: median(p for _, p in found) for name, found in rates.items() if "worker" not in name and "thread" not in name}
    one = clock["stored.zip"]
    result: dict[str, Any] = {
        "command": f"python benchmarks/data.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "images": {"count": args.count, "side": args.side, "mean_png_bytes": round(size)},
        "batch": BATCH,
        "images_per_second": clock,
        "images_per_second_of_process_time": own,
        "ratio_to_one_process": {name: value / one for name, value in clock.items()},
        "microseconds_per_image": by_stage,
        "share_waiting": {"step_seconds": 2 * BATCH / BAR, "by_workers": wait},
        "bars": [
            {
                "what": "images a second of one core, 64x64 PNGs in a zip",
                "measured": one,
                "bar": f">= {BAR:g}",
                "met": one >= BAR,
            }
        ],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    print(f"PNGs of {size:.0f} bytes")
    for name, value in clock.items():
        print(f"{name:28} {value:10.0f} images/s   {value / one:5.2f}x")
    print("microseconds an image:", ", ".join(f"{name} {value:.0f}" for name, value in by_stage.items()))
    for count, share in wait.items():
        print(f"{count} worker(s): {share:.0%} of the time waiting, with steps of {2 * BATCH / BAR:.3f} s")
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:52} {bar['measured']:8.0f}  {bar['bar']}")


if __name__ == "__main__":
    main()
