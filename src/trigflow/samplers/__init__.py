"""Drawing samples: solvers of the probability-flow ODE for teachers, few-step sampling for consistency models.

A sampler is a function of (velocity, x, times); `network_velocity` and `guided_velocity` make the first from a network,
`TrigFlow.sample_noise` the second, `sigma_grid` and `consistency_times` the third.
"""

from trigflow.samplers.consistency import consistency_sample, consistency_times
from trigflow.samplers.flow_map import flow_map_sample, search_times_and_gamma, segment_times
from trigflow.samplers.grid import sigma_grid
from trigflow.samplers.guidance import JumpFunction, Network, VelocityFunction, guided_velocity, network_velocity
from trigflow.samplers.meanflow import meanflow_sample, meanflow_times
from trigflow.samplers.multistep import multistep_sample
from trigflow.samplers.ode import (
    SOLVERS,
    Solver,
    ddim,
    dpm_solver_2s,
    dpm_solver_pp_2m,
    get_solver,
    heun,
    nfe,
    steps_for_nfe,
)
from trigflow.samplers.sampling import Sampling
from trigflow.samplers.schedule import ScheduleSearch, Trial, search_times

__all__ = [
    "SOLVERS",
    "JumpFunction",
    "Network",
    "Sampling",
    "ScheduleSearch",
    "Solver",
    "Trial",
    "VelocityFunction",
    "consistency_sample",
    "consistency_times",
    "ddim",
    "dpm_solver_2s",
    "dpm_solver_pp_2m",
    "flow_map_sample",
    "get_solver",
    "guided_velocity",
    "heun",
    "meanflow_sample",
    "meanflow_times",
    "multistep_sample",
    "network_velocity",
    "nfe",
    "search_times",
    "search_times_and_gamma",
    "segment_times",
    "sigma_grid",
    "steps_for_nfe",
]
