"""The doctor: reads a run and says in plain words what is wrong with its training."""

from trigflow.doctor.checks import CHECKS
from trigflow.doctor.examine import Examination, examine
from trigflow.doctor.outcome import Diagnosis, NotSeen, Outcome, Sound
from trigflow.doctor.record import Record, read_record

__all__ = ["CHECKS", "Diagnosis", "Examination", "NotSeen", "Outcome", "Record", "Sound", "examine", "read_record"]
