"""The model card: what a student is, how to draw from it, how it was trained and what was measured, as Markdown."""

from pathlib import Path
from typing import Any

from trigflow.data.config import data_of
from trigflow.migrations import migrated, stamped
from trigflow.models.model import Model
from trigflow.networks import name_of
from trigflow.objectives import OBJECTIVES, known
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json
from trigflow.training.config import RunConfig, from_dict, to_dict

COLUMNS = {
    "model": "model",
    "nfe": "evaluations",
    "fd": "Frechet distance",
    "fd_real": "of real data",
    "precision": "precision",
    "recall": "recall",
    "num": "samples",
    "samples_per_second": "samples per second",
    "features": "features",
}
"""Figures that a card shows, with the heading of their column."""

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- trigflow
- consistency-model
---

# {title}

{summary}

{picture}## Use

    pip install "trigflow[diffusers]"

```python
import torch
from trigflow.deploy.pipeline import TrigFlowPipeline

pipe = TrigFlowPipeline.from_pretrained("FOLDER or user/model")
generator = torch.Generator().manual_seed(0)
images = pipe({arguments}generator=generator).images
```

`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` opens it too: `pipeline.py` and
`network/trigflow.deploy.pipeline_network.py` import the classes of the installed trigflow and hold nothing else.

{conditions}

## Figures

{figures}

{speed}## Recipe

{recipe}

The whole configuration is in `network/config.json`. The method: C. Lu and Y. Song, *Simplifying, Stabilizing and Scaling
Continuous-Time Consistency Models*, ICLR 2025, arXiv 2410.11081.
"""


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The configuration for `config.json`, folders and files by their last name only: a card is read by others."""
    raw = stamped("config", to_dict(config))
    for name in ("teacher", "start", "negative"):
        raw[name] = raw[name] and Path(raw[name]).name
    raw["data"]["source"] = Path(raw["data"]["source"]).name
    return raw


def description_of(model: Model) -> dict[str, Any]:
    """`Model.description`, folders and files by their last name only: it is read by others."""
    raw = model.description()
    source, origin = raw["codec"].get("vae"), dict(raw["origin"])
    if source and Path(source["name"]).expanduser().exists():
        raw["codec"]["vae"] = {**source, "name": Path(source["name"]).name}
    if origin.get("teacher"):
        origin["teacher"] = Path(origin["teacher"]).name
    if origin.get("data"):
        origin["data"] = {**origin["data"], "source": Path(origin["data"]["source"]).name}
    return {**raw, "origin": origin}


