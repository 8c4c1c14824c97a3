"""One cell in its own process: `python -m studies.cell OUT/cells/KEY`.

Reads cell.json, trains the model unless that has been done, draws from it, and writes result.json. A cell that was killed goes
on from the newest checkpoint of its model. With `--attended` it stops, as for Ctrl-C, when its standard input is closed: that
happens when the runner ends, however it ends.
"""

import _thread
import dataclasses
import itertools
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from studies.pool import RawResult, lock_of
from studies.spec import Draw
from trigflow.data import LatentDataset
from trigflow.data.config import load_data
from trigflow.evaluation import Reference
from trigflow.evaluation.evaluate_model import make_reference, score
from trigflow.lab.demo import trained
from trigflow.models.model import Model, load
from trigflow.runtime.errors import DivergedError, UserError, first_line
from trigflow.runtime.files import read_json, write_json
from trigflow.runtime.machine import machine
from trigflow.samplers import ScheduleSearch, search_times
from trigflow.training.config import from_dict
from trigflow.training.log import read_metrics

MOST_SKIPPED = 0.1
"""Share of steps that may be skipped, because loss or gradient are not finite, before a run counts as diverged."""
JUDGED_FROM = 100
"""Steps from which on a run that draws no better than noise counts as diverged."""
BOOKKEEPING = frozenset({"iteration", "skipped", "images_per_second", "lr"})
"""What the log has beside figures of training."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 with a result.json, 130 when interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
    folder = Path(arguments[0])
    if "--attended" in arguments:
        threading.Thread(target=_stop_with_runner, daemon=True).start()
    try:
        cell = read_json(folder / "cell.json", "cell")
        out = folder.parent.parent
        with lock_of(out, cell["model"]):
            if not (folder / "result.json").is_file():
                write_json(folder / "result.json", run_cell(cell, out))
    except KeyboardInterrupt:
        return 130
    return 0


def _stop_with_runner() -> None:
    while os.read(0, 1024):
        pass
    _thread.interrupt_main()


def run_cell(cell: dict[str, Any], out: Path) -> RawResult:
    """The content of result.json: `status`, `reason`, and where it is not `failed` everything that was measured.

    The status is done; failed, for an exception; or diverged:

    * more than a tenth of the steps were skipped, because loss or gradient were not finite, or
    * the training gave up because its numbers would not stay finite, or a weight of the averaged network is not, or
    * after 100 steps or more, even its best draw has a Frechet distance above that of plain noise `N(0, sd^2)`, as if nothing
      had been drawn.

    Args:
        cell: content of cell.json.
        out: folder of all models and cells.
    """
    try:
        return _measured(cell, out)
    except DivergedError as error:
        return {"status": "diverged", "reason": str(error), "scores": {}, "machine": machine()}
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return {"status": "failed", "reason": kind + first_line(error), "machine": machine()}


def _measured(cell: dict[str, Any], out: Path) -> RawResult:
    """What came of the training and the draws of a cell, where nothing is raised."""
    began = time.perf_counter()
    config = from_dict(cell["config"])
    dataset = load_data(config.data)
    if isinstance(dataset, LatentDataset):
        raise UserError("a study of latents, which cannot be measured; expected images; choose another base or --data")
    teacher = None if cell["teacher"] is None else load(out / cell["teacher"], config.loop.device)
    model = trained(config, out / cell["model"], teacher, None if cell["start"] is None else out / cell["start"])
    trained_at = time.perf_counter()

    lines = read_metrics(out / cell["model"])
    iterations, skipped = int(lines[-1]["iteration"]), int(lines[-1]["skipped"])
    scores: dict[str, Any] = {}
    reason = ""
    if not all(bool(p.isfinite().all()) for p in model.network.parameters()):
        reason = "weights are not finite"
    elif skipped > MOST_SKIPPED * iterations:
        reason = f"loss or gradient were not finite in {skipped} of {iterations} steps"
    else:
        reference, seed = make_reference(dataset), config.loop.seed
        scores = score_draws(model, reference, [Draw(**draw) for draw in cell["draws"]], cell["num"], seed)
        if iterations >= JUDGED_FROM:
            noise = model.codec.pictures(model.codec.decode(model.noise(2 * seed + 1, 0, 0, cell["num"]))).cpu()
            best, nothing = min(s["fd"] for s in scores.values()), reference.score(noise).fd
            reason = f"Frechet distance {best:.1f}, that of noise is {nothing:.1f}" if best > nothing else ""
    ended = time.perf_counter()
    return {
        "status": "diverged" if reason else "done",
        "reason": reason,
        "iterations": iterations,
        "skipped": skipped,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "training": training_figures(lines),
        "seconds": {
            "train": training_seconds(lines, config.loop.batch_size),
            "evaluate": ended - trained_at,
            "process": ended - began,
        },
        "machine": {**machine(), **({"device": "cpu"} if model.device.type == "cpu" else {})},
        "scores": scores,
    }


def training_figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each logged figure the mean over the last quarter of the log, item by item for lists, None where nothing was finite;
    and the largest and the median norm of the gradient over all of it."""
    tail = lines[-max(1, len(lines) // 4) :]
    figures = {name: _mean([line.get(name) for line in tail]) for name in lines[-1] if name not in BOOKKEEPING}
    norms = [line["grad_norm"] for line in lines if line.get("grad_norm") is not None]
    seen = [line["grad_norm_max"] for line in lines if line.get("grad_norm_max") is not None]  # by instruments, at every step
    figures["grad_norm_max"] = max(seen or norms, default=None)
    figures["grad_norm_median"] = statistics.median(norms) if norms else None
    return figures


def _mean(values: list[Any]) -> Any:
    if any(isinstance(value, list) for value in values):
        return [_mean(list(items)) for items in zip(*(v for v in values if isinstance(v, list)), strict=True)]
    finite = [value for value in values if isinstance(value, int | float)]
    return statistics.fmean(finite) if finite else None


def training_seconds(lines: list[dict[str, Any]], batch_size: int) -> float:
    """Seconds of training behind the log: those of an interrupted run's lost steps are not in it."""
    pairs = itertools.pairwise([{"iteration": 0}, *lines])
    return sum((line["iteration"] - last["iteration"]) * batch_size / line["images_per_second"] for last, line in pairs)


def score_draws(model: Model, reference: Reference, draws: list[Draw], num: int, seed: int) -> dict[str, Any]:
    """Scores by the name of the draw: fd, fd_real, precision, recall, nfe, times (None where they were not searched), seconds.

    Noise is the same for all models of one seed, so that their differences are differences of models, and other noise finds
    the times of a draw with search.
    """
    scores: dict[str, Any] = {}
    usual = model.sampling
    for draw in draws:
        began = time.perf_counter()
        model.times, model.sampling = {}, usual  # what an earlier search has found is for its draw
        if draw.search and draw.steps > 1 and model.kind == "consistency" and model.sampling.jumps != "segments":
            _search(model, reference, draw, num, 2 * seed + 2)
        found = score(
            model, reference, num=num, steps=draw.steps, guidance=draw.guidance, solver=draw.solver, seed=2 * seed + 1
        )
        scores[draw.name] = {
            **{name: found[name] for name in ("fd", "fd_real", "precision", "recall", "nfe")},
            "times": model.times.get(draw.steps),
            "seconds": time.perf_counter() - began,
        }
    return scores


def _search(model: Model, reference: Reference, draw: Draw, num: int, seed: int) -> None:
    """Give the model the times, and where it takes any jump the gamma, with the least Frechet distance: for each gamma 8 trials
    for two steps, 10 for each searched time of more."""
    free = model.sampling.jumps == "any"
    trials = 8 if draw.steps == 2 else 10 * (draw.steps - 1)

    def searched(gamma: float) -> ScheduleSearch:
        def distance(times: tuple[float, ...]) -> float:
            drawn = model.sample(num, times=times, gamma=gamma if free else None, guidance=draw.guidance, seed=seed)
            return reference.score(drawn).fd

        return search_times(distance, model.process, draw.steps, evaluations=trials)

    found = {gamma: searched(gamma) for gamma in ((0.0, 0.5, 1.0) if free else (0.0,))}
    gamma = min(found, key=lambda gamma: found[gamma].score)
    model.times[draw.steps] = found[gamma].times
    model.sampling = dataclasses.replace(model.sampling, gamma=gamma)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
