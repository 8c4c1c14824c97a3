"""What fits where, and how cost grows with processes, resolution and parameters: counted on the meta device, without a GPU.

    python benchmarks/fits.py            # a few minutes; writes results/fits.json and the tables of docs/scale.md
    python benchmarks/fits.py --check    # only compare the tables with those of results/fits.json

Everything is what `trigflow plan` counts: samples at a time on a GPU, with a tenth of its memory kept free, and floating-point
operations, a multiply-add as two. Traffic is what a ring sends: for a sum over n processes each one sends 2 (n - 1) / n of its
size, to gather or to scatter (n - 1) / n.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from trigflow.lab.plan.hardware import GPUS
from trigflow.lab.plan.memory import GIB, USABLE, memory
from trigflow.lab.plan.step import Step
from trigflow.lab.recipes import get_run
from trigflow.runtime.files import read_json, write_json, write_text

ROOT = Path(__file__).parents[1]
JSON = ROOT / "benchmarks" / "results" / "fits.json"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- {}: python benchmarks/fits.py -->", "<!-- end of {} -->"

SIZES = ("s", "m", "l", "xl", "xxl")
RECIPES = ("cifar10-scd", "dit-b-scd", "dit-xl-scd", *(f"img512-{size}-scd" for size in SIZES))
CARDS = ("rtx4090", "l40s", "h100", "h200")
MACHINE = 8
"""GPUs that weights are sharded over."""
SIDES = {"dit-b-scd": (32, 64, 128), "img512-s-scd": (32, 64, 128)}
"""Sides of a square sample, to see how cost grows."""


def fits(counted: Step, sharded: bool) -> dict[str, int]:
    """Most samples at a time on each kind of GPU, at most its share of the batch."""
    need = memory(counted, "fsdp2" if sharded else "ddp", MACHINE)
    share = counted.config.loop.batch_size // MACHINE
    return {card: min(share, need.largest_batch(GIB * USABLE * GPUS[card].memory)) for card in CARDS}


def traffic(counted: Step) -> dict[str, float]:
    """GiB that each of eight processes sends for an update whose batch is one part.

    ddp sums gradients. fsdp gathers the weights of the student for its forward and for its backward pass and those of the
    teacher for each of its evaluations (two where it is guided), and scatters gradients.
    """
    student, teacher = counted.student.parameters, 0 if counted.teacher is None else counted.teacher.parameters
    evaluations = round(counted.many.teacher / counted.many.batch / counted.forward)
    part = 4 * (MACHINE - 1) / MACHINE / GIB
    return {"ddp": 2 * student * part, "fsdp": (3 * student + evaluations * teacher) * part}


def count() -> dict[str, Any]:
    """Everything on the page."""
    runs, growth = [], []
    for name in RECIPES:
        print(name, file=sys.stderr, flush=True)
        run = get_run(name)
        plain, eased = (Step(run, checkpointing=checkpointing) for checkpointing in (False, True))
        need = memory(plain, "ddp", 1)
        runs.append(
            {
                "recipe": name,
                "parameters": plain.student.parameters,
                "states_gib": need.states / GIB,
                "sample_gib": need.per_sample / GIB,
                "sample_gflops": plain.many.total / plain.many.batch / 1e9,
                "ddp": fits(plain, sharded=False),
                "fsdp": fits(plain, sharded=True),
                "fsdp_recompute": fits(eased, sharded=True),
                "sent_gib": traffic(plain),
            }
        )
        for side in SIDES.get(name, ()):
            sized = Step(dataclasses.replace(run, shape=(run.shape[0], side, side)))
            growth.append(
                {
                    "recipe": name,
                    "side": side,
                    "sample_gflops": sized.many.total / sized.many.batch / 1e9,
                    "sample_gib": memory(sized, "ddp", 1).per_sample / GIB,
                }
            )
    return {"command": "python benchmarks/fits.py", "usable": USABLE, "gpus": MACHINE, "runs": runs, "growth": growth}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/scale.md by name."""

    def room(run: dict[str, Any], card: str) -> str:
        ways = [run[way][card] for way in ("ddp", "fsdp", "fsdp_recompute")]
        return " / ".join(str(samples) if samples else "–" for samples in ways)

    head = ["recipe", "parameters", "weights, moments, averages, teacher", "a sample", *[GPUS[c].title for c in CARDS]]
    what_fits = table(
        head,
        [
            [
                f"`{run['recipe']}`",
                f"{run['parameters'] / 1e6:,.0f} M",
                f"{run['states_gib']:.1f} GiB",
                f"{run['sample_gib']:.2f} GiB",
                *[room(run, card) for card in CARDS],
            ]
            for run in found["runs"]
        ],
    )
    parameters = table(
        ["recipe", "parameters", "GFLOP, a step for one sample", "sent with `ddp`", "sent with `fsdp`"],
        [
            [
                f"`{run['recipe']}`",
                f"{run['parameters'] / 1e6:,.0f} M",
                f"{run['sample_gflops']:,.0f}",
                f"{run['sent_gib']['ddp']:.1f} GiB",
                f"{run['sent_gib']['fsdp']:.1f} GiB",
            ]
            for run in found["runs"]
        ],
    )
    resolution = table(
        ["recipe", "side of a sample", "GFLOP, a step for one sample", "memory of a sample"],
        [
            [f"`{g['recipe']}`", str(g["side"]), f"{g['sample_gflops']:,.0f}", f"{g['sample_gib']:.2f} GiB"]
            for g in found["growth"]
        ],
    )
    return {"what fits": what_fits, "parameters": parameters, "resolution": resolution}


def page_with(text: str, found: dict[str, Any]) -> str:
    """A page with what is between the marks of each table replaced."""
    for name, content in tables(found).items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the page with results/fits.json")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    if args.check:
        if page_with(text, read_json(JSON, "result")) != text:
            raise SystemExit("docs/scale.md does not have the tables of results/fits.json; run: python benchmarks/fits.py")
        return
    found = count()
    write_json(JSON, found)
    write_text(PAGE, page_with(PAGE.read_text(encoding="utf-8"), found))


if __name__ == "__main__":
    main()
