"""How long does a sample take? Two steps of a student against its teacher, on networks of the sCM paper with random weights.

    python benchmarks/sampling.py                                    # EDM2-XXL for ImageNet 512 (1.5B), on a GPU
    python benchmarks/sampling.py --network img512-s --batches 1     # a smaller one
    python benchmarks/sampling.py --quick --json /tmp/quick.json     # a tiny one anywhere: does everything run?

Each variant draws latents (no VAE) of the same shape, after calls that are not counted:

    student    two steps, one evaluation each, the guidance scale an input of the network
    teacher    Heun over 32 levels, 63 evaluations, classifier-free guidance: 126 evaluations of the network

each of them eager, with `torch.compile` around the network and, on CUDA, as one CUDA graph of the network replayed at each
evaluation; weights normalized once beforehand (`for_sampling`), in bfloat16 on CUDA. Weights are random, which changes no time.

Reported: median seconds a batch and a sample, teacher over student in the same variant, and the peak memory on CUDA. The paper
gives 0.11 s for one sample of the 1.5B student in two steps on an A100, without inference optimization; it is printed beside
the batch of one, and only comparable on such a machine.

Writes benchmarks/results/sampling-<device>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from trigflow import samplers
from trigflow.networks import build
from trigflow.networks.edm2 import EDM2Config, edm2_config
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, write_json
from trigflow.runtime.machine import machine

PAPER_SECONDS = 0.11
"""Lu and Song 2025: 1.5B student, two steps, batch of one, A100."""
PROCESS = TrigFlow()
TEACHER_STEPS = 32


def network(name: str, quick: bool, guided: bool, device: str, dtype: torch.dtype) -> nn.Module:
    """The paper's form of an EDM2 network, ready to draw; `guided` takes the guidance scale as an input."""
    config: EDM2Config = edm2_config(name)
    if quick:
        conditioning = dataclasses.replace(config.conditioning, width=16, num_classes=10)
        config = dataclasses.replace(
            config, width=16, mult=(1, 2), blocks=1, resolution=16, attention=(8,), head_width=16, conditioning=conditioning
        )
    config = dataclasses.replace(
        config, conditioning=dataclasses.replace(config.conditioning, takes=("guidance",) if guided else ())
    )
    with torch.device(device):
        net = build(config, PROCESS.sigma_data)
    net = net.for_sampling(dtype)  # type: ignore[operator]
    return net.to(memory_format=torch.channels_last)


