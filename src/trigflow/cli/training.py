"""Commands that train, and what is done with a run: `train`, `distill`, `info`, `checkpoint`, `ema` and `convert`."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from trigflow.data.config import DataConfig, data_of, load_data
from trigflow.lab.recipes import RUNS, preset, require_data
from trigflow.networks import NetworkConfig, UNetConfig
from trigflow.objectives import Diffusion, Objective, as_kind
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.places import check_place
from trigflow.training.config import (
    EMAConfig,
    GuardConfig,
    LoopConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    flattened,
    to_dict,
)
from trigflow.training.convert import ConvertSettings
from trigflow.training.setup import fit_network

if TYPE_CHECKING:
    from trigflow.models.model import Model


@dataclass(frozen=True)
class Train:
    """Train a diffusion teacher (or, with an sct preset, a student from scratch) on digits, mnist or your own images.

    Example: trigflow train --data photos/ --resize 32 --out runs/teacher
    """

    out: Path
    """Run folder to create (or, with --resume, to go on with)."""
    preset: str = "auto"
    """Starting point of all settings, see trigflow recipes; auto chooses by the data. Every other option overrides it."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes, or --resume alone: go on from the newest checkpoint in the run folder; one that is damaged is an error. auto: from
    the newest that is sound, or anew where there is none, for scripts that are started again and again."""
    dry: bool = False
    """Print every setting with where it is from (defaults, preset, teacher, command line, data), and train nothing."""
    quiet: bool = False
    """No progress bars."""
    data: DataConfig = field(default_factory=DataConfig)
    process: TrigFlow = field(default_factory=TrigFlow)
    network: NetworkConfig = field(default_factory=UNetConfig)
    objective: Objective = field(default_factory=Diffusion)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def run(self) -> None:
        from trigflow.training.runs import train
        from trigflow.training.saving import RESUME

        if self.objective.distills:
            raise UserError(
                "train without a teacher cannot distill; expected diffusion, sct, ct or meanflow; use: trigflow distill RUN"
            )
        require_data(self.data.source)
        config = RunConfig(
            self.data, self.process, self.network, self.objective,
            self.optimizer, self.ema, self.loop, self.parallel, self.guard,
        )  # fmt: skip
        if self.dry:
            print_settings(config, self.out, **{f"preset {self.preset}": as_kind_of(preset(self.preset, "train"), config)})
            return
        train(config, self.out, resume=RESUME[self.resume], progress=not self.quiet)
        print(f"Trained. Draw with: trigflow sample {self.out}; distill with: trigflow distill {self.out} --out RUN")


@dataclass(frozen=True)
class Distill:
    """Turn a teacher into a student that draws in one or two steps (sCD), starting from the teacher's weights.

    Data and network are the teacher's. `--objective.kind` chooses the loss: scd, vsd, scd-vsd (their sum), cd or
    meanflow-distill; or sct, ct or meanflow, which learn from the data alone and only start from the teacher. `--from` starts
    from a student instead.

    Example: trigflow distill runs/teacher --out runs/student
    """

    teacher: Positional[Path]
    """Run folder of the teacher."""
    out: Path
    """Run folder to create (or, with --resume, to go on with)."""
    preset: str = "auto"
    """Starting point of all settings, see trigflow recipes; auto chooses by the teacher's data. Other options override it."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes, or --resume alone: go on from the newest checkpoint in the run folder; one that is damaged is an error. auto: from
    the newest that is sound, or anew where there is none, for scripts that are started again and again."""
    dry: bool = False
    """Print every setting with where it is from (defaults, preset, teacher, command line, data), and train nothing."""
    quiet: bool = False
    """No progress bars."""
    start: Annotated[Path | None, arg(name="from", metavar="RUN")] = None
    """Run folder of a student of this teacher to start from; the paper's scd-vsd starts from an scd student. Or adapters that
    somebody else has trained (.safetensors, or a folder as diffusers writes it)."""
    negative: Annotated[Path | None, arg(metavar="RUN")] = None
    """Run folder of a worse teacher (smaller, or trained for less time) to guide the teacher away from; by default the
    teacher without the class. For `--objective.guidance-max` above 1, or `--objective.guidance`."""
    data: Annotated[str | None, arg(name="data")] = None
    """Other data than the teacher was trained on: digits, mnist, a folder or a zip."""
    lora: int | None = None
    """Of a teacher imported from diffusers: train adapters of this rank, and nothing else."""
    lora_targets: tuple[str, ...] = ()
    """Modules that get adapters, by the ends of their names; by default those of the family."""
    dora: bool = False
    """Adapters of direction and magnitude."""
    full: bool = False
    """Of a teacher imported from diffusers: train every weight."""
    memory: str | None = None
    """Of a teacher imported from diffusers: how much memory there is, such as 24G. Chooses in how many parts a batch is
    computed, and whether blocks are computed again in the backward pass."""
    dropout: float | None = None
    """Dropout of the student's network; by default that of the preset or else of the teacher."""
    dropout_up_to: int | None = None
    """With dropout: the largest resolution that has it, for an EDM2 network; by default every one."""
    objective: Objective = field(default_factory=Diffusion)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def run(self) -> None:
        from trigflow.models.model import load
        from trigflow.training.runs import distill, with_dropout_of
        from trigflow.training.saving import RESUME

        if self.objective.kind == "diffusion":
            raise UserError(
                "distill with the diffusion objective; expected that of a student, such as scd; use: trigflow train"
            )
        if self.dropout is None and self.dropout_up_to is not None:
            raise UserError(f"--dropout-up-to {self.dropout_up_to} without dropout; expected both; pass --dropout too")
        check_place(self.out, "folder")
        device = "cpu" if self.parallel.mode == "fsdp" else self.loop.device  # sharded from there, block by block
        teacher = load(self.teacher, device)
        start = None if self.start is None or self._adapters() else load(self.start, device)
        negative = None if self.negative is None else load(self.negative, self.loop.device)
        config = RunConfig(
            data_of(teacher.origin), teacher.process, teacher.spec,
            objective=self.objective, optimizer=self.optimizer, ema=self.ema, loop=self.loop,
            parallel=self.parallel, guard=self.guard, teacher=str(self.teacher),
            start=None if self.start is None else str(self.start),
            negative=None if self.negative is None else str(self.negative),
        )  # fmt: skip
        if self.data is None and "imported" in teacher.origin and hasattr(teacher.spec, "adapter"):
            raise UserError("no data for a teacher from diffusers; expected what trigflow encode --with wrote; pass --data")
        if self.data is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=self.data))
        if self.lora is not None or self.lora_targets or self.dora or self.full or hasattr(teacher.spec, "adapter"):
            config = dataclasses.replace(config, network=self._adapted(teacher.spec))
        if self._adapters():
            start = started(teacher, config, self.start)
        if self.memory is not None:
            from trigflow.lab.plan import fitted

            size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:G|GB|GiB)?", self.memory)
            if not size or not hasattr(config.network, "adapter"):
                raise UserError(f"--memory {self.memory}; expected GiB, such as 24G, with a teacher from diffusers; correct it")
            config = fitted(config, self.teacher, float(size[1]))
            parts, again = config.loop.accumulate, config.parallel.recompute
            print(
                f"{self.memory}: each batch in {parts} parts{', blocks computed again in the backward pass' if again else ''}"
            )
        if self.dropout is not None:
            dropped = {"dropout": self.dropout, "dropout_up_to": self.dropout_up_to}
            settings: dict[str, Any] = {n: value for n, value in dropped.items() if hasattr(config.network, n)}
            config = dataclasses.replace(config, network=config.network.changed(**settings))
        require_data(config.data.source)
        if self.dry:
            named = as_kind_of(preset(self.preset, "distill"), config)
            given = dataclasses.replace(
                named, data=data_of(teacher.origin), process=teacher.process,
                network=with_dropout_of(named.network, teacher.spec) if self.preset in RUNS else teacher.spec,
                teacher=config.teacher,
            )  # fmt: skip
            print_settings(config, self.out, **{f"preset {self.preset}": named, "teacher": given})
            return
        student = distill(
            config, teacher, self.out, start=start, negative=negative, resume=RESUME[self.resume], progress=not self.quiet
        )
        print(f"Distilled. Draw with: trigflow sample {self.out} --steps {student.default_steps()}")

    def _adapters(self) -> bool:
        """Whether what is to be started from are adapters, not a run."""
        return self.start is not None and (self.start.suffix == ".safetensors" or any(self.start.glob("*lora*.safetensors")))

    def _adapted(self, network: NetworkConfig) -> NetworkConfig:
        """The network of a teacher from elsewhere with what of it is trained."""
        if not hasattr(network, "adapter"):
            raise UserError(
                "--lora, --dora or --full for a teacher of trigflow's own networks, which are always trained whole; expected "
                "one imported from diffusers; leave it out"
            )
        if (self.lora is None) == (not self.full):
            raise UserError(
                "what of a teacher from diffusers is to be trained; expected --lora RANK or --full; pass one of them"
            )
        adapter = dataclasses.replace(
            network.adapter, rank=self.lora or 0, targets=self.lora_targets, dora=self.dora, full=self.full
        )
        if self.lora is not None and self.lora < 1:
            raise UserError(f"--lora {self.lora}; expected a rank of at least 1; change it")
        return network.changed(adapter=adapter)


