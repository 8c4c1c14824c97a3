"""The doctor: reads a run and says in plain words what is wrong with its training."""

from trigflow.lab.doctor.checks import CHECKS
from trigflow.lab.doctor.examine import Examination, examine
from trigflow.lab.doctor.outcome import Diagnosis, NotSeen, Outcome, Sound
from trigflow.lab.doctor.record import Record, read_record

__all__ = ["CHECKS", "Diagnosis", "Examination", "NotSeen", "Outcome", "Record", "Sound", "examine", "read_record"]
