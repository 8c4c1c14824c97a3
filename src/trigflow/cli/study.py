"""`trigflow study`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from trigflow.runtime.errors import UserError

if TYPE_CHECKING:
    from trigflow.lab.study.spec import Base


@dataclass(frozen=True)
class Study:
    """See whether a finding holds: train and score every arm of a study with several seeds, and compare them.

    `trigflow study list` shows the studies; `all` runs those meant for the base one after the other. Results, table and figure
    are written to OUT/STUDY-BASE. A study that was stopped, or killed, goes on where it was when it is started again: finished
    cells are not repeated, and teachers and students that several studies need are trained once.

    Example: trigflow study tangent --out runs/lab --jobs 2
    """

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """Name of a study, all, or list."""
    out: Path = Path("runs/lab")
    """Folder of all studies."""
    base: str | None = None
    """Teacher and student that the study changes, sized for it: digits (the default) or mnist."""
    teacher_preset: str | None = None
    """Instead of a base: preset of the teacher, see trigflow recipes; with --student-preset."""
    student_preset: str | None = None
    """Instead of a base: preset of the student."""
    data: str | None = None
    """Other data than those of base or presets: digits, mnist, a folder or zip of images."""
    only: Annotated[tuple[str, ...], arg(metavar="ARM ...")] = ()
    """Run only these arms, and those they start from."""
    seeds: Annotated[tuple[int, ...], arg(metavar="SEED ...")] = ()
    """One teacher and one student of every arm for each; by default those of the study, 0 1 2 for most."""
    jobs: int = 1
    """Cells at a time, each in a process of its own with an equal share of the cores."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    num: int = 2000
    """Samples behind every score."""
    retry: bool = False
    """Run failed cells again."""
    smoke: bool = False
    """Only see that it works: one seed and a few steps of the first two arms, in miniature."""
    quiet: bool = False
    """Print no line for each cell."""

    def run(self) -> None:
        import sys

        from trigflow.lab.study.judge import judge
        from trigflow.lab.study.paper_studies import STUDIES
        from trigflow.lab.study.runner import Settings, run_study

        if self.study == "list":
            print("\n".join(f"{s.name:14} {s.title} ({', '.join(s.bases)})" for s in STUDIES.values()))
            return
        if self.study not in (*STUDIES, "all"):
            raise UserError(
                f"unknown study '{self.study}'; expected one of {', '.join(STUDIES)}, all or list; correct the name"
            )
        name, base = self._base()
        if self.study == "all" and self.only:
            raise UserError("--only with all studies, whose arms differ; expected one study; name it")
        settings = Settings(
            self.out, self.seeds, self.only, self.jobs, self.device, self.num, self.retry, self.smoke, self.quiet
        )
        failed = 0
        named = self.student_preset is None
        every = [study for study in STUDIES.values() if not named or name in study.bases]
        for study in every if self.study == "all" else [STUDIES[self.study]]:
            results = run_study(study, base, name, settings)
            failed += sum(cell.status == "failed" for cell in results.cells)
            folder = self.out / f"{study.name}-{name}{'-smoke' if self.smoke else ''}"
            print(f"{study.title}: {folder / 'table.md'}, {folder / 'figure.png'}")
            print("\n".join(f"  {verdict.text}" for verdict in judge(results)), flush=True)
        if failed:
            print(f"{failed} cells failed; their reasons are in table.md, run them again with --retry", file=sys.stderr)
            sys.exit(1)

    def _base(self) -> tuple[str, Base]:
        from trigflow.lab.study.bases import BASES
        from trigflow.lab.study.runner import base_of, with_data

        presets = (self.teacher_preset, self.student_preset)
        if any(presets):
            if self.base is not None or self.teacher_preset is None or self.student_preset is None:
                raise UserError(
                    "a base is named in two ways, or half; expected --base, or --teacher-preset with --student-preset; "
                    "correct the command line"
                )
            return self.student_preset, with_data(base_of(self.teacher_preset, self.student_preset), self.data)
        name = self.base or "digits"
        if name not in BASES:
            raise UserError(
                f"unknown base '{name}'; expected one of {', '.join(BASES)}, or --teacher-preset with --student-preset; "
                "correct --base"
            )
        return name, with_data(BASES[name], self.data)
