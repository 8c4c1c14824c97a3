"""The networks of the package under `jvp` on the device, small and with every weight moved off its start."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.kernels import relative_error
from gpu_parts.record import Record
from trigflow.networks import (
    ConditioningConfig,
    DDPMPPConfig,
    DiTConfig,
    EDM2Config,
    MLPConfig,
    NetworkConfig,
    UNetConfig,
    build,
)
from trigflow.tangent import attention_implementation, jvp

GIVEN = ConditioningConfig(width=32, num_classes=5, takes=("guidance",))
LEVELS: dict[str, Any] = {"width": 32, "mult": (1, 2), "blocks": 1, "conditioning": GIVEN}


def configs(side: int, dropout: float = 0.0) -> dict[str, NetworkConfig]:
    """One of each kind for images of this side; heads of 64 where attention has any."""
    return {
        "unet": UNetConfig(channels=3, attention=(0, 1), dropout=dropout, **LEVELS),
        "ddpmpp": DDPMPPConfig(resolution=side, attention=(side // 2,), dropout=dropout, **LEVELS),
        "edm2": EDM2Config(channels=3, resolution=side, attention=(side // 2,), dropout=dropout, **LEVELS),
        "dit": DiTConfig(channels=3, width=128, depth=2, heads=2, dropout=dropout, conditioning=GIVEN),
        "mlp": MLPConfig(features=7, width=32, depth=2, dropout=dropout, conditioning=GIVEN),
    }


class Case:
    """A network, its inputs and directions, in double precision on the CPU; `on` gives them elsewhere."""

    def __init__(self, kind: str, side: int, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.net = build(configs(side, dropout)[kind]).double()
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        shape = (4, 7) if kind == "mlp" else (4, 3, side, side)
        self.x, self.dx, self.weight = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        self.t, self.dt = torch.linspace(0.2, 1.5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        self.label, self.guidance = torch.tensor([0, 5, 1, 2]), torch.tensor([1.0, 1.3, 1.6, 2.0], dtype=torch.float64)

    def on(self, device: str, dtype: torch.dtype) -> Placed:
        return Placed(self, device, dtype)


class Placed:
    """A case on a device, in a dtype."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.net = deepcopy(case.net).to(device, dtype)
        moved = (v.to(device, dtype) for v in (case.x, case.t, case.dx, case.dt, case.guidance, case.weight))
        self.x, self.t, self.dx, self.dt, self.guidance, self.weight = moved
        self.label = case.label.to(device)
        self.device = device

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, label=self.label, guidance=self.guidance)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Output and gradient of all parameters, end to end."""
        return self._graded(lambda: self.forward(self.x, self.t))

    def engine(self) -> tuple[Tensor, Tensor, Tensor]:
        """These, and the tangent."""
        tangents: list[Tensor] = []

        def forward() -> Tensor:
            out, tangent = jvp(self.forward, (self.x, self.t), (self.dx, self.dt))
            tangents.append(tangent)
            return out

        return (*self._graded(forward), tangents[0])

    def reference(self) -> Tensor:
        """The tangent by `torch.func.jvp`."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(self.forward, (self.x, self.t), (self.dx, self.dt))[1]

    def _graded(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        out = forward()
        gradients = torch.autograd.grad((out * self.weight).sum(), list(self.net.parameters()), allow_unused=True)
        kept = [g.flatten() for g in gradients if g is not None]
        return out.detach(), torch.cat(kept)


def run(record: Record, tiny: bool) -> None:
    """Each network in double, single and half precision, and with the kernel by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8 if tiny else 32
    for kind in configs(side):
        with record.guarded(kind):
            record.add("cases", {"network": kind, **compare(kind, side, device)})
        with record.guarded(f"{kind}, dropout"):
            record.add("dropout", {"network": kind, **dropout(kind, side, device)})


def compare(kind: str, side: int, device: str) -> dict[str, Any]:
    """Relative errors of tangents and gradients; `same_*` are bit for bit."""
    case = Case(kind, side)
    exact, exact_gradient, exact_tangent = case.on("cpu", torch.float64).engine()
    double = case.on(device, torch.float64)
    out, gradient, tangent = double.engine()
    plain, plain_gradient = double.plain()
    again, again_gradient = double.plain()
    found: dict[str, Any] = {
        "float64": {
            "tangent against torch.func.jvp": relative_error(tangent, double.reference()),
            "tangent against the CPU": relative_error(tangent.cpu(), exact_tangent),
            "output against the CPU": relative_error(out.cpu(), exact),
            "gradient against the CPU": relative_error(gradient.cpu(), exact_gradient),
            "gradient against a plain step": relative_error(gradient, plain_gradient),
            "same_output": torch.equal(out, plain),
            "same_gradient": torch.equal(gradient, plain_gradient),
            "plain_step_repeats": torch.equal(plain, again) and torch.equal(plain_gradient, again_gradient),
        }
    }
    ways: dict[str, Any] = {
        "float32": (torch.float32, None, "auto"),
        "float32 without TF32": (torch.float32, None, "auto"),
        "float32, kernel": (torch.float32, None, "triton"),
        "float32, chunked": (torch.float32, None, "chunked"),
        "bfloat16 autocast": (torch.float32, torch.bfloat16, "auto"),
        "bfloat16 autocast, kernel": (torch.float32, torch.bfloat16, "triton"),
        "float16 autocast": (torch.float32, torch.float16, "auto"),
    }
    for name, (dtype, half, implementation) in ways.items():
        if implementation == "triton" and device == "cpu":
            continue
        single = case.on(device, dtype)
        allow_tf32 = torch.backends.cudnn.allow_tf32 and "without" not in name
        with (
            torch.autocast(device, half) if half else nullcontext(),
            attention_implementation(implementation),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32),
        ):
            plain, plain_gradient = single.plain()
            out, gradient, tangent = single.engine()
        found[name] = {
            "tangent": relative_error(tangent.cpu(), exact_tangent),
            "output": relative_error(out.cpu(), exact),
            "gradient": relative_error(gradient.cpu(), exact_gradient),
            "gradient against a plain step": relative_error(gradient, plain_gradient),
            "same_output": torch.equal(out, plain),
            "same_gradient": torch.equal(gradient, plain_gradient),
            "tangent_dtype": str(tangent.dtype),
        }
    return found


def dropout(kind: str, side: int, device: str) -> dict[str, Any]:
    """In training, the tangent passes through the masks of the same forward: against a difference on the same masks."""
    case = Case(kind, side, dropout=0.3).on(device, torch.float64)
    case.net.train()
    plain, _ = case.plain()
    out, _, tangent = case.engine()
    torch.manual_seed(1)
    with torch.no_grad():
        difference = jvp(case.forward, (case.x, case.t), (case.dx, case.dt), method="finite-difference", step=1e-6)[1]
    return {"same_output": torch.equal(out, plain), "tangent against a difference": relative_error(tangent, difference)}


def summary(part: dict[str, Any]) -> str:
    """One line."""
    cases = part.get("cases", [])
    worst = max((c["float64"]["tangent against torch.func.jvp"] for c in cases), default=float("nan"))
    half = max((c.get("bfloat16 autocast", {}).get("tangent", float("nan")) for c in cases), default=float("nan"))
    raised = len(part.get("failures", []))
    return f"networks: {len(cases)}, worst tangent {worst:.1e} in float64, {half:.1e} in bfloat16 autocast, {raised} raised"
