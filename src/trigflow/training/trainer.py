"""One trainer for teacher and student: from data to gradient to update, step by step.

Where nothing has to be decided by its numbers at once, a step reads none of them: what is not finite is left out on the device,
and the host takes note of it when the next line of metrics is due. See `trigflow.training.run` for what a run consists of.
"""

from typing import Any

import torch
from torch import Tensor

from trigflow.migrations import stamped
from trigflow.models.model import Model
from trigflow.runtime.distributed import average, is_first
from trigflow.runtime.files import write_json
from trigflow.runtime.heap import freed_memory_kept
from trigflow.runtime.interrupt import stop_for, uninterrupted
from trigflow.runtime.machine import repeatable
from trigflow.training.batch import Batch, split
from trigflow.training.config import to_dict
from trigflow.training.learner import Learner
from trigflow.training.log import warn
from trigflow.training.report import Report
from trigflow.training.run import RunParts
from trigflow.training.setup import kept_alone

UNREAD = 1000
"""Steps whose numbers are left unread at most."""


class Trainer(RunParts):
    """Trains the network of a configuration into a run folder.

    Where a process group has been set up, all of its processes make the same trainer and call the same methods in the same
    order; see `trigflow.training.parallel`. The first one writes the run folder, which for resuming all have to see.

    Args:
        config: the run; channels and classes of the network are taken from the data.
        folder: the run folder: config.json, metrics.jsonl, tensorboard/, samples/, checkpoints/, and at the end the model.
        teacher: for distillation; the student also starts from its weights.
        start: model whose weights the student starts from instead.
        negative: model that the teacher is guided away from (autoguidance); None for classifier-free guidance.
        network: a module of your own, `F(x_t / sd, t, **conditions)`, trained in place of the network of the configuration
            and from the weights it has; see `trigflow.networks.CustomConfig`.
        dataset: the data, when already open; by default `config.data` is opened.
        resume: go on from the newest checkpoint, when there is one. With `auto`, damaged ones are set aside, and the newest
            sound one is taken.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: for settings that make no sense, data or teacher that do not fit, a folder that cannot be written or
            holds another run.
    """

    @freed_memory_kept()
    def run(self) -> Model:
        """Train to the last iteration, write the model into the run folder and return it.

        A step whose loss or gradient is not finite changes nothing and is counted as skipped. After too many of them in a row,
        or where weights or moments are not finite themselves, the run goes back to its last checkpoint and on from there with
        other data and noise; see `trigflow.training.guard`.

        Raises:
            KeyboardInterrupt: after Ctrl-C, and `Terminated` (see `trigflow.runtime.interrupt`) after SIGTERM, when a
                checkpoint has been written; several processes stop after the same step. A second signal is not waited for.
            UserError: when the last checkpoint or the model cannot be written. Of others that is said, and training goes on.
        """
        with kept_alone(self.folder), self.stops:
            times = self._times()
            self._train()
            with self.stops.deferred():
                self.save_checkpoint()
                model = self.model()
                model.times = times
                model.save(self.folder)
        return model

    def _train(self) -> None:
        loop = self.config.loop
        if is_first():
            write_json(self.folder / "config.json", stamped("config", to_dict(self.config)))
        report = Report(self.folder, self.config, self.iteration, show=self.progress)
        try:
            self._snapshot()  # one that an interruption prevented
            while self.iteration < loop.iterations:
                scalars, figures = self.step()
                report.add(self.iteration, figures)
                if self.decides_at_once or report.due(self.iteration) or self._acts():
                    self.settle()
                trouble = self._trouble()
                if trouble or report.due(self.iteration):
                    self.settle()  # found in steps without a line, trouble may come before their numbers
                    measured = {} if trouble or self.instruments is None else self.instruments.read()
                    report.write(self.iteration, {**scalars, **self.read}, measured, self.guard, self.loader.waited())
                if trouble:
                    self._go_back(trouble)
                    report.go_back(self.iteration)
                    continue
                self._snapshot()
                if self._draws():
                    self.grids.draw(self.model(), self.iteration, report.log)
                self.saving.go_on()
                if self.saving.due(self.iteration) and self.iteration < loop.iterations and not self.guard.streak:
                    self.save_checkpoint(wait=False)
                if self.stops.agreed:
                    raise stop_for(self.stops.agreed)
        except KeyboardInterrupt:
            if bad := self._not_finite():
                warn(f"{', '.join(bad)} not finite, and no checkpoint written; --resume goes on from the one before")
                self.saving.finish()
            else:
                self.save_checkpoint()
            raise
        except Exception:
            self.saving.writer.wait()
            raise
        finally:
            self.loader.close()
            report.close()

    def step(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One optimizer step: scalars of the whole batch, and figures of the samples of this process, both on the device.

        Advances `iteration`. What came of the step is noted by `settle`. With a fake score network, both learners take their
        step from gradients of the same samples, or neither does.
        """
        loop, i = self.config.loop, self.iteration
        indices = self.order.indices(i)
        batch = self._batch(indices, torch.Generator().manual_seed(self._seed("step", i)))
        values: dict[str, Tensor] = {}
        figures = []
        lr = self.student.begin(i)
        if self.fake is not None:
            self.fake.begin(i)
        with repeatable(self.device), self._dropout_stream(i):
            for k, part in enumerate(split(batch, loop.accumulate), start=1):
                more, seen = self.losses.backward(part, i, loop.accumulate, last=k == loop.accumulate)
                values = {name: values[name] + value if name in values else value for name, value in more.items()}
                figures.append(seen)
            values["grad_norm"] = self.student.clip_gradient(self.scale)
            if self.fake is not None:
                values["fake_grad_norm"] = self.fake.clip_gradient(self.scale)
            if self.instruments is not None:
                self.instruments.watch(i, part, values["grad_norm"])
            with uninterrupted():
                values = {name: value.detach().float() for name, value in values.items()}
                self.pending.append(values)
                self._tell()
                updates: Any = self.guard.updates + 1
                accepted, fine = True, None
                if self.decides_at_once:
                    accepted = self._note()
                else:
                    fine = self._are_fine(values)
                    self.made = fine.double() if self.made is None else self.made + fine
                    updates = self.guard.updates + self.made
                if accepted:
                    self.student.fine = fine
                    self.student.update()
                    self.ema.update(self.network, updates, loop.batch_size, fine)
                    if self.fake is not None:
                        self.fake.fine = fine
                        self.fake.update()
                        self._update_fake_again(self.fake, indices, fine)
                self.iteration += 1
        if len(self.pending) >= UNREAD:
            self.settle()
        return {**values, "lr": lr}, {name: torch.cat([f[name] for f in figures]) for name in figures[0]}

    def settle(self) -> None:
        """Read the numbers of the steps since the last time, all at once, and take note of what came of them."""
        if self.pending:
            self._note()

    @property
    def decides_at_once(self) -> bool:
        """Whether an update waits for its numbers to be read: where a spike is to be left out or gone back for, float16 has a
        scale to adjust, weights are sharded, the device has no float64, or the optimizer is RAdam, which leaves out no step."""
        known = all(learner.skips for learner in (self.student, self.fake) if learner is not None)
        return (
            not (known and self.config.guard.spikes in ("off", "log") and self.scale is None)
            or self.parallel.sharded
            or self.device.type == "mps"
        )

    @property
    def skipped(self) -> int:
        """Steps left out because a loss or a gradient was not finite; all processes ask together."""
        self.settle()
        return self.guard.skipped

    # Parts -----------------------------------------------------------------------------------------------------------

    def _batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        stored = self.loader.read(self.iteration, self.share.of(indices))
        return self.batches.draw(indices, generator, stored, self.iteration)

    def _note(self) -> bool:
        """Have the guard look at the steps that are pending; whether it accepts the last one."""
        names = list(self.pending[0])
        read = torch.stack([torch.stack([values[name] for name in names]) for values in self.pending]).tolist()
        self.pending, self.made = [], None
        accepted = False
        for row in read:
            self.read = average(dict(zip(names, row, strict=True)))
            accepted = self.guard.accepts(self.read)
        return accepted

    def _are_fine(self, values: dict[str, Tensor]) -> Tensor:
        """1 on the device where all numbers of a step are finite, else 0. Norms are the same in all processes; losses are not,
        and what is not finite in one is so in the gradient of all."""
        several = self.parallel.processes > 1
        seen = [value for name, value in values.items() if not several or name.endswith("norm")]
        return torch.stack(seen).isfinite().all().float()

    def _tell(self) -> None:
        """Agree with the other processes whether to save and to stop, all of them after the same step."""
        told = {**self.stops.tell(), **self.saving.tell()}
        agreed = average(told)
        self.stops.hear(agreed)
        self.saving.hear(agreed)

    def _acts(self) -> bool:
        """Whether something is done after this step that depends on how the steps went."""
        return self._writes() or self._draws() or bool(self.stops.agreed)

    def _draws(self) -> bool:
        """Whether a grid of samples is drawn after this step."""
        every = self.config.loop.sample_every
        return every > 0 and self.iteration % every == 0

    def _update_fake_again(self, fake: Learner, indices: Tensor, accepted: Tensor | None) -> None:
        """The updates of the fake score network after the first, on new samples; one that is not finite is left out."""
        loop, i = self.config.loop, self.iteration
        for k in range(1, getattr(self.config.objective, "fake_updates", 1)):
            fake.begin(i)
            batch = self._batch(indices, torch.Generator().manual_seed(self._seed("fake", i, k)))
            losses = []
            for m, part in enumerate(split(batch, loop.accumulate), start=1):
                with torch.no_grad():
                    sample = self.student.compute(self.losses.generate, part)
                losses.append(self.losses.backward_fake(part, loop.accumulate, sample, last=m == loop.accumulate)[0])
            values = {"loss": torch.stack(losses).sum().float(), "norm": fake.clip_gradient(self.scale).float()}
            if accepted is not None:
                fake.fine = accepted * self._are_fine(values)
                fake.update()
            elif self.guard.accepts_more(average({name: value.item() for name, value in values.items()})):
                fake.update()
