"""One trainer for teacher and student.

Every random number of step i comes from a generator seeded by (seed, i), and the data order is a function of (seed, i) too.
A run that is interrupted and resumed therefore ends with the same weights, bit for bit, as one that never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trigflow.data import ImageDataset, Normalization, Order, derive_seed, measure, open_dataset, require_classes
from trigflow.errors import UserError
from trigflow.files import ensure_folder, read_json, write_json
from trigflow.images import make_grid, save_picture
from trigflow.model import Model, fit_network, resolve_device
from trigflow.networks import build
from trigflow.objectives import AdaptiveWeight, Loss, consistency_loss, diffusion_loss
from trigflow.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from trigflow.training.config import DataConfig, RunConfig, from_dict, to_dict
from trigflow.training.ema import EMA
from trigflow.training.log import FigureWindow, MetricLog
from trigflow.training.optimizer import build_optimizer, learning_rate

GRID = 40
"""Samples on the grids drawn while training."""


def load_data(config: DataConfig, progress: bool = False) -> ImageDataset:
    """The data set of a configuration, read with a progress bar on a terminal; see `trigflow.data.open_dataset`.

    Raises:
        UserError: as `open_dataset`, and for labelled data of one class only.
    """
    dataset = open_dataset(
        config.source,
        resize=config.resize,
        channels=config.channels,
        skip_corrupt=config.skip_corrupt,
        progress=progress and sys.stderr.isatty(),
    )
    if dataset.labels is not None:
        require_classes(dataset)
    return dataset


class Trainer:
    """Trains the network of a configuration into a run folder.

    Args:
        config: the run; channels and classes of the network are taken from the data.
        folder: the run folder: config.json, metrics.jsonl, tensorboard/, samples/, checkpoints/, and at the end the model.
        teacher: for distillation; the student also starts from its weights.
        dataset: the data, when already open; by default `config.data` is opened.
        resume: go on from the newest checkpoint, when there is one.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: for settings that make no sense, data or teacher that do not fit, a folder that cannot be written or
            holds another run.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        teacher: Model | None = None,
        dataset: ImageDataset | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        config.validate()
        self.dataset = load_data(config.data, progress) if dataset is None else dataset
        self.config = config = fit_network(config, self.dataset)
        self.teacher = teacher
        self.progress = progress
        self.device = resolve_device(config.loop.device)
        self.normalization = self._normalization()
        self._check_teacher()

        loop = config.loop
        self.memory_format = torch.channels_last if loop.channels_last else torch.contiguous_format
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(loop.seed, "weights"))
            network = build(config.network, config.process.sigma_data)
            weight = AdaptiveWeight(config.process) if config.objective.adaptive_weight else None
        if teacher is not None:
            start_from(network, teacher.network)
        self.network = network.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.weight = None if weight is None else weight.to(self.device)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        if self.weight is not None:
            self.modules["weight"] = self.weight
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = build_optimizer(config.optimizer, self.modules.values())
        self.ema = EMA(config.ema, self.network)
        self.order = Order(len(self.dataset), loop.batch_size, derive_seed(loop.seed, "data"))
        self.iteration = 0
        self.skipped = 0
        self.folder = self._claim(Path(folder), resume)  # last, so that settings in error leave no folder behind
        if resume and (found := list_checkpoints(self.folder)):
            state = load_checkpoint(found[-1], {**self.modules, "ema": self.ema.network}, self.optimizer)
            self.iteration, self.skipped = state["iteration"], state["skipped"]

    # Running -------------------------------------------------------------------------------------------------------

    def run(self) -> Model:
        """Train to the last iteration, write the model into the run folder and return it.

        A step whose loss or gradient is not finite changes nothing and is counted as skipped. An interruption
        (Ctrl-C) writes a checkpoint first.
        """
        loop = self.config.loop
        write_json(self.folder / "config.json", to_dict(self.config))
        log = MetricLog(self.folder, self.iteration)
        window, began, since = FigureWindow(), time.perf_counter(), self.iteration
        title = {"diffusion": "teacher", "sct": "student (sCT)", "scd": "student (sCD)"}[self.config.objective.kind]
        bar = tqdm(total=loop.iterations, initial=self.iteration, desc=title, unit="it", disable=not self.progress)
        try:
            while self.iteration < loop.iterations:
                scalars, figures = self.step()
                window.add(figures)
                bar.update(1)
                if self.iteration % loop.log_every == 0 or self.iteration == loop.iterations:
                    seconds = time.perf_counter() - began
                    metrics = {**scalars, **window.flush(), "skipped": self.skipped}
                    metrics["images_per_second"] = (self.iteration - since) * loop.batch_size / seconds
                    log.write(self.iteration, metrics)
                    bar.set_postfix(loss=f"{metrics['loss']:.4f}", skipped=self.skipped, refresh=False)
                    began, since = time.perf_counter(), self.iteration
                if loop.sample_every and self.iteration % loop.sample_every == 0:
                    self._draw(log)
                if loop.checkpoint_every and self.iteration % loop.checkpoint_every == 0:
                    self.save_checkpoint()
        except KeyboardInterrupt:
            self.save_checkpoint()
            raise
        finally:
            bar.close()
            log.close()
        self.save_checkpoint()
        model = self.model()
        model.save(self.folder)
        return model

    def step(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One optimizer step: scalars and per-sample figures to log. Advances `iteration`."""
        config, loop, i = self.config, self.config.loop, self.iteration
        indices = self.order.indices(i)
        lr = learning_rate(config.optimizer, i, loop.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        total, figures = 0.0, []
        batch = self._batch(indices, torch.Generator().manual_seed(derive_seed(loop.seed, "step", i)))
        with self._dropout_stream(i):
            for values in zip(*(value.chunk(loop.accumulate) for value in batch.values()), strict=True):
                loss = self.loss(**dict(zip(batch, values, strict=True)))
                (loss.value / loop.accumulate).backward()
                total += loss.value.item() / loop.accumulate
                figures.append(loss.figures)
        clip = config.optimizer.clip
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip).item()
        with uninterrupted():
            if math.isfinite(total) and math.isfinite(grad_norm):
                self.optimizer.step()
                self.ema.update(self.network, i + 1 - self.skipped, loop.batch_size)
            else:
                self.skipped += 1
            self.iteration += 1
        scalars = {"weighted_loss": total, "grad_norm": grad_norm, "lr": lr}
        return scalars, {name: torch.cat([f[name] for f in figures]) for name in figures[0]}

    def _batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The arguments of `loss` for these samples; flips, noise, times, dropped labels and guidance from the generator."""
        config, objective, process = self.config, self.config.objective, self.config.process
        b = len(indices)
        flip = torch.rand(b, generator=generator) < 0.5 if config.data.flip else None
        images, label = self.dataset.batch(indices, flip=flip)
        x0 = self.normalization.encode(images.to(self.device)).to(memory_format=self.memory_format)
        noise = process.sample_noise(x0, generator).to(memory_format=self.memory_format)
        t = objective.proposal.sample(process, b, generator).to(self.device)
        null_label = self.network.null_label
        if null_label is None:
            label = None
        elif label is not None:
            if objective.kind == "diffusion":
                drop = torch.rand(b, generator=generator) < objective.label_dropout
                label = torch.where(drop, torch.full_like(label, null_label), label)  # type: ignore[arg-type]
            label = label.to(self.device)
        guidance = None
        if self.network.takes_guidance:
            guidance = 1 + (objective.guidance_max - 1) * torch.rand(b, generator=generator)
            guidance = guidance.to(self.device)
        batch = {"x0": x0, "noise": noise, "t": t, "label": label, "guidance": guidance}
        return {name: value for name, value in batch.items() if value is not None}

    def loss(
        self, x0: Tensor, noise: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Loss:
        """The objective on a batch: x0 and noise `(b, c, h, w)`, the others `(b,)`."""
        config, objective, process = self.config, self.config.objective, self.config.process
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.loop.precision == "bf16"):
            if objective.kind == "diffusion":
                return diffusion_loss(self.network, process, x0, noise, t, label=label, weight=self.weight)
            teacher = None
            if objective.kind == "scd" and self.teacher is not None:
                teacher = self.teacher.velocity(label, 1.0 if guidance is None else guidance)
            return consistency_loss(
                self.network,
                process,
                x0,
                noise,
                t,
                teacher=teacher,
                label=label,
                guidance=guidance,
                tangent=objective.tangent,
                r=objective.tangent.warmup_factor(self.iteration),
                weight=self.weight,
            )

    def model(self) -> Model:
        """The averaged network as a model."""
        kind = "diffusion" if self.config.objective.kind == "diffusion" else "consistency"
        names = self.dataset.class_names if self.network.null_label is not None else ()
        return Model(self.ema.network, self.config, kind, self.dataset.shape, names, self.normalization)  # type: ignore[arg-type]

    def save_checkpoint(self) -> Path:
        """Write the state of the run as of now."""
        modules = {**self.modules, "ema": self.ema.network}
        extra = {"skipped": self.skipped}
        return save_checkpoint(self.folder, self.iteration, modules, self.optimizer, extra, self.config.loop.keep)

    # Parts ---------------------------------------------------------------------------------------------------------

    def _draw(self, log: MetricLog) -> None:
        model = self.model()
        grid = make_grid(model.sample(GRID, seed=self.config.loop.seed), columns=10)
        (self.folder / "samples").mkdir(exist_ok=True)
        save_picture(grid, self.folder / "samples" / f"{self.iteration:08d}.png")
        pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
        log.picture(self.iteration, "samples", pixels.reshape(grid.height, grid.width, 3))

    def _dropout_stream(self, iteration: int) -> contextlib.AbstractContextManager[Any]:
        """Dropout draws from torch's default generator: seed it for this step, and give it back unchanged."""
        stack = contextlib.ExitStack()
        if self.config.network.dropout > 0:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(derive_seed(self.config.loop.seed, "dropout", iteration))
        return stack

    def _normalization(self) -> Normalization:
        if self.teacher is not None:
            return self.teacher.normalization
        if self.config.data.normalize == "symmetric":
            return Normalization.symmetric(self.dataset.channels)
        return measure(self.dataset, self.config.process.sigma_data)

    def _check_teacher(self) -> None:
        teacher, config = self.teacher, self.config
        if teacher is None:
            if config.objective.kind == "scd":
                raise UserError("distillation without a teacher; expected a teacher run folder; pass --teacher RUN")
            return
        if config.objective.kind == "scd" and teacher.kind != "diffusion":
            raise UserError(
                "the teacher is a consistency model; expected a diffusion model; distill the run of its teacher"
            )
        for what, mine, theirs in (
            ("images of shape", self.dataset.shape, teacher.shape),
            ("classes", config.network.conditioning.num_classes, teacher.num_classes),
            ("sigma_data", config.process.sigma_data, teacher.config.process.sigma_data),
        ):
            if mine != theirs:
                raise UserError(
                    f"the data have {what} {mine} and the teacher {theirs}; expected the same; use the teacher's data"
                )
        if self.config.network.conditioning.takes_guidance and not teacher.num_classes:
            raise UserError(
                f"objective.guidance_max is {config.objective.guidance_max} and the teacher is unconditional; expected a "
                "class-conditional teacher, which guidance needs; set objective.guidance_max to 1"
            )
        teacher.network.to(self.device)

    def _claim(self, folder: Path, resume: bool) -> Path:
        """The run folder, created; it must be free unless the same run is resumed."""
        existing = folder / "config.json"
        if resume and existing.is_file():
            compare_configs(to_dict(from_dict(read_json(existing, "configuration"))), to_dict(self.config))
        elif existing.is_file():
            raise UserError(
                f"'{folder}' already holds a run; expected a new folder; choose another --out, or --resume to go on with it"
            )
        return ensure_folder(folder)


MAY_CHANGE = frozenset({"device", "log_every", "sample_every", "checkpoint_every", "keep", "iterations"})
"""Loop settings that a resumed run may have otherwise than before."""


def compare_configs(old: dict[str, Any], new: dict[str, Any], path: str = "") -> None:
    """Raise a UserError naming the first setting that a resumed run may not change."""
    for name in {**old, **new}:
        where = f"{path}{name}"
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            compare_configs(a, b, f"{where}.")
        elif a != b and not (path == "loop." and name in MAY_CHANGE):
            raise UserError(
                f"the run to resume has {where} = {a}, now it is {b}; expected the same; restore the setting or start anew"
            )


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended, so that what it changes is changed as a whole or not at all."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is None or threading.current_thread() is not threading.main_thread():
        yield  # Python delivers Ctrl-C to its main thread alone
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        signal.raise_signal(signal.SIGINT)


def start_from(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the teacher's weights into the student, which may have a guidance input beside them (left at zero effect).

    Raises:
        UserError: when the networks differ otherwise.
    """
    missing, unexpected = [], []
    own, given = student.state_dict(), teacher.state_dict()
    for name, value in own.items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        elif not name.startswith("conditioning.guidance"):
            missing.append(name)
    unexpected = [name for name in given if name not in own]
    if missing or unexpected:
        raise UserError(
            f"the student's network differs from the teacher's (first difference '{(missing + unexpected)[0]}'); expected the "
            "same architecture; give both the same network settings"
        )


def train(config: RunConfig, folder: str | Path, *, resume: bool = False, progress: bool = True) -> Model:
    """Train a teacher (or a student from scratch, sCT) into a run folder and return the model; see `Trainer`."""
    return Trainer(config, folder, resume=resume, progress=progress).run()


def distill(
    config: RunConfig, teacher: Model, folder: str | Path, *, resume: bool = False, progress: bool = True
) -> Model:
    """Train a student that starts from `teacher` into a run folder and return the model; see `Trainer`.

    Network and process are the teacher's, whatever the configuration says of them.
    """
    config = dataclasses.replace(
        config, process=teacher.config.process, network=teacher.config.network, teacher=config.teacher or "teacher"
    )
    return Trainer(config, folder, teacher=teacher, resume=resume, progress=progress).run()
