"""Training steps of the published networks: diffusion, sCT and sCD, with the tangent taken in several ways.

A step goes from noised data to gradients, without an optimizer. `plain` is the diffusion loss. The consistency losses are those
of the library, with the derivative by

    engine      trigflow.tangent.jvp
    func        a plain forward, and torch.func.jvp without a graph
    graph       torch.func.jvp with the graph, its tangent detached
    difference  a plain forward, and a central difference of two more

PyTorch has no forward derivative of fused attention; torch.func.jvp is given the unfused one where it raises without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.kernels import relative_error
from gpu_parts.record import Record, first_line
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, NetworkConfig, build, dit_config
from trigflow.networks.edm2 import edm2_config
from trigflow.objectives import AdaptiveWeight, diffusion_loss, flow_map_loss, objective_of, tangents
from trigflow.process import Proposal, TrigFlow
from trigflow.samplers import network_velocity

VARIANTS = ("plain", "sct engine", "sct func", "sct graph", "sct difference", "scd engine", "scd func", "scd difference")
LEAST, MOST = 5, 20
"""Rounds."""


@dataclass(frozen=True)
class Case:
    """A network at one batch size."""

    name: str
    what: str
    config: NetworkConfig
    shape: tuple[int, int, int, int]
    precisions: tuple[str, ...] = ("bf16",)
    channels_last: bool = True
    """As the recipes of the network have it."""
    variants: tuple[str, ...] = VARIANTS


GIVEN = ConditioningConfig(width=16, num_classes=10)
TINY_LEVELS: dict[str, Any] = {"width": 16, "mult": (1, 2), "blocks": 1, "conditioning": GIVEN}
CASES = {
    case.name: case
    for case in (
        Case(
            "ddpmpp",
            "DDPM++ for CIFAR-10, batch 128 of 3x32x32",
            DDPMPPConfig(),
            (128, 3, 32, 32),
            precisions=("bf16", "fp32"),
            channels_last=False,
        ),
        Case(
            "ddpmpp-last",
            "the same, channels-last, for which torch.func.jvp has no group norm",
            DDPMPPConfig(),
            (128, 3, 32, 32),
            variants=("plain", "sct engine", "sct difference", "scd engine"),
        ),
        Case("edm2-s", "EDM2-S, batch 32 of 4x64x64", edm2_config("img512-s"), (32, 4, 64, 64), precisions=("bf16", "fp32")),
        Case(
            "dit-xl", "DiT-XL/2, batch 32 of 4x32x32", dit_config("xl", num_classes=1000), (32, 4, 32, 32), channels_last=False
        ),
        Case("edm2-xxl", "EDM2-XXL, batch 8 of 4x64x64", edm2_config("img512-xxl"), (8, 4, 64, 64)),
    )
}
TINY = {
    case.name: case
    for case in (
        Case(
            "ddpmpp", "tiny", DDPMPPConfig(resolution=8, attention=(4,), **TINY_LEVELS), (2, 3, 8, 8), ("bf16", "fp32"), False
        ),
        Case("edm2-s", "tiny", EDM2Config(resolution=8, attention=(4,), head_width=16, **TINY_LEVELS), (2, 4, 8, 8)),
        Case("dit-xl", "tiny", DiTConfig(width=32, depth=1, heads=2, conditioning=GIVEN), (2, 4, 8, 8), channels_last=False),
        Case("edm2-xxl", "tiny", EDM2Config(resolution=8, attention=(4,), head_width=16, **TINY_LEVELS), (1, 4, 8, 8)),
    )
}  # fmt: skip


class Step:
    """`step(variant)` is one training step; gradients stay until the next.

    Args:
        case: the network and its batch.
        precision: fp32, or bf16 for autocast.
    """

    def __init__(self, case: Case, precision: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = precision
        self.math_attention = False
        self.process = TrigFlow()
        torch.manual_seed(0)
        with torch.device(self.device):
            self.net = build(case.config)
        with torch.no_grad():
            for weight in self.net.parameters():  # off the start, where the last layer is zero
                weight.add_(torch.randn_like(weight), alpha=0.02)
        if case.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher: nn.Module | None = None
        self.weight = AdaptiveWeight(self.process).to(self.device)
        generator = torch.Generator().manual_seed(1)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        x0, noise = (
            (0.5 * torch.randn(case.shape, generator=generator)).to(self.device).contiguous(memory_format=layout)
            for _ in range(2)
        )
        t = Proposal(-0.8, 1.6).sample(self.process, case.shape[0], generator).to(self.device)
        self.batch = (x0, noise, t)
        classes = case.config.conditioning.num_classes
        labels = torch.arange(case.shape[0], device=self.device)
        self.conditions = {"label": labels % classes} if classes else {}
        self.derivative: Tensor | None = None
        """Of the last consistency step."""

    def velocity(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Of a teacher of the same kind, made when first needed."""
        if self.teacher is None:
            self.net.zero_grad(set_to_none=True)
            self.teacher = deepcopy(self.net).requires_grad_(False)
        return network_velocity(self.teacher, self.process, self.conditions)

    def loss(self, variant: str) -> Tensor:
        """The scalar to differentiate."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            if variant == "plain":
                return diffusion_loss(self.net, self.process, *self.batch, conditions=self.conditions, weight=self.weight).value
            kind, way = variant.split()
            original = tangents.derivative_along
            tangents.derivative_along = self._kept(self._ways(original)[way])
            try:
                return flow_map_loss(
                    self.net,
                    self.process,
                    *self.batch,
                    teacher=self.velocity() if kind == "scd" else None,
                    conditions=self.conditions,
                    config=objective_of(kind),
                    weight=self.weight,
                ).value
            finally:
                tangents.derivative_along = original

    def __call__(self, variant: str) -> Tensor:
        """Loss and gradients; the loss is returned."""
        self.net.zero_grad(set_to_none=True)
        self.weight.zero_grad(set_to_none=True)
        loss = self.loss(variant)
        loss.backward()
        return loss.detach()

    def _kept(self, way: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def derivative(function: Any, point: Any, directions: Any, method: str = "exact") -> tuple[Tensor, Tensor]:
            value, change = way(function, point, directions)
            self.derivative = change.detach()
            return value, change

        return derivative

    def _ways(self, engine: Callable[..., Any]) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
        def func(function: Any, point: Any, directions: Any) -> tuple[Tensor, Tensor]:
            value = function(*point)
            with torch.no_grad(), self._attention():
                return value, torch.func.jvp(function, point, directions)[1]

        def graph(function: Any, point: Any, directions: Any) -> tuple[Tensor, Tensor]:
            with self._attention():
                value, change = torch.func.jvp(function, point, directions)
            return value, change.detach()

        def difference(function: Any, point: Any, directions: Any) -> tuple[Tensor, Tensor]:
            return engine(function, point, directions, "finite-difference")

        return {"engine": engine, "func": func, "graph": graph, "difference": difference}

    def _attention(self) -> Any:
        return sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext()

    def seconds(self, variant: str) -> float:
        """Duration of one step; on CUDA by events."""
        return measured(lambda: self(variant), self.device)


def measured(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call; on CUDA between two events, the device idle before the first."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rounds_of(calls: dict[str, Callable[[], Any]], device: str, record: Record, until: float, tiny: bool) -> dict[str, Any]:
    """Seconds of each call in each round; a round starts one call later than the one before.

    Rounds go on until `record.left()` is below `until`; at least `LEAST` are made unless the time is over.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(2 if tiny else MOST):
        if record.left() < until and (i >= LEAST or record.left() < 0):
            break
        start = i % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(measured(calls[name], device))
    return seconds


