"""How close `trigflow plan` comes to the memory that training steps take: planned against measured, on the CPU.

    python benchmarks/plan_memory.py            # some minutes on one core

Writes benchmarks/results/plan_memory.json. Each case is a training step (student, teacher, tangent, backward) of a recipe with
a narrow network. `planned` counts the activations of the step on tensors without values, with the CPU's arithmetic. `live` and
`resident` are the peak of resident memory while real steps run, less what was resident before, in a process of its own: `live`
with every block of 64 KiB or more returned to the system when it is freed, `resident` with the allocator as it comes
(benchmarks/tangent_parts/memory.py). `ratio` is planned over live.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from tangent_parts.memory import added_peak, can_measure, in_fresh_process, map_large_blocks

from trigflow.lab.plan import Step
from trigflow.lab.recipes import NamedRun, get_run
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine

TOLERANCE = 0.2
"""The plan is to come this close."""


def narrow(recipe: str, shape: tuple[int, int, int], **network: Any) -> NamedRun:
    """A recipe with other settings of its network, on smaller samples of ten classes."""
    run = get_run(recipe)
    changed = dataclasses.replace(run.config.network, **network)
    return NamedRun(recipe, dataclasses.replace(run.config, network=changed), shape, min(run.classes, 10))


CASES: dict[str, tuple[NamedRun, int]] = {
    "unet scd fp32": (narrow("mnist-scd", (1, 28, 28), width=64, mult=(1, 2, 2), attention=(2,)), 32),
    "ddpmpp sct fp32": (narrow("cifar10-sct", (3, 32, 32), width=32, blocks=2), 16),
    "edm2 teacher bf16": (narrow("img64-m-teacher", (3, 32, 32), width=48, blocks=2), 32),
    "edm2 scd bf16": (narrow("img512-m-scd", (4, 32, 32), width=48, blocks=2), 32),
    "edm2 scd-vsd bf16": (narrow("img512-m-scd-vsd", (4, 32, 32), width=48, blocks=2), 32),
    "dit sct bf16": (narrow("dit-b-sct", (4, 32, 32), width=192, depth=6, heads=3), 16),
    "dit scd bf16": (narrow("dit-b-scd", (4, 32, 32), width=192, depth=6, heads=3), 16),
}
"""From a name to a run and its batch."""


def measured(name: str, mapped: bool) -> int:
    """Peak of the bytes that steps of a case add; for a fresh process."""
    torch.set_num_threads(1)
    if mapped:
        map_large_blocks()
    run, size = CASES[name]
    step = Step(run, target="cpu", values=True)
    step.backward(step.batch(1))  # loads code, leaves little behind
    batch = step.batch(size)
    return added_peak(lambda: step.backward(batch), times=1 if mapped else 2)


def planned(name: str) -> tuple[int, int]:
    """Activations that are planned for a case, and its number of parameters."""
    run, size = CASES[name]
    step = Step(run, target="cpu")
    return step.count(size).activations, step.student.parameters


def case(name: str) -> dict[str, Any]:
    """One case: what is planned, and what is measured."""
    activations, parameters = planned(name)
    live = in_fresh_process(measured, name, True)
    resident = in_fresh_process(measured, name, False)
    return {
        "case": name,
        "parameters": parameters,
        "batch": CASES[name][1],
        "planned": activations,
        "live": live,
        "resident": resident,
        "ratio": activations / live,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "plan_memory.json")
    args = parser.parse_args()
    if not can_measure():
        parser.exit(2, "plan_memory.py: error: this system does not tell its peak of resident memory; use Linux\n")
    print(f"{'case':20} {'planned':>8} {'live':>8} {'resident':>8}   (MiB)   planned / live")
    results = []
    for name in args.cases:
        found = case(name)
        results.append(found)
        mib = [found[key] / 2**20 for key in ("planned", "live", "resident")]
        print(f"{name:20} {mib[0]:8.0f} {mib[1]:8.0f} {mib[2]:8.0f} {found['ratio']:22.2f}", flush=True)
    worst = max(abs(found["ratio"] - 1) for found in results)
    write_json(
        args.json,
        {
            "command": "python benchmarks/plan_memory.py",
            "machine": machine(),
            "tolerance": TOLERANCE,
            "worst": worst,
            "met": worst <= TOLERANCE,
            "cases": results,
        },
    )


if __name__ == "__main__":
    main()
