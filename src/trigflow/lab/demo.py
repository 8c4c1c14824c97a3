"""The demo: real digits to a two-step generator, with everything measured on the way."""

import base64
import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigflow.codecs.pictures import label_panels, save_picture
from trigflow.data.config import load_data
from trigflow.evaluation.evaluate_model import make_reference, score
from trigflow.lab.recipes import Recipe, get_recipe
from trigflow.lab.recipes.changes import Changes, change
from trigflow.migrations import migrated, stamped
from trigflow.models.model import Model, load
from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.runtime.files import ensure_folder, read_json, write_json, write_text
from trigflow.runtime.machine import machine
from trigflow.runtime.places import check_place
from trigflow.samplers import search_times
from trigflow.training.config import RunConfig, read_config, to_dict
from trigflow.training.log import read_metrics
from trigflow.training.runs import distill, train
from trigflow.training.setup import compare_configs

DEMOS = ("digits", "mnist")
"""Recipes that are small enough to be trained from nothing while one looks on."""
TEACHER_STEPS = (18, 32)
"""Heun steps the teacher is scored at: 35 and 63 evaluations; the better one is its figure."""
PANEL = 50
"""Images per panel of the picture."""
QUICK: Changes = {
    "network.width": 16,  # of a U-Net
    "loop.iterations": 30,
    "loop.batch_size": 16,
    "loop.sample_every": 15,
    "loop.checkpoint_every": 15,
}
"""Of a demo of a few seconds."""


@dataclass
class DemoReport:
    """What the demo measured; `figures` is the content of report.json."""

    figures: dict[str, Any]

    def rows(self) -> list[tuple[str, ...]]:
        """The table, header first."""
        f = self.figures
        rows: list[tuple[str, ...]] = [("", "evaluations", "Frechet distance", "precision", "recall", "images / s")]
        for name, key in {"teacher": "teacher", "student, 1 step": "student_1", "student, 2 steps": "student_2"}.items():
            scores = (f"{f[score][key]:.2f}" for score in ("fd", "precision", "recall"))
            rows.append((name, str(f["nfe"][key]), *scores, f"{f['samples_per_second'][key]:,.0f}"))
        return [*rows, ("real against real", "", f"{f['fd']['real']:.2f}", "", "", "")]

    def table(self) -> str:
        """The table as text, with the headline below."""
        rows = self.rows()
        first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
        head, *lines = (
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))])
            for row in rows
        )
        return "\n".join([head, "-" * len(head), *lines, "", self.headline()])

    def headline(self) -> str:
        """One sentence."""
        f = self.figures
        took = {name: f"{seconds:.0f} s" for name, seconds in f["seconds"].items()}
        made = f"trained in {took['train']}, distilled in {took['distill']}, {took['total']} in all"
        return (
            f"Two steps draw {f['speedup_2']:.0f}x faster than the teacher at {f['nfe']['teacher_timed']} evaluations; "
            f"{'resumed after an interruption' if f['resumed'] else made}."
        )


