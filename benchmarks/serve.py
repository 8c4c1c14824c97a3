"""The server under load: does it keep up with a hand, with the network itself, and with a crowd?

    python benchmarks/serve.py runs/demo                 # the run of trigflow demo; about two minutes
    python benchmarks/serve.py runs/demo --seconds 10    # shorter

Starts `trigflow serve RUN` in a process of its own, measures over loopback from this one, and writes
benchmarks/results/serve.json: figures, and each bar with what was measured.

    viewer      one stream at two steps that asks for the next place on the walk as soon as it has the last frame
    throughput  requests for 64 images at two steps, two at a time, in turns with two loops in this process: over the two
                evaluations of the network alone, and over `Model.sample`, noise to bytes; both with the variant of the server
                and a thread for each core
    crowd       clients of all kinds (tests/serve/crowd.py), also slow, mute and malicious ones; memory is that of the server's
                process (resident, Linux) after the first sixth of the time, against the most of the rest

That a pipeline from a folder draws the same bits in a fresh process is a test: tests/deploy/test_pipeline_files.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from websockets.sync.client import connect

from trigflow.deploy import Engine
from trigflow.models.model import Model, load
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine
from trigflow.serve.limits import Limits
from trigflow.serve.wire import unpack

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serve"))
from crowd import Tally, crowd

BATCH, STEPS = 64, 2
LIMITS = Limits()


@contextlib.contextmanager
def server(run: Path, variant: str, *options: str) -> Iterator[tuple[int, int]]:
    """`trigflow serve` on the CPU in a process of its own; its port and process id."""
    command = [sys.executable, "-m", "trigflow", "serve", str(run), "--port", "0", "--device", "cpu"]
    command += ["--variant", variant, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line.strip()}")
        yield int(found[1]), process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile."""
    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99)}


# A viewer ------------------------------------------------------------------------------------------------------------


def viewer(port: int, seconds: float) -> dict[str, Any]:
    """Frames a second of one walking stream, and the milliseconds from a request to its frame."""
    latencies: list[float] = []
    with connect(f"ws://127.0.0.1:{port}/v1/stream", compression=None) as stream:

        def next_frame(id: int) -> float:
            begun = time.perf_counter()
            asked = {"id": id, "walk": [0.01 * id, 0.0], "steps": STEPS, "taken": id - 1 if id else None}
            stream.send(json.dumps(asked))
            header, _ = unpack(stream.recv(decode=False))
            assert header["id"] == id
            return time.perf_counter() - begun

        for id in range(20):
            next_frame(id)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            latencies.append(next_frame(20 + len(latencies)))
    per_second = len(latencies) / sum(latencies)
    return {"frames_per_second": round(per_second, 1), "latency_ms": percentiles([1000 * s for s in latencies])}


# Throughput ----------------------------------------------------------------------------------------------------------


def network_alone(model: Model) -> Callable[[int], None]:
    """Two evaluations of the network for 64 images, and nothing else."""
    x = model.noise(0, 0, 0, BATCH) / model.process.sigma_data
    told = {"label": torch.arange(BATCH) % model.num_classes} if model.num_classes else {}
    told |= {"guidance": torch.ones(BATCH)} if "guidance" in model.takes else {}
    times = [torch.full((BATCH,), t) for t in model.times.get(STEPS, (1.57, 1.1))]

    @torch.inference_mode()
    def evaluate(seed: int) -> None:
        for t in times:
            model.network(x, t, **told)

    return evaluate


def sampling(model: Model) -> Callable[[int], None]:
    """`Model.sample` of 64 images at two steps."""
    return lambda seed: void(model.sample(BATCH, steps=STEPS, seed=seed))


def through_the_api(port: int) -> Callable[[int], None]:
    """`POST /v1/images` for 64 images at two steps, as pixels."""
    own = threading.local()

    def ask(seed: int) -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port)
        asked = json.dumps({"seed": seed, "count": BATCH, "steps": STEPS, "format": "npy"})
        own.connection.request("POST", "/v1/images", asked, {"Content-Type": "application/json"})
        answer = own.connection.getresponse()
        assert (answer.status, len(answer.read()) > 0) == (200, True)

    return ask


def void(value: object) -> None:
    """Nothing, in the place of the value."""


