"""The figure of a study, for a column of a page: bars by arm, or lines over the arms' place, steps or guidance scale."""

import itertools
import math
from pathlib import Path
from typing import Any

from studies.results import Results
from studies.spec import HIGHER_IS_BETTER
from studies.study_table import NAMES, Row, label, rows
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import replacing

Style = dict[str, Any]

WIDTH, POINTS, DPI = 3.5, 8, 200
"""Inches across, size of the smallest letters, dots per inch."""
FILLS = (("0.25", ""), ("0.75", ""), ("white", "////"), ("0.5", "...."), ("white", ""), ("0.85", "xxxx"))
"""Gray and hatching of bars, so that they can be told apart without colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h")
STROKES = ("-", "--", ":", "-.")
"""Of lines: markers tell arms apart, strokes the figures of an arm."""
COLOURS = ("#00429d", "#b3611f", "#3a7d44", "#7b3294", "#555555", "#c2185b", "#00838f", "#8d6e00", "#111111", "#e07b91")
"""Of lines; markers and strokes tell them apart where there is no colour."""
SPREAD = 5.0
"""Largest value over smallest above which values are drawn on a logarithmic axis."""
LONG = 24
"""Letters of a name beyond which a legend has one column."""
BAR: Style = {"edgecolor": "black", "linewidth": 0.6, "error_kw": {"elinewidth": 0.9, "capsize": 2, "ecolor": "#c0392b"}}
LINE: Style = {"markersize": 4, "linewidth": 1.1, "elinewidth": 0.9, "capsize": 2}
TEACHER: Style = {"color": "0.4", "linewidth": 0.9, "linestyle": (0, (1, 2)), "label": "teacher"}

Curves = dict[tuple[str, str], list[tuple[float | None, float, float]]]
"""The lines of a panel: by name of the arm (or of several that are joined) and of the figure its points `(x, mean, error)`; a
line whose x is None is horizontal."""


def require_matplotlib() -> None:
    """Raise a UserError where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "the figure of a study needs matplotlib, which is not installed; expected it there; run: pip install matplotlib"
        ) from None


