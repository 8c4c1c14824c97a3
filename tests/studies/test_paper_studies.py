"""The studies that come with trigflow can be run as they are defined, on every base."""

from __future__ import annotations

import dataclasses
import re

import pytest

from studies import BASES, FINDINGS, STUDIES, Arm, Base, Study
from studies.bases import OF_KIND
from studies.figure import COLOURS, MARKERS
from studies.rivals import SCALES
from studies.study_plan import expand, resolve_arm
from trigflow.lab.recipes import RECIPES
from trigflow.training.config import RunConfig
from trigflow.training.instruments import Instruments

EACH = pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
SCORE = re.compile(r"(?P<draw>\d+(@[\d.]+)?|teacher)\.(fd|ratio|precision|recall)")


def figures_of(study: Study) -> list[tuple[Arm, str]]:
    """Each figure that an expectation compares, with its arm."""
    arms = {arm.name: arm for arm in study.arms}
    pairs = []
    for expect in study.expectations:
        pairs += [(arms[expect.better], expect.figure), (arms[expect.worse], expect.against or expect.figure)]
    return pairs


def student(study: str, arm: str, base: str = "digits") -> RunConfig:
    found = next(a for a in STUDIES[study].arms if a.name == arm)
    config = resolve_arm(BASES[base], found, 0, "cpu")[1]
    assert config is not None
    return config


@EACH
@pytest.mark.parametrize("base", BASES)
def test_every_arm_resolves_to_settings_that_make_sense(study: Study, base: str) -> None:
    plan = expand(study, BASES[base], study.arms, (0,))  # resolves and validates
    assert set(plan.of_arm) == {(arm.name, 0) for arm in study.arms}
    assert len({plan.of_arm[arm.name, 0] for arm in study.arms}) == len(study.arms), "two arms are the same"


@EACH
def test_expectations_speak_of_what_is_drawn(study: Study) -> None:
    for arm, figure in figures_of(study):
        match = SCORE.fullmatch(figure)
        if match is None:
            name = figure.partition(".")[0]
            assert name == "grad_norm_max" or name in str(Instruments.read.__doc__), figure
        elif match["draw"] != "teacher":
            assert match["draw"] in {draw.name for draw in arm.draws or study.draws}, (arm.name, figure)


@EACH
def test_definitions_are_complete(study: Study) -> None:
    assert STUDIES[study.name] is study
    assert len({arm.name for arm in study.arms}) == len(study.arms) >= 2
    assert study.title
    assert study.claim.endswith(".")
    assert set(study.bases) <= set(BASES)
    assert (study.axis is None) == (study.over == "arm" and all(arm.x is None for arm in study.arms))
    if study in FINDINGS.values():
        assert "section" in study.claim or "paper" in study.claim or "published" in study.claim
        assert study.expectations
        assert len(study.seeds) >= 3


def test_lines_of_a_figure_can_be_told_apart() -> None:
    for study in STUDIES.values():
        lines = {arm.line or arm.name for arm in study.arms}
        assert len(lines) <= min(len(set(MARKERS)), len(set(COLOURS))), study.name


def test_every_finding_is_there_and_the_central_ones_on_both_data_sets() -> None:
    assert {letter[0] for letter in FINDINGS} == set("abcdefghij")
    assert all("digits" in study.bases for study in FINDINGS.values())
    for name in ("tangent", "weighting", "discrete", "rivals", "guidance"):
        assert STUDIES[name].bases == ("digits", "mnist")


def test_students_of_equal_settings_are_shared_between_studies() -> None:
    base = BASES["digits"]
    plans = {name: expand(study, base, study.arms, (0,)) for name, study in STUDIES.items()}
    defaults = {
        plans[study].cells[plans[study].of_arm[arm, 0]].model
        for study, arm in (
            ("weighting", "cos(t)^0.5"), ("warmup", "with warmup"),
            ("embedding", "positional, t"), ("normalization", "double normalization"), ("discrete", "sCD"),
            ("rivals", "sCD"), ("steps", "sCD"), ("steps", "M = 1"), ("derivative", "exact, fp32"), ("optimizer", "Muon"),
            ("teacher", "sCD"),
        )
    }  # fmt: skip
    assert len(defaults) == 1
    teachers = {cell.model for plan in plans.values() for cell in plan.cells.values() if cell.teacher is None}
    others = {"embedding": 5, "normalization": 1, "size": 3, "teacher": 1}
    assert len(teachers) == 1 + sum(others.values())


