"""The table of a study, in Markdown."""

from dataclasses import dataclass

from studies.judge import judge
from studies.results import Results, Summary, summarize
from studies.spec import Arm, Draw

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
    head, _, name = figure.rpartition(".")
    if figure in OF_TRAINING:
        return OF_TRAINING[figure]
    if head == "teacher":
        return f"{NAMES.get(name, name)}, teacher"
    if name.isdigit():
        return f"{head}, item {name}".replace("_", " ")
    if name not in NAMES:
        return figure.replace("_", " ")
    steps, _, guidance = head.partition("@")
    words = [NAMES[name]]
    words += [f"{steps} step{'' if steps == '1' else 's'}"] * bool(steps)
    words += [f"scale {guidance}"] * bool(guidance)
    return ", ".join(words)


@dataclass(frozen=True)
class Row:
    """An arm, at one place along the figure.

    Attributes:
        arm: it.
        place: steps or guidance scale of its draws here; in a study over arms its x.
        figures: those that are shown, by the names of `Study.shown`.
    """

    arm: Arm
    place: float | None
    figures: dict[str, Summary]


def rows(results: Results) -> list[Row]:
    """What table and figure show: one row for each arm, or for each place of its draws."""
    study, found = results.study, list[Row]()
    for arm in study.arms:
        if study.over == "arm":
            found.append(Row(arm, arm.x, {name: results.summary(arm.name, name) for name in study.shown}))
            continue
        by_place: dict[float, list[Draw]] = {}
        for draw in arm.draws or study.draws:
            by_place.setdefault(getattr(draw, study.over), []).append(draw)
        for place, draws in sorted(by_place.items()):
            found.append(Row(arm, place, {name: _drawn(results, arm, name, draws) for name in study.shown}))
    return found


def _drawn(results: Results, arm: Arm, shown: str, draws: list[Draw]) -> Summary:
    """A shown figure by its full name: `fd` drawn in two steps is `2.fd`, and `1.fd` at guidance scale 2 is `1@2.fd`."""
    steps, _, name = shown.rpartition(".")
    full = (f"{draw.name}.{name}" for draw in draws if steps in ("", str(draw.steps)))
    return next((results.summary(arm.name, figure) for figure in full), Summary(None, None, 0))


def table(results: Results) -> str:
    """Mean ± standard error of the shown figures by arm, iterations and seconds of training, and how many cells were done,
    diverged or failed."""
    study = results.study
    over = [] if study.over == "arm" else [study.over]
    unfinished = any(cell.status in ("failed", "missing") for cell in results.cells)
    header = ["arm", *over, *map(label, study.shown), "iterations", "seconds", "n", "diverged"]
    lines = [header + ["failed or missing"] * unfinished]
    lines.append([":---"] * (1 + len(over)) + ["---:"] * (len(lines[0]) - 1 - len(over)))
    for row in rows(results):
        arm = row.arm
        trained = [] if arm.student is None else results.of(arm.name).values()
        lengths = [summarize(c.iterations for c in trained), summarize(c.seconds.get("train") for c in trained)]
        line = [arm.name, *(f"{row.place:g}" for _ in over), *map(show, row.figures.values())]
        line += ["" if length.mean is None else f"{length.mean:,.0f}" for length in lengths]
        line += [f"{results.count(arm.name, 'done')}", f"{results.count(arm.name, 'diverged')}"]
        lines.append(line + [f"{results.count(arm.name, 'failed', 'missing')}"] * unfinished)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terms(results: Results) -> str:
    """What is equal between the arms, and what they are measured against."""
    equal = {
        "iterations": "Every arm trains for the iterations in the table.",
        "seconds": "Every arm has the same training time, unless its name says otherwise, as measured step times of arms and "
        "base foretell it: iterations are fitted to it, and seconds are what was really used, also where the machine had other "
        "things to do.",
    }
    text = (
        f"Base {results.base}; mean ± standard error over seeds {', '.join(map(str, results.seeds))}, without cells that "
        f"diverged; {results.num} samples a score. {equal[results.study.budget]}"
    )
    names = {cell.teacher for cell in results.cells}
    best = [teacher.best for name, teacher in results.teachers.items() if name in names and teacher.status == "done"]
    if not best or len(names) != len({teacher.seed for teacher in results.teachers.values()}):
        return text  # none, or those of arms differ
    fd, real = (show(summarize(scores[name] for scores in best)) for name in ("fd", "fd_real"))
    evaluations = " or ".join(sorted({str(scores["nfe"]) for scores in best}))
    return f"{text} Teacher: Fréchet distance {fd} with {evaluations} evaluations; real against real: {real}."


def report(results: Results) -> str:
    """The content of table.md: title, claim, terms, table, verdicts, and the cells that did not end well."""
    bad = [c for c in [*results.teachers.values(), *results.cells] if c.status in ("diverged", "failed")]
    parts = [
        f"# {results.study.title}",
        results.study.claim,
        terms(results),
        table(results),
        "\n".join(f"* {verdict.text}" for verdict in judge(results)),
        "\n".join(f"* {c.arm}, seed {c.seed}, {c.status}: {c.reason}" for c in bad),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def show(summary: Summary) -> str:
    """`2.31 ± 0.04`, with as many digits as the standard error leaves sense to."""
    mean, error = summary.mean, summary.error
    if mean is None:
        return "–"
    if error is None:
        return f"{mean:.3g}"
    if abs(mean) >= 1e5 or 0 < abs(mean) < 1e-3:
        return f"{mean:.2e} ± {error:.1e}"
    digits = 3 if abs(mean) < 1 else 2 if abs(mean) < 100 else 0
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"
