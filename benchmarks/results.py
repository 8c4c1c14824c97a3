"""docs/results.md and its figures, from the committed results of all studies.

    python benchmarks/results.py            # write docs/results.md and docs/results/*.png
    python benchmarks/results.py --check    # only compare docs/results.md with what would be written

Reads benchmarks/results/study-STUDY-BASE.json (the results.json of `python -m studies STUDY --base BASE`), the bars of
seeds.json and mnist.json, and notes.json: by STUDY-BASE a remark in words, without figures, on what was found. Pictures need
matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from studies import FINDINGS, STUDIES, Study
from studies.judge import Verdict, judge
from studies.results import Results, load_results
from studies.study_table import label, table, terms
from trigflow.runtime.files import read_json, write_text

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"(?<![\w.])[\d.]*\d")
"""A number that is no part of a name (bf16, sd2)."""

HEAD = """\
# Results

Each finding of Lu and Song 2025 as a study on real images: what the paper says, what was measured here, and whether it holds,
also where it does not. This page is written by `python benchmarks/results.py` from the files in
[benchmarks/results](../benchmarks/results); every figure on it is from one of them.

How to read it:

* A *cell* is one training with one seed, from its teacher on. Means are over seeds, ± is the standard error of the mean.
  Fréchet distance, precision and recall are in [the feature space of the data set](metrics.md): compare them with each other,
  not with published figures of other data.
