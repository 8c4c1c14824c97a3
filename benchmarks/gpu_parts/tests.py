"""Tests of the suite on the device: those that need CUDA, and many that know nothing of it, with their numbers there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gpu_parts.record import Record

ROOT = Path(__file__).parents[2]
PLUGIN = Path(__file__).parent / "plugin"
GROUPS: dict[str, dict[str, Any]] = {
    "needs": {
        "what": "tests that need CUDA, and those beside them",
        "paths": ["tests/tangent/attention/test_triton.py", "tests/deploy/test_variants.py", "tests/deploy/test_bench.py"],
        "arguments": ["-k", "cuda or CUDA or graph"],
        "workers": 6,
    },
    "engine": {
        "what": "tests of the tangent engine and of the networks, their numbers on the device",
        "paths": [
            "tests/tangent/rules",
            "tests/tangent/test_attention.py",
            "tests/tangent/test_compositions.py",
            "tests/tangent/test_hooks.py",
            "tests/tangent/test_inplace.py",
            "tests/tangent/test_modules.py",
            "tests/tangent/test_operators.py",
            "tests/tangent/test_transformer.py",
            "tests/tangent/test_finite.py",
            "tests/networks/test_tangent.py",
        ],
        "plugin": "draw",
        "workers": 6,
    },
    "training": {
        "what": "tests of training, the tiny runs on the device",
        "paths": [
            "tests/training/test_resume.py",
            "tests/training/test_float16.py",
            "tests/training/test_vsd.py",
            "tests/training/test_muon.py",
            "tests/training/test_ema.py",
            "tests/training/test_trainer.py",
        ],
        "plugin": "train",
        "workers": 4,
    },
}
QUICK = {
    "needs": ["tests/deploy/test_variants.py"],
    "engine": ["tests/tangent/rules/test_norm.py"],
    "training": ["tests/training/test_ema.py"],
}
MESSAGES = 60
"""Failures of a group whose messages are kept."""


def run(record: Record, tiny: bool, name: str) -> None:
    """One group, in several processes; its own failures are figures, not failures of the part."""
    group = GROUPS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record.put("what", group["what"])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(PLUGIN), os.environ.get("PYTHONPATH", "")]),
        "TRIGFLOW_TEST_DEVICE": device,
        "TRIGFLOW_TEST_PARTS": group.get("plugin", ""),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", "--tb=short"]
        command += ["--durations=0", "--durations-min=5", *group.get("arguments", [])]
        command += ["-n", "0" if tiny else str(group["workers"]), "--dist", "worksteal"]
        command += ["-p", "on_cuda"] if "plugin" in group else []
        command += QUICK[name] if tiny else group["paths"]
        record.put("command", " ".join(["pytest", *[c for c in command[3:] if "junit" not in c]]))
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=max(5.0, record.left() - 2), check=False,
                capture_output=True, text=True,
            )  # fmt: skip
            record.put("exit_code", done.returncode)
            print(done.stdout[-60_000:], done.stderr[-5_000:], sep="\n")
        if not report.is_file():
            record.add("failures", {"what": name, "error": "no report: the time was over, or pytest did not start"})
            return
        for key, value in read(report).items():
            record.put(key, value)


def read(report: Path) -> dict[str, Any]:
    """Counts, and what failed with the last line of its error."""
    outcomes: Counter[str] = Counter()
    failed = []
    for case in ET.parse(report).getroot().iter("testcase"):
        kind = next((k for k in ("failure", "error", "skipped") if case.find(k) is not None), "passed")
        outcomes[kind] += 1
        if kind in ("failure", "error"):
            found = case.find(kind)
            text = (found.text or "") if found is not None else ""
            lines = [line[1:].strip() for line in text.splitlines() if re.match(r"E\s", line)]
            message = next(iter(lines), (found.get("message") or "") if found is not None else "")
            failed.append({"test": f"{case.get('classname')}::{case.get('name')}", "error": message[:300]})
    return {
        "outcomes": dict(outcomes),
        "failed": failed[:MESSAGES],
        "kinds_of_errors": Counter(re.sub(r"[\d.e+-]+", "#", f["error"])[:100] for f in failed).most_common(12),
    }


def summary(name: str, part: dict[str, Any]) -> str:
    """One line."""
    found = part.get("outcomes")
    if found is None:
        return f"tests, {name}: {part.get('failures', 'no report')}"
    return f"tests, {name}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
