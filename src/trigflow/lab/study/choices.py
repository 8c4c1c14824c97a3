"""Studies behind the choices of the other studies: the optimizer, and a learning rate for every objective."""

from __future__ import annotations

from trigflow.lab.study.rivals import ECT, MEANFLOW, MEANFLOW_DISTILL, SCT, discrete
from trigflow.lab.study.spec import Arm, Changes, Expect, Study

ADAM_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)

OPTIMIZER = Study(
    name="optimizer",
    title="Adam or Muon",
    claim="The presets of small data train with Muon, because it gets further than Adam in the same time, at the best of "
    "seven learning rates of Adam (our own choice; the paper uses RAdam and Adam).",
    arms=(
        Arm("Muon", {"optimizer.name": "muon"}),
        *(Arm(f"Adam {rate:g}", {"optimizer.name": "adam", "optimizer.lr": rate}) for rate in ADAM_RATES),
    ),
    expectations=tuple(Expect("Muon", f"Adam {rate:g}", figure) for rate in ADAM_RATES for figure in ("1.fd", "2.fd")),
    budget="seconds",
)

FACTORS = (0.2, 0.5, 1.0, 2.0)
KINDS: dict[str, Changes] = {
    "sCD": {},
    "sCT": SCT,
    "CD": discrete(128),
    "ECT": ECT,
    "MeanFlow": MEANFLOW,
    "MeanFlow distilled": MEANFLOW_DISTILL,
}

RATES = Study(
    name="rates",
    title="A learning rate for every objective",
    claim="None: this study chooses. Each objective is compared with others at the learning rate that is best for it here, on "
    "a seed that no comparison uses.",
    arms=tuple(
        Arm(f"{name}, rate x {factor:g}", changes, rate=factor, x=factor, line=name)
        for name, changes in KINDS.items()
        for factor in FACTORS
    ),
    budget="seconds",
    axis="learning rate, times that of the preset",
    log_axis=True,
    shown=("2.fd",),
    seeds=(100,),
)
