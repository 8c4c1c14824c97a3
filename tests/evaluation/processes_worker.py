"""Runs in a process of its own: the same evaluation by one, two and four processes that it forks.

Arguments: the run folder of a teacher, and a folder to write what each process finds into.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trigflow.evaluation import PixelFeatures, Processes, gather, overlap, stream_features, write_reference
from trigflow.evaluation.evaluate_model import evaluate_model
from trigflow.evaluation.manifold import neighbour_radii
from trigflow.evaluation.measure_reference import measure_reference
from trigflow.models.model import load
from trigflow.runtime.errors import UserError

COUNTS = (1, 2, 4)


def images(start: int, stop: int) -> Tensor:
    generators = [torch.Generator().manual_seed(number) for number in range(start, stop)]
    return torch.stack([torch.randint(0, 256, (1, 6, 6), dtype=torch.uint8, generator=g) for g in generators])


def failing(start: int, stop: int) -> Tensor:
    if start <= 24 < stop:
        raise UserError("image 24 is broken; expected a whole one; replace it")
    return images(start, stop)


def look(folder: str, reference: Path) -> dict[str, Any]:
    """What this process finds."""
    processes = Processes.present()
    mine: list[int] = []

    def counted(start: int, stop: int) -> Tensor:
        mine.extend(range(start, stop))
        return images(start, stop)

    statistics, features = gather(stream_features(counted, 50, PixelFeatures(), batch_size=4, processes=processes), keep=True)
    assert features is not None
    found = overlap(features[:30], features[30:], chunk=4, processes=processes)
    try:
        list(stream_features(failing, 50, PixelFeatures(), batch_size=4, processes=processes))
        error = "none"
    except UserError as raised:
        error = str(raised)
    result = evaluate_model(load(folder, "cpu"), num=90, steps=2, batch_size=8, reference=reference)
    del result["samples_per_second"]
    real = measure_reference("digits", features="pixels", keep=5, num=100, batch_size=8)
    return {
        "mine": mine,
        "features": features.double().sum(1).tolist(),
        "statistics": [*statistics.mean.tolist(), *statistics.covariance.flatten().tolist()],
        "radii": neighbour_radii(features, chunk=7, processes=processes).tolist(),
        "overlap": [found.precision, found.recall, found.density, found.coverage],
        "error": error,
        "first": processes.one_first(lambda: processes.rank),
        "evaluation": result,
        "reference": [real.fd_real, *real.statistics.mean.tolist()],
    }


def work(rank: int, count: int, folder: str, out: Path) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/meet{count}", rank=rank, world_size=count)
    (out / f"found{count}-{rank}.json").write_text(json.dumps(look(folder, out / "reference.npz")))
    if count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_reference(Path(sys.argv[2], "reference.npz"), measure_reference("digits", features="pixels", keep=40))
    context = multiprocessing.get_context("fork")
    for count in COUNTS:
        children = [context.Process(target=work, args=(rank, count, sys.argv[1], Path(sys.argv[2]))) for rank in range(count)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            sys.exit(1)
