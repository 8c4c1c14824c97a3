"""The student of the emoji as a folder to publish: weights in half precision, and a card with what was measured.

    python tools/publish_emoji.py --student runs/emoji-student --out models/emoji

`benchmarks/results/emoji.json` has the figures, of `python benchmarks/words.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from trigflow.models.model import check_run
from trigflow.runtime.files import read_json, read_tensors, write_folder, write_json, write_tensors
from trigflow.runtime.machine import machine

ROOT = Path(__file__).parents[1]
CARD = """---
license: apache-2.0
library_name: trigflow
pipeline_tag: text-to-image
tags:
- trigflow
- consistency-model
---

# Emoji in one or two steps

A text-to-image model of {size:.1f} MB that draws pictures of 48 x 48 pixels for a few words, made for two cores of a CPU: a
consistency student (sCD, with score distillation beside it at the end) that takes the scale of guidance as an input, so that a
picture takes two evaluations and no more.

    trigflow sample models/emoji --prompt "green heart" --steps 2 --num 16 --guidance 2 --out hearts.png
    trigflow serve models/emoji --open

It reads bytes, in any language, but has learned English: the short names of 1,721 emoji and what they are called else. Simple
things, such as hearts and faces, come out as they are known and in the colour that was asked for; of things with details, the
rough shape does; combinations that are in no emoji ("blue apple") often do not.

## How it was made

{commands}

On {machine}: {teacher_hours} h of the teacher and {student_hours} h of the students, of training alone, beside other work. The
data are drawn from Google's Noto Color Emoji (SIL Open Font License 1.1) with names of the Python package `emoji`; 177 emoji
were held out of training.

## What was measured

{figures}

Guidance 2, seeds {seeds}, {num} pictures each. FD and precision and recall are of the held-out emoji in features of a small
classifier of emoji that comes with trigflow (its accuracy on variations it has not seen is {judge:.3f}); prompt accuracy is how
often that classifier takes a picture for the emoji that was asked for, of 1,898; colour accuracy, how often things that are in
the data in several colours come out in the one asked for (the judge is right on {colours:.3f} of real ones).

## Limits

It draws emoji and nothing else. Trained on a CPU for some hours, it is a demonstration: its pictures are grainy, and the
classifier recognizes the very emoji in fewer of them than in those of its teacher. Rare words are not known, and a word that it
does not know gives some emoji.
"""
COLUMNS = {
    "fd": "FD", "precision": "precision", "recall": "recall", "prompt_accuracy": "prompt accuracy",
    "colour_accuracy": "colour accuracy", "samples_per_second": "pictures a second",
}  # fmt: skip
ROWS = {"teacher": "teacher, {steps} steps of Heun, guided", "student_2": "two steps", "student_1": "one step"}


def stages(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The runs and merges that made this one, and what is said of them; each once, after all that it stands on."""
    if (merge := run / "merged.json").exists():
        said = read_json(merge, "merge")
        before = [said[name] for name in ("model", "add", "less")]
    else:
        said = read_json(run / "config.json", "settings")
        before = [name for name in (said.get("teacher"), said.get("start")) if name]
    made = [stage for name in before for stage in stages(Path(name))]
    return [*{str(path): (path, what) for path, what in [*made, (run, said)]}.values()]