def test_bases_are_the_recipes_in_other_sizes_with_instruments_and_without_pictures() -> None:
    for name, base in BASES.items():
        recipe = RECIPES[name]
        for mine, whole in ((base.teacher, recipe.teacher), (base.student, recipe.student)):
            assert mine.optimizer == whole.optimizer
            assert mine.loop.iterations <= whole.loop.iterations or mine is BASES["digits"].teacher
            assert mine.loop.sample_every == 0
            assert 0 < mine.loop.checkpoint_every <= mine.loop.iterations / 4
        assert base.teacher.network == base.student.network
        assert base.student.loop.instruments
        assert 0 < base.student.objective.tangent.warmup <= base.student.loop.iterations / 10
    assert BASES["digits"].teacher.network == RECIPES["digits"].teacher.network
    assert BASES["digits"].student.loop.iterations == 1_200
    assert BASES["digits"].teacher.loop.iterations == 3_000


def test_what_an_objective_needs_comes_with_the_base() -> None:
    vsd = student("guidance", "VSD")
    assert (vsd.optimizer.name, vsd.optimizer.lr, vsd.objective.fake_lr) == ("adam", 2e-4, 1e-3)
    assert vsd.objective.guidance_max == SCALES[-1]
    both = student("guidance", "sCD + VSD")
    assert both.loop.iterations == 300
    assert set(OF_KIND) <= {"sct", "vsd", "scd-vsd"}
    assert student("rivals", "sCT").objective.tangent.prior == 1.0
    # A weighting is learned only where something says so.
    assert student("rivals", "MeanFlow distilled").objective.learns_weight
    assert not student("rivals", "ECT").objective.learns_weight


def test_the_published_weighting_is_that_of_the_paper_whatever_the_preset() -> None:
    for study, arm in (("tangent", "normalized"), ("tangent", "raw"), ("weighting", "adaptive weighting")):
        objective = student(study, arm).objective
        assert (objective.adaptive_weight, objective.tangent.prior) == (True, 0.0)
    powers = [student("weighting", f"cos(t)^{power}").objective.tangent.prior for power in ("0.5", "1")]
    assert powers == [0.5, 1.0]


def test_rates_tries_four_rates_of_each_objective_on_a_seed_of_its_own() -> None:
    study, base = STUDIES["rates"], BASES["digits"]
    assert not set(study.seeds) & {seed for other in FINDINGS.values() for seed in other.seeds}
    rates: dict[str | None, list[float]] = {}
    chosen = Base(base.teacher, base.student, base.of_kind, rates={"cd": 7.0, "ct": 7.0, "scd": 7.0})
    for arm in study.arms:
        config = resolve_arm(chosen, arm, 100, "cpu")[1]
        assert config is not None
        rates.setdefault(arm.line, []).append(config.optimizer.lr)
    assert len(rates) == 6
    for tried in rates.values():
        assert tried == pytest.approx([1e-3, 2.5e-3, 5e-3, 1e-2])


def test_rates_chosen_for_a_base_are_those_of_the_rivals() -> None:
    base = BASES["digits"]
    chosen = dataclasses.replace(base, rates={"meanflow": 0.4})
    arms = {arm.name: arm for arm in STUDIES["rivals"].arms}
    meanflow, scd = (resolve_arm(chosen, arms[name], 0, "cpu")[1] for name in ("MeanFlow", "sCD"))
    assert meanflow is not None
    assert scd is not None
    assert meanflow.optimizer.lr == pytest.approx(0.4 * base.student.optimizer.lr)
    assert scd.optimizer.lr == base.student.optimizer.lr


def test_sizes_span_sixteenfold_parameters() -> None:
    from trigflow.networks import build

    def parameters(arm: Arm) -> int:
        network = resolve_arm(BASES["digits"], arm, 0, "cpu")[0].network
        conditioning = dataclasses.replace(network.conditioning, num_classes=10)
        built = build(dataclasses.replace(network, conditioning=conditioning), 0.5)  # type: ignore[arg-type]
        return sum(p.numel() for p in built.parameters())

    counts = list(map(parameters, STUDIES["size"].arms))
    assert counts == sorted(counts)
    assert len(counts) >= 4
    assert counts[-1] >= 16 * counts[0]
