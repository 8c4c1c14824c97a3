"""The tables of docs/scale.md are those of the committed counts, which are what `trigflow plan` says."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import load_script
from trigflow.lab.plan.run_plan import make_plan
from trigflow.lab.plan.step import Step, count_run
from trigflow.runtime.files import read_json


@pytest.fixture(scope="module")
def fits() -> ModuleType:
    return load_script("fits")


@pytest.fixture(scope="module")
def counted() -> Step:
    """Its teacher is not guided: one evaluation, as large as the student."""
    return count_run("cifar10-scd")


def test_the_page_has_the_committed_tables(fits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["fits.py", "--check"])
    fits.main()
    other = tmp_path / "scale.md"
    other.write_text(fits.PAGE.read_text(encoding="utf-8").replace(" GiB |", " GB |", 1), encoding="utf-8")
    monkeypatch.setattr(fits, "PAGE", other)
    with pytest.raises(SystemExit, match=r"run: python benchmarks/fits\.py"):
        fits.main()


def test_counts_are_those_of_plan(fits: ModuleType, counted: Step) -> None:
    plan = make_plan("cifar10-scd", gpus=fits.MACHINE, gpu="rtx4090")
    assert fits.fits(counted, sharded=False)["rtx4090"] == plan.largest_batch_gpu["ddp"]
    assert fits.fits(counted, sharded=True)["rtx4090"] == plan.largest_batch_gpu["fsdp2"]
    committed = next(run for run in read_json(fits.JSON, "result")["runs"] if run["recipe"] == "cifar10-scd")
    assert committed["parameters"] == plan.parameters["student"]
    assert math.isclose(committed["sample_gflops"], plan.sample_gflops["total"], rel_tol=1e-6)
    assert committed["ddp"]["rtx4090"] == plan.largest_batch_gpu["ddp"]


def test_traffic(fits: ModuleType, counted: Step) -> None:
    assert counted.teacher is not None
    sent = fits.traffic(counted)
    whole = 4 * 7 / 8 / 2**30
    assert math.isclose(sent["ddp"], 2 * counted.student.parameters * whole)
    assert math.isclose(sent["fsdp"], (3 * counted.student.parameters + counted.teacher.parameters) * whole)
