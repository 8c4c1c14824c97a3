"""An experiment, no part of the library: a traced step with a tangent, compiled, against the compiled plain step.

`make_fx` over a function that calls `trigflow.tangent.jvp` gives a graph of plain operators for output and tangent, and
`torch.compile` takes that graph in the place of the derivative inside the library's own loss. The kernel of attention
tangents is launched past the tracer, so attention tangents are plain in the trace.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from gpu_parts.kernels import relative_error
from gpu_parts.record import Record
from gpu_parts.steps import CASES, TINY, Step, rounds_of
from trigflow.objectives import diffusion_loss, flow_map_loss, objective_of, tangents
from trigflow.tangent import jvp

SCD = objective_of("scd")


class Compiled:
    """The steps of a case, compiled: `plain`, `sct`, `scd`; each leaves its gradients in the network."""

    def __init__(self, step: Step, backend: str) -> None:
        self.step, self.backend = step, backend
        self.net, self.process = step.net, step.process
        self.graph: Any = None
        self.plain_loss = torch.compile(self._plain, backend=backend)
        self.consistency_loss = torch.compile(self._consistency, backend=backend)
        self.velocity: Callable[..., Tensor] | None = None

    def trace(self) -> int:
        """Make the graph of output and tangent; the number of its nodes."""
        x0, noise, t = self.step.batch
        parameters = {name: p.detach() for name, p in self.net.named_parameters()}

        def both(parameters: dict[str, Tensor], x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
            def forward(x: Tensor, t: Tensor) -> Tensor:
                return functional_call(self.net, parameters, (x, t), self.step.conditions)

            with self._autocast():
                out, tangent = jvp(forward, (x, t), (dx, dt))
            return out, tangent.detach()

        self.graph = make_fx(both)(parameters, x0, t, noise, torch.ones_like(t))
        return len(self.graph.graph.nodes)

    def _autocast(self) -> Any:
        return torch.autocast(self.step.device, torch.bfloat16, enabled=self.step.precision == "bf16")

    def _plain(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        with self._autocast():
            return diffusion_loss(
                self.net, self.process, x0, noise, t, conditions=self.step.conditions, weight=self.step.weight
            ).value

    def _consistency(self, x0: Tensor, noise: Tensor, t: Tensor, dxdt: Tensor) -> Tensor:
        with self._autocast():
            return flow_map_loss(
                self.net,
                self.process,
                x0,
                noise,
                t,
                teacher=lambda x_t, t: dxdt,
                conditions=self.step.conditions,
                config=SCD,
                weight=self.step.weight,
            ).value

    def _derivative(self, function: Any, point: Any, directions: Any, method: str) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.step.device, enabled=False):  # its casts are in the graph
            return self.graph(dict(self.net.named_parameters()), *point, *directions)

    def __call__(self, variant: str) -> Tensor:
        step = self.step
        step.net.zero_grad(set_to_none=True)
        step.weight.zero_grad(set_to_none=True)
        x0, noise, t = step.batch
        if variant == "plain":
            loss = self.plain_loss(x0, noise, t)
        else:
            if variant == "sct":
                dxdt = self.process.velocity(x0, noise, t)
            else:
                dxdt = self._velocity(self.process.interpolate(x0, noise, t), t)
            original = tangents.derivative_along
            tangents.derivative_along = self._derivative
            try:
                loss = self.consistency_loss(x0, noise, t, dxdt)
            finally:
                tangents.derivative_along = original
        loss.backward()
        return loss.detach()

    def _velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.velocity is None:
            self.step.velocity()
            teacher: Any = self.step.teacher

            def velocity(x_t: Tensor, t: Tensor) -> Tensor:
                with self._autocast():
                    return self.process.sigma_data * teacher(x_t / self.process.sigma_data, t, **self.step.conditions)

            self.velocity = torch.compile(velocity, backend=self.backend)
        with torch.no_grad():
            return self.velocity(x_t, t)


def gradients(step: Step) -> Tensor:
    """All of them in one vector."""
    return torch.cat([p.grad.flatten().clone() for p in step.net.parameters() if p.grad is not None])


def prepare(record: Record, tiny: bool, name: str) -> tuple[Step, Compiled]:
    """Trace, compile, compare with the eager step; what takes how long is recorded."""
    case = (TINY if tiny else CASES)[name]
    # No classes: on a CPU, one_hot reads its argument, which the tracer does not allow.
    conditioning = dataclasses.replace(case.config.conditioning, num_classes=0)
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, conditioning=conditioning))
    step = Step(case, "bf16")
    backend = "inductor" if step.device == "cuda" else "aot_eager"
    record.put("case", {"case": name, "what": case.what, "precision": "bf16", "backend": backend})
    compiled = Compiled(step, backend)
    seconds: dict[str, float] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        record.put("stage", what)
        began = time.perf_counter()
        value = call()
        if step.device == "cuda":
            torch.cuda.synchronize()
        seconds[what] = time.perf_counter() - began
        record.put("preparation_seconds", seconds)
        return value

    record.put("nodes", timed("trace", compiled.trace))
    with torch.no_grad():  # the graph itself, before compilation
        x0, noise, t = step.batch
        parameters = {key: p.detach() for key, p in step.net.named_parameters()}
        out, tangent = compiled.graph(parameters, x0, t, noise, torch.ones_like(t))
        with compiled._autocast():
            eager_out, eager_tangent = jvp(
                lambda x, t: step.net(x, t, **step.conditions), (x0, t), (noise, torch.ones_like(t))
            )
        record.put(
            "graph_against_eager",
            {"output": relative_error(out, eager_out), "tangent": relative_error(tangent, eager_tangent)},
        )
        del out, tangent, eager_out, eager_tangent
    errors = {}
    for variant, eager in (("plain", "plain"), ("sct", "sct engine"), ("scd", "scd engine"))[: 2 if tiny else 3]:
        with record.guarded(f"compiled {variant}"):
            loss = timed(f"compile {variant}", lambda variant=variant: compiled(variant))
            gradient = gradients(step)
            expected_loss = step(eager)
            expected = gradients(step)
            errors[variant] = {
                "loss": relative_error(loss, expected_loss),
                "gradient": relative_error(gradient, expected),
            }
            step.precision = "fp32"
            step(eager)
            errors[variant]["gradient of eager bf16 against fp32"] = relative_error(expected, gradients(step))
            step.precision = "bf16"
            record.put("compiled_against_eager", errors)
    record.put("stage", "ready")
    return step, compiled


def measure(record: Record, step: Step, compiled: Compiled, tiny: bool) -> None:
    """Paired times of compiled and eager steps."""
    able = list(record.entries.get("compiled_against_eager", {}))
    names = {"plain": "plain", "sct": "sct engine", "scd": "scd engine"}
    calls: dict[str, Callable[[], Any]] = {f"compiled {v}": (lambda v=v: compiled(v)) for v in able}
    calls |= {f"eager {v}": (lambda v=v: step(names[v])) for v in able}
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
    if "compiled plain" in seconds:
        record.put("over_compiled_plain", {n: s / seconds["compiled plain"] for n, s in seconds.items()})
    if "eager plain" in seconds:
        record.put("over_eager_plain", {n: s / seconds["eager plain"] for n, s in seconds.items()})


def summary(part: dict[str, Any]) -> str:
    """One line."""
    name = part.get("case", {}).get("case", "?")
    over = "  ".join(f"{n} {r:.2f}" for n, r in part.get("over_compiled_plain", {}).items())
    failures = "  ".join(f"{f['what']}: {f['error']}" for f in part.get("failures", []))
    return f"compiled {name}: {over or 'stopped at ' + str(part.get('stage'))}  {failures}"
