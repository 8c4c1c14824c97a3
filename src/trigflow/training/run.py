"""What a run consists of: networks, data, optimizers, averages, counters; how it is saved and comes back.

Every random number of step i comes from a generator seeded by (seed, i), and the data order is a function of (seed, i) too.
A run that is interrupted and resumed therefore ends with the same weights, bit for bit, as one that never stopped.
"""

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.conditions import null, takes
from trigflow.data import Dataset, Loader, Order
from trigflow.data.config import load_data
from trigflow.models.bridges import Bridge
from trigflow.models.model import Model, read_description, times_of
from trigflow.networks import CustomConfig, build
from trigflow.networks.custom import check_apart
from trigflow.objectives import AdaptiveWeight
from trigflow.runtime.distributed import is_first, on_first, rank, world_size
from trigflow.runtime.errors import DivergedError, UserError
from trigflow.runtime.files import write_json
from trigflow.runtime.interrupt import Stops, uninterrupted
from trigflow.runtime.machine import resolve_device
from trigflow.runtime.places import check_outside, check_place
from trigflow.runtime.seeds import derive_seed, generators_kept
from trigflow.runtime.values import kind_of
from trigflow.runtime.wrappers import unwrapped
from trigflow.training.basis import basis_of, begun, check_same, numbered
from trigflow.training.batch import Batches
from trigflow.training.checkpoint import clear_unfinished
from trigflow.training.compiled import is_compiled
from trigflow.training.config import RunConfig, origin_of
from trigflow.training.ema import EMA
from trigflow.training.guard import Guard, not_finite
from trigflow.training.instruments import Instruments
from trigflow.training.learner import Learner
from trigflow.training.log import warn
from trigflow.training.losses import Losses
from trigflow.training.parallel import Parallel, Share
from trigflow.training.report import SAMPLES, Grids
from trigflow.training.saving import RESUME, Resume, Saving
from trigflow.training.scaling import LossScale
from trigflow.training.setup import check_start, check_teacher, choose_codec, claim_folder, fit_network, kept_alone, start_from
from trigflow.training.snapshots import drop_snapshots_after