def run(record: Record, tiny: bool, name: str) -> None:
    """A network in its precisions and layouts."""
    cases = [case for case in (TINY if tiny else CASES).values() if case.name in (name, f"{name}-last")]
    jobs = [(case, precision) for case in cases for precision in case.precisions]
    share = record.left() / len(jobs)
    for i, (case, precision) in enumerate(jobs):
        with record.guarded(f"{case.name}, {precision}"):
            measure(record, case, precision, (len(jobs) - 1 - i) * share, tiny)


def measure(record: Record, case: Case, precision: str, until: float, tiny: bool) -> None:
    """Memory of each variant, its tangent against that of `torch.func.jvp`, and paired times.

    A variant that raises is left out, and `messages` says why.
    """
    step = Step(case, precision)
    cuda = step.device == "cuda"
    row: dict[str, Any] = {
        "case": case.name,
        "what": case.what,
        "precision": precision,
        "channels_last": case.channels_last,
        "parameters": sum(p.numel() for p in step.net.parameters()),
        "messages": {},
        "memory": {},
    }
    record.add("cases", row)
    derivatives: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    able = []
    for variant in case.variants:
        if record.left() < until + 3:
            row["messages"][variant] = "left out for want of time"
            continue
        if not tried(step, variant, row["messages"], cuda):
            continue
        step(variant)  # now warm
        able.append(variant)
        losses[variant] = float(step(variant))
        if variant != "plain" and step.derivative is not None:
            derivatives[variant] = step.derivative.clone()
        step.derivative = None
        if cuda:
            step.net.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(variant)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            row["memory"][variant] = {"before": before, "peak": peak, "added": peak - before}
        record.write()
    row["math_attention"] = step.math_attention
    row["losses"] = losses
    if "sct func" in derivatives:
        expected = derivatives["sct func"]
        row["tangent_against_func"] = {
            v: relative_error(d, expected) for v, d in derivatives.items() if v != "sct func" and v.startswith("sct")
        }
    record.write()
    row["rounds"] = rounds_of({v: (lambda v=v: step(v)) for v in able}, step.device, record, until, tiny)
    row["seconds"] = {v: median(r) for v, r in row["rounds"].items() if r}
    plain = row["seconds"].get("plain")
    if plain:
        row["over_plain"] = {v: s / plain for v, s in row["seconds"].items()}
    if plain and row["memory"].get("plain"):
        row["memory_over_plain"] = {v: m["added"] / row["memory"]["plain"]["added"] for v, m in row["memory"].items()}
    record.write()
    step = derivatives = None
    if cuda:
        torch.cuda.empty_cache()


