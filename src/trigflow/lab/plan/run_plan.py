"""The plan of a run: what it takes on which machine, or why it does not fit; and the plan as text."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from trigflow.lab.plan.hardware import get_gpu
from trigflow.lab.plan.memory import GIB, USABLE, Memory, ParallelMode, memory
from trigflow.lab.plan.step import Step, count_run
from trigflow.lab.recipes import get_run
from trigflow.lab.recipes.named import NamedRun
from trigflow.networks import name_of
from trigflow.runtime.errors import UserError
from trigflow.training.config import Precision

MOST_GPUS = 4096
"""GPUs up to which a plan that does not fit is tried again."""


@dataclass(frozen=True)
class RunPlan:
    """What a run takes.

    Attributes:
        recipe: its name.
        kind: of its objective.
        network: name of the network.
        precision: of the network's arithmetic.
        sample: shape `(c, h, w)` of a sample.
        parameters: of student, teacher and fake score network, weightings of the losses included.
        forward_gflops: floating-point operations of one evaluation on one sample, in 10^9; a multiply-add is two.
        sample_gflops: those of a training step for one sample, by part: `teacher`, `student` (forward, tangent, backward and
            all else), `total`; and `total_separate_jvp`, where the tangent comes from a pass of its own.
        batch: samples of a step on all GPUs.
        iterations: steps of the run.
        gpu: the GPU's full name.
        gpus: their number.
        batch_gpu: samples on each at a time.
        accumulate: parts of a step's batch that a GPU takes one after the other.
        parallel: ddp or fsdp2.
        checkpointing: whether blocks are computed again in the backward pass.
        utilization: share of the peak rate that is assumed.
        peak_tflops: that peak rate.
        memory_gib: on each GPU by what it holds, for both ways of dividing; and `available`, what is planned with.
        largest_batch_gpu: most samples that fit at a time, for both.
        tflops_per_iteration: floating-point operations of a step in 10^12, with the engine and with a separate jvp.
        hours: of the whole run, likewise.
    """

    recipe: str
    kind: str
    network: str
    precision: str
    sample: tuple[int, ...]
    parameters: dict[str, int]
    forward_gflops: float
    sample_gflops: dict[str, float]
    batch: int
    iterations: int
    gpu: str
    gpus: int
    batch_gpu: int
    accumulate: int
    parallel: ParallelMode
    checkpointing: bool
    utilization: float
    peak_tflops: float
    memory_gib: dict[str, Any]
    largest_batch_gpu: dict[str, int]
    tflops_per_iteration: dict[str, float]
    hours: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, floats rounded to six digits."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)), parse_float=lambda x: float(f"{float(x):.6g}"))
        return plain


def make_plan(
    recipe: str | NamedRun,
    *,
    gpus: int = 1,
    batch_gpu: int | None = None,
    gpu: str = "h100",
    utilization: float = 0.4,
    memory_gib: float | None = None,
    parallel: ParallelMode = "ddp",
    precision: Precision | None = None,
    checkpointing: bool = False,
) -> RunPlan:
    """Count what a run takes, on the meta device.

    Args:
        recipe: a name that `trigflow recipes` lists, or a run itself.
        gpus: number of GPUs.
        batch_gpu: samples on each at a time; by default the most that fit and divide the batch.
        gpu: see `trigflow.lab.plan.GPUS`.
        utilization: share of the peak rate that training reaches, in (0, 1].
        memory_gib: memory of a GPU, in place of what the named one has.
        parallel: ddp (everything on each GPU) or fsdp2 (sharded).
        precision: fp32, bf16 or fp16, in place of the recipe's.
        checkpointing: compute blocks again in the backward pass instead of keeping what is inside of them.

    Raises:
        UserError: for settings that make no sense, and when the run does not fit; the message says what would.
    """
    run, device = recipe if isinstance(recipe, NamedRun) else get_run(recipe), get_gpu(gpu)
    recipe = run.name
    batch = run.config.loop.batch_size
    _check(batch, gpus, batch_gpu, utilization, memory_gib)
    share = batch // gpus
    made = run.folder is not None
    counted = (
        Step(run, precision=precision, checkpointing=checkpointing) if made else count_run(recipe, precision, checkpointing)
    )
    available = GIB * USABLE * (device.memory if memory_gib is None else memory_gib)
    ways: tuple[ParallelMode, ...] = ("ddp", "fsdp2")
    needs = {way: memory(counted, way, gpus) for way in ways}
    largest = {way: min(share, needs[way].largest_batch(available)) for way in ways}
    fitting = batch_gpu or _largest_divisor(share, largest[parallel])
    if fitting == 0 or fitting > largest[parallel]:
        need = needs[parallel].total(batch_gpu or 1)
        away = _what_fits(counted, gpus, parallel, largest[parallel], batch_gpu, available)
        raise UserError(
            f"{recipe} needs {need / GIB:.1f} GiB a GPU at a batch of {batch_gpu or 1} on each under {parallel} on {gpus} x "
            f"{device.title}; expected at most {available / GIB:.1f} GiB, {USABLE:.0%} of its memory; {away}"
        )
    config, forward, many = counted.config, counted.forward, counted.many
    total, teacher = many.total / many.batch, many.teacher / many.batch
    separate = total + (forward if config.objective.has_tangent else 0)
    peak = device.fp32 if config.loop.precision == "fp32" else device.half
    rate = gpus * peak * 1e12 * utilization * 3600
    work = {"engine": batch * total, "separate_jvp": batch * separate}
    networks = {"student": counted.student, "teacher": counted.teacher, "fake_score": counted.fake}
    return RunPlan(
        recipe=recipe,
        kind=config.objective.kind,
        network=name_of(config.network),
        precision=config.loop.precision,
        sample=run.shape,
        parameters={name: size.parameters for name, size in networks.items() if size is not None},
        forward_gflops=forward / 1e9,
        sample_gflops={
            "teacher": teacher / 1e9,
            "student": (total - teacher) / 1e9,
            "total": total / 1e9,
            "total_separate_jvp": separate / 1e9,
        },
        batch=batch,
        iterations=config.loop.iterations,
        gpu=device.title,
        gpus=gpus,
        batch_gpu=fitting,
        accumulate=share // fitting,
        parallel=parallel,
        checkpointing=checkpointing,
        utilization=utilization,
        peak_tflops=peak,
        memory_gib={"available": available / GIB, **{way: _in_gib(needs[way], fitting) for way in ways}},
        largest_batch_gpu={way: largest[way] for way in ways},
        tflops_per_iteration={name: flops / 1e12 for name, flops in work.items()},
        hours={name: config.loop.iterations * flops / rate for name, flops in work.items()},
    )


def _check(batch: int, gpus: int, batch_gpu: int | None, utilization: float, memory_gib: float | None) -> None:
    checks = [
        (gpus >= 1 and batch % max(gpus, 1) == 0, "--gpus", gpus, f"a divisor of the batch of {batch}"),
        (0 < utilization <= 1, "--utilization", utilization, "a share in (0, 1]"),
        (memory_gib is None or 0 < memory_gib < math.inf, "--memory", memory_gib, "a positive number of GiB"),
    ]
    for fine, name, value, expected in checks:
        if not fine:
            raise UserError(f"{name} is {value}; expected {expected}; correct the option")
    share = batch // gpus
    if batch_gpu is not None and (batch_gpu < 1 or share % batch_gpu):
        raise UserError(
            f"--batch-gpu is {batch_gpu}; expected a divisor of {share}, the part of the batch of {batch} that each of {gpus} "
            "GPUs has; correct the option"
        )


def _largest_divisor(number: int, bound: int) -> int:
    """The largest divisor of `number` up to `bound`, 0 for none."""
    return next((n for n in range(min(number, bound), 0, -1) if number % n == 0), 0)


def _what_fits(counted: Step, gpus: int, parallel: ParallelMode, largest: int, batch_gpu: int | None, available: float) -> str:
    """What to do about a run that does not fit: fewer samples at a time, sharding, more GPUs, or another GPU."""
    batch = counted.config.loop.batch_size
    if batch_gpu is not None and largest >= 1:
        return f"use --batch-gpu {_largest_divisor(batch // gpus, largest)}"
    for more in (n for n in range(gpus, min(batch, MOST_GPUS) + 1) if batch % n == 0):
        most = min(batch_gpu or batch, memory(counted, "fsdp2", more).largest_batch(available))
        if most >= 1 and (parallel, more) != ("fsdp2", gpus):
            wanted = f" --gpus {more}" if more != gpus else ""
            smaller = "" if batch_gpu is None else f" --batch-gpu {_largest_divisor(batch // more, most)}"
            return f"use --parallel fsdp2{wanted}{smaller}"
    return "use a GPU with more memory (--gpu), or --checkpointing"


def _in_gib(need: Memory, batch_gpu: int) -> dict[str, float]:
    """By what memory holds, and in total, with this many samples at a time."""
    parts = dataclasses.asdict(need)
    parts["activations"] = parts.pop("fixed") + batch_gpu * parts.pop("per_sample")
    return {name: value / GIB for name, value in {**parts, "total": need.total(batch_gpu)}.items()}


TITLES = {
    "fake_score": "fake score network",
    "optimizer": "optimizer moments",
    "averages": "EMA copies",
    "gathered": "gathered blocks",
}
"""Of what has parameters or takes memory, where its name does not say it."""


def describe(plan: RunPlan) -> str:
    """A page of text: what is trained, operations, memory, hours."""
    work, hours = plan.tflops_per_iteration, plan.hours
    lines = [
        f"{plan.recipe}: {plan.kind}, {plan.network} on samples of {' x '.join(map(str, plan.sample))}, {plan.precision}",
        f"batch {plan.batch:,}, {plan.iterations:,} iterations",
        "",
        "parameters",
        *(_row(TITLES.get(name, name), f"{number / 1e6:,.2f} M") for name, number in plan.parameters.items()),
        "",
        "operations (a multiply-add is two)",
        _row("one evaluation, one sample", f"{plan.forward_gflops:,.1f} GFLOP"),
        _row("a step, one sample", f"{plan.sample_gflops['total']:,.1f} GFLOP"),
        _row("  of which the teacher", f"{plan.sample_gflops['teacher']:,.1f} GFLOP"),
        _row("an iteration", f"{work['engine']:,.1f} TFLOP"),
        _row("  with a jvp of its own", f"{work['separate_jvp']:,.1f} TFLOP"),
        "",
        f"memory of a GPU in GiB, {plan.batch_gpu} samples at a time"
        + (", blocks computed again in the backward pass" if plan.checkpointing else ""),
        f"  {'':28}{'ddp':>10}{'fsdp2':>10}",
        *(
            f"  {TITLES.get(name, name):28}{ddp:10.2f}{plan.memory_gib['fsdp2'][name]:10.2f}"
            for name, ddp in plan.memory_gib["ddp"].items()
            if ddp or plan.memory_gib["fsdp2"][name]
        ),
        f"  {'most samples at a time':28}{plan.largest_batch_gpu['ddp']:10}{plan.largest_batch_gpu['fsdp2']:10}",
        f"  of {plan.memory_gib['available']:.1f} GiB to plan with",
        "",
        f"{plan.gpus} x {plan.gpu}, {plan.parallel}: {plan.accumulate} x {plan.batch_gpu} samples each an iteration",
        _row(f"hours at {plan.utilization:.0%} of {plan.peak_tflops:g} TFLOP/s", f"{hours['engine']:,.1f}"),
        _row("  with a jvp of its own", f"{hours['separate_jvp']:,.1f}"),
    ]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"  {name:38}{value:>16}"
