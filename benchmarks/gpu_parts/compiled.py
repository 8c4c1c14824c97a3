"""Whole steps compiled by the library, `trigflow.tangent.Compiled`, against the compiled plain step and the eager ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpu_parts.kernels import relative_error
from gpu_parts.record import Record
from gpu_parts.steps import CASES, TINY, Step, rounds_of
from trigflow.objectives import diffusion_loss, flow_map_loss, objective_of
from trigflow.tangent import Compiled

VARIANTS = {"plain": "plain", "sct": "sct engine", "scd": "scd engine"}
"""Names here, and those of the eager steps."""


class CompiledStep:
    """The steps of a case, each compiled as a whole; each leaves its gradients in the network."""

    def __init__(self, step: Step, backend: str, tell: Callable[[str], None]) -> None:
        self.step = step
        self.compiled = {
            name: Compiled(self._plain if name == "plain" else self._consistency, backend=backend, tell=tell, name=name)
            for name in VARIANTS
        }

    def _autocast(self) -> Any:
        return torch.autocast(self.step.device, torch.bfloat16, enabled=self.step.precision == "bf16")

    def _plain(self, batch: tuple[Tensor, ...], kind: str) -> Tensor:
        step = self.step
        with self._autocast():
            return diffusion_loss(step.net, step.process, *batch, conditions=step.conditions, weight=step.weight).value

    def _consistency(self, batch: tuple[Tensor, ...], kind: str) -> Tensor:
        step = self.step
        with self._autocast():
            return flow_map_loss(
                step.net,
                step.process,
                *batch,
                teacher=step.velocity() if kind == "scd" else None,
                conditions=step.conditions,
                config=objective_of(kind),
                weight=step.weight,
            ).value

    def __call__(self, variant: str) -> Tensor:
        step = self.step
        if variant == "scd":
            step.velocity()  # makes the teacher
        step.net.zero_grad(set_to_none=True)
        step.weight.zero_grad(set_to_none=True)
        loss = self.compiled[variant](step.batch, variant)
        loss.backward()
        return loss.detach()


def gradients(step: Step) -> Tensor:
    """All of them in one vector."""
    return torch.cat([p.grad.flatten().clone() for p in step.net.parameters() if p.grad is not None])


def prepare(record: Record, tiny: bool, name: str) -> tuple[Step, CompiledStep]:
    """Compile each step and compare it with the eager one; what takes how long is recorded."""
    case = (TINY if tiny else CASES)[name]
    step = Step(case, "bf16")
    backend = "inductor" if step.device == "cuda" else "aot_eager"
    record.put("case", {"case": name, "what": case.what, "precision": "bf16", "backend": backend})
    fallbacks: list[str] = []
    compiled = CompiledStep(step, backend, fallbacks.append)
    seconds: dict[str, float] = {}
    errors: dict[str, dict[str, float]] = {}
    for variant, eager in VARIANTS.items():
        record.put("stage", f"compile {variant}")
        with record.guarded(f"compiled {variant}"):
            began = time.perf_counter()
            loss = compiled(variant)
            if step.device == "cuda":
                torch.cuda.synchronize()
            seconds[f"compile {variant}"] = time.perf_counter() - began
            gradient = gradients(step)
            expected_loss, expected = step(eager), gradients(step)
            step.precision = "fp32"
            step(eager)
            exact = gradients(step)
            step.precision = "bf16"
            errors[variant] = {
                "loss": relative_error(loss, expected_loss),
                "gradient": relative_error(gradient, expected),
                "gradient of eager bf16 against fp32": relative_error(expected, exact),
            }
        record.put("preparation_seconds", seconds)
        record.put("compiled_against_eager", errors)
        record.put("fallbacks", fallbacks)
    record.put("stage", "ready")
    return step, compiled


def measure(record: Record, step: Step, compiled: CompiledStep, tiny: bool) -> None:
    """Paired times of compiled and eager steps, and the memory that each adds."""
    able = list(record.entries.get("compiled_against_eager", {}))
    calls: dict[str, Callable[[], Any]] = {f"compiled {v}": (lambda v=v: compiled(v)) for v in able}
    calls |= {f"eager {v}": (lambda v=v: step(VARIANTS[v])) for v in able}
    for call in calls.values():
        call()
    if step.device == "cuda":
        memory = {}
        for name, call in calls.items():
            step.net.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            memory[name] = torch.cuda.max_memory_allocated() - before
        record.put("added_memory", memory)
    found = rounds_of(calls, step.device, record, 1, tiny)
    record.put("rounds", found)
    seconds = {name: median(values) for name, values in found.items() if values}
    record.put("step_seconds", seconds)
    for name in ("compiled plain", "eager plain"):
        if name in seconds:
            record.put(f"over_{name.replace(' ', '_')}", {n: s / seconds[name] for n, s in seconds.items()})


def summary(part: dict[str, Any]) -> str:
    """One line."""
    name = part.get("case", {}).get("case", "?")
    over = "  ".join(f"{n} {r:.2f}" for n, r in part.get("over_compiled_plain", {}).items())
    failures = "  ".join([*(f"{f['what']}: {f['error']}" for f in part.get("failures", [])), *part.get("fallbacks", [])])
    return f"compiled {name}: {over or 'stopped at ' + str(part.get('stage'))}  {failures}"
