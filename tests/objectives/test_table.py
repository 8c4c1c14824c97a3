"""The objectives by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from objectives.helpers import PROCESS
from trigflow import objectives
from trigflow.objectives import (
    OBJECTIVES,
    Diffusion,
    Discrete,
    DiscreteConfig,
    Distribution,
    FlowMap,
    Given,
    Loss,
    Objective,
    TangentConfig,
    as_kind,
    known,
    objective_of,
    register,
)
from trigflow.process import Proposal
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling

CLASSES: dict[str, type[Objective]] = {
    "diffusion": Diffusion, "sct": FlowMap, "scd": FlowMap, "vsd": Distribution, "scd-vsd": Distribution,
    "flow-map": FlowMap, "meanflow": FlowMap, "meanflow-distill": FlowMap, "ct": Discrete, "cd": Discrete,
}  # fmt: skip


@dataclass(frozen=True)
class Halved(Diffusion):
    """An objective from outside."""

    kind: str = "halved"
    share: float = 0.5

    def loss(self, given: Given) -> Loss:
        loss = super().loss(given)
        return Loss(self.share * loss.value, loss.figures)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr("trigflow.objectives.table.OBJECTIVES", OBJECTIVES | {}, raising=True)


@pytest.mark.parametrize(("kind", "cls"), CLASSES.items())
def test_every_name_is_a_class_of_which_its_defaults_make_sense(kind: str, cls: type[Objective]) -> None:
    objective = objective_of(kind)
    assert type(objective) is cls
    assert objective.kind == kind
    assert [name for fine, name, *_ in objective.checks(PROCESS) if not fine] == []
    assert known(kind).summary
    assert known(kind).title == ("teacher" if kind == "diffusion" else known(kind).title)


def test_all_names_are_known() -> None:
    assert OBJECTIVES.keys() == CLASSES.keys()
    assert objective_of() == Diffusion()
    assert objective_of("flow-map") == FlowMap(weighting="average", to_zero=0.5)
    assert objective_of("scd-vsd") == Distribution()


@pytest.mark.parametrize(
    ("kind", "distills", "told", "sampling"),
    [
        ("diffusion", False, (), Sampling(guided=True)),
        ("sct", False, (), Sampling("flow_map")),
        ("scd", True, (), Sampling("flow_map")),
        ("vsd", True, (), Sampling("flow_map")),
        ("scd-vsd", True, (), Sampling("flow_map")),
        ("flow-map", True, ("end",), Sampling("flow_map", "any")),
        ("meanflow", False, ("end",), Sampling("flow_map", "any")),
        ("meanflow-distill", True, ("end",), Sampling("flow_map", "any")),
        ("ct", False, (), Sampling("flow_map")),
        ("cd", True, (), Sampling("flow_map")),
    ],
)
def test_what_a_name_says(kind: str, distills: bool, told: tuple[str, ...], sampling: Sampling) -> None:
    objective = objective_of(kind)
    assert (objective.distills, objective.told, objective.sampling) == (distills, told, sampling)
    assert objective.needs_end == ("end" in told)
    assert objective.fake == (kind in ("vsd", "scd-vsd"))
    if kind == "diffusion":
        return
    guided = objective_of(kind, guidance_max=2.0)
    assert guided.told == (("guidance", *told) if distills else told)
    assert guided.sampling == dataclasses.replace(sampling, guidance_max=2.0 if distills else 1.0)


def test_what_names_settle() -> None:
    meanflow = objective_of("meanflow")
    assert isinstance(meanflow, FlowMap)
    assert (meanflow.velocity, meanflow.residual, meanflow.jumps, meanflow.ends) == ("data", "eulerian", "any", "pair")
    assert (meanflow.anchor, meanflow.weighting, meanflow.tangent.warmup) == (0.75, "error", 0)
    assert (meanflow.proposal.mean, meanflow.proposal.std) == pytest.approx((-0.4 + math.log(0.5), 1.0))
    assert objective_of("meanflow-distill") == dataclasses.replace(meanflow, kind="meanflow-distill", velocity="teacher")
    scd = objective_of("scd", segments=4)
    assert isinstance(scd, FlowMap)
    assert (scd.velocity, scd.jumps, scd.segments, scd.told) == ("teacher", "segments", 4, ("end",))
    assert not scd.needs_end  # the end follows from the time
    assert scd.sampling == Sampling("flow_map", "segments", 4)
    vsd = objective_of("vsd")
    assert isinstance(vsd, Distribution)
    assert (vsd.alone, vsd.has_tangent, vsd.probe) == (True, False, None)
    assert objective_of("scd-vsd").has_tangent


def test_settings_take_the_place_of_those_of_the_name() -> None:
    objective = objective_of("meanflow", anchor=0.5, proposal=Proposal(-1.0, 2.0))
    assert isinstance(objective, FlowMap)
    assert (objective.anchor, objective.proposal, objective.weighting) == (0.5, Proposal(-1.0, 2.0), "error")
    assert objective_of("cd", discrete=DiscreteConfig(steps=7)).discrete.steps == 7  # type: ignore[attr-defined]


def test_unknown_names() -> None:
    for make in (known, objective_of, lambda kind: as_kind(Diffusion(), kind)):
        with pytest.raises(UserError, match=r"^unknown objective 'scm'; expected one of diffusion, sct, .*--plugin$"):
            make("scm")


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("diffusion", {"segments": 2}, "segments"),
        ("sct", {"label_dropout": 0.1}, "label_dropout"),
        ("cd", {"steps": 8}, "steps"),
        ("scd", {"zeta": 1, "alpha": 2}, "alpha"),
    ],
)
def test_unknown_settings(kind: str, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=rf"^objective\.{name} for the objective {kind}; expected one of .*; correct") as caught:
        objective_of(kind, **settings)
    expected = str(caught.value).split("expected one of ")[1].split("; ")[0].split(", ")
    assert expected == sorted(expected)
    assert {"proposal", "adaptive_weight"} <= set(expected)
    assert not {"kind", name} & set(expected)


def test_another_kind_keeps_what_both_have() -> None:
    base = objective_of("scd", guidance_max=2.0, tangent=TangentConfig(warmup=7), adaptive_weight=False, segments=2)
    assert as_kind(base, "scd") is base
    ct = as_kind(base, "ct")
    assert ct == objective_of("ct", guidance_max=2.0, tangent=TangentConfig(warmup=7), adaptive_weight=False)
    back = as_kind(ct, "scd")
    assert back == dataclasses.replace(base, segments=1)  # type: ignore[type-var]
    sct = as_kind(base, "sct")
    assert (sct.velocity, sct.segments, sct.jumps) == ("data", 2, "segments")  # type: ignore[attr-defined]


def test_another_kind_does_not_keep_what_a_name_settles() -> None:
    """Neither what the old one settled goes over, nor what the new one settles is overwritten."""
    meanflow = as_kind(objective_of("scd", tangent=TangentConfig(warmup=7), proposal=Proposal(0.0, 3.0)), "meanflow")
    assert meanflow == objective_of("meanflow")
    scd = as_kind(objective_of("meanflow", anchor=0.5, power=0.5), "scd")
    assert scd == objective_of("scd", power=0.5)
    proposal = Proposal(0.3, 2.0)
    assert as_kind(Diffusion(proposal=proposal, label_dropout=0.3), "ct") == objective_of("ct", proposal=proposal)


def test_an_objective_from_outside() -> None:
    with pytest.raises(UserError, match="unknown objective 'halved'"):
        objective_of("halved")
    register("halved", Halved, summary="half as much", share=0.25)
    found = objective_of("halved", label_dropout=0.2)
    assert found == Halved(share=0.25, label_dropout=0.2)
    assert (known("halved").title, known("halved").summary) == ("halved", "half as much")
    assert as_kind(Diffusion(label_dropout=0.4), "halved") == Halved(share=0.25, label_dropout=0.4)
    register("halved", Halved, title="a half")  # again, as when a file is read twice
    assert (known("halved").title, objective_of("halved")) == ("a half", Halved())


def test_names_are_taken_once() -> None:
    register("halved", Halved)
    for kind, cls in (("scd", Halved), ("halved", Diffusion)):
        with pytest.raises(UserError, match=rf"^the name '{kind}' is taken by {known(kind).objective.__name__}; expected"):
            register(kind, cls)


def test_what_is_no_objective() -> None:
    for cls in (TangentConfig, int):
        with pytest.raises(UserError, match=rf"^{cls.__name__} as an objective; expected a dataclass that is an Objective"):
            register("mine", cls)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown objective 'mine'"):
        known("mine")


@pytest.mark.parametrize("name", objectives.RENAMED)
def test_old_names_say_what_they_are_now(name: str) -> None:
    with pytest.raises(ImportError, match=rf"trigflow\.objectives\.{name} is now .*; use it by that name"):
        getattr(objectives, name)
    with pytest.raises(AttributeError, match="no attribute 'never_there'"):
        objectives.never_there  # noqa: B018


def test_an_object_in_place_of_a_class_is_no_objective() -> None:
    with pytest.raises(UserError, match="as an objective; expected a class derived from Objective"):
        objectives.register("mine", objectives.objective_of("scd"))  # type: ignore[arg-type]
