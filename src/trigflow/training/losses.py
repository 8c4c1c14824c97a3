"""Which losses an objective minimizes, and their gradients."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trigflow.models.model import Model
from trigflow.objectives import (
    Loss,
    VelocityFunction,
    consistency_loss,
    diffusion_loss,
    discrete_loss,
    generate,
    meanflow_loss,
    multistep_loss,
    vsd_loss,
)
from trigflow.samplers import network_velocity
from trigflow.training.batch import Batch
from trigflow.training.config import RunConfig
from trigflow.training.learner import Learner
from trigflow.training.scaling import LossScale


@dataclass(frozen=True)
class Losses:
    """The losses of a run, by the kind of its objective.

    Attributes:
        config: objective, process and precision.
        student: the network that is trained.
        teacher: of a distillation.
        fake: the fake score network, of vsd and scd-vsd.
        negative: what the teacher is guided away from; None for classifier-free guidance.
        scale: factor of the losses when they are differentiated, for float16; None for none.
    """

    config: RunConfig
    student: Learner
    teacher: Model | None = None
    fake: Learner | None = None
    negative: Model | None = None
    scale: LossScale | None = None

    def backward(
        self, batch: Batch, iteration: int, parts: int, last: bool = True
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Add the gradients of this part, one of `parts`, of a batch to those of all learners, times the scale.

        Args:
            batch: the part.
            iteration: of the run, from 0.
            parts: how many there are.
            last: whether this is the last part before the update.

        Returns:
            The minimized values of student and fake score, as `weighted_loss` and `fake_weighted_loss`, and figures per
            sample. Losses are differentiated one after the other, so that only one graph is in memory.
        """
        objective = self.config.objective
        values, figures = {"weighted_loss": 0.0}, {}
        if objective.kind != "vsd":
            loss = self.student.compute(self.first, batch, iteration, last=last and self.fake is None)
            self._differentiate(loss.value / parts)
            values["weighted_loss"] = loss.value.item() / parts
            figures = loss.figures
        if self.fake is not None:
            sample, vsd = self.student.compute(self.generated, batch, last=last)
            self._differentiate(objective.lambda_vsd * vsd.value / parts)
            values["weighted_loss"] += objective.lambda_vsd * vsd.value.item() / parts
            values["fake_weighted_loss"], fake_figures = self.backward_fake(batch, parts, sample, last)
            vsd_figures = {f"vsd_{name}": value for name, value in vsd.figures.items()}
            figures = {**(figures or vsd.figures), **vsd_figures, **fake_figures}
        return values, figures

    def backward_fake(
        self, batch: Batch, parts: int, sample: Tensor, last: bool = True
    ) -> tuple[float, dict[str, Tensor]]:
        """Add the gradients of the fake score on samples of the generator; returns its value and figures."""
        assert self.fake is not None
        loss = self.fake.compute(self.fake_score, sample, batch, last=last)
        self._differentiate(loss.value / parts)
        return loss.value.item() / parts, {f"fake_{name}": value for name, value in loss.figures.items()}

    # One loss each, in the precision of the run ----------------------------------------------------------------------

    def first(self, batch: Batch, iteration: int) -> Loss:
        """The loss of the objective's kind; for scd-vsd that of scd, to which VSD is added."""
        objective = self.config.objective
        if objective.kind == "diffusion":
            return self.diffusion(batch)
        if objective.averages:
            return self.meanflow(batch)
        if objective.kind in ("ct", "cd"):
            return self.discrete(batch, iteration)
        return self.consistency(batch, iteration)

    def diffusion(self, batch: Batch) -> Loss:
        """Velocity prediction."""
        with self.precision():
            return diffusion_loss(
                self.student.network,
                self.config.process,
                batch["x0"],
                batch["noise"],
                batch["t"],
                label=batch.get("label"),
                weight=self.student.weights.get("weight"),
            )

    def consistency(self, batch: Batch, iteration: int) -> Loss:
        """Continuous-time consistency, along the teacher's velocity (scd) or the data's (sct), in one segment or several."""
        tangent, segments = self.config.objective.tangent, self.config.objective.segments
        loss = consistency_loss if segments == 1 else functools.partial(multistep_loss, segments=segments)
        with self.precision():
            return loss(
                self.student.network,
                self.config.process,
                batch["x0"],
                batch["noise"],
                batch["t"],
                teacher=self.teacher_velocity(batch) if self.config.objective.distills else None,
                label=batch.get("label"),
                guidance=batch.get("guidance"),
                tangent=tangent,
                r=tangent.warmup_factor(iteration),
                weight=self.student.weights.get("weight"),
            )

    def discrete(self, batch: Batch, iteration: int) -> Loss:
        """Discrete-time consistency, along the teacher (cd) or the trajectory of data and noise (ct)."""
        objective, process = self.config.objective, self.config.process
        t, s = objective.discrete.pairs(process, batch["t"], iteration, self.config.loop.iterations)
        with self.precision():
            return discrete_loss(
                self.student.network,
                process,
                batch["x0"],
                batch["noise"],
                t,
                s,
                teacher=self.teacher_velocity(batch) if objective.distills else None,
                label=batch.get("label"),
                guidance=batch.get("guidance"),
                config=objective.discrete,
                tangent=objective.tangent,
                r=objective.tangent.warmup_factor(iteration),
                weight=self.student.weights.get("weight"),
            )

    def meanflow(self, batch: Batch) -> Loss:
        """Average velocities, of the teacher's flow (meanflow-distill) or from the data (meanflow)."""
        with self.precision():
            return meanflow_loss(
                self.student.network,
                self.config.process,
                batch["x0"],
                batch["noise"],
                batch["t"],
                batch["end"],
                teacher=self.teacher_velocity(batch) if self.config.objective.distills else None,
                label=batch.get("label"),
                guidance=batch.get("guidance"),
                config=self.config.objective.meanflow,
                weight=self.student.weights.get("weight"),
            )

    def generate(self, batch: Batch) -> Tensor:
        """The student's one-step samples."""
        with self.precision():
            return generate(
                self.student.network,
                self.config.process,
                batch["z"],
                label=batch.get("label"),
                guidance=batch.get("guidance"),
            )

    def generated(self, batch: Batch) -> tuple[Tensor, Loss]:
        """One-step samples, detached, and the loss of variational score distillation on them."""
        sample = self.generate(batch)
        return sample.detach(), self.vsd(sample, batch)

    def vsd(self, sample: Tensor, batch: Batch) -> Loss:
        """Variational score distillation of these samples."""
        assert self.fake is not None
        process, fake = self.config.process, self.fake.network.eval()
        with self.precision():
            return vsd_loss(
                sample,
                process,
                batch["vsd_noise"],
                batch["vsd_t"],
                teacher=self.teacher_velocity(batch),
                fake=network_velocity(fake, process, batch.get("label"), batch.get("guidance")),
                weight=self.student.weights.get("vsd_weight"),
            )

    def fake_score(self, sample: Tensor, batch: Batch) -> Loss:
        """Velocity prediction of the fake score network on these samples."""
        assert self.fake is not None
        with self.precision():
            return diffusion_loss(
                self.fake.network.train(),
                self.config.process,
                sample,
                batch["fake_noise"],
                batch["fake_t"],
                label=batch.get("label"),
                guidance=batch.get("guidance"),
                weight=self.fake.weights.get("fake_weight"),
            )

    def teacher_velocity(self, batch: Batch) -> VelocityFunction:
        """`v(x_t, t)` of the teacher with the labels of the batch and its guidance scales, 1 where it has none."""
        assert self.teacher is not None
        label, scale = batch.get("label"), batch.get("guidance", 1.0)
        interval = self.config.objective.guidance_interval
        return self.teacher.velocity(label, scale, interval=interval, negative=self.negative)

    def _differentiate(self, value: Tensor) -> None:
        """Add the gradients of a loss, times the scale."""
        (value if self.scale is None else self.scale.value * value).backward()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the half precision that the run asks for, if it does."""
        device, precision = next(self.student.network.parameters()).device, self.config.loop.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