def figure(results: Results, path: str | Path) -> Path:
    """Draw the shown figures of a study into a PNG of 200 dots per inch; one panel for each kind of figure.

    Means with standard errors over seeds, without cells that diverged; how many did is written beside.

    Raises:
        UserError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    study, shown = results.study, rows(results)
    kinds: dict[str, list[str]] = {}  # what figures measure, a panel each
    for name in study.shown:
        kind = name.rpartition(".")[2]
        kinds.setdefault(kind if kind in NAMES else name, []).append(name)
    bars = study.over == "arm" and (study.axis is None or all(arm.x is None for arm in study.arms))
    curves = {kind: _curves(results, shown, names) for kind, names in kinds.items()}
    if bars:
        heights = [0.75 + 0.16 * len(names) * (1 + len(shown)) + 0.05 * len(shown) for names in kinds.values()]
    else:
        heights = [2.1 + 0.17 * math.ceil((len(lines) + 1) / _columns(lines)) for lines in curves.values()]
    with rc_context({"font.size": POINTS, "axes.titlesize": POINTS, "legend.fontsize": POINTS, "hatch.linewidth": 0.6}):
        page = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        FigureCanvasAgg(page)
        panels = page.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (kind, names) in zip(panels, kinds.items(), strict=True):
            if bars:
                _draw_bars(panel, results, shown, kind, names)
            else:
                _draw_lines(panel, results, curves[kind], kind, names)
            panel.spines[["top", "right"]].set_visible(False)
        with replacing(Path(path)) as temporary:
            page.savefig(temporary, dpi=DPI, format="png")
    return Path(path)


def _draw_bars(panel: Any, results: Results, shown: list[Row], kind: str, names: list[str]) -> None:
    """Horizontal bars, the first arm on top, one bar for each figure."""
    # The arms that have the figures, or would have but for their end.
    drawn = [row for row in shown if any(_draws(results, row, name) or row.figures[name].mean is not None for name in names)]
    share = 0.8 / len(names)
    for i, name in enumerate(names):
        gray, hatch = FILLS[i % len(FILLS)]
        places = [k - 0.4 + share * (i + 0.5) for k in range(len(drawn))]
        means = [row.figures[name].mean or 0.0 for row in drawn]
        errors = [row.figures[name].error or 0.0 for row in drawn]
        panel.barh(places, means, share, xerr=errors, label=_short(name), color=gray, hatch=hatch, **BAR)
    teacher = _teacher(results, kind, names)
    if teacher is not None:
        panel.axvline(teacher, **TEACHER)
    _scale(panel, "x", kind, [row.figures[name].mean for row in drawn for name in names])
    panel.set_yticks(range(len(drawn)), [_with_counts(results, row.arm.name) for row in drawn])
    panel.invert_yaxis()
    panel.set_xlabel(NAMES.get(kind, label(kind)))
    if len(names) > 1 or teacher is not None:
        panel.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.02, 1.0))  # names leave room on the left


def _draws(results: Results, row: Row, name: str) -> bool:
    """Whether an arm is drawn from in the way that a figure scores."""
    return name.rpartition(".")[0] in {"teacher", *(draw.name for draw in row.arm.draws or results.study.draws)}


def _with_counts(results: Results, arm: str) -> str:
    diverged = results.count(arm, "diverged")
    return f"{arm}\n({diverged} of {len(results.of(arm))} diverged)" if diverged else arm


def _curves(results: Results, shown: list[Row], names: list[str]) -> Curves:
    """A line for each arm (or the line it belongs to) and figure; of arms those with a place come first, in its order."""
    over_arms = results.study.over == "arm"
    if over_arms:
        shown = sorted(shown, key=lambda row: (row.place is None, row.place or 0.0))
    alone = over_arms and len({row.arm.line or row.arm.name for row in shown}) == 1
    curves: Curves = {}
    for row, name in itertools.product(shown, names):
        found = row.figures[name]
        if found.mean is not None:
            title = "" if alone else row.arm.line or row.arm.name
            curves.setdefault((title, name), []).append((row.place, found.mean, found.error or 0.0))
    return curves


def _draw_lines(panel: Any, results: Results, curves: Curves, kind: str, names: list[str]) -> None:
    """Lines over the arms' x, or over steps or guidance scales; arms without an x are horizontal lines."""
    study, titles = results.study, _titles(curves)
    arms = list(dict.fromkeys(arm for arm, _ in curves))
    xs = sorted({x for points in curves.values() for x, _, _ in points if x is not None})
    for (arm, name), points in curves.items():
        figure = names.index(name)
        number = arms.index(arm) if len(arms) > 1 else figure
        x, y, errors = zip(*points, strict=True)
        if x[0] is None:  # along the whole axis
            x, y, errors = (xs[0], xs[-1]) if xs else (0.0, 1.0), (y[0], y[0]), (errors[0], errors[0])
        style: Style = {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
        style |= {"linestyle": STROKES[figure % len(STROKES)], "markerfacecolor": "white" if number % 2 else None}
        panel.errorbar(x, y, errors, label=titles[arm, name], **style, **LINE)
    teacher = _teacher(results, kind, names)
    if teacher is not None:
        panel.axhline(teacher, **TEACHER)
    if study.log_axis:
        panel.set_xscale("log", base=2)
    _ticks(panel, xs, study.log_axis)
    _scale(panel, "y", kind, [mean for points in curves.values() for _, mean, _ in points])
    panel.set_xlabel(study.axis or {"steps": "steps", "guidance": "guidance scale"}.get(study.over, ""))
    panel.set_ylabel(NAMES.get(kind, label(kind)))
    if len(curves) + (teacher is not None) > 1:
        columns = _columns(curves)
        panel.legend(frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=3)


def _titles(curves: Curves) -> dict[tuple[str, str], str]:
    """What the lines are called: by the arm, and by the figure where there are several."""
    several = len({name for _, name in curves}) > 1
    return {(arm, name): ", ".join(filter(None, (arm, _short(name) * several))) for arm, name in curves}


def _columns(curves: Curves) -> int:
    """Of the legend: two, as long as the names leave room for them."""
    return 2 if len(curves) > 2 and all(len(title) <= LONG for title in _titles(curves).values()) else 1


def _teacher(results: Results, kind: str, names: list[str]) -> float | None:
    """The mean distance of the teachers, in a panel of distances that has none, where all arms have the same teachers."""
    if kind != "fd" or "teacher.fd" in names or len({t.seed for t in results.teachers.values()}) < len(results.teachers):
        return None
    return results.summary(results.study.arms[0].name, "teacher.fd").mean


def _short(figure: str) -> str:
    """What tells a figure from others of its kind: the number of steps."""
    return label(figure).partition(", ")[2] or label(figure)


def _ticks(panel: Any, places: list[float], log: bool) -> None:
    """Ticks where there are points, when they are few enough to be read."""
    apart = [b / a if log and a > 0 else b - a for a, b in itertools.pairwise(places)]
    if 1 < len(places) <= 8 and (log or max(apart) < 4 * min(apart)):
        panel.set_xticks(places, [f"{x:g}" if x < 1e4 else f"{x:.1e}" for x in places])
        panel.minorticks_off()


def _scale(panel: Any, axis: str, kind: str, found: list[float | None]) -> None:
    """A logarithmic axis where values are far apart; none for precision and recall, which are shares of all samples."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for value in found if value]
    if kind in HIGHER_IS_BETTER or not values or min(values) <= 0 or max(values) <= SPREAD * min(values):
        return
    panel.set(**{f"{axis}scale": "log"})
    if axis == "x":
        panel.set_xlim(left=10 ** math.floor(math.log10(min(values))))
    if max(values) < 1000 * min(values):
        one = getattr(panel, f"{axis}axis")
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())
