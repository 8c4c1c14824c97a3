"""One training step of a run, counted."""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from trigflow.codecs import Pixels
from trigflow.conditions import null, takes
from trigflow.lab.plan.trace import Target, Trace, arithmetic_of
from trigflow.lab.recipes import get_run
from trigflow.lab.recipes.listing import resolve_run
from trigflow.lab.recipes.named import NamedRun
from trigflow.models.model import Model
from trigflow.networks import NetworkConfig, build
from trigflow.objectives import AdaptiveWeight, StepDraws
from trigflow.training.batch import CONDITION, Batch, conditions_of
from trigflow.training.config import Precision, RunConfig
from trigflow.training.ema import EMA
from trigflow.training.learner import Learner
from trigflow.training.losses import Losses
from trigflow.training.muon import hidden_matrices
from trigflow.training.parallel import blocks_of, recomputes_by_itself

MANY = 1009
"""Samples in the step that is counted: a prime, so that what grows with it can be told from what does not."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of what one optimizer trains, or of a teacher.

    Attributes:
        parameters: all of them.
        blocks: those of each block of the network, the largest first.
        moments: numbers that the optimizer keeps; 0 for a teacher.
        size: bytes of the parameters.
    """

    parameters: int
    blocks: tuple[int, ...]
    moments: int
    size: int


@dataclass(frozen=True)
class StepCount:
    """What one step takes, for the whole batch.

    Attributes:
        batch: samples.
        teacher: floating-point operations of the teacher's evaluations.
        total: those of the step, backward and teacher included.
        activations: bytes in use at the peak beside weights, gradients, optimizer states and averages.
        growing: of these, the bytes that grow with the batch, where its size is such that `Trace` can tell.
    """

    batch: int
    teacher: int
    total: int
    activations: int
    growing: int


@functools.lru_cache(maxsize=64)
def count_run(recipe: str, precision: Precision | None = None, checkpointing: bool = False) -> "Step":
    """The step of a recipe, to be counted once however often it is asked for. Raises a UserError for an unknown name."""
    return Step(get_run(recipe), precision=precision, checkpointing=checkpointing)


