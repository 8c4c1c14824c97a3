"""One training step, four ways, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_parts.networks import Case
from trigflow.tangent import jvp

VARIANTS = ("plain", "separate", "graph", "engine")
"""Plain diffusion; forward and a `torch.func.jvp` without a graph; `torch.func.jvp` with the graph; the engine."""


class Step:
    """`step(variant)` is one training step, from inputs to gradients, without an optimizer.

    Plain training fits a target; the others turn the output along the tangent, as consistency training does, which costs one
    more pass over the output. Gradients are dropped first, so that each step allocates its own.

    PyTorch has no forward derivative of fused attention. Where `torch.func.jvp` raises for that reason it is given the
    unfused attention (`math_attention`), the usual remedy; the plain forward of `separate` stays fused.

    Args:
        case: the network and its batch.
        device: "cpu" or "cuda".
        shape: another batch than that of the case.
    """

    def __init__(self, case: Case, device: str, shape: tuple[int, ...] | None = None) -> None:
        self.net = case.build().to(device)
        self.cuda = device == "cuda"
        self.half = case.cuda
        self.math_attention = False
        shape = shape or case.shape
        generator = torch.Generator().manual_seed(1)
        x, dx, self.target = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        t = torch.rand(shape[0], generator=generator).to(device)
        self.primals, self.tangents = (x, t), (dx, torch.ones_like(t))

    def __call__(self, variant: str) -> Tensor | None:
        """The tangent, where the variant has one."""
        self.net.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if self.half else nullcontext():
            out, tangent = self.forward(variant)
        target = self.target if tangent is None else out.detach() + tangent
        (out - target).square().mean().backward()
        return tangent

    def forward(self, variant: str) -> tuple[Tensor, Tensor | None]:
        """Output on the graph, and detached tangent."""
        if variant == "plain":
            return self.net(*self.primals), None
        if variant == "engine":
            return jvp(self.net, self.primals, self.tangents)
        if variant == "graph":
            with self._attention():
                out, tangent = torch.func.jvp(self.net, self.primals, self.tangents)[:2]
            return out, tangent.detach()
        out = self.net(*self.primals)
        with torch.no_grad(), self._attention():
            return out, torch.func.jvp(self.net, self.primals, self.tangents)[1]

    def _attention(self) -> Any:
        return sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext()

    def seconds(self, variant: str) -> float:
        """Duration of one step; on CUDA by events."""
        if not self.cuda:
            began = time.perf_counter()
            self(variant)
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self(variant)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def try_variants(step: Step) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run every variant once: gradients and tangents by variant, and why the others cannot run.

    Sets `step.math_attention` where `torch.func.jvp` needs it; the message that says so is kept under "attention".
    """
    tangents: dict[str, Tensor] = {}
    messages: dict[str, str] = {}
    for variant in VARIANTS:
        try:
            tangent = step(variant)
        except Exception as reason:
            messages[variant] = first_line(reason)
            if variant in ("plain", "engine"):
                continue
            try:
                step.math_attention = True
                tangent = step(variant)
            except Exception as second:
                messages[variant] = first_line(second)
                continue
            messages["attention"] = messages.pop(variant)
        if tangent is not None:
            tangents[variant] = tangent
    return tangents, messages


def leave_out_what_does_not_fit(step: Step, messages: dict[str, str]) -> list[str]:
    """The variants that run; on CUDA, one whose full batch does not fit into memory is added to `messages`."""
    for variant in VARIANTS:
        if step.cuda and variant not in messages:
            try:
                step(variant)
            except torch.OutOfMemoryError as reason:
                messages[variant] = first_line(reason)
                step.net.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
    return [variant for variant in VARIANTS if variant not in messages]


def first_line(reason: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(reason).__name__}: {(str(reason).strip() or 'no message').splitlines()[0][:300]}"


def time_steps(step: Step, variants: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that is not counted.

    A round runs every variant once, and starts one later than the round before.
    """
    for variant in variants:
        step(variant)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for i in range(repeats):
        start = i % len(variants)
        for variant in variants[start:] + variants[:start]:
            seconds[variant].append(step.seconds(variant))
    return seconds


def dispatch_seconds(case: Case, repeats: int = 30) -> float:
    """What the engine adds to a forward of the case's network where tensors are too small to matter.

    One image of 4x4 pixels leaves only what does not depend on sizes. The engine then takes its Python (interception, table,
    rules) and the calls of the tangent kernels; a plain forward takes the calls of the primal kernels. Their difference is
    therefore an upper bound on dispatch: it counts the launching of the tangent kernels, which any method must do.
    """
    step = Step(case, "cpu", (1, case.shape[1], 4, 4))
    taken: dict[str, list[float]] = {"plain": [], "engine": []}
    for _ in range(repeats + 3):
        for variant, seconds in taken.items():
            began = time.perf_counter()
            step.forward(variant)
            seconds.append(time.perf_counter() - began)
    return median(taken["engine"][3:]) - median(taken["plain"][3:])


def relative_error(value: Tensor, expected: Tensor) -> float:
    """`|value - expected| / |expected|`."""
    return float(torch.linalg.vector_norm(value.float() - expected.float()) / torch.linalg.vector_norm(expected.float()))


def timed(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a CUDA function, after three calls that are not counted."""
    seconds = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return median(seconds[3:])
