"""Processes that torchrun starts again find each other, not those before them."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

import programs

JOIN = """
import os
from trigflow.runtime.distributed import average, process_group
with process_group("cpu", timeout=60):
    mean = average({"rank": float(os.environ["RANK"])})["rank"]
print(mean, flush=True)
os._exit(0)  # as a process that is killed, it clears nothing up
"""


@pytest.mark.skipif(sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_second_attempt_does_not_see_the_first() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GROUP_WORLD_SIZE": "1"}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}  # the store is that of torchrun
    for attempt in ("0", "1"):
        processes = []
        for rank in ("0", "1"):
            environment = {**os.environ, **told, "TORCHELASTIC_RESTART_COUNT": attempt, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(programs.start(["-c", JOIN], environment=environment, stdout=subprocess.PIPE))
        try:
            said = [process.communicate(timeout=50)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert said == ["0.5\n", "0.5\n"], f"attempt {attempt}"
