"""The table of a study, in Markdown."""

from trigflow.lab.study.judge import judge
from trigflow.lab.study.results import Results, Summary, best_draw, summarize
from trigflow.lab.study.spec import Arm, Draw

NAMES = {
    "fd": "Fréchet distance",
    "fd_real": "Fréchet distance of real images",
    "precision": "precision",
    "recall": "recall",
    "ratio": "distance over the teacher's",
    "nfe": "evaluations",
}
"""Of the figures of a draw."""
OF_TRAINING = {
    "grad_norm_max": "largest norm of the gradient",
    "embedding_derivative_end": "time derivative of the embedding near pi/2",
}
"""Of figures of training that studies compare; others are called as they are in the metrics."""


def label(figure: str) -> str:
    """A figure in words: `2.fd` is "Fréchet distance, 2 steps"."""
    if figure in OF_TRAINING:
        return OF_TRAINING[figure]
    head, _, name = figure.rpartition(".")
    if head == "teacher":
        return f"{NAMES.get(name, name)}, teacher"
    if name not in NAMES:
        return figure.replace("_", " ").replace(".", ", item ") if name.isdigit() else figure.replace("_", " ")
    steps, _, guidance = head.partition("@")
    words = [
        NAMES[name],
        f"{steps} step{'' if steps == '1' else 's'}" if steps else "",
        f"scale {guidance}" if guidance else "",
    ]
    return ", ".join(word for word in words if word)


def place(draw: Draw, over: str) -> float:
    """Where a draw is along the figure of a study over steps or guidance scales."""
    return draw.guidance if over == "guidance" else draw.steps


def figure_at(figure: str, draw: Draw, over: str) -> str | None:
    """The full name of a shown figure at one draw: over steps, `fd` at two steps is `2.fd`; over guidance scales, `1.fd` at
    scale 2 is `1@2.fd`. None where the draw has another number of steps, or the figure is not one of draws."""
    head, _, name = figure.rpartition(".")
    if name not in NAMES or head == "teacher":
        return None
    if over == "guidance" and head != str(draw.steps):
        return None
    return f"{draw.name}.{name}"


def places(results: Results, arm: Arm) -> list[tuple[float, list[Draw]]]:
    """The draws of an arm by their place, in order; over arms there is one place with all of them."""
    draws, over = arm.draws or results.study.draws, results.study.over
    if over == "arm":
        return [(0.0, list(draws))]
    return [(x, [d for d in draws if place(d, over) == x]) for x in sorted({place(d, over) for d in draws})]


def at(results: Results, arm: Arm, figure: str, draws: list[Draw]) -> Summary:
    """A shown figure of an arm at one place."""
    if results.study.over == "arm":
        return results.summary(arm.name, figure)
    names = (figure_at(figure, draw, results.study.over) for draw in draws)
    found = [results.summary(arm.name, name) for name in names if name is not None]
    return found[0] if found else Summary(None, None, 0)


def table(results: Results) -> str:
    """Mean ± standard error of the shown figures by arm, iterations and seconds of training, and how many cells were done,
    diverged or failed; above it the terms of the comparison."""
    over = results.study.over
    counts = [results.count(arm.name, status) for arm in results.study.arms for status in ("failed", "missing")]
    rest = ["failed or missing"] if any(counts) else []
    header = ["arm", *([] if over == "arm" else [over]), *map(label, results.study.shown)]
    header += ["iterations", "seconds", "n", "diverged", *rest]
    rows = []
    for arm in results.study.arms:
        cells = list(results.of(arm.name).values())
        teacher_only = arm.student is None
        iterations = summarize(None if teacher_only else c.iterations for c in cells)
        seconds = summarize(None if teacher_only else c.seconds.get("train") for c in cells)
        ends = [str(results.count(arm.name, "done")), str(results.count(arm.name, "diverged"))]
        if rest:
            ends.append(str(results.count(arm.name, "failed") + results.count(arm.name, "missing")))
        for x, draws in places(results, arm):
            values = [show(at(results, arm, figure, draws)) for figure in results.study.shown]
            where = [] if over == "arm" else [f"{x:g}"]
            trained = ["" if s.mean is None else f"{s.mean:,.0f}" for s in (iterations, seconds)]
            rows.append([arm.name, *where, *values, *trained, *ends])
    words = 1 + (over != "arm")
    rule = [":---" if i < words else "---:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terms(results: Results) -> str:
    """What is equal between the arms, and what they are measured against."""
    equal = {
        "iterations": "Every arm trains for the iterations in the table.",
        "seconds": "Every arm has the same training time, unless its name says otherwise, as measured step times of arms and "
        "base foretell it: iterations are fitted to it, and seconds are what was really used, also where the machine had other "
        "things to do.",
    }[results.study.budget]
    seeds = ", ".join(map(str, results.seeds))
    lines = [
        f"Base {results.base}; mean ± standard error over seeds {seeds}, without cells that diverged; {results.num} samples a "
        f"score. {equal}"
    ]
    teachers = {results.of(arm.name)[seed].teacher for arm in results.study.arms for seed in results.of(arm.name)}
    by_seed = [t for name, t in results.teachers.items() if name in teachers and t.status == "done"]
    if by_seed and len(teachers) == len({t.seed for t in results.teachers.values()}):
        best = [best_draw(teacher) for teacher in by_seed]
        fd, real = (summarize(b[name] for b in best) for name in ("fd", "fd_real"))
        lines.append(
            f"Teacher: Fréchet distance {show(fd)} with {' or '.join(sorted({str(b['nfe']) for b in best}))} evaluations; "
            f"real against real: {show(real)}."
        )
    return " ".join(lines)


def report(results: Results) -> str:
    """The content of table.md: title, claim, terms, table, verdicts, and the cells that did not end well."""
    study = results.study
    parts = [f"# {study.title}", study.claim, terms(results), table(results)]
    parts.append("\n".join(f"* {verdict.text}" for verdict in judge(results)))
    bad = [c for c in [*results.teachers.values(), *results.cells] if c.status in ("diverged", "failed")]
    parts.append("\n".join(f"* {c.arm}, seed {c.seed}, {c.status}: {c.reason}" for c in bad))
    return "\n\n".join(part for part in parts if part) + "\n"


def show(summary: Summary) -> str:
    """`2.31 ± 0.04`, with as many digits as the standard error leaves sense to."""
    if summary.mean is None:
        return "–"
    if summary.error is None:
        return f"{summary.mean:.3g}"
    if abs(summary.mean) >= 1e5 or 0 < abs(summary.mean) < 1e-3:
        return f"{summary.mean:.2e} ± {summary.error:.1e}"
    digits = 3 if abs(summary.mean) < 1 else 2 if abs(summary.mean) < 100 else 0
    return f"{summary.mean:,.{digits}f} ± {summary.error:,.{digits}f}"
