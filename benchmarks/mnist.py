"""The demo's way on mnist (28x28): is two-step quality within 25% of the teacher's, within an hour on two cores?

    python benchmarks/mnist.py                 # three seeds, most of an hour each on two cores
    python benchmarks/mnist.py --seeds 0 --json /tmp/one.json
    python benchmarks/mnist.py --out runs/mnist --untimed --json benchmarks/results/mnist-seeds.json

Writes benchmarks/results/mnist.json, as benchmarks/digits.py writes digits.json. `--untimed` leaves out the bar on time, for
runs beside other work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from digits import Bar, check_whole, run


def quality(result: dict[str, Any]) -> list[Bar]:
    """Two steps against the teacher, and nothing that diverged."""
    return [
        ("mean fd.student_2 / mean fd.teacher", result["ratio_2"]["of_means"], "<=", 1.25),
        ("mean of fd.student_2 / fd.teacher", result["ratio_2"]["mean"], "<=", 1.25),
        ("training steps that were not finite", result["skipped_steps"], "<=", 0),
    ]


def quality_and_time(result: dict[str, Any]) -> list[Bar]:
    """These, and how long it takes."""
    check_whole(result)
    return [
        *quality(result),
        ("seconds of training, distillation and scores, most of the seeds", result["most_seconds"], "<=", 3600.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "mnist.json")
    parser.add_argument("--out", type=Path, help="keep the runs below this folder")
    parser.add_argument("--untimed", action="store_true", help="leave out the bar on time")
    parser.add_argument("--add", action="store_true", help="to the seeds that the file has already")
    args = parser.parse_args()
    run("mnist", args.seeds, args.out, quality if args.untimed else quality_and_time, args.json, args.add)


if __name__ == "__main__":
    main()
