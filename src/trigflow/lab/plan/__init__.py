"""What a run will take, before it is started: operations, memory, hours. Nothing is computed, only counted."""

from trigflow.lab.plan.hardware import GPU, GPUS, get_gpu
from trigflow.lab.plan.memory import Memory, fitted, memory, student_of
from trigflow.lab.plan.run_plan import RunPlan, make_plan
from trigflow.lab.plan.step import Step, StepCount, count_run
from trigflow.lab.plan.trace import Trace
from trigflow.runtime.errors import renamed

__getattr__ = renamed(__name__, {"Counted": "Step", "Plan": "RunPlan", "RunCounts": "Step"})

__all__ = [
    "GPU", "GPUS", "Memory", "RunPlan", "Step", "StepCount", "Trace", "count_run", "fitted", "get_gpu", "make_plan", "memory",
    "student_of",
]  # fmt: skip
