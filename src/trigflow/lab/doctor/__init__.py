"""The doctor: reads a run and says in plain words what is wrong with its training."""

from trigflow.lab.doctor.checks import CHECKS, Diagnosis, NotSeen, Outcome, Sound
from trigflow.lab.doctor.examine import Examination, examine
from trigflow.lab.doctor.run_record import RunRecord, read_record
from trigflow.runtime.errors import renamed

__getattr__ = renamed(__name__, {"Record": "RunRecord"})

__all__ = ["CHECKS", "Diagnosis", "Examination", "NotSeen", "Outcome", "RunRecord", "Sound", "examine", "read_record"]
