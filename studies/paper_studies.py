"""The findings of Lu and Song 2025 ("the paper"), each as a study, in the order of the paper's sections; and the studies behind
the choices of the other studies: the optimizer, and a learning rate for every objective.

Claims are in our own words. Where a claim comes from somewhere else, it says so.
"""

from studies.rivals import DISCRETE, GUIDANCE, LEARNED, LENGTH, RIVALS, SCT, TEACHER
from studies.spec import Arm, Draw, Expect, Study, better
from trigflow.lab.recipes.changes import Changes

ADAM_RATES = {f"Adam {rate:g}": rate for rate in (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}

OPTIMIZER = Study(
    name="optimizer",
    title="Adam or Muon",
    claim="The presets of small data train with Muon, because it gets further than Adam in the same time, at the best of "
    "seven learning rates of Adam (our own choice; the paper uses RAdam and Adam).",
    arms=(
        Arm("Muon", {"optimizer.name": "muon"}),
        *(Arm(name, {"optimizer.name": "adam", "optimizer.lr": rate}) for name, rate in ADAM_RATES.items()),
    ),
    expectations=better("Muon", *ADAM_RATES),
    budget="seconds",
)

KINDS: dict[str, Changes] = {
    "sCD": {},
    "sCT": SCT,
    "CD": LEARNED["CD, N = 128"],
    **{name: LEARNED[name] for name in ("ECT", "MeanFlow", "MeanFlow distilled")},
}

RATES = Study(
    name="rates",
    title="A learning rate for every objective",
    claim="None: this study chooses. Each objective is compared with others at the learning rate that is best for it here, on "
    "a seed that no comparison uses.",
    arms=tuple(
        Arm(f"{name}, rate x {factor:g}", changes, rate=factor, x=factor, line=name)
        for name, changes in KINDS.items()
        for factor in (0.2, 0.5, 1.0, 2.0)
    ),
    budget="seconds",
    axis="learning rate, times that of the preset",
    log_axis=True,
    shown=("2.fd",),
    seeds=(100,),
)


STEEPEST = "embedding_derivative_end"
"""Relative norm of the time derivative of the embedding at t_max, next to pi/2, as the instruments measure it."""

# a, b, e: the objective (section 4.2) -----------------------------------------------------------------------------------

PUBLISHED: Changes = {"objective.tangent.prior": 0.0, "objective.adaptive_weight": True}
"""The weighting over time of the paper, which some presets depart from."""
SHAPES: dict[str, Changes] = {
    "clipped": {**PUBLISHED, "objective.tangent.mode": "clip"},
    "raw": {**PUBLISHED, "objective.tangent.mode": "raw"},
    # The published limit, for larger data, is far above a tangent of small images.
    "clipped tightly": {**PUBLISHED, "objective.tangent.mode": "clip", "objective.tangent.limit": 0.1},
}

TANGENT = Study(
    name="tangent",
    title="Tangents: normalized, clipped, raw",
    claim="The norm of the tangent varies greatly between samples and times. Normalizing each sample's tangent to about unit "
    "length, or clipping its elements to [-1, 1], makes training stable and samples much better than the raw tangent does "
    "(section 4.2).",
    arms=(
        Arm("normalized", PUBLISHED),
        Arm("clipped", SHAPES["clipped"]),
        Arm("raw", SHAPES["raw"]),
        # Not to mistake a rate that is too high for a method that fails.
        Arm("clipped, a fifth of the rate", SHAPES["clipped"], rate=0.2),
        Arm("raw, a fifth of the rate", SHAPES["raw"], rate=0.2),
        Arm("clipped tightly", SHAPES["clipped tightly"]),
        Arm("clipped tightly, a fifth of the rate", SHAPES["clipped tightly"], rate=0.2),
    ),
    expectations=(
        *better("normalized", "raw", "raw, a fifth of the rate"),
        *better("clipped", "raw"),
        *better("clipped, a fifth of the rate", "raw, a fifth of the rate"),
    ),
    bases=("digits", "mnist"),
)


def _fixed(power: float) -> Arm:
    """The factor that normalizing takes out of the tangent, or its square root."""
    return Arm(f"cos(t)^{power:g}", {"objective.tangent.prior": power, "objective.adaptive_weight": False})


UNWEIGHTED: Changes = {**PUBLISHED, "objective.adaptive_weight": False}

WEIGHTING = Study(
    name="weighting",
    title="Weighting over time: learned, none or fixed",
    claim="A weighting over time that is learned along with the network, so that every time adds equally to the gradient, "
    "improves one- and two-step samples and replaces a hand-made one (section 4.2).",
    arms=(
        Arm("adaptive weighting", PUBLISHED),
        Arm("no weighting", UNWEIGHTED),
        _fixed(0.5),
        _fixed(1.0),
        Arm("adaptive and cos(t)^0.5", {"objective.tangent.prior": 0.5, "objective.adaptive_weight": True}),
        Arm("adaptive weighting, half the rate", PUBLISHED, rate=0.5),
        Arm("no weighting, half the rate", UNWEIGHTED, rate=0.5),
    ),
    expectations=(
        *better("adaptive weighting", "no weighting", "cos(t)^0.5", "cos(t)^1"),
        *better("adaptive weighting, half the rate", "no weighting, half the rate", "cos(t)^0.5", "cos(t)^1"),
    ),
    bases=("digits", "mnist"),
)

WARMUP = Study(
    name="warmup",
    title="Tangent warmup: on or off",
    claim="The second term of the tangent, with the time derivative of the network, is where instability comes from. Bringing "
    "it in over the first iterations keeps training stable at no cost in quality (section 4.2).",
    arms=(Arm("with warmup"), Arm("without warmup", {"objective.tangent.warmup": 0})),
    expectations=(
        Expect("with warmup", "without warmup", "grad_norm_max"),
        *better("with warmup", "without warmup", within=1.05),
    ),
)

# c, d: the network (section 4.1) ----------------------------------------------------------------------------------------


def _embedding(name: str, **settings: str | float) -> Arm:
    return Arm(name, teacher={f"network.conditioning.{setting}": value for setting, value in settings.items()})


EMBEDDINGS = Study(
    name="embedding",
    title="What the network is told of time",
    claim="The tangent contains the time derivative of the embedding. Fourier features of scale 16 make it large everywhere, "
    "and log(sd tan t) makes it grow without bound near pi/2; positional features (or Fourier features of scale 0.02) of t "
    "itself keep it small and training stable, and cost the diffusion model nothing (section 4.1).",
    arms=(
        _embedding("positional, t"),
        _embedding("Fourier 0.02, t", time_embedding="fourier", fourier_scale=0.02),
        _embedding("Fourier 16, t", time_embedding="fourier", fourier_scale=16.0),
        _embedding("positional, log", time_map="log"),
        _embedding("Fourier 0.02, log", time_map="log", time_embedding="fourier", fourier_scale=0.02),
        _embedding("Fourier 16, log", time_map="log", time_embedding="fourier", fourier_scale=16.0),
    ),
    expectations=(
        *better("positional, t", "Fourier 16, t", "Fourier 16, log", "positional, log", by=["2.fd", "2.ratio", STEEPEST]),
        Expect("positional, t", "Fourier 16, log", "teacher.fd", within=1.05),
        Expect("positional, t", "Fourier 0.02, t", "2.ratio", within=1.1),
    ),
    shown=("teacher.fd", "2.fd", "2.ratio", STEEPEST),
)

NORMALIZATION = Study(
    name="normalization",
    title="Normalization: double normalization or AdaGN",
    claim="Adaptive group normalization makes continuous-time training diverge; normalizing its scale and shift as well keeps "
    "its expressiveness and trains stably (section 4.1).",
    arms=(Arm("double normalization"), Arm("AdaGN", teacher={"network.norm": "adagn"})),
    expectations=(
        *better("double normalization", "AdaGN", by=["2.fd", "2.ratio"]),
        Expect("double normalization", "AdaGN", "teacher.fd", within=1.05),
    ),
    shown=("teacher.fd", "1.fd", "2.fd", "2.ratio"),
)

# h, i, j: steps, size, derivative (section 5) -----------------------------------------------------------------------------


def _segments(count: int) -> Arm:
    return Arm(f"M = {count}", {"objective.segments": count}, draws=(Draw(count),), line="sCD in M segments, drawn in M steps")


STEPS = Study(
    name="steps",
    title="More steps, more segments",
    claim="A second step brings both sCD and sCT markedly closer to the teacher. Multistep models, which jump only to the end "
    "of their segment of the trajectory, get better with the number of segments M = 1, 2, 4, 8, 16 (published tables).",
    arms=(Arm("sCD"), Arm("sCT", SCT), *map(_segments, (1, 2, 4, 8, 16))),
    draws=(Draw(1), Draw(2, search=True), Draw(4, search=True)),
    expectations=(
        Expect("sCD", "sCD", "2.fd", against="1.fd"),
        Expect("sCT", "sCT", "2.fd", against="1.fd"),
        Expect("sCD", "sCD", "4.fd", against="2.fd"),
        *(Expect(f"M = {2 * m}", f"M = {m}", f"{2 * m}.fd", against=f"{m}.fd") for m in (1, 2, 4, 8)),
    ),
    over="steps",
    axis="evaluations",
    log_axis=True,
    shown=("fd",),
)


def _width(width: int) -> Arm:
    changes = {"network.width": width, "network.conditioning.width": width // 2}
    return Arm(f"width {width}", teacher=changes, x=width, line="sCD")


SIZE = Study(
    name="size",
    title="Larger teachers",
    claim="Student and teacher get better together as the network grows; the ratio of their distances stays about the same "
    "(section 5.2). From the narrowest to the widest network here, parameters grow more than sixteenfold.",
    arms=tuple(map(_width, (16, 32, 64, 96))),
    expectations=(
        *better("width 96", "width 16", by=["teacher.fd", "2.fd"]),
        Expect("width 96", "width 16", "2.ratio", within=1.1),
        Expect("width 16", "width 96", "2.ratio", within=1.1),
    ),
    axis="width of teacher and student",
    log_axis=True,
    shown=("teacher.fd", "2.fd", "2.ratio"),
)


def _derivative(name: str, derivative: str, precision: str) -> Arm:
    return Arm(name, {"objective.tangent.derivative": derivative, "loop.precision": precision})


DERIVATIVE = Study(
    name="derivative",
    title="Exact derivatives or finite differences",
    claim="The derivative is computed exactly, by forward-mode differentiation arranged so that half precision suffices "
    "(section 5.1). Later work that takes finite differences instead reports lower quality (not a claim of the paper).",
    arms=(
        Arm("exact, fp32"),
        _derivative("exact, bf16", "exact", "bf16"),
        _derivative("differences, fp32", "finite-difference", "fp32"),
        _derivative("differences, bf16", "finite-difference", "bf16"),
    ),
    expectations=(
        *better("exact, fp32", "differences, fp32"),
        *better("exact, bf16", "differences, bf16"),
        Expect("exact, bf16", "exact, fp32", "2.fd", within=1.1),
    ),
)


FINDINGS = {
    "a": TANGENT,
    "b": WEIGHTING,
    "c": EMBEDDINGS,
    "d": NORMALIZATION,
    "e": WARMUP,
    "f": DISCRETE,
    "f, rivals": RIVALS,
    "g": GUIDANCE,
    "h": STEPS,
    "i": SIZE,
    "j": DERIVATIVE,
}
STUDIES: dict[str, Study] = {study.name: study for study in (*FINDINGS.values(), LENGTH, TEACHER, OPTIMIZER, RATES)}
"""Every study, by name."""
