"""One of the processes of test_distributed.py, see `group.py`; its arguments are FOLDER STEPS PORTS.

STEPS is JSON: names of runs, their cases and changes to these; see `distributed_cases`. Run folders are below FOLDER. With more
than one port, commands are run too, and at last a process is lost; what was said is in FOLDER/said-RANK.json.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from training.distributed_cases import make_trainer, run_case
from trigflow import cli
from trigflow.runtime.distributed import is_first, process_group, rank, world_size
from trigflow.runtime.errors import UserError


def commands(folder: Path, ports: list[int]) -> None:
    """The command line in a process that torchrun has started, each time with a port of its own."""

    def run(*words: object) -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())
        cli.main([str(word) for word in words])

    network = ["--network.width", "8", "--network.blocks", "1", "--network.conditioning.width", "8"]
    loop = ["--iterations", "3", "--batch-size", "8", "--loop.device", "cpu", "--quiet"]
    run("train", "--out", folder / "run", *network, *loop)
    run("distill", folder / "run", "--out", folder / "student", *loop, "--parallel.mode", "fsdp")
    for name in ("run", "student"):
        run("sample", folder / name, "--num", 7, "--out", folder / f"{name}.png", "--device", "cpu", "--quiet")


def told_to_one(folder: Path) -> tuple[int, str]:
    """Exit code and errors of a command that takes one process."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as leave:
        cli.main(["info", str(folder)])
    return int(leave.value.code or 0), errors.getvalue()


def refusals(folder: Path) -> dict[str, str]:
    """What is said of runs that cannot be."""
    said = {}
    for name, changes in {
        "uneven": {"loop.batch_size": 8, "loop.accumulate": 8},
        "shards": {"parallel.mode": "fsdp", "parallel.shards": 3},
        "instruments": {"parallel.mode": "fsdp", "loop.instruments": True},
        "taken": {},
    }.items():
        if name == "taken" and is_first():
            (folder / "taken").mkdir()
            (folder / "taken" / "config.json").write_text("{}")
        try:
            make_trainer("teacher", folder / name, changes)
        except UserError as error:
            said[name] = str(error)
    return said


def lost(folder: Path, said: dict[str, Any]) -> str:
    """What the first process says when the second is gone."""
    try:
        with process_group("cpu", timeout=400):
            trainer = make_trainer("teacher", folder / "lost", {})
            trainer.step()
            if rank():
                (folder / "said-1.json").write_text(json.dumps(said))
                os._exit(9)
            began = time.monotonic()
            trainer.step()
    except UserError as error:
        return f"{error} ({time.monotonic() - began:.0f} s)"
    return ""


def main() -> None:
    folder, steps, ports = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    faulthandler.dump_traceback_later(480, exit=True)  # a process that waits for ever says where
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    os.environ["MASTER_PORT"] = str(ports.pop())
    with process_group("cpu", timeout=400):
        for name, case, changes in steps:
            began = time.perf_counter()
            run_case(case, folder / name, changes)
            if is_first():
                print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        if world_size() == 2:
            said["refusals"] = refusals(folder)
    if ports:
        commands(folder, ports)
        said["info"] = told_to_one(folder)
        os.environ["MASTER_PORT"] = str(ports.pop())
        said["lost"] = lost(folder, said)
        (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))
