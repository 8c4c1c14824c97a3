"""Studies of the paper's objectives against others: discrete time, average velocities, solvers, score distillation."""

import math

from trigflow.lab.study.spec import Arm, Changes, Draw, Expect, Study
from trigflow.process import Proposal

SCT: Changes = {"objective.kind": "sct"}
ECT: Changes = {
    "objective.kind": "ct",
    "objective.discrete.schedule": "ect",
    "objective.adaptive_weight": False,
}
"""With the published distance and weighting, which take the place of a learned one."""
MEANFLOW: Changes = {
    "objective.kind": "meanflow",
    "objective.proposal": Proposal(-2.0 + math.log(0.5), 2.0),  # logit-normal (-2, 2) in the time of the straight path
    "objective.anchor": 0.25,
    "objective.power": 0.75,
}
"""With what MeanFlow's paper has for CIFAR-10; its defaults are for latents of ImageNet."""
MEANFLOW_DISTILL: Changes = {
    "objective.kind": "meanflow-distill",
    "objective.proposal": Proposal(-0.4 + math.log(0.5), 1.6),
    "objective.anchor": 0.25,
    "objective.weighting": "average",
    "objective.adaptive_weight": True,
}
"""The teacher leaves almost no error where a jump has no length, which the published weighting makes the most of."""


def discrete(steps: int, solver: str = "ddim") -> Changes:
    """Discrete-time consistency distillation with N steps, of the paper's solver (DDIM) or Heun's."""
    return {"objective.kind": "cd", "objective.discrete.steps": steps, "objective.discrete.solver": solver}


COUNTS = (8, 32, 128, 512, 1024)

DISCRETE = Study(
    name="discrete",
    title="Continuous time or N discrete steps",
    claim="Discrete-time consistency distillation, all else equal, gets better with the number of steps N up to about a "
    "thousand, from where rounding makes it worse in half precision; continuous time is better at every N (the paper's "
    "figure 5 and appendix E).",
    arms=(
        Arm("sCD"),
        Arm("sCT", SCT),
        *(Arm(f"CD, N = {count}", discrete(count), x=count, line="CD with N steps") for count in COUNTS),
    ),
    expectations=tuple(Expect("sCD", f"CD, N = {n}", f) for n in COUNTS for f in ("1.fd", "2.fd")),
    budget="seconds",
    axis="steps N of the discrete-time model",
    log_axis=True,
    bases=("digits", "mnist"),
)

AHEAD = 32
"""N of the discrete time that is ahead of continuous time on mnist, where a student of the studies trains briefly."""
LENGTHS = (1.0, 3.0, 6.0)


def _long(name: str, length: float) -> str:
    return name if length == 1 else f"{name}, {length:g} times as long"


def _same_length(length: float) -> tuple[Expect, ...]:
    return tuple(Expect(_long("sCD", length), _long(f"CD, N = {AHEAD}", length), f) for f in ("1.fd", "2.fd"))


LENGTH = Study(
    name="length",
    title="Discrete or continuous time, as training goes on",
    claim="Few discrete steps pass what is known near the data on to noise in few updates; continuous time passes it on from "
    "neighbour to neighbour, and has no error of discretization. So it may be behind in a brief training, and should be ahead "
    "in a long one (our own question: why few discrete steps win where the study `discrete` is brief).",
    arms=tuple(
        Arm(_long(name, length), changes, length=length, x=length, line=name)
        for name, changes in {"sCD": {}, f"CD, N = {AHEAD}": discrete(AHEAD)}.items()
        for length in LENGTHS
    ),
    expectations=tuple(expect for length in LENGTHS for expect in _same_length(length)),
    budget="seconds",
    axis="length of training, times that of the other studies",
    log_axis=True,
    bases=("mnist",),
)

SOLVER_STEPS = (2, 4, 8)
FINER = (16, 64)
"""Evaluations that come closer to the teacher's ODE: whether a few are good because, or although, they miss it."""
LONGER = "sCD, three times as long"
"""Whether a solver is ahead of the method, or of a student that has not learned all it can."""
LEARNED = ("CD, N = 128", "CD, N = 64, Heun", "ECT", "MeanFlow", "MeanFlow distilled")