def throughput(port: int, run: Path, variant: str, seconds: float) -> dict[str, Any]:
    """Images a second of the three, in turns of eight batches, and the median ratio of neighbouring turns."""
    engine = Engine(load(run, "cpu"), steps=STEPS, variant=variant)
    engine.settle(BATCH)
    works = {"network": network_alone(engine.model), "sample": sampling(engine.model), "api": through_the_api(port)}
    rates: dict[str, list[float]] = {name: [] for name in works}
    turn, end = 0, time.perf_counter() + seconds
    with ThreadPoolExecutor(2) as two:
        while turn < 4 or time.perf_counter() < end:
            for name, work in works.items():
                seeds = range(8 * turn, 8 * turn + 8)
                begun = time.perf_counter()
                list(two.map(work, seeds)) if name == "api" else [work(seed) for seed in seeds]
                if turn:  # the first warms up
                    rates[name].append(8 * BATCH / (time.perf_counter() - begun))
            turn += 1
    ratios = {
        f"api_over_{name}": round(statistics.median(a / b for a, b in zip(rates["api"], rates[name], strict=True)), 3)
        for name in ("network", "sample")
    }
    return {f"{name}_images_per_second": round(statistics.median(found)) for name, found in rates.items()} | ratios


# A crowd -------------------------------------------------------------------------------------------------------------


def crowded(port: int, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """What the crowd saw, and the memory of the server meanwhile."""
    memory: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        begun = time.monotonic()
        while not over.wait(0.25):
            memory.append((time.monotonic() - begun, resident(pid)))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        tally: Tally = asyncio.run(crowd(port, clients, seconds))
    finally:
        over.set()
        watching.join()
    warm = seconds / 6
    before = max(size for at, size in memory if at <= warm)
    after = max(size for at, size in memory if at > warm)
    refused_by_server = server_errors(port)
    return {
        "clients": clients,
        "seconds": seconds,
        "images": tally.images,
        "frames": tally.frames,
        "outcomes": {f"{kind} {outcome}": n for (kind, outcome), n in sorted(tally.outcomes.items(), key=str)},
        "server_errors": refused_by_server,
        "queue_ms": percentiles(tally.queue),
        "warmup_seconds": round(warm, 1),
        "memory_mb": {"at_the_end_of_the_warmup": before >> 20, "most_after_it": after >> 20},
        "memory_growth": round(after / before - 1, 4),
    }


def server_errors(port: int) -> int:
    """Answers with 5xx and streams closed with 1011, as the server counts them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    counted = re.findall(r'trigflow_requests_total\{.*status="5\d\d"\} (\S+)|closed_total\{code="1011"\} (\S+)', text)
    return sum(int(float(a or b)) for a, b in counted)


def resident(pid: int) -> int:
    """Resident memory of a process in bytes (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Bars ----------------------------------------------------------------------------------------------------------------


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with what was measured."""
    held = [
        ("frames a second to one viewer at two steps", result["viewer"]["frames_per_second"], ">=", 30.0),
        ("ms from a request to its frame, p95", result["viewer"]["latency_ms"]["p95"], "<=", 50.0),
        ("throughput through the API / the network alone", result["throughput"]["api_over_network"], ">=", 0.8),
        ("server errors in the crowd", result["crowd"]["server_errors"], "<=", 0),
        ("growth of memory after the warmup", result["crowd"]["memory_growth"], "<=", 0.05),
        ("ms in the queue, p99", result["crowd"]["queue_ms"]["p99"], "<=", 1000 * LIMITS.queue_seconds),
    ]
    return [
        {"what": what, "measured": value, "bar": f"{sign} {bar}", "met": value <= bar if sign == "<=" else value >= bar}
        for what, value, sign, bar in held
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), help="run folder of a student")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the crowd; the others take a third of it each")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--variant", default="auto", help="as in trigflow serve")
    parser.add_argument("--workers", type=int, help="as in trigflow serve")
    parser.add_argument("--threads", type=int, help="as in trigflow serve")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    args = parser.parse_args()
    if not (args.run / "model.json").is_file():
        raise SystemExit(f"'{args.run}' is no run; make one with: trigflow demo --out {shlex.quote(str(args.run))}")
    chosen = {name: getattr(args, name) for name in ("workers", "threads")}
    options = [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]
    with server(args.run, args.variant, *options) as (port, pid):
        result: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
            "machine": machine(),
            "variant": args.variant,
            "options": options,
            "viewer": viewer(port, args.seconds / 3),
            "throughput": throughput(port, args.run, args.variant, args.seconds / 3),
            "crowd": crowded(port, pid, args.clients, args.seconds),
        }
    result["bars"] = bars(result)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    print(json.dumps({name: result[name] for name in ("viewer", "throughput", "crowd")}, indent=2))
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:47} {bar['measured']:10.3f}  {bar['bar']}")


if __name__ == "__main__":
    main()
