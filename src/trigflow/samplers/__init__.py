"""Drawing samples: solvers of the probability-flow ODE for teachers, jumps for students of every kind.

A sampler is a function of (velocity, x, times); `network_velocity` and `guided_velocity` make the first from a network,
`TrigFlow.sample_noise` the second, `sigma_grid`, `consistency_times`, `segment_times` and `meanflow_times` the third.
"""

from trigflow.runtime.errors import renamed
from trigflow.samplers.editing import Edit
from trigflow.samplers.flow_map import flow_map_sample
from trigflow.samplers.grid import consistency_times, meanflow_times, sigma_grid
from trigflow.samplers.guidance import JumpFunction, Network, VelocityFunction, guided_velocity, network_velocity
from trigflow.samplers.ode import SOLVERS, Solver, ddim, dpm_solver_2s, dpm_solver_pp_2m, get_solver, heun, nfe, steps_for_nfe
from trigflow.samplers.sampling import Sampling
from trigflow.samplers.search import ScheduleSearch, Trial, search_times
from trigflow.segments import segment_times

RENAMED = {
    "consistency_sample": "flow_map_sample(..., gamma=1)",
    "meanflow_sample": "flow_map_sample(velocity, process, noise, times)",
    "multistep_sample": "flow_map_sample(velocity, process, noise, segment_times(process, segments))",
}
"""Old names, and how they are spelled now."""


__getattr__ = renamed(__name__, RENAMED)


__all__ = [
    "SOLVERS",
    "Edit",
    "JumpFunction",
    "Network",
    "Sampling",
    "ScheduleSearch",
    "Solver",
    "Trial",
    "VelocityFunction",
    "consistency_times",
    "ddim",
    "dpm_solver_2s",
    "dpm_solver_pp_2m",
    "flow_map_sample",
    "get_solver",
    "guided_velocity",
    "heun",
    "meanflow_times",
    "network_velocity",
    "nfe",
    "search_times",
    "segment_times",
    "sigma_grid",
    "steps_for_nfe",
]