def started(teacher: Model, config: RunConfig, path: Path | None) -> Model:
    """A model of the teacher's denoiser with adapters from a file, for a student to start from."""
    from trigflow.models.foreign.adapters import read_adapters
    from trigflow.networks import build
    from trigflow.runtime.wrappers import entries, load_entries

    if path is None or not getattr(config.network, "adapter", None):
        raise UserError(f"--from '{path}' for a network without adapters; expected a run folder; correct it")
    network = build(config.network, config.process.sigma_data).requires_grad_(False)
    own = entries(network)
    load_entries(network, {**own, **entries(teacher.network), **read_adapters(path, own)})
    return dataclasses.replace(teacher, network=network, spec=config.network)


def as_kind_of(config: RunConfig, other: RunConfig) -> RunConfig:
    """The configuration with the kind of objective that another has, so that their settings can be compared."""
    return dataclasses.replace(config, objective=as_kind(config.objective, other.objective.kind))


def print_settings(config: RunConfig, out: Path, **decided: RunConfig) -> None:
    """Print every setting that a run of this configuration would have, those that the data decide among them.

    Beside its value stands the first layer that it is like this from: the defaults, what has `decided` on top of these by its
    name, in order, then the command line, then the data.

    Raises:
        UserError: as the run would, for settings that make no sense or data that cannot be read.
    """
    config.validate()
    fitted = fit_network(config, load_data(config.data, progress=False))
    layers = {"default": as_kind_of(RunConfig(), config), **decided, "command line": config, "data": fitted}
    flat = {name: flattened(to_dict(layer)) for name, layer in layers.items()}
    for setting, value in flat["data"].items():
        if setting == "format":
            continue
        origin = "data"
        for name, values in reversed(flat.items()):
            if setting not in values or values[setting] != value:
                break
            origin = name
        print(f"{setting:40} {value!s:28} {origin}")
    print(f"nothing was trained; without --dry this run goes to {out}")


