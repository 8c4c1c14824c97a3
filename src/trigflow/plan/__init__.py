"""What a run will take, before it is started: operations, memory, hours. Nothing is computed, only counted."""

from trigflow.plan.hardware import GPU, GPUS, get_gpu
from trigflow.plan.memory import Memory, memory
from trigflow.plan.report import Plan, make_plan
from trigflow.plan.step import Counted, Step, StepCount, count_run
from trigflow.plan.trace import Trace

__all__ = [
    "GPU",
    "GPUS",
    "Counted",
    "Memory",
    "Plan",
    "Step",
    "StepCount",
    "Trace",
    "count_run",
    "get_gpu",
    "make_plan",
    "memory",
]
