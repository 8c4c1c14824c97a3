"""Distilling a model of one's own: a flow-matching network that knows nothing of this library draws in two steps.

    python examples/own_model.py

A small network is trained on 8x8 digits with plain flow matching. `FlowBridge` then shows it as a TrigFlow network, exactly:
first as the teacher, and a copy of it as the student that the trainer distills. About a minute on one core.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trigflow
from trigflow.data import ImageDataset
from trigflow.models.bridges import FlowBridge
from trigflow.objectives import TangentConfig, objective_of
from trigflow.training.config import LoopConfig, OptimizerConfig, RunConfig
from trigflow.training.trainer import Trainer

SCALE = 2.0
"""The flow model's data have unit variance, those of the process a standard deviation of 0.5."""


class Velocity(nn.Module):
    """`u(x, s)`, the velocity `n - x0` of flow matching: a residual network on the 64 pixels."""

    def __init__(self, pixels: int = 64, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(8.0))
        self.inp = nn.Linear(pixels + 16, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.blocks = nn.ModuleList(nn.Linear(width + 16, width) for _ in range(blocks))
        self.out = nn.Linear(width, pixels)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        angle = s[:, None] * self.frequencies
        time = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
        h = self.inp(torch.cat([x.flatten(1), time], dim=1))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + F.silu(block(torch.cat([norm(h), time], dim=1)))
        return self.out(h).reshape(x.shape)


def train_flow(data: ImageDataset, iterations: int) -> Velocity:
    """Flow matching as anybody would write it: `x_s = (1 - s) x0 + s n`, the network learns `n - x0`."""
    generator, normalization = torch.Generator().manual_seed(0), data.codec("measured", 0.5)
    torch.manual_seed(0)
    network = Velocity()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * i / iterations))
        images, _ = data.batch(torch.randint(len(data), (256,), generator=generator))
        x0 = SCALE * normalization.encode(images)
        n, s = torch.randn(x0.shape, generator=generator), torch.sigmoid(torch.randn(256, generator=generator))
        at = s[:, None, None, None]
        loss = F.mse_loss(network((1 - at) * x0 + at * n, s), n - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flow-iterations", type=int, default=3000)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--num", type=int, default=1000, help="samples to measure")
    options = parser.parse_args(arguments)

    # A model from elsewhere.
    data = trigflow.open_dataset("digits")
    flow = train_flow(data, options.flow_iterations)

    # The same model as a TrigFlow network, and with what it takes to draw images from it.
    process = trigflow.TrigFlow(sigma_data=0.5)
    bridge = FlowBridge(flow, process, noise_at=1, scale=SCALE)
    student = copy.deepcopy(bridge)
    teacher = trigflow.model_of(bridge, data.shape, codec=data.codec("measured", 0.5), data="digits")

    # Distillation: the usual trainer, given the network. Its run folder is loaded with `network=` too.
    config = RunConfig(
        teacher="flow",
        objective=objective_of("scd", proposal=trigflow.Proposal(-1.2, 1.6), tangent=TangentConfig(warmup=100, c=0.01)),
        optimizer=OptimizerConfig(lr=2e-4, schedule="cosine"),
        loop=LoopConfig(iterations=options.iterations, sample_every=0, checkpoint_every=0, device="cpu"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "student"
        Trainer(config, folder, network=student, teacher=teacher, progress=sys.stderr.isatty()).run()
        distilled = trigflow.load(folder, "cpu", network=FlowBridge(Velocity(), process, scale=SCALE))

    rows = []
    for name, model, steps in (
        ("flow", teacher, 18),
        ("flow", teacher, 2),
        ("student", distilled, 2),
        ("student", distilled, 1),
    ):
        scores = trigflow.evaluate_model(model, num=options.num, steps=steps)
        rows.append({"model": name, **scores})
        print(
            f"{name:8} {scores['nfe']:3} evaluations   Frechet distance {scores['fd']:7.2f}   "
            f"(real against real {scores['fd_real']:.2f})"
        )
    return rows


if __name__ == "__main__":
    main()
