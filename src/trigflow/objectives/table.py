"""The objectives by name. A name is a class with some of its settings; one from outside the package is added by `register`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trigflow.conditions import quoted
from trigflow.objectives.diffusion import Diffusion
from trigflow.objectives.discrete import Discrete
from trigflow.objectives.distribution import Distribution
from trigflow.objectives.flow_map import FlowMap
from trigflow.objectives.objective import Objective, TangentConfig
from trigflow.process import Proposal
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import same_class


@dataclass(frozen=True)
class NamedObjective:
    """What a name stands for.

    Attributes:
        objective: the class.
        title: what a progress bar calls a run with it.
        summary: a line for lists and model cards.
        settings: what the name settles, by field.
    """

    objective: type[Objective]
    title: str
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_AVERAGES: dict[str, Any] = {
    "jumps": "any", "ends": "pair", "anchor": 0.75, "weighting": "error", "tangent": TangentConfig(warmup=0),
    "proposal": Proposal(-0.4 + math.log(0.5), 1.0),  # logit-normal (-0.4, 1) in tau, for sd = 0.5
}  # fmt: skip

OBJECTIVES: dict[str, NamedObjective] = {
    "diffusion": NamedObjective(Diffusion, "teacher", "diffusion"),
    "sct": NamedObjective(
        FlowMap, "student (sCT)", "continuous-time consistency training, from data (sCT)",
        {"velocity": "data", "jumps": "segments"},
    ),
    "scd": NamedObjective(
        FlowMap, "student (sCD)", "continuous-time consistency distillation of a teacher (sCD)",
        {"velocity": "teacher", "jumps": "segments"},
    ),
    "vsd": NamedObjective(
        Distribution, "student (VSD)", "variational score distillation of a teacher", {"velocity": "teacher", "alone": True}
    ),
    "scd-vsd": NamedObjective(
        Distribution, "student (sCD + VSD)",
        "continuous-time consistency distillation of a teacher, with variational score distillation (sCD + VSD)",
        {"velocity": "teacher", "alone": False},
    ),
    "flow-map": NamedObjective(
        FlowMap, "student (flow map)", "a flow map, by default of any jump and from a teacher (AYF)",
        {"weighting": "average", "to_zero": 0.5},  # ours; benchmarks/mixture.py
    ),
    "meanflow": NamedObjective(
        FlowMap, "student (MeanFlow)", "average velocities, from data (MeanFlow)", {"velocity": "data", **_AVERAGES}
    ),
    "meanflow-distill": NamedObjective(
        FlowMap, "student (MeanFlow)", "average velocities, of a teacher (MeanFlow)", {"velocity": "teacher", **_AVERAGES}
    ),
    "ct": NamedObjective(Discrete, "student (discrete)", "discrete-time consistency training, from data", {"velocity": "data"}),
    "cd": NamedObjective(
        Discrete, "student (discrete)", "discrete-time consistency distillation of a teacher", {"velocity": "teacher"}
    ),
}  # fmt: skip
"""From the name to what it stands for."""


def register(kind: str, objective: type[Objective], *, title: str | None = None, summary: str = "", **settings: Any) -> None:
    """Add an objective from outside the package under a name of its own, its `kind`.

    Args:
        kind: the name, not yet taken by another class.
        objective: a frozen dataclass; its fields are its settings.
        title: what a progress bar calls a run with it.
        summary: a line for lists and model cards.
        settings: what the name settles.

    Raises:
        UserError: for a name that is taken, or a class that is no objective.
    """
    if not isinstance(objective, type):
        raise UserError(f"{quoted(objective)} as an objective; expected a class derived from Objective; pass the class")
    if kind in OBJECTIVES and not same_class(found := OBJECTIVES[kind].objective, objective):
        raise UserError(f"the name '{kind}' is taken by {found.__name__}; expected a new one; choose another")
    if not (issubclass(objective, Objective) and dataclasses.is_dataclass(objective)):
        raise UserError(
            f"{objective.__name__} as an objective; expected a dataclass that is an Objective; derive it from Objective"
        )
    OBJECTIVES[kind] = NamedObjective(objective, title or kind, summary or kind, settings)


def known(kind: str) -> NamedObjective:
    """What a name stands for.

    Raises:
        UserError: for an unknown one.
    """
    if kind not in OBJECTIVES:
        raise UserError(
            f"unknown objective '{kind}'; expected one of {', '.join(OBJECTIVES)}; correct objective.kind, or name the file "
            "that registers it with --plugin"
        )
    return OBJECTIVES[kind]


def objective_of(kind: str = "diffusion", **settings: Any) -> Objective:
    """The objective of this name, with these settings in place of its own.

    Raises:
        UserError: for an unknown name or setting.
    """
    found = known(kind)
    fields = {f.name for f in dataclasses.fields(found.objective)}
    if unknown := sorted(settings.keys() - fields):
        raise UserError(
            f"objective.{unknown[0]} for the objective {kind}; expected one of {', '.join(sorted(fields - {'kind'}))}; "
            "correct the setting"
        )
    return found.objective(**{**found.settings, **settings, "kind": kind})


def as_kind(objective: Objective, kind: str) -> Objective:
    """The objective of this name with the settings of another that both have, but for what the name settles."""
    if objective.kind == kind:
        return objective
    fields = {f.name for f in dataclasses.fields(known(kind).objective)}
    settled = {"kind", *known(kind).settings, *known(objective.kind).settings}
    shared = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name in fields - settled}
    return objective_of(kind, **shared)
