"""Studies: named grids of runs and seeds that show whether a finding holds."""

from trigflow.study.bases import BASES
from trigflow.study.findings import FINDINGS, STUDIES
from trigflow.study.spec import Arm, Base, Changes, Draw, Expect, Study

__all__ = ["BASES", "FINDINGS", "STUDIES", "Arm", "Base", "Changes", "Draw", "Expect", "Study"]
