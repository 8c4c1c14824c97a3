"""The server under load: one viewer, whole batches through the API, many clients at once.

    python benchmarks/serve.py --run runs/demo [--clients 200] [--seconds 60] [--json FILE]

Starts `trigflow serve` in a process of its own and measures from this one, over loopback:

    viewer       frames a second of one stream that asks for the next frame when it has the last; latency percentiles
    throughput   images a second of requests for 64 images at two steps, over those of the same model called in a loop
    crowd        clients that ask for images as fast as they get them: statuses, latency percentiles, growth of memory
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from websockets.sync.client import connect

from trigflow.inference import fast
from trigflow.model import load
from trigflow.serve.wire import unpack

BATCH = 64


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds."""
    ordered = sorted(seconds)
    at = {
        name: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
    return {name: round(1000 * value, 2) for name, value in at.items()}


def post(connection: http.client.HTTPConnection, asked: dict[str, Any]) -> int:
    connection.request("POST", "/v1/images", json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def viewer(port: int, seconds: float) -> dict[str, Any]:
    """One stream at two steps, walking."""
    latencies: list[float] = []
    with connect(f"ws://127.0.0.1:{port}/v1/stream", compression=None) as stream:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begun, id = time.perf_counter(), len(latencies)
            asked = {"id": id, "walk": [0.01 * id, 0.0], "steps": 2, "taken": id - 1 if id else None}
            stream.send(json.dumps(asked))
            frame = stream.recv()
            assert isinstance(frame, bytes)
            assert unpack(frame)[0]["id"] == id
            latencies.append(time.perf_counter() - begun)
    return {"frames_per_second": round(len(latencies) / sum(latencies), 1), "latency_ms": percentiles(latencies)}


def throughput(port: int, run: Path, variant: str, rounds: int) -> dict[str, Any]:
    """Images a second through the API and in a loop, in turns."""
    model = fast(load(run, "cpu"), variant)
    model.sample(BATCH, steps=2)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    asked = {"count": BATCH, "steps": 2, "format": "npy"}
    post(connection, asked)
    ratios, loops = [], []
    for seed in range(rounds):
        begun = time.perf_counter()
        model.sample(BATCH, steps=2, seed=seed)
        between = time.perf_counter()
        assert post(connection, asked | {"seed": seed}) == 200
        loops.append(between - begun)
        ratios.append((between - begun) / (time.perf_counter() - between))
    return {
        "loop_images_per_second": round(BATCH / statistics.median(loops), 1),
        "api_over_loop": round(statistics.median(ratios), 3),
    }


def crowd(port: int, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask for one to four images, each again as soon as it has an answer; 429 means a short rest."""
    statuses: collections.Counter[int] = collections.Counter()
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        turn = 0
        while time.perf_counter() < end:
            begun = time.perf_counter()
            try:
                status = post(connection, {"seed": turn, "count": 1 + number % 4, "format": ("png", "npy")[number % 2]})
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            statuses[status] += 1
            latencies.append(time.perf_counter() - begun)
            turn += 1
            if status == 429:
                time.sleep(0.5)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    early = resident(pid)
    for thread in threads:
        thread.join()
    return {
        "clients": clients,
        "seconds": seconds,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "latency_ms": percentiles(latencies),
        "memory_over_first_quarter": round(resident(pid) / early, 3),
    }


def resident(pid: int) -> int:
    """Resident memory of a process in bytes (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description="The server under load.")
    parser.add_argument("--run", type=Path, required=True, help="run folder of a student")
    parser.add_argument("--variant", default="auto", help="as in trigflow serve")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="length of the crowd; the viewer watches for a sixth of it"
    )
    parser.add_argument("--rounds", type=int, default=30, help="of the throughput")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    command = [sys.executable, "-m", "trigflow", "serve", str(given.run), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    server = subprocess.Popen(
        [*command, "--variant", given.variant], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        port = int(line.split("http://127.0.0.1:")[1].split(",")[0])
        result = {
            "threads": given.threads,
            "variant": given.variant,
            "viewer": viewer(port, given.seconds / 6),
            "throughput": throughput(port, given.run, given.variant, given.rounds),
            "crowd": crowd(port, server.pid, given.clients, given.seconds),
        }
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    print(json.dumps(result, indent=2))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
