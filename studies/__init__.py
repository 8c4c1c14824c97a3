"""Studies: named grids of runs and seeds that show whether a finding holds."""

from studies.bases import BASES
from studies.paper_studies import FINDINGS, STUDIES
from studies.spec import Arm, Base, Draw, Expect, Study
from trigflow.lab.recipes.changes import Changes

__all__ = ["BASES", "FINDINGS", "STUDIES", "Arm", "Base", "Changes", "Draw", "Expect", "Study"]
