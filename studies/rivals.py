"""Studies of the paper's objectives against others: discrete time, average velocities, solvers, score distillation."""

import math

from studies.spec import Arm, Draw, Expect, Study, better
from trigflow.lab.recipes.changes import Changes
from trigflow.process import Proposal

SCT: Changes = {"objective.kind": "sct"}
ECT: Changes = {"objective.kind": "ct", "objective.discrete.schedule": "ect", "objective.adaptive_weight": False}
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


COUNTS = {f"CD, N = {steps}": steps for steps in (8, 32, 128, 512, 1024)}

DISCRETE = Study(
    name="discrete",
    title="Continuous time or N discrete steps",
    claim="Discrete-time consistency distillation, all else equal, gets better with the number of steps N up to about a "
    "thousand, from where rounding makes it worse in half precision; continuous time is better at every N (the paper's "
    "figure 5 and appendix E).",
    arms=(
        Arm("sCD"),
        Arm("sCT", SCT),
        *(Arm(name, discrete(steps), x=steps, line="CD with N steps") for name, steps in COUNTS.items()),
    ),
    expectations=better("sCD", *COUNTS),
    budget="seconds",
    axis="steps N of the discrete-time model",
    log_axis=True,
    bases=("digits", "mnist"),
)

AHEAD = "CD, N = 32"
"""The discrete time that is ahead of continuous time on mnist, where a student of the studies trains briefly."""
LENGTHS = {1.0: "", 3.0: ", 3 times as long", 6.0: ", 6 times as long"}

LENGTH = Study(
    name="length",
    title="Discrete or continuous time, as training goes on",
    claim="Few discrete steps pass what is known near the data on to noise in few updates; continuous time passes it on from "
    "neighbour to neighbour, and has no error of discretization. So it may be behind in a brief training, and should be ahead "
    "in a long one (our own question: why few discrete steps win where the study `discrete` is brief).",
    arms=tuple(
        Arm(name + words, changes, length=length, x=length, line=name)
        for name, changes in {"sCD": {}, AHEAD: discrete(COUNTS[AHEAD])}.items()
        for length, words in LENGTHS.items()
    ),
    expectations=tuple(expect for words in LENGTHS.values() for expect in better("sCD" + words, AHEAD + words)),
    budget="seconds",
    axis="length of training, times that of the other studies",
    log_axis=True,
    bases=("mnist",),
)

LONGER = "sCD, three times as long"
"""Whether a solver is ahead of the method, or of a student that has not learned all it can."""
SOLVER = "DPM-Solver++(2M)"
LEARNED: dict[str, Changes] = {
    "CD, N = 128": discrete(128),
    "CD, N = 64, Heun": discrete(64, "heun"),
    "ECT": ECT,
    "MeanFlow": MEANFLOW,
    "MeanFlow distilled": MEANFLOW_DISTILL,
}

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
        *(Arm(name, changes) for name, changes in LEARNED.items()),
        # Evaluations beyond eight come closer to the teacher's ODE: whether a few are good because, or although, they miss it.
        Arm(SOLVER, None, draws=tuple(Draw(steps, solver="dpm++2m") for steps in (2, 4, 8, 16, 64))),
    ),
    expectations=(
        *better("sCD", *LEARNED, by=["2.fd"]),
        *better("sCD", *LEARNED, by=["1.fd"]),
        *(Expect("sCD", SOLVER, "2.fd", against=f"{steps}.fd") for steps in (2, 4, 8)),
        Expect(LONGER, SOLVER, "2.fd", against="8.fd"),
        *better("sCT", "ECT", "MeanFlow", by=["2.fd"]),  # from data alone, without a teacher to do as well as
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
BRIEFLY = ", short teacher"
LEARNERS: dict[str, Changes] = {"sCD": {}, "sCT": SCT, "ECT": ECT}

TEACHER = Study(
    name="teacher",
    title="What a longer trained teacher does for those who learn from it, or from data",
    claim="A distilled student is at best as good as its teacher, while training on data goes on with what the teacher was "
    "trained for. So distillation gains from a teacher that was trained longer, and more than sCT and ECT, which only start "
    "from its weights (our own question: why rivals that learn from data win where the teacher is short).",
    arms=tuple(
        Arm(name + words, changes, teacher, x=x, line=name)
        for name, changes in LEARNERS.items()
        for words, teacher, x in ((BRIEFLY, {"loop.iterations": SHORT}, SHORT), ("", {}, 3 * SHORT))
    ),
    expectations=(
        *better("sCD", "sCD" + BRIEFLY, by=["2.fd", "1.fd", "teacher.fd"]),
        *better("sCD", "sCT", "ECT", by=["2.fd"]),
        *(Expect(name + BRIEFLY, "sCD" + BRIEFLY, "2.fd") for name in ("sCT", "ECT")),
    ),
    budget="seconds",
    axis="iterations of the teacher",
    shown=("2.fd", "1.fd"),
)

SCALES = (1.0, 1.5, 2.0, 3.0)
GUIDED: Changes = {"objective.guidance_max": SCALES[-1]}

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
    draws=tuple(Draw(steps, guidance=scale) for steps in (1, 2) for scale in SCALES),
    expectations=(
        *better("sCD", "VSD", by=["1.recall", "1@3.recall", "1@3.fd"]),
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
