"""What does the tangent cost? A consistency-training step with `trigflow.tangent.jvp` against three others.

    python benchmarks/tangent.py                                  # a quarter of an hour on two cores
    python benchmarks/tangent.py --cases unet-1m --repeats 15     # the case with the bars alone
    python benchmarks/tangent.py --quick --json /tmp/quick.json   # seconds: does everything run?

A step goes from inputs to gradients, without an optimizer, on a U-Net and a diffusion transformer of several sizes:

    plain      forward and backward of a diffusion step, no tangent
    separate   plain forward, the tangent by a torch.func.jvp of its own under no_grad, backward
    graph      torch.func.jvp with the graph, the tangent detached, backward
    engine     trigflow.tangent.jvp, backward

on the CPU, and on CUDA where there is one (larger networks too, under bfloat16 autocast). The engine is timed against each of
the others in turns, in three fresh processes a pair, because a step leaves a heap behind on which the next one runs, and no
training mixes them. Ratios are of medians over the rounds of a pair:

    step_ratio            engine / plain; 4/3 if backward takes twice a forward and the tangent one forward
    speedup_vs_separate   separate / engine
    speedup_vs_graph      graph / engine
    memory_ratio          added peak memory, engine / plain: resident memory on the CPU
    live_memory_ratio     the same without the holes of the heap (tangent_parts/memory.py says how); on CUDA both are tensors

On the CPU all of this runs as in `trigflow.training.Trainer`, with freed memory kept (`runtime.heap`); `--heap default` leaves
the allocator as it comes.

Also measured: what the engine adds to a forward where tensors have no size, over the plain step of the named case (an upper
bound on dispatch, see `dispatch_seconds`); how the memory of the chunked attention tangent grows with the sequence; and on
CUDA the attention kernel alone, against plain attention and, where it is installed, the package jvp-flash-attention.

Writes benchmarks/results/tangent.json: everything above with the raw seconds and bytes, and each bar with what was measured.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tangent_parts.attention import kernel_table, memory_by_length, time_kernel
from tangent_parts.memory import added_peak, added_peak_on_cuda, can_measure, in_fresh_process, map_large_blocks
from tangent_parts.networks import CASES, NAMED, TINY, Case
from tangent_parts.steps import Step, dispatch_seconds, leave_out_what_does_not_fit, relative_error, time_steps, try_variants

from trigflow.runtime.files import ensure_folder, write_json
from trigflow.runtime.heap import freed_memory_kept
from trigflow.runtime.machine import machine

LENGTHS = (1024, 2048, 4096, 8192)
KERNEL_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384)


def step_memory(name: str, quick: bool, variant: str, math_attention: bool, threads: int, heap: str) -> int:
    """Added peak bytes of a step on the CPU; for a fresh process."""
    live = heap == "live"
    if live:
        map_large_blocks()
    torch.set_num_threads(threads)
    case = (TINY if quick else CASES)[name]
    step, warm = Step(case, "cpu"), Step(case, "cpu", (1, *case.shape[1:]))
    warm.net = step.net
    step.math_attention = warm.math_attention = math_attention
    warm(variant)
    step.net.zero_grad(set_to_none=True)
    with freed_memory_kept() if heap == "kept" else nullcontext():
        return added_peak(partial(step, variant), times=1 if live else 2)


def measure_memory(step: Step, case: Case, variants: list[str], quick: bool, heap: str) -> dict[str, dict[str, int]]:
    """Added peak bytes by variant: `resident` and `live`. With `quick`, of the two that make the ratio."""
    variants = [v for v in variants if not quick or v in ("plain", "engine")]
    if step.cuda:
        peaks = {v: added_peak_on_cuda(partial(step, v)) for v in variants}
        return {v: {"resident": peak, "live": peak} for v, peak in peaks.items()}
    if not can_measure():
        return {}
    settings = step.math_attention, torch.get_num_threads()
    return {
        v: {
            kind: in_fresh_process(step_memory, case.name, quick, v, *settings, setting)
            for kind, setting in (("resident", heap), ("live", "live"))
        }
        for v in variants
    }


PROCESSES = 3
"""Fresh processes over which the rounds of a pair are spread on the CPU."""


def time_in_process(
    name: str, quick: bool, variants: list[str], repeats: int, math_attention: bool, threads: int, heap: str
) -> dict[str, list[float]]:
    """Seconds of every round; for a fresh process."""
    torch.set_num_threads(threads)
    step = Step((TINY if quick else CASES)[name], "cpu")
    step.math_attention = math_attention
    with freed_memory_kept() if heap == "kept" else nullcontext():
        return time_steps(step, variants, repeats)


def time_pair(step: Step, case: Case, variant: str, repeats: int, quick: bool, heap: str) -> dict[str, list[float]]:
    """Seconds of each round of a variant and of the engine, in turns."""
    pair = [variant, "engine"]
    if step.cuda:
        return time_steps(step, pair, repeats)
    settings = step.math_attention, torch.get_num_threads(), heap
    rounds: dict[str, list[float]] = {name: [] for name in pair}
    for i in range(PROCESSES):
        share = len(range(i, repeats, PROCESSES))
        if share:
            for name, values in in_fresh_process(time_in_process, case.name, quick, pair, share, *settings).items():
                rounds[name] += values
    return rounds


def measure_case(case: Case, device: str, repeats: int, quick: bool, heap: str) -> dict[str, Any]:
    """Everything about one network on one device. A variant that raises is left out; `messages` says why."""
    one = Step(case, device, (1, *case.shape[1:]))
    tangents, messages = try_variants(one)
    step = Step(case, device)
    step.math_attention = one.math_attention
    variants = leave_out_what_does_not_fit(step, messages)
    memory = measure_memory(step, case, variants, quick, heap)
    pairs = {v: time_pair(step, case, v, repeats, quick, heap) for v in variants if v != "engine" and "engine" in variants}
    medians = {v: {name: median(values) for name, values in rounds.items()} for v, rounds in pairs.items()}
    seconds = {v: medians[v][v] for v in pairs} | {"engine": medians["plain"]["engine"]} if "plain" in pairs else {}
    return {
        "case": case.name,
        "what": case.what,
        "device": device,
        "precision": "bfloat16 autocast" if step.half else "float32",
        "parameters": sum(p.numel() for p in step.net.parameters()),
        "repeats": repeats,
        "step_ratio": ratio(medians.get("plain", {}), "engine", "plain"),
        "memory_ratio": ratio({v: m["resident"] for v, m in memory.items()}, "engine", "plain"),
        "live_memory_ratio": ratio({v: m["live"] for v, m in memory.items()}, "engine", "plain"),
        "speedup_vs_separate": ratio(medians.get("separate", {}), "separate", "engine"),
        "speedup_vs_graph": ratio(medians.get("graph", {}), "graph", "engine"),
        "seconds": seconds,
        "pairs": pairs,
        "memory": memory,
        "tangent_error": {
            v: relative_error(tangents["engine"], t) for v, t in tangents.items() if v != "engine" and "engine" in tangents
        },
        "messages": messages,
    }


def ratio(values: dict[str, Any], above: str, below: str) -> float | None:
    """Their quotient, None where one of them was not measured."""
    return values[above] / values[below] if above in values and values.get(below) else None


def find_bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with what was measured; `met` is None where nothing was."""
    named: dict[str, Any] = next((c for c in result["cases"] if c["case"] == NAMED and c["device"] == "cpu"), {})
    kernel: dict[str, Any] = next((r["methods"] for r in result["attention_cuda"] if r["tokens"] == 4096), {})
    rival = ratio({n: m["seconds"] for n, m in kernel.items() if "seconds" in m}, "package", "kernel")
    bars: list[tuple[str, float | None, str, float]] = [
        (f"step_ratio, {NAMED}", named.get("step_ratio"), "<=", 1.45),
        (f"memory_ratio, {NAMED}", named.get("memory_ratio"), "<=", 1.25),
        (f"speedup_vs_separate, {NAMED}", named.get("speedup_vs_separate"), ">=", 1.7),
        (f"speedup_vs_graph, {NAMED}", named.get("speedup_vs_graph"), ">=", 1.3),
        (f"dispatch / plain step, {NAMED}", result["dispatch"]["share"], "<=", 0.05),
        ("growth of chunked attention's memory, tokens doubled", result["attention_memory"].get("growth"), "<=", 2.2),
        ("jvp-flash-attention / kernel, 4,096 tokens", rival, ">=", 1.2),
    ]
    return [
        {"what": what, "measured": value, "bar": f"{sign} {bar}",
         "met": None if value is None else value <= bar if sign == "<=" else value >= bar}
        for what, value, sign, bar in bars
    ]  # fmt: skip


