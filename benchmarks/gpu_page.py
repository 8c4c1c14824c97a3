"""Tables of docs/gpu.md, from benchmarks/results/gpu-*.json: `python benchmarks/gpu_page.py`, or `--check` to compare only."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def parts_of(result: dict[str, Any]) -> dict[str, Any]:
    """The parts of all runs; of one that ran twice, the later."""
    return {name: part for run in result["runs"] for name, part in run["parts"].items()}


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def steps(parts: dict[str, Any]) -> str:
    """Milliseconds of a step, over a plain step, and the memory that it adds over a plain one."""
    rows = []
    for name, part in parts.items():
        for case in part.get("cases", []) if name.startswith("steps") else []:
            for variant, seconds in case.get("seconds", {}).items():
                over, memory = (case.get(key) or {} for key in ("over_plain", "memory_over_plain"))
                rows.append(
                    [case["what"], case["precision"], variant, f"{seconds * 1e3:.0f}",
                     number(over.get(variant)), number(memory.get(variant))]
                )  # fmt: skip
    return table(["network", "precision", "step", "ms", "over plain", "memory over plain"], rows)


def attention(part: dict[str, Any]) -> str:
    """Throughput of attention, tangents included where there are any."""
    rows = [
        [f"{shape['batch']} x {shape['heads']} x {shape['tokens']} x {shape['width']}", name,
         f"{found['seconds'] * 1e3:.2f}", f"{found['tflops']:.0f}", number(found.get("of_flash_forward"))]
        for shape in part["shapes"]
        for name, found in shape["methods"].items()
        if "seconds" in found
    ]  # fmt: skip
    return table(["batch, heads, tokens, width", "method", "ms", "TFLOP/s", "of flash forward"], rows)


def drawing(part: dict[str, Any]) -> str:
    """Two steps of the 1.5B network at batch 1, without a decoder."""
    rows = [
        [f"loop, {name}", f"{found['student']['seconds'] * 1e3:.1f}"]
        for name, found in part["sampling"]["variants"].items()
        if "seconds" in found.get("student", {})
    ]
    rows += [[f"engine, {found['variant']}", f"{found['seconds'] * 1e3:.1f}"] for found in part.get("engine", [])]
    return table(["two steps, EDM2-XXL, batch 1", "ms"], rows)


def checks(parts: dict[str, Any]) -> str:
    """What was compared, and what came of it."""
    cases = [case for name, part in parts.items() if name.startswith("kernels") for case in part.get("cases", [])]
    left = sum(len(part.get("left_out", [])) for name, part in parts.items() if name.startswith("kernels"))
    within = sum(case["within"] for case in cases)
    rows = [["Triton kernels against float64", f"{within} of {len(cases)} within bounds; {left} not reached in the time"]]
    kinds = parts["resume"].get("kinds", [])
    equal = sum(kind["differ_resumed"] == kind["differ_repeated"] == 0 for kind in kinds)
    rows.append(["interrupted and resumed runs equal whole ones, bit for bit", f"{equal} of {len(kinds)} kinds"])
    sharded = parts["sharding"]
    worst = max(case["gradients"] for case in sharded["cases"] if case["dtype"] == "fp32")
    rows.append(["FSDP2 on one rank against none, fp32", f"gradients within {worst:.1e}"])
    for name, part in parts.items():
        if name.startswith("tests"):
            outcomes = ", ".join(f"{count} {what}" for what, count in part.get("outcomes", {}).items())
            rows.append([part.get("what", name), outcomes])
        if name.startswith("compiled"):
            took = ", ".join(f"{what} {s:.0f} s" for what, s in part.get("preparation_seconds", {}).items())
            rows.append([name, f"{took}; {part.get('ended', part.get('stage'))}"])
        if name == "compile-check":
            found = part.get("networks", [])
            rows.append(
                ["compiled consistency steps against eager ones", f"{sum(r['equal'] for r in found)} of {len(found)} equal"]
            )
        if name == "networks":
            for case in part.get("cases", []):
                error = case.get("float64", {}).get("tangent against torch.func.jvp")
                rows.append([f"tangent of {case['network']}, float64", f"within {error:.1e} of torch.func.jvp"])
    return table(["check", "result"], rows)


def demo(report: dict[str, Any]) -> str:
    """The demo of the digits on the card."""
    names = (("teacher", "teacher"), ("student_1", "student, 1 step"), ("student_2", "student, 2 steps"))
    rows = [
        [text, str(report["nfe"][key]), f"{report['fd'][key]:.2f}", f"{report['precision'][key]:.2f}",
         f"{report['recall'][key]:.2f}", f"{report['samples_per_second'][key]:,.0f}"]
        for key, text in names
    ]  # fmt: skip
    return table(["digits, seed 0", "evaluations", "Frechet distance", "precision", "recall", "images / s"], rows)


def tables(result: dict[str, Any]) -> str:
    """All of one card."""
    parts, machine = parts_of(result), result["runs"][0]["environment"]
    about = f"{machine['device']}, PyTorch {machine['torch']}, driver {machine['driver']}, Triton {machine['triton']}"
    sections = {
        f"## {machine['device']}": f"{about}. {result['about']}",
        "### Checks": checks(parts),
        "### Steps": steps(parts),
        "### Attention": attention(parts["attention"]),
        "### Drawing": drawing(parts["drawing"]),
        "### A training": demo(result["demo"]),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())


def main() -> None:
    """Rewrite the page, or say that it is not up to date (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    files = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    made = "\n\n".join(tables(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    old = PAGE.read_text(encoding="utf-8")
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{made}\n\n{END}", old, flags=re.DOTALL)
    if check:
        sys.exit(new != old)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