def tried(step: Step, variant: str, messages: dict[str, str], cuda: bool) -> bool:
    """Whether the variant runs; `torch.func.jvp` is given the unfused attention where it needs it."""
    for _ in range(2):
        try:
            step(variant)
            return True
        except Exception as reason:
            message = first_line(reason)
        step.net.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.empty_cache()
        if step.math_attention or not variant.endswith(("func", "graph")) or "OutOfMemory" in message:
            break
        messages["attention"] = message
        step.math_attention = True
    messages[variant] = message
    return False


def line(row: dict[str, Any]) -> str:
    """A case in one line: the plain step, then every variant over it."""
    if "seconds" not in row or "plain" not in row["seconds"]:
        return f"{row['case']:12} {row['precision']}  not measured: {row['messages']}"
    over = "  ".join(f"{v} {r:.2f}" for v, r in row["over_plain"].items() if v != "plain")
    plain = f"plain {row['seconds']['plain'] * 1e3:.1f} ms"
    memory = row.get("memory_over_plain", {}).get("sct engine")
    return f"{row['case']:12} {row['precision']}  {plain}  {over}" + (f"  memory {memory:.2f}" if memory else "")


def summary(part: dict[str, Any]) -> str:
    """Lines of all cases."""
    return "\n".join([line(row) for row in part.get("cases", [])] + [str(f) for f in part.get("failures", [])])
