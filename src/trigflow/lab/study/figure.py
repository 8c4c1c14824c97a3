"""The figure of a study, for a column of a page: bars by arm, or lines over the arms' place, steps or guidance scale."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigflow.lab.study.results import HIGHER_IS_BETTER, Results, Summary
from trigflow.lab.study.spec import Arm
from trigflow.lab.study.study_table import NAMES, at, figure_at, label, places
from trigflow.runtime.errors import MissingExtraError
from trigflow.runtime.files import replacing

WIDTH, POINTS, DPI = 3.5, 8, 200
"""Inches across, size of the smallest letters, dots per inch."""
FILLS = (("0.25", ""), ("0.75", ""), ("white", "////"), ("0.5", "...."), ("white", ""), ("0.85", "xxxx"))
"""Gray and hatching of bars, so that they can be told apart without colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h")
STROKES: tuple[Any, ...] = ("-", "--", ":", "-.")
"""Of lines: markers tell arms apart, strokes the figures of an arm."""
COLOURS = ("#00429d", "#b3611f", "#3a7d44", "#7b3294", "#555555", "#c2185b", "#00838f", "#8d6e00", "#111111", "#e07b91")
"""Of lines; markers and strokes tell them apart where there is no colour."""
SPREAD = 5.0
"""Largest value over smallest above which values are drawn on a logarithmic axis."""
LONG = 24
"""Letters of a name beyond which a legend has one column."""
TEACHER = {"color": "0.4", "linewidth": 0.9, "linestyle": (0, (1, 2)), "label": "teacher"}


@dataclass
class Curve:
    """A line of a panel: that of an arm (or of several that are joined) and one figure.

    Attributes:
        arm: what the line is called, empty where a panel has only one.
        figure: name of the figure.
        points: `(x, mean, error)`; where x is None the line is horizontal.
    """

    arm: str
    figure: str
    points: list[tuple[float | None, float, float]]


def require_matplotlib() -> None:
    """Raise MissingExtraError where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("the figure of a study", "matplotlib", "lab") from None


def figure(results: Results, path: str | Path) -> Path:
    """Draw the shown figures of a study into a PNG of 200 dots per inch; one panel for each kind of figure.

    Means with standard errors over seeds, without cells that diverged; how many did is written beside.

    Raises:
        MissingExtraError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    study, path = results.study, Path(path)
    groups = _by_kind(study.shown)
    bars = study.over == "arm" and (study.axis is None or all(arm.x is None for arm in study.arms))
    heights = [(_bar_height if bars else _line_height)(results, names) for names in groups.values()]
    settings: Any = {"font.size": POINTS, "axes.titlesize": POINTS, "legend.fontsize": POINTS, "hatch.linewidth": 0.6}
    with rc_context(settings):
        page = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        FigureCanvasAgg(page)
        panels = page.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (kind, names) in zip(panels, groups.items(), strict=True):
            (_bars if bars else _lines)(panel, results, kind, names)
            panel.spines[["top", "right"]].set_visible(False)
        with replacing(path) as temporary:
            page.savefig(temporary, dpi=DPI, format="png")
    return path


def _by_kind(shown: tuple[str, ...]) -> dict[str, list[str]]:
    """Shown figures by what they measure, a panel each."""
    groups: dict[str, list[str]] = {}
    for name in shown:
        kind = name.rpartition(".")[2]
        groups.setdefault(kind if kind in NAMES else name, []).append(name)
    return groups


# Bars ----------------------------------------------------------------------------------------------------------------


def _bar_height(results: Results, names: list[str]) -> float:
    return 0.75 + 0.16 * len(names) * (1 + len(results.study.arms)) + 0.05 * len(results.study.arms)


def _bars(panel: Any, results: Results, kind: str, names: list[str]) -> None:
    """Horizontal bars, the first arm on top, one bar for each figure."""
    arms = [arm for arm in results.study.arms if any(_has(results, arm, name) for name in names)]
    share = 0.8 / len(names)
    values = []
    for i, name in enumerate(names):
        gray, hatch = FILLS[i % len(FILLS)]
        found = [results.summary(arm.name, name) for arm in arms]
        middle = [k - 0.4 + share * (i + 0.5) for k in range(len(arms))]
        widths = [s.mean or 0.0 for s in found]
        errors = [s.error or 0.0 for s in found]
        panel.barh(
            middle, widths, share, xerr=errors, label=_short(name), color=gray, hatch=hatch, edgecolor="black", linewidth=0.6,
            error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "#c0392b"},
        )  # fmt: skip
        values += [s.mean for s in found if s.mean]
    teacher = _teacher(results, kind, names)
    if teacher is not None:
        panel.axvline(teacher, **TEACHER)
    _scale(panel, "x", kind, values)
    panel.set_yticks(range(len(arms)), [_with_counts(results, arm) for arm in arms])
    panel.invert_yaxis()
    panel.set_xlabel(NAMES.get(kind, label(kind)))
    if len(names) > 1 or teacher is not None:
        panel.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.02, 1.0))  # names leave room on the left


def _has(results: Results, arm: Arm, name: str) -> bool:
    """Whether an arm belongs into a panel: it has the figure, or would have but for its end."""
    draws = {draw.name for draw in arm.draws or results.study.draws}
    head = name.rpartition(".")[0]
    return head in draws or head == "teacher" or results.summary(arm.name, name).mean is not None


def _with_counts(results: Results, arm: Arm) -> str:
    diverged, total = results.count(arm.name, "diverged"), len(results.of(arm.name))
    return f"{arm.name}\n({diverged} of {total} diverged)" if diverged else arm.name


# Lines ---------------------------------------------------------------------------------------------------------------