def figures_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of figures found in a run folder: of the `report.json` of a demo, every `evaluation*.json` and every `bench*.json`.

    The latter are what `trigflow evaluate RUN --out RUN/evaluation.json` and `trigflow bench RUN --json RUN/bench.json` write.
    Rows of a measurement of speed have a `variant`. Raises a UserError for such a file that holds no figures.
    """
    rows: list[dict[str, Any]] = []
    report = folder / "report.json"
    if report.is_file():
        raw = _figures(report)
        for name, text in (("student_1", "student"), ("student_2", "student"), ("teacher", "teacher")):
            tables = {key: raw[key] for key in ("nfe", "fd", "precision", "recall") if isinstance(raw.get(key), dict)}
            if found := {key: of_each[name] for key, of_each in tables.items() if name in of_each}:
                rows.append({"model": text, **found, **({"num": raw["num"]} if "num" in raw else {})})
    for path in sorted(folder.glob("evaluation*.json")):
        raw = _figures(path)
        rows.append({"model": "student", **{key: raw[key] for key in COLUMNS if key in raw}})
    return rows + _speeds(folder)


def _speeds(folder: Path) -> list[dict[str, Any]]:
    """How fast each variant draws its smallest batch."""
    rows = []
    for path in sorted(folder.glob("bench*.json")):
        raw = read_json(path, "measurement")
        try:
            least = min(row["batch"] for row in raw["rows"])
            for row in raw["rows"]:
                if row["batch"] == least:
                    picked = " (the pick)" if row["variant"] == raw["pick"] else ""
                    rows.append({
                        "variant": row["variant"] + picked, "steps": raw["steps"], "batch": least,
                        "milliseconds": row["p50"], "largest difference from float32, of 255": row["difference"],
                        "device": raw["device"],
                    })  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{path}' cannot be used (no measurement); expected a file of 'trigflow bench --json'; remove or replace it"
            ) from error
    return rows


def model_card(model: Model, figures: list[dict[str, Any]], pictured: bool, run: dict[str, Any] | None = None) -> str:
    """The text of `README.md`.

    Args:
        model: a consistency student.
        figures: rows as `figures_of` gives them; none says so.
        pictured: whether there is a `samples.png` beside the card.
        run: the configuration of the run, where it is known.
    """
    speeds = [row for row in figures if "variant" in row]
    quality = [row for row in figures if "variant" not in row]
    channels, *sides = model.shape
    content = "images" if model.codec.pictured else model.codec.kind
    content += f" of {'x'.join(map(str, sides))} with {channels} channel{'s' * (channels > 1)}"
    parameters = sum(p.numel() for p in model.network.parameters())
    kind = f"{model.num_classes} classes" if model.num_classes else "no classes"
    title = f"{_code(Path(data_of(model.origin).source).name)}, drawn in one or two steps"
    named = [f"{number} {_code(name)}" for number, name in enumerate(model.class_names[:100])]
    more = ", ..." if len(model.class_names) > 100 else ""
    lines = [f"Classes: {', '.join(named)}{more}"] if named else []
    if "guidance" in model.takes:
        lines.append(f"Guidance: `guidance_scale` from 1 to {model.sampling.guidance_max:g}, at no extra cost.")
    else:
        lines.append("Guidance: none; `guidance_scale` is 1.")
    for steps, times in sorted(model.times.items()):
        lines.append(f"Times found by a search for {steps} steps: {', '.join(f'{t:.4f}' for t in times)}")
    settings = _recipe(from_dict(run)) if run else _known(model)
    return CARD.format(
        title=title,
        summary=f"A consistency student of {parameters:,} parameters that draws {content}, {kind}, in one evaluation of its "
        "network or a few. Made with trigflow.",
        picture="![samples](samples.png)\n\nTwo steps from seed 0, not selected.\n\n" if pictured else "",
        arguments="class_labels=[0, 1], num_inference_steps=2, " if model.num_classes else "num_inference_steps=2, ",
        conditions="\n\n".join(lines),
        figures=table(quality) if quality else "Not measured.",
        speed=f"## Speed\n\n{table(speeds)}\n\n" if speeds else "",
        recipe=table([{"setting": name, "value": value} for name, value in settings.items()]),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows; columns that no row has are left out, those of `COLUMNS` come first."""
    found = {key: None for row in rows for key in row}
    names = [key for key in COLUMNS if key in found] + [key for key in found if key not in COLUMNS]
    cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
    head = [COLUMNS.get(name, name) for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(names), *cells))


def _known(model: Model) -> dict[str, Any]:
    """What a model says of its training, where the configuration of its run is not at hand."""
    kind = model.origin.get("objective", "")
    return {
        "objective": OBJECTIVES[kind].summary if kind in OBJECTIVES else "not recorded",
        "data": _code(Path(data_of(model.origin).source).name),
        "network": name_of(model.spec),
        "sigma_data": model.process.sigma_data,
    }


def _recipe(config: RunConfig) -> dict[str, Any]:
    objective, optimizer, loop = config.objective, config.optimizer, config.loop
    raw, tangent = to_dict(config), getattr(objective, "tangent", None)
    conditioning = raw["network"]["conditioning"]
    return {
        "objective": known(objective.kind).summary,
        "data": _code(Path(config.data.source).name),
        "network": raw["network"]["kind"],
        "time embedding": f"{conditioning['time_embedding']}, c_noise(t) = {conditioning['time_map']}",
        "sigma_data": config.process.sigma_data,
        "training times": f"log-normal, P_mean {objective.proposal.mean:g}, P_std {objective.proposal.std:g}",
        **({"tangent": f"{tangent.mode}, c = {tangent.c:g}, warmup {tangent.warmup} iterations"} if tangent else {}),
        "adaptive weighting": "yes" if objective.learns_weight else "no",
        "iterations": loop.iterations,
        "batch size": loop.batch_size,
        "optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g} ({optimizer.schedule})",
        "average of the weights": config.ema.kind,
        "precision": loop.precision,
        "seed": loop.seed,
    }


def _figures(path: Path) -> dict[str, Any]:
    raw = migrated("report", read_json(path, "figures"), f"figures '{path}'")
    if "fd" not in raw:
        raise UserError(
            f"figures '{path}' hold no Frechet distance; expected a file of trigflow demo or evaluate; remove or replace it"
        )
    return raw


def _code(text: str) -> str:
    """Any text as code in Markdown, on one line and without the signs that would end it."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).replace("|", "/").split())
