"""Words to pictures: how well the two-step student of the emoji follows what is written, beside its teacher.

    python benchmarks/words.py --teacher runs/emoji-teacher --student runs/emoji-student      # about an hour on two cores
    python benchmarks/words.py --student models/emoji --picture docs/words.png                # the picture of the README

Writes benchmarks/results/emoji.json. For each model, number of steps and seed of drawing:

fd              Frechet distance to the held-out emoji, drawn for their captions, in the features of the emoji classifier
prompt accuracy share of pictures for the names of emoji in training which the classifier takes for that emoji, first of 1,898
colour accuracy share of pictures for things in a colour that are in the data ("green heart") which have that colour: the mean
                colour of what is not white is nearest to that of real pictures of it. How often this is right on real pictures
                of a thing, by means of the other things, is written beside it.

"combinations" are prompts of a thing and a colour that are not in the data, such as "blue apple": their share has no bar.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from digits import judged
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trigflow import load
from trigflow.codecs.pictures import make_grid, save_picture
from trigflow.data import open_dataset
from trigflow.data.dataset import Dataset
from trigflow.data.sources.emoji import COLOURS
from trigflow.evaluation.evaluate_model import evaluate_model
from trigflow.evaluation.features.extractors import feature_extractor, shipped_weights
from trigflow.models.model import Model
from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine

GUIDANCE = 2.0
NEW = ("blue apple", "purple banana", "pink cat", "red tree", "green dog", "yellow whale")
"""Prompts of things that the data do not have in this colour."""
SENTENCES = ("green heart", "red apple", "a cat", "rocket", "smiling face", "pizza", "blue book", "flower", "blue apple")
"""What the picture of the README is drawn for."""


def coloured(data: Dataset) -> list[tuple[str, int]]:
    """Names with a colour first, of things that are all of that colour, and their numbers."""
    things = ("heart", "circle", "square", "book", "apple")
    found = []
    for number, texts in enumerate(data.captions.texts if data.captions else ()):
        words = texts[0].split()
        if len(words) == 2 and words[0] in COLOURS and words[1] in things:
            found.append((texts[0], number))
    return found


def ink(images: Tensor) -> Tensor:
    """Mean colour, in [0, 1], of what differs from white, more of what differs more; uint8 `(n, 3, h, w)` to `(n, 3)`."""
    x = images.double() / 255
    weight = (1 - x).amax(1, keepdim=True).clamp(min=0.02) - 0.02
    return (x * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-9)


class ColourJudge:
    """Names the colour of a picture by the nearest of the means of real pictures."""

    def __init__(self, data: Dataset, without: str = "") -> None:
        named = [(name.split()[0], number) for name, number in coloured(data) if name.split()[1] != without]
        self.colours = sorted({colour for colour, _ in named})
        groups = [torch.tensor([n for c, n in named if c == colour]) for colour in self.colours]
        self.means = torch.stack([ink(data.stored(group)).mean(0) for group in groups])

    def __call__(self, images: Tensor) -> list[str]:
        return [self.colours[i] for i in torch.cdist(ink(images), self.means).argmin(1).tolist()]


def accuracy_of_judge(data: Dataset) -> float:
    """On each kind of thing, by means of the others."""
    right = []
    for thing in sorted({name.split()[1] for name, _ in coloured(data)}):
        judge = ColourJudge(data, without=thing)
        for name, number in coloured(data):
            colour, kind = name.split()
            if kind == thing and colour in judge.colours:
                right.append(judge(data.stored(torch.tensor([number]))) == [colour])
    return sum(right) / len(right)


def measure(model: Model, steps: int, seed: int, num: int, draws: int) -> dict[str, float]:
    """The three figures of a model at a number of steps."""
    data = open_dataset("emoji")
    assert data.captions is not None
    how: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE, "seed": seed}
    found = evaluate_model(model, num=num, data="emoji-held-out", features="emoji", **how)

    classifier: Any = feature_extractor("emoji")
    names = [texts[0] for texts in data.captions.texts]
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:num].tolist()
    drawn = model.sample(len(chosen), prompt=[names[i] for i in chosen], **how)
    guessed = torch.cat([classifier.logits(part).argmax(1) for part in drawn.split(256)])
    prompts = float((guessed == torch.tensor(chosen)).double().mean())

    judge, result = ColourJudge(data), {}
    for what, texts in (("colour", [name for name, _ in coloured(data)]), ("combinations", list(NEW))):
        drawn = model.sample(draws * len(texts), prompt=texts, **how)
        meant = [texts[i % len(texts)].split()[0] for i in range(len(drawn))]
        result[what] = sum(a == b for a, b in zip(judge(drawn), meant, strict=True)) / len(meant)
    kept = {name: found[name] for name in ("fd", "fd_real", "precision", "recall", "samples_per_second")}
    return {**kept, "prompt_accuracy": prompts, "colour_accuracy": result["colour"], "combinations": result["combinations"]}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def run(args: argparse.Namespace) -> bool:
    """Measure, write the file, and say whether the bars are met."""
    known = int(shipped_weights("emoji")[1]["classes"])
    if (found := sum(len(open_dataset(part)) for part in ("emoji", "emoji-held-out"))) != known:
        raise SystemExit(f"{found} emoji with this font and package; the classifier knows {known}; use those of CI")
    teacher, student = load(args.teacher), load(args.student)
    plans = {"teacher": (teacher, args.teacher_steps), "student_2": (student, 2), "student_1": (student, 1)}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for seed in args.seeds:
        for name, (model, steps) in plans.items():
            rows[name].append(measure(model, steps, seed, args.num, args.draws))
            print(seed, name, {key: round(value, 3) for key, value in rows[name][-1].items()}, flush=True)
    means = {name: mean_of(found) for name, found in rows.items()}
    lost = means["teacher"]["prompt_accuracy"] - means["student_2"]["prompt_accuracy"]
    bars = [
        ("fd, two steps / teacher", means["student_2"]["fd"] / means["teacher"]["fd"], "<=", 1.15),
        ("fd, one step / teacher", means["student_1"]["fd"] / means["teacher"]["fd"], "<=", 1.5),
        ("prompt accuracy, teacher - two steps", lost, "<=", 0.03),
        ("colour accuracy, two steps", means["student_2"]["colour_accuracy"], ">=", 0.9),
    ]  # fmt: skip
    result = {
        "machine": machine(), "command": shlex.join(["python", *sys.argv]),
        "guidance": GUIDANCE, "teacher_steps": args.teacher_steps, "num": args.num, "seeds": args.seeds,
        "classifier_accuracy": float(shipped_weights("emoji")[1]["test_accuracy"]),
        "colour_judge_accuracy": accuracy_of_judge(open_dataset("emoji")),
        "means": means, "bars": judged(bars), "runs": rows,
    }  # fmt: skip
    write_json(args.json, result)
    for bar in result["bars"]:
        print(f"{'met' if bar['met'] else 'NOT MET':8} {bar['what']}: {bar['measured']:.3f}, bar {bar['bar']}")
    return all(bar["met"] for bar in result["bars"])


def picture(student: Model, path: Path, rows: int = 4, scale: int = 2) -> None:
    """A column of pictures below each of the sentences, two steps each, on white."""
    n = len(SENTENCES)
    drawn = student.sample(rows * n, prompt=list(SENTENCES), steps=2, guidance=GUIDANCE)
    grid = make_grid(drawn, n, gap=4, scale=scale)
    sheet = Image.new("RGB", (grid.width, grid.height + 30), "white")
    sheet.paste(grid, (0, 30))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, sentence in enumerate(SENTENCES):
        centre = grid.width * (2 * column + 1) / (2 * n)
        draw.text((centre, 16), sentence, fill="black", font=font, anchor="mm")
    save_picture(sheet, path)
    print(f"{path}: {', '.join(SENTENCES)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="runs/emoji-teacher")
    parser.add_argument("--student", default="runs/emoji-student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num", type=int, default=1770, help="pictures a distance: ten for each held-out emoji")
    parser.add_argument("--teacher-steps", type=int, default=18, help="of Heun's solver, two evaluations each")
    parser.add_argument("--draws", type=int, default=20, help="pictures for each prompt with a colour")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "emoji.json")
    parser.add_argument("--picture", type=Path, help="only draw the sentences of the README into this file")
    args = parser.parse_args()
    if args.picture is not None:
        picture(load(args.student), args.picture)
    elif not run(args):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
