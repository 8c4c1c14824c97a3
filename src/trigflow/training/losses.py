"""The losses of a run, and their gradients."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trigflow.conditions import takes
from trigflow.models.model import Model
from trigflow.objectives import Distribution, Given, Loss, VelocityFunction
from trigflow.samplers import guided_velocity, network_velocity
from trigflow.tangent import Compiled
from trigflow.training.batch import Batch, conditions_of
from trigflow.training.compiled import compiled
from trigflow.training.config import RunConfig
from trigflow.training.learner import Learner
from trigflow.training.scaling import LossScale


@dataclass(frozen=True)
class Losses:
    """Computes and differentiates what the objective of a run minimizes.

    Attributes:
        config: objective, process and precision.
        student: the network that is trained.
        teacher: of a distillation.
        fake: the fake score network, of an objective with one.
        negative: what the teacher is guided away from; None for classifier-free guidance.
        scale: factor of the losses when they are differentiated, for float16; None for none.
        compiles: `loop.compile` where losses are compiled as a whole; None where they are not.
    """

    config: RunConfig
    student: Learner
    teacher: Model | None = None
    fake: Learner | None = None
    negative: Model | None = None
    scale: LossScale | None = None
    compiles: str | None = None
    compiled: dict[str, Compiled] = field(default_factory=dict)

    def backward(
        self, batch: Batch, iteration: int, parts: int, last: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradients of this part, one of `parts`, of a batch to those of all learners, times the scale. `last` says
        that an update follows.

        Returns:
            The minimized values of student and fake score, as `weighted_loss` and `fake_weighted_loss`, on the device, and
            figures per sample. Losses are differentiated one after the other, so that only one graph is in memory.
        """
        objective = self.config.objective
        values: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        if not (isinstance(objective, Distribution) and objective.alone):
            loss = self.student.compute(self.first, batch, iteration, last=last and self.fake is None)
            values["weighted_loss"] = self._differentiate(loss.value / parts)
            figures = loss.figures
        if self.fake is not None and isinstance(objective, Distribution):
            sample, vsd = self.student.compute(self.generated, batch, last=last)
            value = self._differentiate(objective.lambda_vsd * vsd.value / parts)
            values["weighted_loss"] = values["weighted_loss"] + value if values else value
            values["fake_weighted_loss"], fake_figures = self.backward_fake(batch, parts, sample, last)
            vsd_figures = {f"vsd_{name}": value for name, value in vsd.figures.items()}
            figures = {**(figures or vsd.figures), **vsd_figures, **fake_figures}
        return values, figures

    def backward_fake(self, batch: Batch, parts: int, sample: Tensor, last: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the fake score on samples of the generator; returns its value and figures."""
        assert self.fake is not None
        loss = self.fake.compute(self.fake_score, sample, batch, last=last)
        value = self._differentiate(loss.value / parts)
        return value, {f"fake_{name}": figure for name, figure in loss.figures.items()}

    # One loss each, in the precision of the run ----------------------------------------------------------------------

    def given(self, batch: Batch, learner: Learner, weight: str, iteration: int | Tensor = 0, teacher: bool = True) -> Given:
        """What an objective computes a loss of this learner from."""
        return Given(
            learner.network, self.config.process, batch, conditions_of(batch), iteration, self.config.loop.iterations,
            self.teacher_velocity(batch) if teacher and self.config.objective.distills else None, learner.weights.get(weight),
        )  # fmt: skip

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, a method of this class, compiled where that is asked for."""
        if self.compiles is None:
            return function(*args)
        name = function.__name__
        if name not in self.compiled:
            self.compiled[name] = compiled(function, f"the loss '{name.strip('_')}'", self.compiles)
        return self.compiled[name](*args)

    def first(self, batch: Batch, iteration: int) -> Loss:
        """The loss of the objective; of one with a fake score network the part without."""
        if self.compiles is None or not self.config.objective.compiles:
            return Loss(*self._first(batch, iteration))
        now = torch.tensor(iteration, dtype=torch.float64, device=batch["t"].device)  # a number would be a constant of a graph
        return Loss(*self._run(self._first, batch, now))

    def _first(self, batch: Batch, iteration: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        given = self.given(batch, self.student, "weight", iteration)
        with self.precision():
            loss = self.config.objective.loss(given)
        return loss.value, loss.figures

    def generate(self, batch: Batch) -> Tensor:
        """The student's samples, which score distillation and the fake score network look at."""
        with self.precision():
            return self._distribution.generate(self.given(batch, self.student, "vsd_weight", teacher=False))

    def generated(self, batch: Batch) -> tuple[Tensor, Loss]:
        """The student's samples, detached, and the loss of score distillation on them."""
        assert self.fake is not None
        self.fake.network.eval()  # a graph belongs to the mode in which it is called
        sample, value, figures = self._run(self._generated, batch)
        return sample, Loss(value, figures)

    def _generated(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        sample = self.generate(batch)
        loss = self.vsd(sample, batch)
        return sample.detach(), loss.value, loss.figures

    def vsd(self, sample: Tensor, batch: Batch) -> Loss:
        """Score distillation of these samples."""
        assert self.fake is not None
        given = self.given(batch, self.student, "vsd_weight")
        fake = network_velocity(self.fake.network.eval(), self.config.process, given.conditions)
        with self.precision():
            return self._distribution.distribution_loss(sample, given, fake)

    def fake_score(self, sample: Tensor, batch: Batch) -> Loss:
        """The loss of the fake score network on these samples."""
        assert self.fake is not None
        self.fake.network.train()
        return Loss(*self._run(self._fake_score, sample, batch))

    def _fake_score(self, sample: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.fake is not None
        with self.precision():
            loss = self._distribution.fake_loss(sample, self.given(batch, self.fake, "fake_weight", teacher=False))
        return loss.value, loss.figures

    def teacher_velocity(self, batch: Batch) -> VelocityFunction:
        """`v(x_t, t)` of the teacher for the conditions of the batch and its guidance scales, 1 where it has none."""
        assert self.teacher is not None
        told, network = conditions_of(batch), self.teacher.network
        scale = told.pop("guidance", None)
        fixed = getattr(self.config.objective, "guidance", 1.0)
        if scale is None and fixed != 1:
            scale = torch.full_like(batch["t"], fixed)
        if scale is not None and "guidance" in takes(network):  # the teacher takes it as an input itself
            told["guidance"], scale = scale, None
        if scale is None:
            return network_velocity(network, self.config.process, told)
        negative = None if self.negative is None else self.negative.network
        interval = getattr(self.config.objective, "guidance_interval", None)
        return guided_velocity(network, self.config.process, told, scale, negative=negative, interval=interval)

    @property
    def _distribution(self) -> Distribution:
        objective = self.config.objective
        assert isinstance(objective, Distribution)
        return objective

    def _differentiate(self, value: Tensor) -> Tensor:
        """Add the gradients of a loss, times the scale; returns it detached."""
        (value if self.scale is None else self.scale.value * value).backward()
        return value.detach()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the half precision that the run asks for, if it does."""
        device, precision = next(self.student.network.parameters()).device, self.config.loop.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