@dataclass(frozen=True)
class Info:
    """Say what a run folder holds: model, data, settings, how training went.

    Example: trigflow info runs/demo
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        from trigflow.training.describe import describe_run

        print(describe_run(self.run_folder, as_json=self.json))


@dataclass(frozen=True)
class Checkpoint:
    """List and check the checkpoints of a run, or make a model folder of one, however many files it has.

    The folder has the averaged network, as at the end of a run: for trigflow sample, evaluate, distill and the rest. The run
    may still be going on.

    Example: trigflow checkpoint runs/teacher --out runs/teacher-so-far
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to create; without it, checkpoints are listed and their checksums compared."""
    at: int | None = None
    """Iteration of the checkpoint; by default the newest."""
    everything: bool = False
    """Write state.safetensors too: weights, averages and optimizer moments as whole tensors in a single file."""

    def run(self) -> None:
        from trigflow.training.consolidate import consolidate, describe_checkpoints

        if self.out is None:
            if self.at is not None or self.everything:
                raise UserError("--at or --everything without --out; expected a folder to write; add --out DIR")
            print(describe_checkpoints(self.run_folder))
            return
        path = consolidate(self.run_folder, self.out, at=self.at, everything=self.everything)
        print(f"Made of iteration {int(path.name)}. Draw with: trigflow sample {self.out}")


@dataclass(frozen=True)
class Ema:
    """Average the weights of a run over another length than it was trained with, from its snapshots.

    The run must have been trained with `--ema.snapshot-every N`. Writes a folder that every other command takes.

    Example: trigflow ema runs/teacher --sigma-rel 0.07 --out runs/teacher-0.07
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder, finished or not."""
    sigma_rel: float
    """Length of the average relative to the training, in (0, 0.28)."""
    iteration: int | None = None
    """Iteration at which the average ends; by default the last snapshot's. Best is one that has a snapshot."""
    out: Path | None = None
    """Folder to create; by default RUN/ema/<iteration>-<sigma_rel>."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        from trigflow.training.posthoc import LARGE_ERROR, choose_snapshots, reconstruct

        iteration = choose_snapshots(self.run_folder, self.sigma_rel, self.iteration)[2]
        out = self.out or self.run_folder / "ema" / f"{iteration:08d}-{self.sigma_rel:g}"
        check_place(out, "new folder")
        result = reconstruct(self.run_folder, self.sigma_rel, iteration=iteration, progress=not self.quiet)
        result.save(out)
        count, error = len(result.snapshots), result.fit.error
        print(
            f"{out}: sigma_rel {self.sigma_rel:g} at iteration {iteration}, from {count} snapshots; expected error "
            f"{error:.1e} of the distance the weights have moved"
        )
        if error > LARGE_ERROR:
            print(
                f"trigflow: warning: an expected error of {error:.1e} is large; expected at most {LARGE_ERROR:g}; train with "
                "a lower ema.snapshot_every or ema.sigma_rels nearer to the length, or end at the iteration of a snapshot",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Convert:
    """Give a teacher with log time or Fourier features (as imported) the time embedding that distillation is stable with.

    Keeps the weights, fits the new time embedding to the old one, trains a little further with the diffusion loss, and
    reports how far the velocity moved. Writes a run folder with `convert.json`.

    Example: trigflow convert runs/edm2-s --data imagenet.zip --out runs/teacher
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of the teacher."""
    out: Path
    """Run folder to create."""
    data: str | None = None
    """Other data than the run was trained on: digits, mnist, a folder or a zip."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    resume: bool = False
    """Go on with a fine-tuning that was interrupted, with the same settings."""
    quiet: bool = False
    """No progress bar."""
    settings: OmitArgPrefixes[ConvertSettings] = field(default_factory=ConvertSettings)

    def run(self) -> None:
        from trigflow.training.convert import convert

        result = convert(
            self.run_folder, self.out, self.settings, data=self.data, device=self.device, resume=self.resume,
            progress=not self.quiet,
        )  # fmt: skip
        print(result.table())
        print(f"\nConverted. Distill with: trigflow distill {self.out} --out RUN")
