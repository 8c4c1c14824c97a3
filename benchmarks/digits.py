"""The demo at several seeds: is two-step quality within 10% of the teacher's on average, at 1/25 of its time?

    python benchmarks/digits.py                 # three demos, about five minutes each on two cores
    python benchmarks/digits.py --seeds 0 --json /tmp/one.json
    python benchmarks/digits.py --seeds $(seq 0 19) --out runs/seeds --untimed --json benchmarks/results/seeds.json
    python benchmarks/digits.py --seeds 20 21 --add --untimed --json benchmarks/results/seeds.json

Writes benchmarks/results/digits.json: the report of every seed, their means, and each bar with what was measured. Runs are
made from nothing, in a temporary folder or in one folder a seed below `--out`, where finished ones are not repeated; nothing is
chosen by hand between them. `--untimed` leaves out the bars on time, for runs beside other work. `--add` keeps what the file
says of other seeds, made on a machine of the same kind.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trigflow.lab.demo import run_demo
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine

Bar = tuple[str, float, str, float]
"""What was measured, its value, `<=` or `>=`, and the bar."""


def summarize(reports: list[dict[str, Any]], bars_of: Callable[[dict[str, Any]], list[Bar]]) -> dict[str, Any]:
    """Means over seeds, and the bars. A standard error is that of the mean over seeds."""
    fd = {name: mean(r["fd"][name] for r in reports) for name in ("teacher", "student_1", "student_2", "real")}
    each = [r["fd"]["student_2"] / r["fd"]["teacher"] for r in reports]
    error = stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    result = {
        "mean": {"fd": fd, "speedup_2": mean(r["speedup_2"] for r in reports)},
        "ratio_1": {"mean": fd["student_1"] / fd["teacher"]},
        "ratio_2": {"mean": mean(each), "of_means": fd["student_2"] / fd["teacher"], "standard_error": error, "each": each},
        "least_speedup_2": min(r["speedup_2"] for r in reports),
        "most_seconds": max(r["seconds"]["total"] for r in reports),
        "resumed": [r["seed"] for r in reports if r.get("resumed")],
        "skipped_steps": sum(r["skipped_steps"]["teacher"] + r["skipped_steps"]["student"] for r in reports),
    }
    result["bars"] = judged(bars_of(result))
    return result


def judged(bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """The bars, with what was measured and whether they are met, as they go into a file."""
    return [
        {"what": what, "measured": value, "bar": f"{sign} {bar}", "met": value <= bar if sign == "<=" else value >= bar}
        for what, value, sign, bar in bars
    ]


def quality(result: dict[str, Any]) -> list[Bar]:
    """Distances against the teacher's, and nothing that diverged."""
    return [
        ("mean fd.student_2 / mean fd.teacher", result["ratio_2"]["of_means"], "<=", 1.10),
        ("mean of fd.student_2 / fd.teacher", result["ratio_2"]["mean"], "<=", 1.10),
        ("mean fd.student_1 / mean fd.teacher", result["ratio_1"]["mean"], "<=", 1.5),
        # beyond it a run has diverged in quality
        ("fd.student_2 / fd.teacher, most of the seeds", max(result["ratio_2"]["each"]), "<=", 2.0),
        ("training steps that were not finite", result["skipped_steps"], "<=", 0),
    ]


def check_whole(result: dict[str, Any]) -> None:
    """End where the seconds of a demo are those of its rest alone."""
    if result["resumed"]:
        sys.exit(
            f"seeds {result['resumed']} went on after an interruption, so that their seconds are of a part; expected demos in "
            "one go; delete their folders below --out, or leave out the bars on time with --untimed"
        )


def quality_and_time(result: dict[str, Any]) -> list[Bar]:
    """These, and how long it takes."""
    check_whole(result)
    return [
        *quality(result),
        ("speedup_2, least of the seeds", result["least_speedup_2"], ">=", 25.0),
        ("seconds.total, most of the seeds", result["most_seconds"], "<=", 360.0),
    ]


def run(
    recipe: str,
    seeds: Sequence[int],
    out: Path | None,
    bars_of: Callable[[dict[str, Any]], list[Bar]],
    path: Path,
    add: bool = False,
) -> None:
    """A demo of each seed; prints each report and the bars, and writes all of it; `add` keeps what the file has."""
    command = shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    here = machine()
    reports: list[dict[str, Any]] = []
    if add and path.is_file():
        before = json.loads(path.read_text())
        if before["machine"] != here:
            sys.exit(f"{path} was made on {before['machine']}, this is {here}; expected the same; run all seeds anew")
        reports = [report for report in before["reports"] if report["seed"] not in seeds]
        command = f"{before['command']}; {command}"
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            report = run_demo((out or Path(folder)) / str(seed), recipe=recipe, seed=seed)
        print(f"seed {seed}\n{report.table()}\n", flush=True)
        reports.append(report.figures)
    reports.sort(key=lambda figures: figures["seed"])
    result = {"command": command, "machine": here, **summarize(reports, bars_of), "reports": reports}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:45} {bar['measured']:8.3f}  {bar['bar']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "digits.json")
    parser.add_argument("--out", type=Path, help="keep the runs below this folder")
    parser.add_argument("--untimed", action="store_true", help="leave out the bars on time")
    parser.add_argument("--add", action="store_true", help="to the seeds that the file has already")
    args = parser.parse_args()
    run("digits", args.seeds, args.out, quality if args.untimed else quality_and_time, args.json, args.add)


if __name__ == "__main__":
    main()
