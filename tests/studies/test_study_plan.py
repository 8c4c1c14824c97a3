"""Studies become cells with complete settings, and what is equal is one cell."""

from __future__ import annotations

import dataclasses

import pytest

from studies.spec import Arm, Base, Study
from studies.study_plan import StudyPlan, choose_arms, expand, key_of, lengthen, resolve_arm, settings_of
from tiny_study import STUDY, tiny_base
from trigflow.objectives import objective_of
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig


def plan_of(
    *arms: Arm, base: Base | None = None, seeds: tuple[int, ...] = (0,), study: Study = STUDY, **more: object
) -> StudyPlan:
    return expand(study, base or tiny_base(), arms, seeds, **more)  # type: ignore[arg-type]


def test_every_arm_and_seed_has_a_cell_after_those_it_needs() -> None:
    plan = plan_of(*STUDY.arms, seeds=(0, 1))
    assert set(plan.of_arm) == {(arm.name, seed) for arm in STUDY.arms for seed in (0, 1)}
    assert len(plan.cells) == 2 * (1 + 4)  # a teacher, three students, and a solver, for each seed
    before: set[str] = set()
    for key, cell in plan.cells.items():
        assert set(cell.needs) <= before
        before.add(key)
    assert [cell.config.loop.seed for cell in plan.cells.values()] == [0] * 5 + [1] * 5


def test_students_share_the_teacher_with_equal_settings() -> None:
    plan = plan_of(*STUDY.arms, Arm("other teacher", teacher={"optimizer.lr": 1e-4}))
    teachers = {arm: plan.cells[key].model for (arm, _), key in plan.teacher_of.items()}
    assert len({teachers[arm.name] for arm in STUDY.arms}) == 1
    assert teachers["other teacher"] != teachers["normalized"]
    assert plan.cells[plan.of_arm["normalized", 0]].teacher == teachers["normalized"]


def test_equal_arms_of_two_studies_are_one_cell_unless_they_are_drawn_otherwise() -> None:
    first = plan_of(Arm("a", {"optimizer.lr": 1e-4}))
    same = plan_of(Arm("b", {"optimizer.lr": 1e-4}))
    drawn = plan_of(Arm("a", {"optimizer.lr": 1e-4}, draws=STUDY.draws[:1]))
    assert first.of_arm["a", 0] == same.of_arm["b", 0]
    assert first.of_arm["a", 0] != drawn.of_arm["a", 0]
    assert first.cells[first.of_arm["a", 0]].model == drawn.cells[drawn.of_arm["a", 0]].model
    assert first.of_arm["a", 0] != plan_of(Arm("a", {"optimizer.lr": 1e-4}), num=50).of_arm["a", 0]


def test_a_start_is_part_of_what_a_student_is_and_comes_first() -> None:
    end, begin = Arm("end", start="begin"), Arm("begin")
    plan = plan_of(end, begin)
    last = plan.cells[plan.of_arm["end", 0]]
    assert last.start == plan.cells[plan.of_arm["begin", 0]].model
    assert plan.of_arm["begin", 0] in last.needs
    assert last.model != last.start
    with pytest.raises(UserError, match="'end' starts from 'begin', which trains no student"):
        plan_of(end, dataclasses.replace(begin, student=None))


def test_an_arm_without_student_draws_from_the_teacher() -> None:
    plan = plan_of(*STUDY.arms)
    cell = plan.cells[plan.of_arm["solver", 0]]
    assert cell.model == plan.cells[plan.teacher_of["solver", 0]].model
    assert [draw.solver for draw in cell.draws] == ["dpm++2m"]


def test_settings_are_base_then_kind_then_arm_then_rate() -> None:
    base = tiny_base(
        of_kind={"vsd": {"optimizer.lr": 2e-4, "objective.fake_lr": 1e-3, "optimizer.name": "adamw"}}, rates={"sct": 3.0}
    )
    _, vsd = resolve_arm(base, Arm("", {"objective.kind": "vsd", "optimizer.name": "radam"}, rate=0.5), 7, "cpu")
    assert vsd is not None
    assert (vsd.optimizer.lr, vsd.objective.fake_lr, vsd.optimizer.name, vsd.loop.seed) == (1e-4, 5e-4, "radam", 7)
    _, sct = resolve_arm(base, Arm("", {"objective.kind": "sct"}), 7, "cpu")
    assert sct is not None
    assert sct.optimizer.lr == pytest.approx(3 * base.student.optimizer.lr)


def test_students_have_the_network_of_their_teacher() -> None:
    teacher, student = resolve_arm(tiny_base(), Arm("", {"network.dropout": 0.1}, {"network.width": 16}), 0, "cpu")
    assert student is not None
    assert (teacher.network.width, student.network.width) == (16, 16)  # type: ignore[union-attr]
    assert (teacher.network.dropout, student.network.dropout) == (0.0, 0.1)
    with pytest.raises(UserError, match="changes the student's network; expected changes to the teacher's"):
        resolve_arm(tiny_base(), Arm("wide", {"network.width": 16}), 0, "cpu")


def test_longer_runs_keep_the_share_of_their_warmups() -> None:
    config = tiny_base(1000).student
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup=50, t_ref=400))
    longer = lengthen(config, 1.5)
    assert (longer.loop.iterations, longer.objective.tangent.warmup) == (1500, 6)
    assert (longer.optimizer.warmup, longer.optimizer.t_ref) == (75, 600)
    none = lengthen(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup=0)), 1.5)
    assert none.optimizer.warmup == 0


def test_slower_arms_get_fewer_iterations() -> None:
    plan = plan_of(*STUDY.arms[:2], Arm("half", length=0.5), base=tiny_base(900), pace={"clipped": 1.5, "half": 0.75})
    iterations = {arm: plan.cells[key].config.loop.iterations for (arm, _), key in plan.of_arm.items()}
    assert iterations == {"normalized": 900, "clipped": 600, "half": 600}


def test_keys_are_of_settings_that_are_not_the_default() -> None:
    config = RunConfig()
    assert settings_of(config) == {"network.kind": "unet"}
    shaped = dataclasses.replace(config, objective=objective_of("sct", anchor=0.5))
    assert settings_of(shaped) == {"network.kind": "unet", "objective.kind": "sct", "objective.anchor": 0.5}
    assert set(settings_of(tiny_base().student)) >= {"network.width", "objective.kind", "loop.iterations", "optimizer.lr"}
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 2, "b": 1})


def test_chosen_arms_bring_those_they_start_from() -> None:
    assert [arm.name for arm in choose_arms(STUDY, ["continued"])] == ["normalized", "continued"]
    assert choose_arms(STUDY, []) == STUDY.arms
    with pytest.raises(UserError, match=r"no arm 'clip'; expected one of normalized, clipped, continued, solver"):
        choose_arms(STUDY, ["clip"])


def test_unknown_settings_name_their_neighbours() -> None:
    with pytest.raises(UserError, match=r"unknown setting 'mood'; expected one of mode, c, limit"):
        resolve_arm(tiny_base(), Arm("", {"objective.tangent.mood": "clip"}), 0, "cpu")
    with pytest.raises(UserError, match="unknown setting 'deeper'"):
        resolve_arm(tiny_base(), Arm("", {"loop.seed.deeper": 1}), 0, "cpu")