def commands(made: list[tuple[Path, dict[str, Any]]]) -> str:
    """How the student was made, by the settings of the runs. A longer run of a teacher goes on from a copy of the last one."""
    lines: list[str] = []
    teachers = [path for path, said in made if "model" not in said and not said.get("teacher")]
    teachers.sort(key=iterations)
    for run, said in sorted(made, key=lambda stage: teachers.index(stage[0]) if stage[0] in teachers else len(teachers)):
        out = f"--out runs/{run.name}"
        if "model" in said:
            model, add, less = (f"runs/{Path(said[name]).name}" for name in ("model", "add", "less"))
            lines.append(f"python tools/merge_models.py {model} --add {add} --less {less} \\")
            lines.append(f"    --share {said['share']:g} {out}")
        elif run in teachers:
            place = teachers.index(run)
            if place:
                lines.append(f"cp -r runs/{teachers[place - 1].name} runs/{run.name}")
            resume = " --resume yes" if place else ""
            lines.append(f"trigflow train --preset emoji {out}{resume} --loop.iterations {iterations(run)}")
        else:
            objective, optimizer = said["objective"], said["optimizer"]
            told = {
                "objective.kind": objective["kind"], "loop.iterations": said["loop"]["iterations"],
                "objective.proposal.mean": objective["proposal"]["mean"],
                "objective.proposal.std": objective["proposal"]["std"],
                "optimizer.schedule": optimizer["schedule"], "optimizer.lr": optimizer["lr"],
                "objective.tangent.warmup": objective["tangent"]["warmup"],
                "objective.fake-lr": objective.get("fake_lr"), "objective.lambda-vsd": objective.get("lambda_vsd"),
                "objective.rollouts": objective.get("rollouts"),
            }  # fmt: skip
            options = [f"--{name} {value}" for name, value in told.items() if value is not None]
            start = f" --from runs/{Path(said['start']).name}" if said.get("start") else ""
            lines.append(f"trigflow distill runs/{Path(said['teacher']).name} --preset emoji{start} {out} \\")
            parts = [" ".join(options[i : i + 3]) for i in range(0, len(options), 3)]
            lines += [*(f"    {part} \\" for part in parts[:-1]), f"    {parts[-1]}"]
    last, teacher = (f"runs/{run.name}" for run in (made[-1][0], teachers[-1]))
    if read_json(made[-1][0] / "model.json", "model")["times"]:
        lines.append(f"trigflow evaluate {last} --num 590 --steps 2 --guidance 2 --find-times")
    lines.append(f"python benchmarks/words.py --teacher {teacher} --student {last}")
    lines.append(f"python tools/publish_emoji.py --student {last}")
    return "\n".join(f"    {line}" for line in lines)


def iterations(run: Path) -> int:
    return int(read_json(run / "config.json", "settings")["loop"]["iterations"])


def hours(run: Path) -> float:
    """Of training, from the pictures a second in its log."""
    batch = read_json(run / "config.json", "settings")["loop"]["batch_size"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    known = {line["iteration"]: line["images_per_second"] for line in lines if "images_per_second" in line}
    before, seconds = 0, 0.0
    for iteration, rate in sorted(known.items()):
        seconds += (iteration - before) * batch / rate
        before = iteration
    return seconds / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=Path("runs/emoji-student"))
    parser.add_argument("--out", type=Path, default=Path("models/emoji"))
    args = parser.parse_args()
    found = read_json(ROOT / "benchmarks" / "results" / "emoji.json", "figures")
    made = stages(args.student)
    trained = {run: said.get("teacher") for run, said in made if "model" not in said}
    teacher = max((run for run, of in trained.items() if not of), key=iterations)  # its log is that of the shorter one, too
    tensors = read_tensors(check_run(args.student) / "network.safetensors", "weights")
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    if bad := [name for name, value in half.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise SystemExit(f"{bad[0]} of '{args.student}' is not finite in float16; expected finite weights; train it anew")
    size = sum(value.numel() * value.element_size() for value in half.values()) / 1e6
    header = f"| | {' | '.join(COLUMNS.values())} |\n| --- |{' --- |' * len(COLUMNS)}\n"
    rows = []
    for name, title in ROWS.items():
        cells = [f"{found['means'][name][key]:.3g}" for key in COLUMNS]
        rows.append(f"| {title.format(steps=found['teacher_steps'])} | {' | '.join(cells)} |")
    card = CARD.format(
        size=size, machine=machine()["processor"], figures=header + "\n".join(rows), num=found["num"],
        commands=commands(made),
        teacher_hours=f"{hours(teacher):.1f}",
        student_hours=f"{sum(hours(run) for run, of in trained.items() if of):.1f}",
        seeds=", ".join(map(str, found["seeds"])), judge=found["classifier_accuracy"], colours=found["colour_judge_accuracy"],
    )  # fmt: skip

    def write(folder: Path) -> None:
        write_tensors(folder / "network.safetensors", half)
        write_json(folder / "model.json", read_json(args.student / "model.json", "model"))
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(args.out, write)
    print(f"{args.out}: {size:.1f} MB")


if __name__ == "__main__":
    main()
