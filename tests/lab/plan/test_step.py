"""Counting training steps: sizes, operations and activations of whole runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import programs
from trigflow.lab.plan import Memory, Step, memory
from trigflow.lab.plan.trace import COUNTED
from trigflow.lab.recipes import NamedRun, get_run
from trigflow.objectives import AdaptiveWeight

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def narrow(name: str, shape: tuple[int, int, int], classes: int = 10, **network: Any) -> NamedRun:
    """A recipe on smaller samples and with other settings of its network."""
    run = get_run(name)
    changed = dataclasses.replace(run.config.network, **network)
    return NamedRun(name, dataclasses.replace(run.config, network=changed), shape, classes)


def small_edm2(role: str) -> NamedRun:
    return narrow(f"img512-s-{role}", (4, 16, 16), width=32, mult=(1, 2), blocks=1, head_width=32)


@pytest.fixture(scope="module")
def scd() -> Step:
    return Step(small_edm2("scd"))


def attention_of(run: NamedRun) -> int:
    """Operations of the attention in one evaluation on one sample: two products."""
    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with mock.patch.dict(COUNTED, {packet: COUNTED[packet]}, clear=True):
        return Step(run).forward


def test_operations_of_distillation(scd: Step) -> None:
    """Teacher with guidance: two forwards. Student: forward, tangent of a forward and backward of two; of attention, with two
    products in the forward, five in each."""
    step, forward = scd.many, scd.forward
    assert step.teacher == pytest.approx(2 * step.batch * forward, rel=1e-3)  # the student's has a guidance input beside
    expected = 4 * forward + 2 * attention_of(small_edm2("scd"))
    assert (step.total - step.teacher) / step.batch == pytest.approx(expected, rel=0.02)


def test_activations_are_a_straight_line(scd: Step) -> None:
    line, other = memory(scd, "ddp", 1), Step(small_edm2("scd")).count(16)
    assert line.fixed + 16 * line.per_sample == pytest.approx(other.activations, rel=0.05)
    assert 2 * scd.student.parameters < line.fixed < 6 * scd.student.parameters  # normalized weights, in half precision


def test_operations_of_a_teacher_and_of_sct() -> None:
    teacher = Step(small_edm2("teacher"))
    forward, count = teacher.forward, teacher.count(4)
    assert (count.teacher, teacher.teacher, teacher.fake) == (0, None, None)
    assert count.total / 4 == pytest.approx(3 * forward, rel=0.05)
    sct = Step(small_edm2("sct")).count(4)
    assert sct.teacher == 0
    assert sct.total / 4 == pytest.approx(4 * forward + 2 * attention_of(small_edm2("sct")), rel=0.02)


def test_operations_of_scd_with_vsd() -> None:
    """Beside scd: generator and its backward, teacher and fake score of the noised sample, and a step of the fake score."""
    step = Step(small_edm2("scd-vsd"))
    forward, count = step.forward, step.count(4)
    assert step.fake is not None
    assert step.fake.moments == 2 * step.fake.parameters
    assert count.teacher == pytest.approx(2 * 2 * 4 * forward, rel=1e-3)
    assert (count.total - count.teacher) / 4 == pytest.approx((4 + 3 + 1 + 3) * forward, rel=0.05)


def test_checkpointing_takes_a_forward_for_memory() -> None:
    run = narrow("dit-b-sct", (4, 16, 16), width=64, depth=4, heads=2)
    step = Step(run)
    plain, again = step.count(16), Step(run, checkpointing=True).count(16)
    assert again.total - plain.total == pytest.approx(16 * step.forward, rel=0.1)
    assert again.activations < plain.activations / 2


def test_precision_and_target() -> None:
    run = narrow("dit-b-sct", (4, 16, 16), width=64, depth=2, heads=2)
    half, full = Step(run).count(16), Step(run, precision="fp32").count(16)
    assert half.total == full.total
    assert half.activations < full.activations
    scaled = Step(run, precision="fp16").count(16)  # of the loss too, which is a little more
    assert scaled.total == pytest.approx(half.total, rel=1e-6)
    assert scaled.activations == pytest.approx(half.activations, rel=0.01)
    on_cpu = Step(run, target="cpu").count(256)
    assert on_cpu.activations < Step(run).count(256).activations  # which keeps layer norms in float32


@pytest.mark.parametrize(("name", "parameters"), [("img64-s-teacher", 280_209_381), ("img512-xxl-teacher", 1_523_164_773)])
def test_published_sizes(name: str, parameters: int) -> None:
    step = Step(get_run(name))
    assert step.student.parameters == parameters + 65  # of the weighting of times
    assert step.student.moments == 2 * step.student.parameters
    assert step.averages == 3  # the one to draw from, and two in snapshots
    assert 0.97 * parameters < sum(step.student.blocks) < parameters


def test_muon_keeps_one_number_a_matrix_element() -> None:
    student = Step(get_run("digits-scd")).student
    assert student.parameters < student.moments < 1.5 * student.parameters


# Parallel training ---------------------------------------------------------------------------------------------------


def test_ddp_keeps_everything_everywhere(scd: Step) -> None:
    assert scd.teacher is not None
    one = memory(scd, "ddp", 1)
    assert memory(scd, "ddp", 64) == one
    p = scd.student.parameters
    assert one.weights == one.gradients == 4 * p
    assert (one.optimizer, one.averages) == (8 * p, 8 * p)
    assert one.teacher == scd.teacher.size >= 4 * scd.teacher.parameters  # with its buffers
    assert (one.fake_score, one.gathered) == (0, 0)
    assert one.states == 4 * p * 6 + one.teacher
    assert one.total(5) == one.states + one.fixed + 5 * one.per_sample


def test_fsdp2_shards_what_lasts(scd: Step) -> None:
    student, teacher = scd.student, scd.teacher
    assert teacher is not None
    one, four = (memory(scd, "fsdp2", gpus) for gpus in (1, 4))
    assert one == memory(scd, "ddp", 1)
    for name in ("weights", "gradients", "optimizer", "averages", "teacher"):
        assert getattr(four, name) == getattr(one, name) / 4
    assert (four.fixed, four.per_sample) == (one.fixed, one.per_sample)
    largest, second = student.blocks[:2]
    outside = student.parameters - sum(student.blocks) + teacher.parameters - sum(teacher.blocks)
    assert four.gathered == 4 * (2 * largest + second + outside)


def test_largest_batch() -> None:
    need = Memory(1.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0, fixed=5.0, per_sample=10.0)
    assert [need.largest_batch(available) for available in (3, 10, 19.9, 20, 55)] == [0, 0, 0, 1, 4]
    assert need.total(4) == 50


# Against measurement -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are read from /proc")
def test_planned_activations_are_those_of_real_steps() -> None:
    name = "unet scd fp32"
    code = f"import plan_memory; print(plan_memory.measured({name!r}, True), *plan_memory.planned({name!r}))"
    done = programs.run(["-c", code], cwd=BENCHMARKS)  # which measures in a process that is fresh
    assert done.returncode == 0, done.stderr
    live, planned, parameters = map(int, done.stdout.split())
    assert planned > 100 * 2**20
    assert 0.8 < planned / live < 1.2
    assert parameters > 5e6


def test_a_weighting_is_counted_where_one_is_learned(scd: Step) -> None:
    run = small_edm2("scd")
    objective = dataclasses.replace(run.config.objective, weighting="error")
    without = Step(dataclasses.replace(run, config=dataclasses.replace(run.config, objective=objective)))
    weighting = AdaptiveWeight(run.config.process)
    assert scd.student.parameters - without.student.parameters == sum(p.numel() for p in weighting.parameters()) > 0
