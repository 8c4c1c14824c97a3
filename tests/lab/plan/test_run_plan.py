"""`trigflow plan`: figures that add up, and one line for a run that does not fit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from trigflow.lab.plan import GPUS, RunPlan, make_plan
from trigflow.runtime.errors import UserError

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def digits() -> RunPlan:
    return make_plan("digits-scd", gpus=4, gpu="l4", utilization=0.5)


def test_figures_add_up(digits: RunPlan) -> None:
    assert (digits.batch, digits.iterations, digits.gpus, digits.batch_gpu, digits.accumulate) == (48, 3600, 4, 12, 1)
    assert (digits.kind, digits.network, digits.precision, digits.sample) == ("scd", "unet", "fp32", (1, 8, 8))
    work = digits.sample_gflops
    assert work["teacher"] == pytest.approx(digits.forward_gflops)  # no guidance
    assert work["total"] == pytest.approx(work["teacher"] + work["student"])
    assert work["total_separate_jvp"] == pytest.approx(work["total"] + digits.forward_gflops)
    assert digits.tflops_per_iteration["engine"] == pytest.approx(48 * work["total"] / 1000)
    seconds = 3600 * 48 * work["total"] * 1e9 / (4 * 30.3e12 * 0.5)
    assert digits.hours["engine"] == pytest.approx(seconds / 3600)
    assert digits.hours["separate_jvp"] / digits.hours["engine"] == pytest.approx(work["total_separate_jvp"] / work["total"])
    assert digits.memory_gib["available"] == pytest.approx(0.9 * GPUS["l4"].memory)
    for way in ("ddp", "fsdp2"):
        parts = dict(digits.memory_gib[way])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert digits.memory_gib["ddp"]["weights"] == pytest.approx(4 * digits.parameters["student"] / 2**30)


def test_a_teacher_has_no_tangent() -> None:
    plan = make_plan("digits-teacher", gpus=1)
    assert plan.sample_gflops["teacher"] == 0
    assert plan.hours["engine"] == plan.hours["separate_jvp"]
    assert set(plan.parameters) == {"student"}


def test_more_gpus_take_less_time(digits: RunPlan) -> None:
    twice = make_plan("digits-scd", gpus=8, gpu="l4", utilization=0.5)
    assert twice.hours["engine"] == pytest.approx(digits.hours["engine"] / 2)
    assert twice.batch_gpu == 6


def test_samples_that_fit() -> None:
    """The batch of a GPU is taken in parts when it does not fit at once."""
    whole = make_plan("digits-scd", gpus=1)
    assert (whole.batch_gpu, whole.accumulate) == (48, 1)
    need = whole.memory_gib["ddp"]
    states = need["total"] - need["activations"]
    tight = make_plan("digits-scd", gpus=1, memory_gib=(states + need["activations"] / 3) / 0.9)
    assert tight.batch_gpu * tight.accumulate == 48
    assert 8 <= tight.batch_gpu <= 16
    assert tight.memory_gib["ddp"]["total"] <= tight.memory_gib["available"]
    assert tight.largest_batch_gpu["ddp"] >= tight.batch_gpu
    assert tight.hours == whole.hours


def test_the_command(cli: Cli) -> None:
    printed = cli("plan", "digits-scd", "--gpus", 4, "--gpu", "l4", "--utilization", 0.5, "--json")
    assert printed.code == 0, printed.err
    found = json.loads(printed.out)
    assert found == make_plan("digits-scd", gpus=4, gpu="l4", utilization=0.5).as_dict()
    text = cli("plan", "digits-scd", "--gpus", 4, "--gpu", "l4", "--batch-gpu", 6, "--parallel", "fsdp2").out
    assert text.startswith("digits-scd: scd, unet on samples of 1 x 8 x 8, fp32\nbatch 48, 3,600 iterations\n")
    assert "4 x NVIDIA L4 24GB, fsdp2: 2 x 6 samples each an iteration" in text
    assert "hours at 40% of 30.3 TFLOP/s" in text


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["nope"], ["unknown recipe 'nope'"]),
        (["digits-scd", "--gpu", "tpu"], ["unknown GPU 'tpu'", "h100"]),
        (["digits-scd", "--gpus", "5"], ["--gpus is 5", "divisor of the batch of 48"]),
        (["digits-scd", "--gpus", "0"], ["--gpus is 0"]),
        (["digits-scd", "--batch-gpu", "5"], ["--batch-gpu is 5", "divisor of 48"]),
        (["digits-scd", "--utilization", "1.5"], ["--utilization is 1.5"]),
        (["digits-scd", "--memory", "0"], ["--memory is 0"]),
    ],
)
def test_refusals(args: list[str], parts: list[str], cli: Cli) -> None:
    result = cli("plan", *args)
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize(
    "args",
    [
        ["--gpus", "1", "--batch-gpu", "48", "--memory", "0.016"],
        ["--gpus", "8", "--memory", "0.008"],
        ["--gpus", "2", "--memory", "0.008"],
        ["--gpus", "2", "--batch-gpu", "24", "--memory", "0.0075"],
    ],
)
def test_what_is_advised_fits(args: list[str], cli: Cli) -> None:
    """A run that does not fit: one line, exit code 2, and the options it names do fit."""
    result = cli("plan", "digits-scd", *args)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert re.search(r"needs [\d.]+ GiB a GPU .* expected at most [\d.]+ GiB", result.err)
    advice = shlex.split(result.err.strip().rsplit("; use ", 1)[1])
    kept = [word for i in range(0, len(args), 2) if args[i] not in advice for word in args[i : i + 2]]
    again = cli("plan", "digits-scd", *kept, *advice)
    assert again.code == 0, again.err


def test_what_never_fits() -> None:
    with pytest.raises(UserError, match="use a GPU with more memory"):
        make_plan("digits-scd", memory_gib=1e-4)
    with pytest.raises(UserError, match="use a GPU with more memory"):
        make_plan("digits-scd", gpus=48, memory_gib=1e-4, parallel="fsdp2")
