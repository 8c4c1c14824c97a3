"""Several processes of a script beside this file, forked from one that has imported what takes long:

`group.py PROCESSES PORT SCRIPT FOLDER ...`, with the environment of torchrun. FOLDER/codes gets their exit codes as JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

IMPORTED_LATE = ("sklearn.datasets", "tensorboard.summary", "torch._dynamo", "torch.distributed.fsdp")
"""Which a training would import by itself, in every process."""


def fork(script: str, rank: int) -> int:
    """A process that calls the `main` of the script; gives its number."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        importlib.import_module(f"training.{script}").main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    processes, port, script, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.argv = [script, *sys.argv[4:]]
    for name in (*IMPORTED_LATE, f"training.{script}"):
        importlib.import_module(name)
    importlib.import_module("training.tiny").all_digits()  # as they are for every process
    gc.freeze()
    children = [fork(script, rank) for rank in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