* Two arms are compared seed by seed. An expectation *holds* when the mean difference is in its favour beyond a confidence
  interval of 95 % (Student's t; with three seeds that is 4.3 standard errors), *does not hold* when it is so against it, and is
  *not settled* in between. A training that diverged counts as worse than one that did not, by at least the largest difference
  measured in that comparison.
* Arms of a study have either equal iterations or equal training time, as stated above each table. For equal time the step
  times of both arms are measured in turn in one process and iterations fitted to them; the seconds in the table are those
  really used, beside whatever else ran on the machine.
* Expectations follow from the claim. Arms that were added after others of their study had been seen are named in its remark.
  The study `rates` chooses a learning rate for each objective, by its two-step samples, on a seed that no comparison uses.

To repeat one, in a clone: `python -m studies NAME --base BASE`, with the name in brackets behind the title of its section."""


def summary_of(verdicts: list[Verdict]) -> str:
    """One word for all expectations of a study."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if not outcomes:
        return "makes no claim"
    if "holds" in outcomes:
        return "holds" if outcomes == {"holds"} else "holds in part"
    return "does not hold" if "does not hold" in outcomes else "not settled"


def what(verdict: Verdict) -> str:
    """An expectation in words."""
    expect = verdict.expect
    if expect.within is not None:
        return f"{expect.better} within {expect.within:g}x of {expect.worse}"
    if expect.better == expect.worse:
        return f"{expect.better}: {label(expect.figure)} better than {label(expect.against or expect.figure)}"
    return f"{expect.better} better than {expect.worse}"


def by_what(verdict: Verdict) -> str:
    """The figure, or the two figures, of an expectation in words."""
    expect = verdict.expect
    return label(expect.figure) + (f" against {label(expect.against)}" if expect.against else "")


def margin(verdict: Verdict) -> str:
    """By how much, and how many diverged."""
    parts = []
    if verdict.difference is not None:
        error = "" if verdict.error is None else f" ± {verdict.error:.2g}"
        parts.append(f"{verdict.difference:+.3g}{error}")
    for arm, count in ((verdict.expect.better, verdict.better_diverged), (verdict.expect.worse, verdict.worse_diverged)):
        if count:
            parts.append(f"{arm} diverged in {count}")
    return ", ".join(parts) or "–"


def rows(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


# Parts of the page ---------------------------------------------------------------------------------------------------


def summary(found: dict[tuple[str, str], Results]) -> str:
    """The table at the top: a row for each finding and base."""
    letters = {study.name: f"{letter[0]}. " for letter, study in FINDINGS.items()}
    lines = []
    for study in STUDIES.values():
        for base in bases_of(study, found):
            title = f"[{letters.get(study.name, '')}{study.title}](#{anchor(study)})"
            if (study.name, base) not in found:
                lines.append([title, base, "not measured yet", "", ""])
                continue
            verdicts = judge(found[study.name, base])
            counts = [sum(v.outcome == o for v in verdicts) for o in ("holds", "does not hold", "not settled")]
            counted = " / ".join(map(str, counts)) if verdicts else ""
            lines.append([title, base, f"**{summary_of(verdicts)}**", counted, failures(verdicts)])
    header = ("finding", "data", "outcome", "expectations that hold / do not / are not settled", "what does not hold")
    return f"## Summary\n\n{rows(header, lines)}"


def failures(verdicts: list[Verdict]) -> str:
    """The expectations that do not hold, those that differ in the figure alone together."""
    figures: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome == "does not hold":
            figures.setdefault(what(verdict), []).append(by_what(verdict))
    return "<br>".join(f"{expected} ({'; '.join(by)})" for expected, by in figures.items())


def section(study: Study, found: dict[tuple[str, str], Results], notes: dict[str, str]) -> str:
    """Claim, and what was measured on every base."""
    parts = [f"## {study.title} (`{study.name}`)", f"**Claim.** {study.claim}"]
    for base in bases_of(study, found):
        name = f"{study.name}-{base}"
        if (study.name, base) not in found:
            parts.append(f"### {base}\n\nNot measured yet.")
            continue
        results = found[study.name, base]
        verdicts = judge(results)
        parts += [f"### {base}: {summary_of(verdicts)}" if verdicts else f"### {base}", terms(results)]
        parts += [table(results), f"![{study.title}, {base}](results/{name}.png)"]
        if verdicts:
            lines = [[what(v), by_what(v), f"**{v.outcome}**", margin(v), str(v.n)] for v in verdicts]
            parts.append(rows(("expected", "figure", "outcome", "better by", "seeds"), lines))
        parts += [bad_ends(results), notes.get(name, ""), made_by(results)]
    return "\n\n".join(part for part in parts if part)


def bad_ends(results: Results) -> str:
    """The cells that diverged or failed, and why."""
    cells = [c for c in [*results.teachers.values(), *results.cells] if c.status in ("diverged", "failed")]
    return "\n".join(f"* {cell.arm}, seed {cell.seed}, {cell.status}: {cell.reason}" for cell in cells)


def made_by(results: Results) -> str:
    """Machine, and how to repeat it; studies were `trigflow study` when the first results were made."""
    command = results.command.replace("trigflow study", "python -m studies", 1)
    return f"Made on {'; '.join(map(machine, results.machines))}. To repeat it: `{command}`."


def machine(facts: dict[str, Any]) -> str:
    """A machine and its versions in words."""
    device = "" if facts["device"] == "cpu" else f", {facts['device']}"
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    versions = f"Python {facts['python']}, PyTorch {facts['torch']}, trigflow {facts['trigflow']}"
    return f"{facts['processor']}, {threads}{device} ({versions})"


def bars(title: str, raw: dict[str, Any]) -> str:
    """A benchmark of whole demos: its distances, and what is asked of it."""
    fd, count = raw["mean"]["fd"], len(raw["reports"])
    distances = (
        f"Fréchet distance{', mean over seeds' if count > 1 else ''}: teacher {fd['teacher']:.3f}, student with one evaluation "
        f"{fd['student_1']:.3f}, with two {fd['student_2']:.3f}; real against real {fd['real']:.3f}."
    )
    lines = [[b["what"], _plain(b["measured"]), b["bar"], "met" if b["met"] else "**missed**"] for b in raw["bars"]]
    made = f"{count} {'seeds' if count > 1 else 'seed'}. Made by `{raw['command']}` on {machine(raw['machine'])}."
    return f"## {title}\n\n{distances}\n\n{rows(('what', 'measured', 'bar', ''), lines)}\n\n{made}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def bases_of(study: Study, found: dict[tuple[str, str], Results]) -> list[str]:
    """The bases that a study is meant for, then any others that it was run on."""
    return [*study.bases, *sorted(base for name, base in found if name == study.name and base not in study.bases)]


def anchor(study: Study) -> str:
    """What the title of a section becomes in links to it."""
    return re.sub(r"[^\w\- ]", "", f"{study.title} ({study.name})".lower()).replace(" ", "-")


# The whole -----------------------------------------------------------------------------------------------------------


def read_all(folder: Path) -> dict[tuple[str, str], Results]:
    """Every study of the folder, by study and base."""
    every = [load_results(path) for path in sorted(folder.glob("study-*.json"))]
    return {(results.study.name, results.base): results for results in every}


def read_notes(folder: Path, found: dict[tuple[str, str], Results]) -> dict[str, str]:
    """Remarks by STUDY-BASE; they may explain, but not add figures."""
    path = folder / "notes.json"
    notes: dict[str, str] = read_json(path, "notes") if path.is_file() else {}
    unknown = sorted(set(notes) - {f"{study}-{base}" for study, base in found})
    if unknown:
        raise SystemExit(f"notes.json speaks of {', '.join(unknown)}; expected studies that have results")
    for name, note in notes.items():
        if number := FIGURE.search(note):
            raise SystemExit(f"the note on {name} has the figure {number[0]}; expected words; figures come from results")
    return notes


def page(folder: Path) -> str:
    """The content of docs/results.md from a folder of results."""
    found = read_all(folder)
    notes = read_notes(folder, found)
    parts = [HEAD, summary(found)]
    titles = {"seeds": "Default settings, seed after seed", "mnist": "mnist, default settings"}
    parts += [bars(titles[n], read_json(folder / f"{n}.json", n)) for n in titles if (folder / f"{n}.json").is_file()]
    parts += [section(study, found, notes) for study in STUDIES.values()]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    text, out = page(args.results), args.docs / "results.md"
    if args.check:
        same = out.is_file() and out.read_text(encoding="utf-8") == text
        print(f"{out} is up to date" if same else f"{out} differs; write it with: python benchmarks/results.py")
        return 0 if same else 1
    from studies.figure import figure

    pictures = args.docs / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for (study, base), results in read_all(args.results).items():
        figure(results, pictures / f"{study}-{base}.png")
    write_text(out, text)
    print(f"{out}: {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
