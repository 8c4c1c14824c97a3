"""All checks on one run, and the report of what they found."""

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigflow.lab.doctor.checks import CHECKS, Diagnosis, NotSeen, Sound
from trigflow.lab.doctor.run_record import RunRecord, read_record


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        record: the run.
        diagnoses: what is wrong.
        sound: what was looked at and is not wrong.
        not_seen: what could not be looked at, and why.
    """

    record: RunRecord
    diagnoses: list[Diagnosis]
    sound: list[Sound]
    not_seen: list[NotSeen]

    def facts(self) -> dict[str, Any]:
        """Plain JSON types."""
        config = self.record.config
        return {
            "folder": str(self.record.folder),
            "objective": config.objective.kind,
            "iteration": self.record.iteration,
            "iterations": config.loop.iterations,
            "finished": self.record.finished,
            "lines": len(self.record.lines),
            "diagnoses": [dataclasses.asdict(diagnosis) for diagnosis in self.diagnoses],
            "sound": [dataclasses.asdict(sound) for sound in self.sound],
            "not_seen": [dataclasses.asdict(missing) for missing in self.not_seen],
        }

    def text(self) -> str:
        """For a terminal."""
        facts, count = self.facts(), len(self.diagnoses)
        lines = [
            f"{facts['folder']}: {facts['objective']}, iteration {facts['iteration']} of {facts['iterations']}, "
            f"{facts['lines']} lines of log",
            "",
            "nothing found" if not count else f"{count} {'diagnosis' if count == 1 else 'diagnoses'}",
        ]
        for diagnosis in self.diagnoses:
            lines += ["", f"{diagnosis.name}: {diagnosis.title}"]
            lines += _wrapped("evidence", diagnosis.evidence) + _wrapped("remedy", diagnosis.remedy)
        if self.sound:
            lines += ["", "looked at, nothing found"]
            lines += [line for sound in self.sound for line in _wrapped(sound.name, sound.seen)]
        if self.not_seen:
            lines += ["", "not looked at"]
            lines += [line for missing in self.not_seen for line in _wrapped(missing.name, missing.reason)]
        return "\n".join(lines)


def examine(folder: str | Path) -> Examination:
    """Examine the run in this folder, finished or not. Raises a UserError when it is no run folder, or has no line of log
    yet."""
    record = read_record(Path(folder))
    outcomes = [dataclasses.replace(check(record), name=name) for name, check in CHECKS.items()]
    return Examination(
        record,
        [outcome for outcome in outcomes if isinstance(outcome, Diagnosis)],
        [outcome for outcome in outcomes if isinstance(outcome, Sound)],
        [outcome for outcome in outcomes if isinstance(outcome, NotSeen)],
    )


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=f"  {name:16} ", subsequent_indent=" " * 19)