class RunParts:
    """The parts of a run in its folder, as `Trainer` puts them together and trains them; see there for the arguments."""

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        teacher: Model | None = None,
        start: Model | None = None,
        negative: Model | None = None,
        network: nn.Module | None = None,
        dataset: Dataset | None = None,
        resume: Resume = False,
        progress: bool = True,
    ) -> None:
        kind_of(RunConfig, config=config)
        kind_of(Dataset, dataset=dataset)
        kind_of(Model, teacher=teacher, start=start, negative=negative)
        if not any(type(resume) is type(known) and resume == known for known in RESUME.values()):
            raise UserError(f"resume is {resume!r}; expected True, False or 'auto'; correct the argument")
        config.validate()
        check_outside(check_place(folder, "folder"), config.data.source)
        self.progress = progress and is_first()
        opened = load_data(config.data, self.progress) if dataset is None else dataset
        opened = opened.read_as(None if teacher is None else teacher.conditioner, self.progress)
        state = begun(Path(folder), resume)
        self.dataset = numbered(opened, state, {"teacher": teacher, "start": start})
        network = unwrapped(network) if isinstance(network, nn.Module) else network
        self.config = config = fit_network(config, self.dataset, network)
        self.teacher = teacher
        self.device = resolve_device(config.loop.device)
        self.codec = choose_codec(config, self.dataset, teacher)
        check_teacher(config, self.dataset, teacher, negative)
        check_start(config, self.dataset, start, self.codec)
        self.basis = basis_of(self.dataset, {"teacher": teacher, "start": start, "negative": negative})
        check_same(state, self.basis, self.codec)
        if teacher is not None and network is not None:
            check_apart(network, teacher.network)

        loop = config.loop
        share = Share(loop.batch_size, loop.accumulate, world_size(), rank())
        compiles = is_compiled(loop.compile, self.device, loop.iterations)
        self.parallel = parallel = Parallel(config.parallel, self.device, compiles)
        if parallel.sharded and loop.instruments:
            raise UserError(
                "loop.instruments with sharded weights, which no process has all of; expected parallel.mode ddp; "
                "change it or drop the instruments"
            )
        memory_format = torch.channels_last if loop.channels_last else torch.contiguous_format
        with generators_kept():
            torch.manual_seed(derive_seed(loop.seed, "weights"))
            built = build(config.network, config.process.sigma_data) if network is None else network
            weights = self._weights("weight", *["vsd_weight"] * config.objective.fake)
            fake_weights = self._weights("fake_weight")
        self.dataset = self.dataset.read_by(null(built))
        if teacher is not None and network is None:
            start_from(built, teacher.network)
        fake = copy.deepcopy(built) if config.objective.fake else None  # starts from the teacher
        if start is not None:
            start_from(built, start.network, "start")
        how = loop.compile if compiles and not parallel.compiles_blocks else None
        self.ema = EMA(config.ema, built, compiles=how is not None)  # a copy, which what is sharded has none of
        for averaged in self.ema.modules.values():
            parallel.place(averaged, memory_format)
        modules = [*built.modules(), *([] if teacher is None else teacher.network.modules())]
        last = min((module.sigma_range[1] for module in modules if isinstance(module, Bridge)), default=math.inf)
        latest = config.process.time_from_sigma(torch.tensor(last, dtype=torch.float64)).item()
        parallel.ease(built, trained=True)
        self.network = parallel.place(built, memory_format, trained=True)
        for model, sharded in ((teacher, True), (negative, False)):  # a negative is not called for every batch
            if model is not None:
                parallel.ease(model.network)
                parallel.place(model.network, sharded=sharded)
        self.student = Learner(self.network, weights, config.optimizer, loop.iterations, parallel.replicate, compiles)
        self.modules: dict[str, nn.Module] = {"network": self.network, **weights}
        self.optimizers = {"optimizer": self.student.optimizer}
        self.fake: Learner | None = None
        if fake is not None:
            parallel.ease(fake, trained=True)
            fake = parallel.place(fake, memory_format, trained=True)
            lr = getattr(config.objective, "fake_lr", None) or config.optimizer.lr
            settings = dataclasses.replace(config.optimizer, lr=lr)
            self.fake = Learner(fake, fake_weights, settings, loop.iterations, parallel.replicate, compiles)
            self.modules |= {"fake": fake, **fake_weights}
            self.optimizers["fake_optimizer"] = self.fake.optimizer
        self.batches = Batches(
            config, self.dataset, self.codec, self.network, self.device, memory_format,
            share if parallel.processes > 1 else None, latest,
        )  # fmt: skip
        self.scale = LossScale() if loop.precision == "fp16" else None
        self.guard = Guard(config.guard, self.scale)
        self.losses = Losses(config, self.student, teacher, self.fake, negative, self.scale, how)
        self.instruments = self._instruments()
        self.order = self._order()
        self.share = share
        self.loader = Loader(
            self.dataset, lambda i: share.of(self.order.indices(i)), loop.iterations,
            workers=config.data.workers, ahead=config.data.ahead, device=self.device,
        )  # fmt: skip
        self.iteration = 0
        self.pending: list[dict[str, Tensor]] = []  # numbers of steps, on the device, that nobody has read yet
        self.made: Tensor | None = None  # updates among them, on the device
        self.read: dict[str, float] = {}  # those of the last step that was looked at
        self.stops = Stops(parallel.processes > 1)
        # Last, so that settings in error leave no folder behind.
        self.folder = on_first(lambda: claim_folder(Path(folder), config, bool(resume)))
        spread = torch.arange(SAMPLES) * len(self.dataset) // SAMPLES
        shown = self.dataset.said(spread, ["text"] if "text" in takes(self.network) else [])
        self.grids = Grids(self.folder, self.codec, loop.seed, self.device, parallel.sharded, shown)
        self.saving = Saving(self.folder, loop, {**self.modules, **self.ema.modules}, self.optimizers)
        with kept_alone(self.folder):
            on_first(lambda: clear_unfinished(self.folder))
            if resume:
                self.restore(strict=resume is True)
                on_first(lambda: drop_snapshots_after(self.folder, self.iteration))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The student's optimizer."""
        return self.student.optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the student's optimizer changes."""
        return self.student.parameters

    # State -----------------------------------------------------------------------------------------------------------

    def model(self) -> Model:
        """The averaged network as a model."""
        config = self.config
        return Model(
            self.ema.network, config.network, config.process, self.codec, config.objective.sampling,
            self.dataset.conditioner(takes(self.network)),
            channels_last=config.loop.channels_last, origin=origin_of(config),
        )  # fmt: skip

    def save_checkpoint(self, *, wait: bool = True) -> None:
        """Write the state of the run as of now, all processes together.

        Args:
            wait: until it is whole. Otherwise only a copy of the state is waited for, and training can go on; what becomes of
                the checkpoint is seen to by `run`.

        Raises:
            UserError: when it cannot be written, or when a weight or moment is not finite: nothing could go on from it.
        """
        self.settle()
        if bad := self._not_finite():
            raise UserError(
                f"{', '.join(bad)} of iteration {self.iteration} not finite; expected numbers to go on from; "
                "resume from the checkpoint before"
            )
        self.saving.save(
            self.iteration, {**self.guard.state(), "model": self.model().description(), "basis": self.basis}, wait=wait
        )

    def restore(self, *, strict: bool = False) -> dict[str, Any] | None:
        """Go back, in place, to the newest sound checkpoint of the run folder: weights, averages, moments and counters.

        All processes of a run call this together. Nothing changes where there is no checkpoint.

        Args:
            strict: raise an error for a newest checkpoint that is damaged, instead of setting it aside with a warning.

        Returns:
            What was saved beside the tensors, `iteration` and `skipped` among it; None where there is no checkpoint.

        Raises:
            UserError: when the checkpoint belongs to another network or optimizer.
        """
        state = self.saving.restore(strict=strict)
        if state is None:
            return None
        self.iteration = state["iteration"]
        self.guard.load(state)
        self.order = self._order()
        return state

    def settle(self) -> None:
        """Take note of what came of the steps whose numbers have not been read yet. Nothing here; see `Trainer`."""

    # Parts -----------------------------------------------------------------------------------------------------------

    def _seed(self, *path: int | str) -> int:
        """A seed for this purpose, another one each time the run has gone back."""
        again = ("rollback", self.guard.rollbacks) if self.guard.rollbacks else ()
        return derive_seed(self.config.loop.seed, *path, *again)

    def _order(self) -> Order:
        return self.dataset.order(self.config.loop.batch_size, self._seed("data"))

    def _instruments(self) -> Instruments | None:
        watched = self.config.loop.instruments and is_first()
        return Instruments(self.losses, self.ema.network) if watched else None

    def _not_finite(self) -> list[str]:
        return not_finite({**self.modules, **self.ema.modules}, self.optimizers)

    def _times(self) -> dict[int, tuple[float, ...]]:
        """Sampling times that were searched for after the run had ended, when it is resumed: its weights stay as they are."""
        path = self.folder / "model.json"
        if self.iteration < self.config.loop.iterations or not path.is_file():
            return {}
        try:
            return times_of(read_description(path))
        except (UserError, AttributeError, KeyError, TypeError, ValueError):
            return {}

    def _weights(self, *names: str) -> dict[str, nn.Module]:
        """Adaptive weightings of these names, where the objective has any."""
        if not self.config.objective.learns_weight:
            return {}
        return {name: AdaptiveWeight(self.config.process).to(self.device) for name in names}

    def _snapshot(self) -> None:
        """Write the averages that post-hoc reconstruction starts from, when it is time for them."""
        if self.ema.save_snapshots(self.folder, self.iteration, self.guard.updates, self.config.loop.iterations):
            description = self.model().description()
            try:
                on_first(lambda: write_json(self.folder / "ema" / "model.json", description))
            except UserError as error:
                warn(f"{error}; training goes on")

    def _trouble(self) -> str | None:
        """Why the run has to go back after this step. Its state is looked at where the step failed and where it is written."""
        looked_at = self.guard.streak or self._writes()
        if self.guard.trouble is None and looked_at and (bad := self._not_finite()):
            return f"{', '.join(bad)} not finite"
        return self.guard.trouble

    def _writes(self) -> bool:
        """Whether weights are written after this step, in a checkpoint, a snapshot or the model."""
        i, every = self.iteration, self.config.ema.snapshot_every
        return i == self.config.loop.iterations or self.saving.due(i) or (every > 0 and i % every == 0)

    def _go_back(self, trouble: str) -> None:
        """Restore the newest checkpoint, from which the run goes on with other data and noise. What was counted stays so.

        Raises:
            DivergedError: where there is no checkpoint, or the run has gone back too often.
        """
        self.pending, self.made = [], None
        reached, most = self.iteration, self.config.guard.rollbacks
        with uninterrupted():
            before = self.guard.counts()
            if self.guard.rollbacks >= most or self.restore() is None:
                which = f"the run has gone back {most} times" if self.guard.rollbacks >= most else "there is no checkpoint"
                raise DivergedError(
                    f"iteration {reached}: {trouble}, and {which}; expected finite numbers; "
                    f"run 'trigflow doctor {self.folder}' to see why, and start anew"
                )
            self.guard.go_on(before)
            self.order, self.instruments = self._order(), self._instruments()
            on_first(lambda: drop_snapshots_after(self.folder, self.iteration))
            self.save_checkpoint(wait=False)  # so that a run resumed from here has other data too
        warn(
            f"iteration {reached}: {trouble}; gone back to iteration {self.iteration}, "
            f"{self.guard.rollbacks} of at most {most} times"
        )

    def _dropout_stream(self, iteration: int) -> contextlib.AbstractContextManager[Any]:
        """Dropout, and a module of the user's own whatever it does, draws from torch's default generator: seed it for this step
        and process, and give it back unchanged."""
        stack = contextlib.ExitStack()
        if self.config.network.dropout > 0 or isinstance(self.config.network, CustomConfig):
            stack.enter_context(generators_kept())
            process = (rank(),) if rank() else ()
            torch.manual_seed(self._seed("dropout", iteration, *process))
        return stack
