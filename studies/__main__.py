"""The command `python -m studies`, typed in a clone of the repository."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from studies.bases import choose_base
from studies.judge import judge
from studies.paper_studies import STUDIES
from studies.runner import Settings, run_study
from trigflow.cli import entry
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Study:
    """See whether a finding holds: train and score every arm of a study with several seeds, and compare them.

    `python -m studies list` shows the studies; `all` runs those meant for the base one after the other. Results, table and
    figure are written to OUT/STUDY-BASE. A study that was stopped, or killed, goes on where it was when it is started again:
    finished cells are not repeated, and teachers and students that several studies need are trained once.

    Example: python -m studies tangent --out runs/lab --jobs 2
    """

    study: Annotated[Positional[str], arg(metavar="STUDY")]
    """Name of a study, all, or list."""
    base: str | None = None
    """Teacher and student that the study changes, sized for it: digits (the default) or mnist."""
    teacher_preset: str | None = None
    """Instead of a base: preset of the teacher, see trigflow recipes; with --student-preset."""
    student_preset: str | None = None
    """Instead of a base: preset of the student."""
    data: str | None = None
    """Other data than those of base or presets: digits, mnist, a folder or zip of images."""
    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.settings.device

    def run(self) -> None:
        if self.study == "list":
            print("\n".join(f"{s.name:14} {s.title} ({', '.join(s.bases)})" for s in STUDIES.values()))
            return
        if self.study not in (*STUDIES, "all"):
            raise UserError(
                f"unknown study '{self.study}'; expected one of {', '.join(STUDIES)}, all or list; correct the name"
            )
        name, base = choose_base(self.base, self.teacher_preset, self.student_preset, self.data)
        if self.study == "all" and self.settings.only:
            raise UserError("--only with all studies, whose arms differ; expected one study; name it")
        failed = 0
        named = self.student_preset is None
        every = [study for study in STUDIES.values() if not named or name in study.bases]
        if named and self.data is not None:
            name += f"-{Path(self.data).stem}"  # whose results are not those of the base
        for study in every if self.study == "all" else [STUDIES[self.study]]:
            results = run_study(study, base, name, self.settings)
            failed += sum(cell.status == "failed" for cell in results.cells)
            folder = self.settings.folder(study, name)
            print(f"{study.title}: {folder / 'table.md'}, {folder / 'figure.png'}")
            print("\n".join(f"  {verdict.text}" for verdict in judge(results)), flush=True)
        if failed:
            print(f"{failed} cells failed; their reasons are in table.md, run them again with --retry", file=sys.stderr)
            sys.exit(1)


def main(args: list[str] | None = None) -> None:
    """Entry point: exit codes as of `trigflow`, and 1 where a cell failed."""
    entry.main(args, {"study": Study}, "python -m studies")


if __name__ == "__main__":
    main()
