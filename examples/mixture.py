"""Consistency distillation by hand, in two dimensions: the four nouns (process, network, objective, sampler) and a loop.

    python examples/mixture.py

A teacher learns eight Gaussian blobs on a circle with the diffusion loss; a student is distilled from it with sCD and draws
in one and two evaluations. Prints the distance of each from fresh data. About two minutes on one core.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from trigflow import Proposal, TrigFlow
from trigflow.evaluation import frechet_distance, gaussian_statistics
from trigflow.networks import MLP, MLPConfig
from trigflow.objectives import Loss, TangentConfig, diffusion_loss, flow_map_loss, objective_of
from trigflow.samplers import consistency_times, flow_map_sample, heun, network_velocity, sigma_grid

process, proposal = TrigFlow(sigma_data=0.5), Proposal(mean=-1.0, std=1.4)
generator = torch.Generator().manual_seed(0)


def draw_data(n: int) -> Tensor:
    """Eight blobs on a circle, standard deviation 0.5 per coordinate."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centres = 0.7 * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    return centres + 0.07 * torch.randn(n, 2, generator=generator)


def fit(network: MLP, objective: Callable[[Tensor, Tensor, Tensor, int], Loss], iterations: int, lr: float) -> None:
    """Minimize an objective of (x0, noise, t, iteration)."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99))
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / iterations))
        x0 = draw_data(256)
        loss = objective(x0, process.sample_noise(x0, generator), proposal.sample(process, 256, generator), i)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()


def radius_and_blob(x: Tensor) -> Tensor:
    """Features that see the blobs: the point, and the angle modulo 45 degrees as a point on a circle."""
    angle = 8 * torch.atan2(x[:, 1], x[:, 0])
    return torch.cat([x, torch.stack([torch.cos(angle), torch.sin(angle)], dim=1), x.norm(dim=1, keepdim=True)], dim=1)


def main() -> None:
    torch.manual_seed(0)
    teacher = MLP(MLPConfig(features=2, width=128, depth=4))
    fit(teacher, lambda x0, z, t, i: diffusion_loss(teacher, process, x0, z, t), iterations=2000, lr=2e-3)

    student, velocity = copy.deepcopy(teacher), network_velocity(teacher, process)
    scd = objective_of("scd", tangent=TangentConfig(warmup=200))
    fit(
        student,
        lambda x0, z, t, i: flow_map_loss(
            student, process, x0, z, t, teacher=velocity, config=scd, r=scd.tangent.warmup_factor(i)
        ),
        iterations=2000,
        lr=5e-4,
    )

    noise = process.sample_noise(torch.zeros(5000, 2), generator)
    jump = network_velocity(student, process)
    samples = {
        "fresh data": draw_data(5000),
        "teacher, 35 evaluations": heun(velocity, noise, sigma_grid(process, 18)),
        "student, 2 evaluations": flow_map_sample(
            jump, process, noise, consistency_times(process, 2), gamma=1, generator=generator
        ),
        "student, 1 evaluation": flow_map_sample(jump, process, noise, consistency_times(process, 1)),
        "noise": noise,
    }
    real = gaussian_statistics(radius_and_blob(draw_data(20_000)))
    for name, x in samples.items():
        print(f"{name:24} Frechet distance {frechet_distance(gaussian_statistics(radius_and_blob(x)), real):.4f}")


if __name__ == "__main__":
    main()