class Step:
    """The training step of a run, on tensors that have shapes and no values: what the run takes, whatever it runs on.

    Args:
        run: the recipe.
        precision: in place of the recipe's.
        checkpointing: keep only the inputs of blocks for the backward pass, which computes the rest again.
        target: whose arithmetic to count.
        values: make tensors that have values, for a step whose memory is measured.

    Attributes:
        config: the settings, with the channels and classes of the data.
        student: its size, weightings of the losses included; `teacher` and `fake` (score network) likewise, or None.
        averages: number of averaged copies of the student's weights.
    """

    def __init__(
        self,
        run: NamedRun,
        *,
        precision: Precision | None = None,
        checkpointing: bool = False,
        target: Target = "cuda",
        values: bool = False,
    ) -> None:
        self.shape = run.shape
        self.target: Target = target
        self.config = config = resolve_run(run, precision)
        self.averages = len(EMA(config.ema, nn.Linear(1, 1)).modules)
        self.mode: contextlib.AbstractContextManager[Any] = (
            # Bridges and denoisers from elsewhere have tables of their own, which have values.
            contextlib.nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=run.folder is not None)
        )
        objective = config.objective
        self.drawn = _drawn(config)
        self._trace, self._teacher_flops = Trace(), 0
        self._foreign = run.folder is not None
        with self.mode:
            self.learner = self._learner("weight", *["vsd_weight"] * objective.fake)
            fake = self._learner("fake_weight") if objective.fake else None
            guide = self._teacher() if objective.distills else None
        self.losses = Losses(config, self.learner, guide, fake)
        self.learners = [learner for learner in (self.learner, fake) if learner is not None]
        self.student = _size(self.learner)
        self.fake = None if fake is None else _size(fake)
        self.teacher = None if guide is None else _teacher_size(guide.network)
        if checkpointing:
            for learner in self.learners:
                checkpoint_blocks(learner.network, target)

    def _learner(self, *weights: str) -> Learner:
        config = self.config
        made: dict[str, nn.Module] = {}
        if config.objective.learns_weight:
            made = {name: AdaptiveWeight(config.process) for name in weights}
        network = self._built(config.network).train()
        return Learner(network, made, config.optimizer, config.loop.iterations)

    def _built(self, spec: NetworkConfig) -> nn.Module:
        """The network; one from diffusers without its weights."""
        if not self._foreign:
            return build(spec, self.config.process.sigma_data)
        from trigflow.models.foreign.network import EMPTY

        token = EMPTY.set(True)
        try:
            with unset_fake_temporarily():
                network = build(spec, self.config.process.sigma_data)
        finally:
            EMPTY.reset(token)
        for part in network.modules():
            for name, value in [*part._parameters.items()]:
                if value is not None:
                    part._parameters[name] = nn.Parameter(_like(value), requires_grad=value.requires_grad)
            part._buffers |= {name: _like(value) for name, value in part._buffers.items() if value is not None}
        return network

    def _teacher(self) -> Model:
        """A model with the network of the student, without the conditions that the objective draws, whose evaluations say what
        they take."""
        config = self.config
        spec = config.network.as_teacher()
        network = self._built(spec).eval().requires_grad_(False)

        def begin(*_: object) -> None:
            self._teacher_flops -= self._trace.flops

        def end(*_: object) -> None:
            self._teacher_flops += self._trace.flops

        network.register_forward_pre_hook(begin)
        network.register_forward_hook(end)
        return Model(network, spec, config.process, Pixels.symmetric(self.shape))

    @functools.cached_property
    def forward(self) -> int:
        """Floating-point operations of one evaluation of the student on one sample."""
        with self.mode, torch.no_grad(), Trace() as trace:
            batch = self.batch(1)
            network = self.learner.network
            told = {"end": torch.zeros_like(batch["t"]), **conditions_of(batch)}
            network(batch["x0"], batch["t"], **{name: told[name] for name in takes(network)})
        return trace.flops

    @functools.cached_property
    def many(self) -> StepCount:
        """A step with `MANY` samples."""
        return self.count(MANY)

    def count(self, batch_size: int) -> StepCount:
        """What one step with this many samples takes."""
        self._trace, self._teacher_flops = Trace(batch_size), 0
        with self.mode:
            batch = self.batch(batch_size)
            with self._trace as trace, arithmetic_of(self.target):
                self.backward(batch)
        return StepCount(batch_size, self._teacher_flops, trace.flops, trace.peak, trace.growing)

    def batch(self, size: int) -> Batch:
        """What a step needs: its batch, and gradients to add to, as they are with parallel training or accumulation."""
        for learner in self.learners:
            for parameter in learner.parameters:
                parameter.grad = torch.zeros_like(parameter)
        batch = {name: torch.zeros(size, *self.shape, dtype=torch.float32) for name in ("x0", "noise", *self.drawn[0])}
        batch |= {name: torch.ones(size, dtype=torch.float32) for name in self.drawn[1]}
        for name, row in null(self.learner.network).items():
            batch[f"{CONDITION}{name}"] = row.expand(size, *row.shape).clone()
        return batch

    def backward(self, batch: Batch) -> None:
        """All losses with their gradients, one after the other as in training."""
        losses, objective = self.losses, self.config.objective
        if not getattr(objective, "alone", False):
            losses.first(batch, self.config.loop.iterations).value.backward()
        if objective.fake:
            sample = losses.generate(batch)
            losses.vsd(sample, batch).value.backward()
            losses.fake_score(sample.detach(), batch).value.backward()


def _drawn(config: RunConfig) -> tuple[list[str], list[str]]:
    """Names of what the objective draws for a step: noises, and numbers for each sample."""
    objective = config.objective
    draws = StepDraws(
        2, config.process, torch.Generator(), 0, lambda values: values, lambda: torch.zeros(2, 1, dtype=torch.float32)
    )
    told = {f"{CONDITION}{name}": value for name, value in objective.draw_conditions(draws).items()}
    found = {**objective.draw(draws), **told, **objective.draw_more(draws)}
    numbers = [name for name, value in found.items() if value.ndim == 1]
    return [name for name in found if name not in numbers], numbers


def _size(learner: Learner) -> ParameterCounts:
    parameters = sum(p.numel() for p in learner.parameters)
    matrices = hidden_matrices(learner.network) if learner.config.name == "muon" else []
    moments = 2 * parameters - sum(p.numel() for p in matrices)  # Adam has two, Muon one for matrices
    return ParameterCounts(parameters, _blocks(learner.network), moments, _bytes(learner.parameters))


def _teacher_size(network: nn.Module) -> ParameterCounts:
    return ParameterCounts(_count(network), _blocks(network), 0, _bytes([*network.parameters(), *network.buffers()]))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _blocks(network: nn.Module) -> tuple[int, ...]:
    return tuple(sorted((_count(block) for block in blocks_of(network)), reverse=True))


def checkpoint_blocks(network: nn.Module, target: Target) -> None:
    """Have every block keep its inputs alone and run a second time in the backward pass, as `Parallel.ease` does."""

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), arithmetic_of(target)  # of the first run, which has one already, and the second

    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    if not recomputes_by_itself(network, again):
        for block in blocks_of(network):
            block.forward = functools.partial(again, block.forward)  # type: ignore[method-assign]
