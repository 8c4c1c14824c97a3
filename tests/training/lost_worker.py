"""One of the two processes of test_lost_partner.py, see `group.py`; its arguments are FOLDER CASES.

CASES is JSON: names of cases, and for each where the second process leaves, how, how the weights are laid out, and a port. What
the first process ends with is in FOLDER/NAME.json. A case begins when that before it has ended, or has nothing
to do but wait: the second process, before it is stopped, leaves FOLDER/NAME/left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.distributed_cases import make_trainer
from trigflow.runtime.distributed import average, gather, gather_rows, process_group, rank
from trigflow.training.trainer import Trainer


def spoil(value: Tensor) -> Tensor:
    """The same, of which the backward pass finds out, in C++, that what it needs has been changed."""
    kept = value * 1.0
    result = kept.square()
    kept.detach().add_(1)
    return result


def prepare(trainer: Trainer, where: str, leave: Callable[[], Any]) -> None:
    """Have `leave` called at this place of the next step."""
    network: nn.Module = trainer.network
    parameters = [p for p in network.parameters() if p.requires_grad]
    if where == "forward":
        network.register_forward_pre_hook(lambda *_: leave())
    elif where == "backward":
        parameters[0].register_hook(lambda _: leave())
    elif where == "end of backward":
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda _: leave())


def case(folder: Path, where: str, how: str, mode: str) -> None:
    def leave() -> None:
        if rank() == 1:
            (folder / "left").touch()
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    with process_group("cpu", timeout=6):
        talks = {
            "gather": lambda: gather("x" * 100),
            "average": lambda: average({"a": 1.0}),
            "rows": lambda: gather_rows(torch.zeros(3, 2)),
        }
        if where in talks:
            talks[where]()
            leave()
            talks[where]()
            talks[where]()
            return
        trainer = make_trainer("teacher", folder / "run", {"parallel.mode": mode})
        trainer.step()
        trainer.save_checkpoint()
        if how == "wrong":
            losses: Any = type(trainer.losses)
            differentiate = losses._differentiate
            losses._differentiate = lambda self, value: differentiate(self, spoil(value))
        else:
            prepare(trainer, where, leave)
        for _ in range(3):
            trainer.step()


def child(folder: Path, where: str, how: str, mode: str, said: Path) -> None:
    began = time.monotonic()
    try:
        case(folder, where, how, mode)
        found: dict[str, Any] = {"kind": "", "text": ""}
    except BaseException as error:
        found = {"kind": type(error).__name__, "text": str(error)}
    if os.environ["RANK"] == "0":
        found["seconds"] = time.monotonic() - began
        said.with_suffix(".part").write_text(json.dumps(found))
        said.with_suffix(".part").rename(said)


def main() -> None:
    root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    running: dict[int, Path] = {}
    for name, (where, how, mode, port) in cases.items():
        said, left = root / f"{name}.json", root / name / "left"
        pid = os.fork()
        if pid == 0:
            os.environ["MASTER_PORT"] = str(port)
            (root / name).mkdir(exist_ok=True)
            child(root / name, where, how, mode, said)
            sys.stdout.flush()
            os._exit(0)
        running[pid] = said
        wait_for(lambda said=said, left=left, how=how: said.exists() or (how == "stopped" and left.exists()))  # type: ignore[misc]
    for pid, said in running.items():
        wait_for(said.exists)
        if os.environ["RANK"] == "1" or not said.exists():
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