RIVALS = Study(
    name="rivals",
    title="Other ways to few steps",
    claim="At equal training time two steps of sCD are better than discrete-time consistency, Easy Consistency Tuning and "
    "MeanFlow, and than a fast solver of the teacher's ODE, which needs no training, at up to eight evaluations (our own bar; "
    "the paper's tables compare published figures).",
    arms=(
        Arm("sCD"),
        Arm(LONGER, length=3.0),
        Arm("sCT", SCT),
        Arm("CD, N = 128", discrete(128)),
        Arm("CD, N = 64, Heun", discrete(64, "heun")),
        Arm("ECT", ECT),
        Arm("MeanFlow", MEANFLOW),
        Arm("MeanFlow distilled", MEANFLOW_DISTILL),
        Arm("DPM-Solver++(2M)", None, draws=tuple(Draw(steps, solver="dpm++2m") for steps in (*SOLVER_STEPS, *FINER))),
    ),
    expectations=(
        *(Expect("sCD", rival, "2.fd") for rival in LEARNED),
        *(Expect("sCD", rival, "1.fd") for rival in LEARNED),
        *(Expect("sCD", "DPM-Solver++(2M)", "2.fd", against=f"{steps}.fd") for steps in SOLVER_STEPS),
        Expect(LONGER, "DPM-Solver++(2M)", "2.fd", against=f"{SOLVER_STEPS[-1]}.fd"),
        # From data alone, without a teacher to do as well as.
        *(Expect("sCT", rival, "2.fd") for rival in ("ECT", "MeanFlow")),
    ),
    budget="seconds",
    over="steps",
    axis="evaluations",
    log_axis=True,
    shown=("fd",),
    bases=("digits", "mnist"),
)

SHORT = 1000
"""Iterations of the demo's teacher; those of the studies have three times as many."""
LEARNERS: dict[str, Changes] = {"sCD": {}, "sCT": SCT, "ECT": ECT}


def _short(name: str) -> str:
    return f"{name}, short teacher"


TEACHER = Study(
    name="teacher",
    title="What a longer trained teacher does for those who learn from it, or from data",
    claim="A distilled student is at best as good as its teacher, while training on data goes on with what the teacher was "
    "trained for. So distillation gains from a teacher that was trained longer, and more than sCT and ECT, which only start "
    "from its weights (our own question: why rivals that learn from data win where the teacher is short).",
    arms=tuple(
        arm
        for name, changes in LEARNERS.items()
        for arm in (
            Arm(_short(name), changes, {"loop.iterations": SHORT}, x=SHORT, line=name),
            Arm(name, changes, x=3 * SHORT, line=name),
        )
    ),
    expectations=(
        *(Expect("sCD", _short("sCD"), figure) for figure in ("2.fd", "1.fd", "teacher.fd")),
        *(Expect("sCD", name, "2.fd") for name in ("sCT", "ECT")),
        *(Expect(_short(name), _short("sCD"), "2.fd") for name in ("sCT", "ECT")),
    ),
    budget="seconds",
    axis="iterations of the teacher",
    shown=("2.fd", "1.fd"),
)

SCALES = (1.0, 1.5, 2.0, 3.0)
HIGHEST = f"@{SCALES[-1]:g}"
GUIDED: Changes = {"objective.guidance_max": SCALES[-1]}


def _at_scales(*steps: int) -> tuple[Draw, ...]:
    return tuple(Draw(count, guidance=scale) for count in steps for scale in SCALES)


GUIDANCE = Study(
    name="guidance",
    title="Consistency and score distillation over guidance scales",
    claim="Variational score distillation draws sharp samples but loses diversity, the more the higher the guidance scale; sCD "
    "keeps its recall and works at high scales. Adding both losses improves one step of sCD and has less recall than sCD "
    "(section 5.2). sCT knows no guidance and is drawn at scale 1.",
    arms=(
        Arm("sCD", GUIDED),
        Arm("sCT", SCT, draws=(Draw(1), Draw(2))),
        Arm("VSD", {**GUIDED, "objective.kind": "vsd"}),
        Arm("sCD + VSD", {**GUIDED, "objective.kind": "scd-vsd"}, start="sCD", length=0.25),
    ),
    draws=_at_scales(1, 2),
    expectations=(
        *(Expect("sCD", "VSD", f"1{scale}.recall") for scale in ("", HIGHEST)),
        Expect("sCD", "VSD", f"1{HIGHEST}.fd"),
        Expect("sCD", "sCD + VSD", "1.recall"),
        Expect("sCD + VSD", "sCD", "1.fd"),
        Expect("VSD", "sCD", "1.precision"),
    ),
    budget="seconds",
    over="guidance",
    axis="guidance scale",
    shown=("1.fd", "1.precision", "1.recall", "2.fd"),
    bases=("digits", "mnist"),
)
