"""One, two and four gloo processes find the same, bit for bit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import programs

WORKER = Path(__file__).with_name("processes_worker.py")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo, and fork",
)
Found = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process found, by the number of processes and its rank."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = programs.run([WORKER, teacher_folder, folder], environment=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {
        (count, rank): json.loads((folder / f"found{count}-{rank}.json").read_text())
        for count in (1, 2, 4)
        for rank in range(count)
    }


@pytest.mark.parametrize("what", ["features", "statistics", "radii", "overlap", "evaluation", "reference"])
def test_every_process_finds_what_one_alone_finds(found: Found, what: str) -> None:
    alone = found[1, 0][what]
    assert alone
    for place, report in found.items():
        assert report[what] == alone, place


def test_every_image_is_made_once(found: Found) -> None:
    for count in (1, 2, 4):
        made = [found[count, rank]["mine"] for rank in range(count)]
        assert sorted(number for numbers in made for number in numbers) == list(range(50))
        assert all(made)


def test_what_is_wrong_in_one_process_is_raised_in_all(found: Found) -> None:
    assert {report["error"] for report in found.values()} == {"image 24 is broken; expected a whole one; replace it"}


def test_each_process_gets_its_own_value(found: Found) -> None:
    assert all(report["first"] == rank for (_, rank), report in found.items())
