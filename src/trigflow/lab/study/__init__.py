"""Studies: named grids of runs and seeds that show whether a finding holds."""

from trigflow.lab.recipes.changes import Changes
from trigflow.lab.study.bases import BASES
from trigflow.lab.study.paper_studies import FINDINGS, STUDIES
from trigflow.lab.study.spec import Arm, Base, Draw, Expect, Study

__all__ = ["BASES", "FINDINGS", "STUDIES", "Arm", "Base", "Changes", "Draw", "Expect", "Study"]