def run_demo(
    out: str | Path, *, recipe: str = "digits", seed: int = 0, quick: bool = False, progress: bool = True
) -> DemoReport:
    """Train a recipe's teacher into `out/teacher`, distill it into `out`, score and picture both, write the report.

    An interrupted demo goes on where it stopped. A finished one is not repeated: its report is returned.

    Args:
        out: run folder of the student; gets teacher/, samples.png, report.json and report.html too.
        recipe: one of `DEMOS`.
        seed: of everything random.
        quick: a tiny demo of a few seconds, to try the installation.
        progress: draw progress bars on stderr.

    Raises:
        UserError: for an unknown recipe, and when `out` holds something else, or a demo with another recipe, seed or size.
        MissingExtraError: when the `demo` extra is not installed.
    """
    began = time.perf_counter()
    template = _template()
    if recipe not in DEMOS:
        raise UserError(f"there is no demo of '{recipe}'; expected {' or '.join(DEMOS)}; change --recipe")
    runs = _seeded(get_recipe(recipe), seed, quick)
    made = {"recipe": recipe, "seed": seed, "quick": quick}
    out = check_place(out, "folder")
    if (out / "report.json").is_file():
        raw = read_json(out / "report.json", "report")
        report = DemoReport(migrated("report", raw, f"'{out / 'report.json'}'"))
        found = {name: report.figures.get(name, "digits" if name == "recipe" else None) for name in made}
        if found != made:
            holds = ", ".join(f"{name} {value}" for name, value in found.items())
            raise UserError(
                f"'{out}' holds a finished demo with {holds}; expected a new folder for other settings; choose another --out"
            )
        return report
    resumed = (out / "teacher" / "config.json").is_file()
    if not resumed and out.is_dir() and any(not path.is_dir() for path in out.rglob("*")):
        raise UserError(f"'{out}' is not empty and holds no demo; expected a new folder; choose another --out")
    for folder, run in ((out / "teacher", runs.teacher), (out, runs.student)):
        if (folder / "config.json").is_file():
            begun = to_dict(read_config(folder))
            for part in ("data", "loop"):
                compare_configs({part: begun[part]}, {part: to_dict(run)[part]})
    ensure_folder(out)
    dataset = load_data(runs.teacher.data)

    started = time.perf_counter()
    teacher = trained(runs.teacher, out / "teacher", progress=progress)
    taught = time.perf_counter()
    student = trained(dataclasses.replace(runs.student, teacher="teacher"), out, teacher, progress=progress)

    evaluate_began = time.perf_counter()
    reference = make_reference(dataset)
    num = 200 if quick else 2000
    student.times[2] = search_times(  # on noise that the final figures do not use
        lambda times: reference.score(student.sample(num, times=times, seed=2)).fd, student.process, 2, evaluations=10
    ).times
    student.save(out)
    teachers = {steps: score(teacher, reference, num=num, steps=steps, seed=1) for steps in TEACHER_STEPS}
    best = min(teachers, key=lambda steps: float(teachers[steps]["fd"]))
    scores = {
        "teacher": teachers[best],
        "student_1": score(student, reference, num=num, steps=1, seed=1),
        "student_2": score(student, reference, num=num, steps=2, seed=1),
    }
    speed = _speeds({"teacher": (teacher, best), "student_1": (student, 1), "student_2": (student, 2)}, 32 if quick else 256)
    figures: dict[str, Any] = {
        name: {key: s[name] for key, s in scores.items()} for name in ("fd", "precision", "recall", "nfe")
    }
    figures["fd"]["real"] = scores["teacher"]["fd_real"]
    figures["fd"] |= {f"teacher_{s['nfe']}": s["fd"] for s in teachers.values()}
    figures["nfe"]["teacher_timed"] = figures["nfe"]["teacher"]
    figures["samples_per_second"] = speed
    figures["speedup_2"] = speed["student_2"] / speed["teacher"]
    figures["t_mid"] = student.times[2][1]
    figures["skipped_steps"] = {"teacher": _skipped(out / "teacher"), "student": _skipped(out)}
    figures["num"] = num
    figures["parameters"] = sum(p.numel() for p in student.network.parameters())
    figures["seconds"] = {
        "train": taught - started,
        "distill": evaluate_began - taught,
        "evaluate": time.perf_counter() - evaluate_began,
        "total": time.perf_counter() - began,
    }
    figures |= {**made, "resumed": resumed, "machine": machine()}
    report = DemoReport(figures)

    panels = {f"teacher, {figures['nfe']['teacher_timed']} evaluations": teacher.sample(PANEL, steps=best)}
    panels["student, 2 evaluations"] = student.sample(PANEL, steps=2)
    panels["student, 1 evaluation"] = student.sample(PANEL, steps=1)
    panels["real"] = _real_panel(dataset.values, dataset.labels)
    picture = save_picture(label_panels(panels, columns=10), out / "samples.png")
    header, *rows = report.rows()
    encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
    page = template.render(f=figures, header=header, rows=rows, headline=report.headline(), picture=encoded)
    write_text(out / "report.html", str(page))
    write_json(out / "report.json", stamped("report", figures))
    return report


def _seeded(recipe: Recipe, seed: int, quick: bool) -> Recipe:
    changes = {"loop.seed": seed, **(QUICK if quick else {})}
    return Recipe(change(recipe.teacher, changes), change(recipe.student, changes))


def trained(
    config: RunConfig, folder: Path, teacher: Model | None = None, start: Path | None = None, progress: bool = False
) -> Model:
    """The model of this run folder, trained to its end unless it is already; with a teacher, distilled, and from the weights of
    the model in the folder `start`, where one is given."""
    if (folder / "model.json").is_file():
        return load(folder, config.loop.device)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if teacher is None:
        return train(config, folder, resume="auto", progress=progress)
    begin = None if start is None else load(start, config.loop.device)
    return distill(config, teacher, folder, start=begin, resume="auto", progress=progress)


def _speeds(models: dict[str, tuple[Model, int]], batch: int) -> dict[str, float]:
    """Images per second of models in so many steps, at equal batch size: medians of interleaved repeats, after one that warms
    up."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(4):
        for name, (model, steps) in models.items():
            began = time.perf_counter()
            model.sample(batch, steps=steps, batch_size=batch)
            seconds[name].append(time.perf_counter() - began)
    return {name: batch / statistics.median(times[1:]) for name, times in seconds.items()}


def _skipped(folder: Path) -> int:
    lines = read_metrics(folder)
    return int(lines[-1]["skipped"]) if lines else 0


def _real_panel(images: Tensor, labels: Tensor | None) -> Tensor:
    """Real images with the classes in turn, as the samples have them."""
    if labels is None:
        return images[:PANEL]
    classes = int(labels.max()) + 1
    by_class = [images[labels == c][: -(-PANEL // classes)] for c in range(classes)]
    return torch.stack(by_class, dim=1).flatten(0, 1)[:PANEL]


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("the demo's report", "jinja2", "demo") from None
    loader = jinja2.PackageLoader("trigflow", "templates")
    return jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