def _lines(panel: Any, results: Results, kind: str, names: list[str]) -> None:
    """Lines over the arms' x, or over steps or guidance scales; arms without an x are horizontal lines."""
    study, lines = results.study, _lines_of(results, names)
    arms = list(dict.fromkeys(line.arm for line in lines))
    xs = sorted({x for line in lines for x, _, _ in line.points if x is not None})
    for line in lines:
        which, figure = arms.index(line.arm), names.index(line.figure)
        number = which if len(arms) > 1 else figure
        x, y, errors = zip(*line.points, strict=True)
        if x[0] is None:  # along the whole axis
            x, y, errors = (xs[0], xs[-1]) if xs else (0.0, 1.0), (y[0], y[0]), (errors[0], errors[0])
        panel.errorbar(
            x, y, errors, label=_title(line, names), marker=MARKERS[number % len(MARKERS)],
            linestyle=STROKES[figure % len(STROKES)], color=COLOURS[number % len(COLOURS)],
            markersize=4, linewidth=1.1, elinewidth=0.9, capsize=2, markerfacecolor="white" if number % 2 else None,
        )  # fmt: skip
    teacher = _teacher(results, kind, names)
    if teacher is not None:
        panel.axhline(teacher, **TEACHER)
    if study.log_axis:
        panel.set_xscale("log", base=2)
    _ticks(panel, xs, study.log_axis)
    _scale(panel, "y", kind, [mean for line in lines for _, mean, _ in line.points])
    panel.set_xlabel(study.axis or {"steps": "steps", "guidance": "guidance scale"}.get(study.over, ""))
    panel.set_ylabel(NAMES.get(kind, label(kind)))
    count = len(lines) + (teacher is not None)
    if count > 1:
        columns = _columns(lines, names)
        panel.legend(frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=3)


def _lines_of(results: Results, names: list[str]) -> list[Curve]:
    return _over_arms(results, names) if results.study.over == "arm" else _over_draws(results, names)


def _title(line: Curve, names: list[str]) -> str:
    return ", ".join(word for word in (line.arm, _short(line.figure) if len(names) > 1 else "") if word)


def _columns(lines: list[Curve], names: list[str]) -> int:
    """Of the legend: two, as long as the names leave room for them."""
    return 2 if len(lines) > 2 and all(len(_title(line, names)) <= LONG for line in lines) else 1


def _line_height(results: Results, names: list[str]) -> float:
    """Inches of a panel: what is drawn, and a row of the legend for every one or two lines."""
    lines = _lines_of(results, names)
    return 2.1 + 0.17 * math.ceil((len(lines) + 1) / _columns(lines, names))


def _over_arms(results: Results, names: list[str]) -> list[Curve]:
    """The lines of arms with a place on the axis, then those of arms without."""
    arms = results.study.arms
    placed = sorted((arm for arm in arms if arm.x is not None), key=lambda arm: arm.x or 0.0)
    alone = len({arm.line for arm in placed}) == 1 and len(placed) == len(arms)
    lines: list[Curve] = []
    for arm in [*placed, *(arm for arm in arms if arm.x is None)]:
        for name in names:
            title = "" if alone else (arm.line or arm.name) if arm.x is not None else arm.name
            _extend(lines, title, name, arm.x, results.summary(arm.name, name))
    return lines


def _over_draws(results: Results, names: list[str]) -> list[Curve]:
    """A line for each arm (or the line it belongs to) and figure, over steps or guidance scales."""
    lines: list[Curve] = []
    for arm in results.study.arms:
        for x, draws in places(results, arm):
            for name in names:
                if any(figure_at(name, draw, results.study.over) for draw in draws):
                    _extend(lines, arm.line or arm.name, name, x, at(results, arm, name, draws))
    return lines


def _extend(lines: list[Curve], arm: str, figure: str, x: float | None, summary: Summary) -> None:
    """Add a point to its line, which it may be the first of."""
    if summary.mean is None:
        return
    found = [line for line in lines if (line.arm, line.figure) == (arm, figure)]
    if not found:
        found = [Curve(arm, figure, [])]
        lines += found
    found[0].points.append((x, summary.mean, summary.error or 0.0))


def _teacher(results: Results, kind: str, names: list[str]) -> float | None:
    """The mean distance of the teachers, in a panel of distances that has none, where all arms have the same teachers."""
    if kind != "fd" or "teacher.fd" in names or len({t.seed for t in results.teachers.values()}) < len(results.teachers):
        return None
    first = results.study.arms[0].name
    return results.summary(first, "teacher.fd").mean


def _short(figure: str) -> str:
    """What tells a figure from others of its kind: the number of steps."""
    return label(figure).partition(", ")[2] or label(figure)


def _ticks(panel: Any, places: list[float], log: bool) -> None:
    """Ticks where there are points, when they are few enough to be read."""
    apart = [b / a if log and a > 0 else b - a for a, b in itertools.pairwise(places)]
    if 1 < len(places) <= 8 and (log or max(apart) < 4 * min(apart)):
        panel.set_xticks(places, [f"{x:g}" if x < 1e4 else f"{x:.1e}" for x in places])
        panel.minorticks_off()


def _scale(panel: Any, axis: str, kind: str, values: list[float]) -> None:
    """A logarithmic axis where values are far apart; none for precision and recall, which are shares of all samples."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if kind in HIGHER_IS_BETTER or not values or min(values) <= 0 or max(values) <= SPREAD * min(values):
        return
    getattr(panel, f"set_{axis}scale")("log")
    if axis == "x":
        panel.set_xlim(left=10 ** math.floor(math.log10(min(values))))
    if max(values) < 1000 * min(values):
        one = getattr(panel, f"{axis}axis")
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())