def run(cases: list[Case], repeats: int, quick: bool, heap: str) -> dict[str, Any]:
    """Measure everything, printing as it comes."""
    threads, cuda = torch.get_num_threads(), torch.cuda.is_available()
    jobs = [(case, "cpu") for case in cases if not case.cuda] + [(case, "cuda") for case in cases if cuda]
    print(HEADER, flush=True)
    measured = []
    for case, device in jobs:
        measured.append(measure_case(case, device, repeats, quick, heap))
        print(line(measured[-1]), flush=True)
    dispatch = next((dispatch_seconds(case, 5 if quick else 30) for case in cases if case.name == NAMED), None)
    plain = next((c["seconds"]["plain"] for c in measured if c["case"] == NAMED and c["device"] == "cpu"), None)
    lengths = tuple(n // 16 for n in LENGTHS) if quick else LENGTHS
    kernel = [time_kernel(n, 2 if quick else 20) for n in KERNEL_LENGTHS[: 1 if quick else None]] if cuda else []
    result = {
        "machine": {**machine(), "threads": threads},
        "quick": quick,
        "heap": heap,
        "cases": measured,
        "dispatch": {"seconds": dispatch, "share": dispatch / plain if dispatch and plain else None},
        "attention_memory": memory_by_length(lengths, threads) if can_measure() else {},
        "attention_cuda": kernel,
    }
    return {**result, "bars": find_bars(result)}


HEADER = (
    f"{'':12}{'device':>8}{'parameters':>12}{'plain step':>12}{'step':>8}{'faster than':>14}{'faster than':>14}"
    f"{'memory':>9}{'live':>7}\n"
    f"{'':12}{'':>8}{'':>12}{'s':>12}{'ratio':>8}{'separate':>14}{'graph':>14}{'ratio':>9}{'ratio':>7}"
)


def line(case: dict[str, Any]) -> str:
    """A line of the table; messages below it."""

    def cell(key: str, width: int) -> str:
        return f"{'-' if case[key] is None else format(case[key], '.2f'):>{width}}"

    plain = case["seconds"].get("plain")
    text = f"{case['case']:12}{case['device']:>8}{case['parameters']:12,}{'-' if plain is None else format(plain, '.3f'):>12}"
    text += cell("step_ratio", 8) + cell("speedup_vs_separate", 14) + cell("speedup_vs_graph", 14)
    text += cell("memory_ratio", 9) + cell("live_memory_ratio", 7)
    return "\n".join([text, *[f"    {name}: {message[:110]}" for name, message in case["messages"].items()]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=None, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, help="rounds of each pair (9; 2 with --quick)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (PyTorch's default)")
    parser.add_argument("--heap", choices=["kept", "default"], default="kept", help="freed memory kept, or as it comes")
    parser.add_argument("--quick", action="store_true", help="minimal sizes, whose ratios mean nothing")
    parser.add_argument("--json", type=Path, help="result file (benchmarks/results/tangent.json; none with --quick)")
    args = parser.parse_args()
    if any(number is not None and number < 1 for number in (args.repeats, args.threads)):
        parser.error("--repeats and --threads must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    known = TINY if args.quick else CASES
    cases = [known[name] for name in args.cases or known if name in known]
    if not cases:
        parser.error(f"with --quick there are only {', '.join(TINY)}")
    out = args.json or (None if args.quick else Path(__file__).parent / "results" / "tangent.json")
    if out is not None:
        ensure_folder(out.parent)

    result = run(cases, args.repeats or (2 if args.quick else 9), args.quick, args.heap)
    if result["attention_cuda"]:
        print(f"\nattention alone on {result['machine']['device']}, bfloat16\n{kernel_table(result['attention_cuda'])}")
    print("\nminimal sizes: no bar is meant for them" if args.quick else "")
    for bar in result["bars"]:
        met = {None: "not measured", True: "met", False: "MISSED"}[bar["met"]]
        value = "-" if bar["measured"] is None else format(bar["measured"], ".3f")
        print(f"{met:12}  {bar['what']:54} {value:>8}  {bar['bar']}")
    if out is not None:
        write_json(out, {"command": " ".join(["python benchmarks/tangent.py", *sys.argv[1:]]), **result})


if __name__ == "__main__":
    main()