class Replayed(nn.Module):
    """A network whose evaluation is recorded once as a CUDA graph and replayed, for one batch size."""

    def __init__(self, net: nn.Module, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> None:
        super().__init__()
        self.takes, self.null = net.takes, net.null
        self.x, self.t = x.clone(), t.clone()
        self.conditions = {name: value.clone() for name, value in conditions.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                net(self.x, self.t, **self.conditions)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.output = net(self.x, self.t, **self.conditions)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        for name, value in conditions.items():
            self.conditions[name].copy_(value)
        self.graph.replay()
        return self.output


def prepare(net: nn.Module, variant: str, noise: Tensor, label: Tensor, guided: bool) -> nn.Module:
    """The network as this variant calls it; `guided` networks get the scale, others a batch for classifier-free guidance."""
    if variant == "eager":
        return net
    if variant == "compiled":
        compiled = torch.compile(net)
        compiled.takes, compiled.null = net.takes, net.null
        return compiled
    if not guided:
        noise, label = torch.cat([noise, noise]), torch.cat([label, label])
    t = torch.full((len(noise),), 1.0, device=noise.device)
    return Replayed(net, noise, t, {"label": label, **({"guidance": torch.full_like(t, 1.5)} if guided else {})})


def student_draw(net: nn.Module, noise: Tensor, label: Tensor) -> Callable[[], Tensor]:
    """Two consistency steps, one evaluation each."""
    fresh = [PROCESS.sigma_data * torch.randn_like(noise)]
    velocity = samplers.network_velocity(net, PROCESS, {"label": label, "guidance": 1.5})
    return lambda: samplers.flow_map_sample(velocity, PROCESS, noise, (PROCESS.t_max, 1.1), gamma=1, fresh=fresh)


def teacher_draw(net: nn.Module, noise: Tensor, label: Tensor) -> Callable[[], Tensor]:
    """Heun with classifier-free guidance, 63 evaluations of two."""
    grid = samplers.sigma_grid(PROCESS, TEACHER_STEPS)
    velocity = samplers.guided_velocity(net, PROCESS, {"label": label}, 1.4)
    return lambda: samplers.heun(velocity, noise, grid)


def timed(draw: Callable[[], Tensor], cuda: bool, repeats: int, warm: int) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm` that are not counted."""
    seconds = []
    for i in range(repeats + warm):
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            out = draw()
        if cuda:
            torch.cuda.synchronize()
        if i >= warm:
            seconds.append(time.perf_counter() - began)
    if not bool(out.isfinite().all()):
        raise RuntimeError("samples are not finite")
    return seconds


def measure(name: str, batch: int, variants: list[str], device: str, quick: bool, repeats: int) -> dict[str, Any]:
    """Student and teacher at one batch size, in every variant; a variant that raises says why."""
    cuda = device == "cuda"
    found: dict[str, Any] = {"batch": batch, "variants": {}}
    for who, draw_of in (("student", student_draw), ("teacher", teacher_draw)):
        guided = who == "student"
        net = network(name, quick, guided, device, torch.bfloat16 if cuda else torch.float32)
        found["parameters"] = sum(p.numel() for p in net.parameters())
        size = net.config.resolution
        noise = PROCESS.sigma_data * torch.randn(batch, net.config.channels, size, size, device=device)
        label = torch.arange(batch, device=device) % net.config.conditioning.num_classes
        for variant in variants:
            entry = found["variants"].setdefault(variant, {})
            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                    ready = prepare(net, variant, noise, label, guided)
                seconds = timed(draw_of(ready, noise, label), cuda, repeats if guided else max(1, repeats // 5), 2)
            except Exception as reason:
                entry[who] = {"error": f"{type(reason).__name__}: {(str(reason) or 'no message').splitlines()[0][:200]}"}
                continue
            entry[who] = {"seconds": median(seconds), "per_sample": median(seconds) / batch, "rounds": seconds}
            if cuda:
                entry[who]["peak_bytes"] = torch.cuda.max_memory_allocated()
            del ready
        del net
    for entry in found["variants"].values():
        if all("seconds" in entry.get(who, {}) for who in ("student", "teacher")):
            entry["teacher_over_student"] = entry["teacher"]["seconds"] / entry["student"]["seconds"]
    return found


def table(result: dict[str, Any]) -> str:
    """One line a variant and batch."""
    lines = [f"{'batch':>6} {'variant':12}{'student':>12}{'a sample':>12}{'teacher':>12}{'teacher / student':>20}"]
    for found in result["batches"]:
        for variant, entry in found["variants"].items():
            student, teacher = entry.get("student", {}), entry.get("teacher", {})
            cells = [student.get("seconds"), student.get("per_sample"), teacher.get("seconds")]
            text = "".join(f"{'-' if c is None else format(c, '.4f'):>12}" for c in cells)
            ratio = entry.get("teacher_over_student")
            lines.append(f"{found['batch']:6} {variant:12}{text}{'-' if ratio is None else format(ratio, '.1f'):>20}")
            lines += [f"       {who}: {e['error']}" for who, e in (("student", student), ("teacher", teacher)) if "error" in e]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="img512-xxl", help="img64-s ... img64-xl, img512-s ... img512-xxl")
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="batch sizes (1 64; 1 2 with --quick)")
    parser.add_argument("--variants", nargs="+", choices=["eager", "compiled", "graph"], default=None)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of the student; a fifth of it of the teacher")
    parser.add_argument("--quick", action="store_true", help="a tiny network, whose times mean nothing")
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args()
    batches = args.batches or ([1, 2] if args.quick else [1, 64])
    if args.repeats < 1 or min(batches) < 1:
        parser.error("--repeats and --batches must be at least 1")
    try:
        edm2_config(args.network)
    except UserError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        print("no GPU here: this takes minutes to hours on a CPU; --quick tries a tiny network", file=sys.stderr)
    variants = args.variants or (["eager", "compiled", "graph"] if device == "cuda" else ["eager"])
    machine_ = machine()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/sampling.py", *sys.argv[1:]]),
        "machine": machine_,
        "network": args.network,
        "quick": args.quick,
        "paper_seconds": PAPER_SECONDS,
        "batches": [measure(args.network, b, variants, device, args.quick, args.repeats) for b in batches],
    }
    print(table(result))
    print(f"the paper: {PAPER_SECONDS} s for one sample of the 1.5B student on an A100")
    name = re.sub(r"[^a-z0-9]+", "-", machine_["device"].lower()).strip("-")
    out = args.json or (None if args.quick else Path(__file__).parent / "results" / f"sampling-{name}.json")
    if out is not None:
        ensure_folder(out.parent)
        write_json(out, result)


if __name__ == "__main__":
    main()
