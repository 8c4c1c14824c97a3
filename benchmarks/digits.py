"""The demo at several seeds: is two-step quality within 10% of the teacher's on average, at 1/25 of its time?

    python benchmarks/digits.py                 # three demos, about five minutes each on two cores
    python benchmarks/digits.py --seeds 0 --json /tmp/one.json
    python benchmarks/digits.py --seeds $(seq 0 19) --out runs/seeds --untimed --json benchmarks/results/seeds.json

Writes benchmarks/results/digits.json: the report of every seed, their means, and each bar with what was measured. Runs are
made from nothing, in a temporary folder or in one folder a seed below `--out`, where finished ones are not repeated; nothing is
chosen by hand between them. `--untimed` leaves out the bars on time, for runs beside other work.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trigflow.demo import machine, run_demo
from trigflow.files import write_json


def summarize(reports: list[dict[str, Any]], timed: bool) -> dict[str, Any]:
    """Means over seeds, and the bars. A standard error is that of the mean over seeds."""
    fd = {name: mean(r["fd"][name] for r in reports) for name in ("teacher", "student_1", "student_2", "real")}
    ratio_1, ratio_2 = fd["student_1"] / fd["teacher"], fd["student_2"] / fd["teacher"]
    slowest = max(r["seconds"]["total"] for r in reports)
    speedup = min(r["speedup_2"] for r in reports)
    skipped = sum(r["skipped_steps"]["teacher"] + r["skipped_steps"]["student"] for r in reports)
    each = [r["fd"]["student_2"] / r["fd"]["teacher"] for r in reports]
    bars = [
        ("mean fd.student_2 / mean fd.teacher", ratio_2, "<=", 1.10),
        ("mean of fd.student_2 / fd.teacher", mean(each), "<=", 1.10),
        ("mean fd.student_1 / mean fd.teacher", ratio_1, "<=", 1.5),
        (
            "fd.student_2 / fd.teacher, most of the seeds",
            max(each),
            "<=",
            2.0,
        ),  # beyond it a run has diverged in quality
        ("training steps that were not finite", skipped, "<=", 0),
    ]
    if timed:
        bars += [
            ("speedup_2, least of the seeds", speedup, ">=", 25.0),
            ("seconds.total, most of the seeds", slowest, "<=", 360.0),
        ]
    error = stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return {
        "mean": {"fd": fd, "speedup_2": mean(r["speedup_2"] for r in reports)},
        "ratio_2": {"mean": mean(each), "standard_error": error, "each": each},
        "bars": [
            {"what": what, "measured": value, "bar": f"{sign} {bar}", "met": value <= bar if sign == "<=" else value >= bar}
            for what, value, sign, bar in bars
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "digits.json")
    parser.add_argument("--out", type=Path, help="keep the runs below this folder")
    parser.add_argument("--untimed", action="store_true", help="leave out the bars on time")
    args = parser.parse_args()
    reports = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            report = run_demo((args.out or Path(folder)) / str(seed), seed=seed)
        print(f"seed {seed}\n{report.table()}\n", flush=True)
        reports.append(report.figures)
    result = {
        "command": f"python benchmarks/digits.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        **summarize(reports, not args.untimed),
        "reports": reports,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:40} {bar['measured']:8.3f}  {bar['bar']}")


if __name__ == "__main__":
    main()
