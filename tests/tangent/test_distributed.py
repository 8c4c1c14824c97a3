"""Two processes under DDP and FSDP2 against one process: outputs, tangents and gradients."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import programs

WORKER = Path(__file__).with_name("distributed_worker.py")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found; a process that hangs or dies fails every test."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        with open(folder / f"log{rank}", "w") as log:
            command = [WORKER, rank, folder]
            processes.append(
                programs.start(command, stdout=log, stderr=log, environment=environment, imports=["torch.distributed.fsdp"])
            )
    try:
        codes = [process.wait(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(2))
    return [json.loads((folder / f"errors{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "case",
    [
        "ddp",
        "ddp, unused parameters",
        "ddp, static graph",
        "ddp, checkpointed",
        "ddp, nested output",
        "fsdp",
        "fsdp, checkpoints in the blocks",
        "fsdp, checkpoints around the blocks",
        "fsdp, nested output",
        "fsdp, not resharded",
    ],
)
def test_two_processes_equal_one(reports: list[dict[str, Any]], case: str) -> None:
    for report in reports:
        errors = report[case]
        assert errors["missing"] == []
        assert errors["parameters"] == 22
        assert errors["out"] < 1e-12
        assert errors["tangent"] < 1e-12
        assert errors["gradient"] < 1e-12


def test_mixed_precision_casts_tangents_with_their_primals(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        errors = report["bfloat16"]
        assert errors["dtypes"] == ["torch.bfloat16", "torch.bfloat16"]
        assert max(errors["out"], errors["tangent"], errors["gradient"]) < 0.03


def test_custom_functions_are_refused_inside_sharded_modules(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "autograd.Function" in report["refused"]
        assert "Bad" in report["refused"]


def test_classes_of_pytorch_are_left_as_they_were(reports: list[dict[str, Any]]) -> None:
    assert [report["left behind"] for report in reports] == [False, False]
