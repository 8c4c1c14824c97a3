"""Two-step drawing at batch 1 of the 1.5B network, eager and replayed, and through `trigflow.deploy.Engine`."""

from __future__ import annotations

import dataclasses
import time
from statistics import median
from typing import Any

import sampling
import torch

from gpu_parts.record import Record
from trigflow.codecs import Pixels
from trigflow.conditions import Conditioner
from trigflow.deploy.engine import Engine
from trigflow.models.model import Model
from trigflow.networks import build
from trigflow.networks.edm2 import EDM2Config, edm2_config
from trigflow.process import TrigFlow
from trigflow.samplers import Sampling


def run(record: Record, tiny: bool) -> None:
    """Latents, no autoencoder; random weights, which change no time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with record.guarded("sampling.py"):
        variants = ["eager", "graph"] if device == "cuda" else ["eager"]
        name = "img512-xxl"
        record.put("sampling", sampling.measure(name, 1, variants, device, tiny, 2 if tiny else 20))
    for variant in ("bf16", "graph-bf16", "graph") if device == "cuda" else ("plain", "bf16"):
        if record.left() < 5:
            record.add("left_out", variant)
            continue
        with record.guarded(f"engine, {variant}"), torch.no_grad():
            record.add("engine", {"variant": variant, **engine(variant, tiny, device)})
        if device == "cuda":
            torch.cuda.empty_cache()


def engine(variant: str, tiny: bool, device: str) -> dict[str, Any]:
    """Seconds from noise to bytes on the CPU, one picture at a time."""
    config: EDM2Config = edm2_config("img512-xxl")
    given = dataclasses.replace(config.conditioning, takes=("guidance",))
    if tiny:
        given = dataclasses.replace(given, width=16, num_classes=10)
        config = dataclasses.replace(config, width=16, mult=(1, 2), blocks=1, resolution=16, attention=(8,), head_width=16)
    config = dataclasses.replace(config, conditioning=given)
    torch.manual_seed(0)
    with torch.device(device):
        network = build(config)
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    shape = (config.channels, config.resolution, config.resolution)
    names = tuple(map(str, range(given.num_classes)))
    how = Sampling("flow_map", guidance_max=2.0)
    model = Model(network, config, TrigFlow(), Pixels.symmetric(shape), how, Conditioner.of_classes(given.num_classes, names))
    began = time.perf_counter()
    drawing = Engine(model, steps=2, variant=variant)
    drawing.warm(1)
    ready = time.perf_counter() - began
    noise, fresh = model.noise(0, 0, 0, 1), [model.noise(0, 1, 0, 1)]
    seconds = []
    for _ in range(2 if tiny else 20):
        began = time.perf_counter()
        image = drawing.draw(noise, 1, 1.5, fresh=fresh)
        seconds.append(time.perf_counter() - began)
    found = {"seconds": median(seconds), "ready_seconds": ready, "mean_byte": float(image.float().mean())}
    if device == "cuda":
        found["allocated"] = torch.cuda.memory_allocated()
    return found


def summary(part: dict[str, Any]) -> str:
    """One line."""
    cells = [
        f"{variant} {entry['student']['seconds'] * 1e3:.1f} ms"
        for variant, entry in part.get("sampling", {}).get("variants", {}).items()
        if "seconds" in entry.get("student", {})
    ]
    cells += [f"engine {e['variant']} {e['seconds'] * 1e3:.1f} ms" for e in part.get("engine", [])]
    failures = [f"{f['what']}: {f['error']}" for f in part.get("failures", [])]
    return "two steps at batch 1: " + "  ".join(cells + failures)
