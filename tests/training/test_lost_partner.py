"""A process of a run that is killed or stands still ends the others with one line, wherever they wait for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from training.shared import free_ports, made_once, run_group

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)

CASES = {
    f"{where}, {how}, {mode}": (where, how, mode)
    for where, how, mode in [
        ("gather", "killed", ""),
        ("average", "killed", ""),
        ("rows", "stopped", ""),
        ("forward", "killed", "ddp"),
        ("forward", "stopped", "ddp"),
        ("backward", "killed", "ddp"),
        ("backward", "stopped", "ddp"),
        ("forward", "killed", "fsdp"),
        ("forward", "stopped", "fsdp"),
        ("end of backward", "stopped", "fsdp"),
    ]
}
WRONG = {f"wrong, {mode}": ("backward", "wrong", mode) for mode in ("ddp", "fsdp")}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first process ended with, case by case; while one waits for a process that stands still, others run."""
    cases = dict(sorted((CASES | WRONG).items(), key=lambda item: item[1][1] != "stopped"))

    def make(folder: Path) -> None:
        ports = free_ports(len(cases))
        given = {name: (*case, port) for (name, case), port in zip(cases.items(), ports, strict=True)}
        run_group(folder, "lost_worker", [json.dumps(given)], 2, "0", 400)

    folder = made_once(tmp_path_factory, "lost", make)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases} | {"folder": folder}


@pytest.mark.parametrize("case", CASES)
def test_one_line_wherever_the_others_wait(said: dict[str, Any], case: str) -> None:
    found = said[case]
    assert found["kind"] == "UserError", found
    assert found["text"].startswith("another process of this run has gone or does not answer (")
    assert "expected 2 processes to the end" in found["text"]
    assert "--resume" in found["text"]
    assert "\n" not in found["text"]
    checkpoints = list((said["folder"] / case / "run" / "checkpoints").glob("0*/state.json"))
    assert len(checkpoints) == (case.split(",")[0] in ("forward", "backward", "end of backward"))


@pytest.mark.parametrize("case", WRONG)
def test_a_fault_of_the_backward_pass_is_no_lost_process(said: dict[str, Any], case: str) -> None:
    assert said[case]["kind"] == "RuntimeError"
    assert "modified by an inplace operation" in said[case]["text"]
