"""The resolved configuration of a run: plain dataclasses that the command line mirrors and a JSON file keeps."""

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import dacite
import tyro

from trigflow.data.config import DataConfig
from trigflow.migrations import FORMATS, migrated
from trigflow.models.model import with_foreign
from trigflow.networks import NetworkConfig, UNetConfig, network_from_state, network_state
from trigflow.objectives import Diffusion, Objective, known, objective_of
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json
from trigflow.runtime.values import check_types

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]

LEAST = {
    "data.workers": 0, "data.ahead": 1, "loop.iterations": 1, "loop.batch_size": 1, "loop.accumulate": 1, "loop.log_every": 1,
    "loop.sample_every": 0, "loop.checkpoint_every": 0, "loop.keep": 1, "loop.keep_every": 0, "optimizer.warmup": 0,
    "optimizer.t_ref": 1, "ema.rampup": 0, "ema.snapshot_every": 0, "guard.patience": 0, "guard.rollbacks": 0,
    "guard.window": 8,
}  # fmt: skip
"""Settings that have a least value."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "radam", "muon"] = "adam"
    """Adam, AdamW, RAdam, or Muon (for the matrices; Adam for the rest)."""
    lr: float = 1e-3
    """Reference learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Moment decays."""
    momentum: float = 0.95
    """muon: decay of the momentum of the matrices."""
    eps: float = 1e-8
    """Added to the root of the second moment (the paper's EDM2 presets use 1e-11)."""
    weight_decay: float = 0.0
    """Weight decay (decoupled in adamw and muon)."""
    schedule: Literal["constant", "inverse_sqrt", "cosine"] = "constant"
    """constant; lr / sqrt(max(i / t_ref, 1)); or a cosine to zero over the run."""
    t_ref: int = 35_000
    """Iterations before the inverse square root sets in."""
    warmup: int = 0
    """Iterations of linear warmup from zero."""
    clip: float | None = None
    """Upper bound on the global gradient norm; None for no clipping."""


@dataclass(frozen=True)
class EMAConfig:
    """Averaging of the weights; the average is what samples are drawn from."""

    kind: Literal["power", "halflife", "none"] = "power"
    """Power-function profile (EDM2), traditional exponential average, or none."""
    sigma_rel: float = 0.1
    """power: relative width of the profile, in (0, 0.28)."""
    halflife_mimg: float = 0.5
    """halflife: half-life in millions of images."""
    rampup: float = 0.05
    """halflife: the half-life is at most this share of the images seen so far."""
    snapshot_every: int = 0
    """Iterations between snapshots of power-function averages, for `trigflow ema`; 0 for none."""
    sigma_rels: tuple[float, ...] = (0.05, 0.1)
    """Lengths of the averages in the snapshots, two or more."""
    snapshot_dtype: Literal["fp32", "fp16"] = "fp32"
    """fp16 halves the files, and limits what is reconstructed from them to about 3 digits."""


@dataclass(frozen=True)
class LoopConfig:
    """The training loop."""

    iterations: Annotated[int, tyro.conf.arg(aliases=["--iterations"])] = 10_000
    """Optimizer steps."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 128
    """Samples per optimizer step."""
    accumulate: int = 1
    """Parts the batch is split into, one backward pass each."""
    precision: Precision = "fp32"
    """Arithmetic of the network; bf16 and fp16 are autocast, weights stay fp32. With fp16 the loss is scaled."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."""
    channels_last: bool = False
    """Keep images channels-last: convolutions are often faster."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 0
    """Everything random in the run derives from it."""
    log_every: int = 50
    """Iterations between lines of metrics."""
    sample_every: int = 1_000
    """Iterations between sample grids; 0 for none."""
    checkpoint_every: int = 1_000
    """Iterations between checkpoints; 0 for only the last."""
    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints, whatever the number of iterations; 0 for none by the clock."""
    keep: int = 2
    """Checkpoints kept: the newest."""
    keep_every: int = 0
    """Keep the checkpoints of multiples of so many iterations as well, and make them; 0 for none."""
    compile: Annotated[Literal["auto", "on", "off", "graphs"], tyro.conf.arg(aliases=["--compile"])] = "auto"
    """Compile the losses, tangents and all, and the average; graphs: as CUDA graphs too. auto: on CUDA, from 5,000 iterations
    on. What cannot be compiled runs as it is."""
    instruments: bool = False
    """Log the parts of the tangent, the time derivative of the embedding and the gradient by part of the network."""


@dataclass(frozen=True)
class GuardConfig:
    """What is done about numbers that go wrong. Nothing of it changes a run in which none do."""

    patience: int = 20
    """Steps in a row whose loss or gradient is not finite, after which the run goes back to its last checkpoint and on with
    other data; 0 for never."""
    rollbacks: int = 5
    """Times that a run goes back before it gives up."""
    spikes: Literal["off", "log", "skip", "rollback"] = "log"
    """When a loss or gradient norm is far above those before: count it, leave the step out too, or go back."""
    window: int = 128
    """Steps that a loss or gradient norm is compared with."""
    threshold: float = 10.0
    """Robust standard deviations above their median from which it is a spike."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is laid out over its processes, and its blocks over time. Nothing of it changes what is learned."""

    mode: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process has all weights. fsdp: each has its part of student, teacher, fake score, averages and moments."""
    shards: int | None = None
    """fsdp: parts that weights are cut into, a divisor of the number of processes; None for one in each process. Fewer parts
    make several copies, so that weights are gathered among neighbours only."""
    reshard: bool = True
    """fsdp: give the weights of a block back after its forward pass and gather them again for the backward pass."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """fsdp: number format that the weights of the blocks are gathered in; bf16 needs loop.precision bf16. Gradients are always
    summed, and weights kept, in fp32."""
    recompute: bool = False
    """Keep only the inputs of the blocks for the backward pass, and compute the rest again: less memory, a third more work."""
    timeout: float = 600.0
    """Seconds that a process waits for another before it gives up."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    process: TrigFlow = field(default_factory=TrigFlow)
    network: NetworkConfig = field(default_factory=UNetConfig)
    objective: Objective = field(default_factory=Diffusion)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    teacher: str | None = None
    """Run folder of the teacher (of a distillation; also the initial weights of an sct student, when given)."""
    start: str | None = None
    """Run folder of the model whose weights the student starts from; None for the teacher's."""
    negative: str | None = None
    """Run folder of the model that the teacher is guided away from (autoguidance); None for classifier-free guidance."""

    def validate(self) -> None:
        """Check the types of all settings, and what these cannot say. Raises a UserError naming the first setting that makes no
        sense."""
        check_types(self)
        loop, objective, optimizer, ema = self.loop, self.objective, self.optimizer, self.ema
        data, guard, parallel = self.data, self.guard, self.parallel
        interval = getattr(objective, "guidance_interval", None)
        least = [(name, bound, operator.attrgetter(name)(self)) for name, bound in LEAST.items()]
        checks = [
            *((value >= bound, name, value, f"at least {bound}" if bound else "0 or more") for name, bound, value in least),
            (0 <= data.memory_gib < math.inf, "data.memory_gib", data.memory_gib, "0 or more"),
            (loop.batch_size % max(loop.accumulate, 1) == 0, "loop.accumulate", loop.accumulate, "a divisor of the batch size"),
            (0 <= loop.checkpoint_minutes < math.inf, "loop.checkpoint_minutes", loop.checkpoint_minutes, "0 or more"),
            (0 < optimizer.lr < math.inf, "optimizer.lr", optimizer.lr, "a positive number"),
            (all(0 <= beta < 1 for beta in optimizer.betas), "optimizer.betas", optimizer.betas, "two numbers in [0, 1)"),
            (0 <= optimizer.momentum < 1, "optimizer.momentum", optimizer.momentum, "in [0, 1)"),
            (0 <= optimizer.eps < math.inf, "optimizer.eps", optimizer.eps, "0 or more"),
            (0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", optimizer.weight_decay, "0 or more"),
            (optimizer.clip is None or optimizer.clip > 0, "optimizer.clip", optimizer.clip, "a positive number"),
            *((fine, f"objective.{name}", value, expected) for fine, name, value, expected in objective.checks(self.process)),
            (0 < ema.sigma_rel < 0.28, "ema.sigma_rel", ema.sigma_rel, "in (0, 0.28)"),
            (ema.halflife_mimg > 0, "ema.halflife_mimg", ema.halflife_mimg, "a positive number"),
            (_are_lengths(ema.sigma_rels), "ema.sigma_rels", ema.sigma_rels, "two or more different numbers in (0, 0.28)"),
            (0 <= self.network.dropout < 1, "network.dropout", self.network.dropout, "in [0, 1)"),
            (parallel.shards is None or parallel.shards >= 1, "parallel.shards", parallel.shards, "at least 1, or None"),
            (parallel.dtype == "fp32" or loop.precision == "bf16", "parallel.dtype", parallel.dtype,
             "fp32 unless loop.precision is bf16"),
            (0 < guard.threshold < math.inf, "guard.threshold", guard.threshold, "a positive number"),
            (0 < parallel.timeout < math.inf, "parallel.timeout", parallel.timeout, "a positive number of seconds"),
        ]  # fmt: skip
        for fine, name, value, expected in checks:
            if not fine:
                raise UserError(f"{name} is {value}; expected {expected}; correct the setting")
        if type(objective) is not (meant := known(objective.kind).objective):
            raise UserError(
                f"objective.kind is {objective.kind} on a {type(objective).__name__}; expected a {meant.__name__}; change "
                "the kind with trigflow.objectives.as_kind, or make it with objective_of"
            )
        if objective.distills and self.teacher is None:
            raise UserError("distillation without a teacher; expected a teacher run folder; pass --teacher RUN")
        guided = getattr(objective, "guidance_max", 1.0) != 1 or getattr(objective, "guidance", 1.0) != 1
        if not guided and (interval is not None or self.negative is not None):
            what = "objective.guidance_interval" if interval is not None else "a negative model"
            raise UserError(
                f"{what} while objective.guidance_max is 1, which is no guidance; expected a maximum above 1; "
                "raise objective.guidance_max or drop the other"
            )


def _are_lengths(sigma_rels: tuple[float, ...]) -> bool:
    return len({f"{sigma_rel:g}" for sigma_rel in sigma_rels}) == len(sigma_rels) >= 2 and all(
        0 < sigma_rel < 0.28 for sigma_rel in sigma_rels
    )


def origin_of(config: RunConfig) -> dict[str, Any]:
    """What a model says of the run that it is from, see `Model.origin`."""
    raw = to_dict(config)
    return {"objective": config.objective.kind, "data": raw["data"], "teacher": config.teacher, "seed": config.loop.seed}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain JSON types with the number of their format; the network carries its name under `kind`."""
    raw: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"format": FORMATS["config"], **raw, "network": network_state(config.network)}


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of the run in a folder. Raises a UserError when there is none, it is damaged, or only a newer version
    reads it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no config.json; expected a run folder written by trigflow; check the path")
    return from_dict(read_json(path, "configuration"))


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """Inverse of `to_dict`. Raises a UserError for an unknown network, an unknown setting, or a value of the wrong type."""
    try:
        raw = migrated("config", raw, "the configuration")
        with_foreign(raw)
        rest = {name: value for name, value in raw.items() if name not in ("network", "objective")}
        kind = raw["objective"]["kind"]
        defaults = json.loads(json.dumps(dataclasses.asdict(objective_of(kind))))
        objective = _build(known(kind).objective, {**defaults, **raw["objective"]})
        return dataclasses.replace(_build(RunConfig, rest), network=network_from_state(raw["network"]), objective=objective)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, dacite.DaciteError) as error:
        raise UserError(
            f"configuration cannot be read ({type(error).__name__}: {error}); expected a config.json written by this "
            "version of trigflow; use the matching version or start a new run"
        ) from None


def _build(cls: type[T], raw: dict[str, Any]) -> T:
    return dacite.from_dict(cls, raw, dacite.Config(cast=[tuple], strict=True))
