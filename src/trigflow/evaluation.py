"""Measuring a model against its data, and describing a run folder."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigflow.data import ImageDataset
from trigflow.errors import UserError
from trigflow.files import read_json
from trigflow.metrics import Reference, default_features, feature_extractor
from trigflow.model import Model, load
from trigflow.samplers import get_solver, nfe, sigma_grid
from trigflow.samplers.guidance import inside_interval, time_interval
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.config import from_dict, to_dict
from trigflow.training.log import read_metrics
from trigflow.training.setup import load_data


def evaluations(
    model: Model,
    steps: int | None,
    solver: str = "heun",
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
) -> int:
    """Network evaluations per sample (NFE). On a diffusion model those with guidance count twice: all, or the ones inside
    the interval of noise levels; a negative model counts like the model itself."""
    steps = model.default_steps() if steps is None else steps
    if model.kind == "consistency":
        return steps
    if guidance == 1 or guidance_interval is None:
        return nfe(solver, steps) * (1 if guidance == 1 else 2)
    process, times = model.config.process, []

    def record(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return x_t

    get_solver(solver)(record, torch.zeros(1), sigma_grid(process, steps))
    inside = inside_interval(torch.cat(times), time_interval(process, guidance_interval))
    return len(times) + int(inside.sum())


def score(model: Model, reference: Reference, *, num: int, **sampling: Any) -> dict[str, Any]:
    """Draw `num` samples and score them: fd, fd_real, precision, recall, nfe, num, samples_per_second.

    Args:
        model: what to draw from.
        reference: real data in feature space.
        num: number of samples.
        sampling: arguments of `Model.sample`.
    """
    began = time.perf_counter()
    images = model.sample(num, **sampling)
    seconds = time.perf_counter() - began
    scores = reference.score(images)
    counted = {
        name: sampling[name] for name in ("steps", "solver", "guidance", "guidance_interval") if name in sampling
    }
    return {
        "fd": scores.fd,
        "fd_real": scores.fd_real,
        "precision": scores.precision,
        "recall": scores.recall,
        "nfe": evaluations(model, **{"steps": None, **counted}),
        "num": num,
        "samples_per_second": num / seconds,
    }


def make_reference(dataset: ImageDataset, features: str = "auto", seed: int = 0) -> Reference:
    """The data in the feature space named `features`; `auto` takes the network shipped for the data set, else pixels."""
    name = default_features(dataset.name) if features == "auto" else features
    return Reference(dataset.images, feature_extractor(name), seed=seed)


def evaluate_model(
    model: Model,
    *,
    num: int = 2000,
    steps: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    negative: Model | None = None,
    solver: str = "heun",
    seed: int = 0,
    features: str = "auto",
    data: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Frechet distance, precision and recall of `num` samples against the model's data set (or `data`).

    Returns:
        fd, fd_real (real against real, the floor of fd), precision, recall, nfe, num, samples_per_second, data, features.

    Raises:
        UserError: for data of another shape than the model draws, or arguments out of range.
    """
    if model.vae is not None:
        raise UserError(
            "measuring a model of latents is not supported; expected a model of images; draw single files with trigflow "
            "sample and measure those"
        )
    config = model.config.data if data is None else dataclasses.replace(model.config.data, source=data)
    dataset = load_data(config, progress)
    if dataset.shape != model.shape:
        raise UserError(
            f"data of shape {dataset.shape} for a model that draws {model.shape}; expected the same; "
            "use the data the model was trained on"
        )
    name = default_features(dataset.name) if features == "auto" else features
    reference = make_reference(dataset, name)
    if num <= reference.k:
        raise UserError(f"{num} samples to measure; expected at least {reference.k + 1}; raise --num")
    result = score(
        model, reference, num=num, steps=steps, guidance=guidance, guidance_interval=guidance_interval, negative=negative,
        solver=solver, seed=seed, progress=progress,
    )  # fmt: skip
    return {**result, "data": dataset.name, "features": name}


def describe_run(folder: str | Path, *, as_json: bool = False) -> str:
    """What a run folder holds, as text or JSON.

    Raises:
        UserError: when it is no run folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' holds no config.json; expected a run folder written by trigflow; check the path")
    config = to_dict(from_dict(read_json(folder / "config.json", "configuration")))
    metrics, checkpoints = read_metrics(folder), list_checkpoints(folder)
    finished = (folder / "model.json").is_file()
    facts: dict[str, Any] = {
        "folder": str(folder),
        "objective": config["objective"]["kind"],
        "data": config["data"]["source"],
        "network": config["network"]["kind"],
        "finished": finished,
        "iterations": config["loop"]["iterations"],
        "newest checkpoint": int(checkpoints[-1].name) if checkpoints else None,
    }
    if finished:
        model = load(folder, "cpu")
        facts["kind"] = model.kind
        facts["parameters"] = sum(p.numel() for p in model.network.parameters())
        facts["image shape (c, h, w)" if model.vae is None else "latent shape (c, h, w)"] = list(model.shape)
        if model.vae is not None:
            facts["autoencoder"] = model.vae.source.name
        facts["classes"] = model.num_classes
        taught = model.kind == "diffusion" and model.num_classes and model.config.objective.label_dropout > 0
        facts["guidance"] = f"1 to {model.config.objective.guidance_max}" if model.takes_guidance else (
            "classifier-free" if taught else "none"
        )  # fmt: skip
        facts["searched times"] = {steps: list(times) for steps, times in model.times.items()}
    if metrics:
        last = metrics[-1]
        facts |= {name: last.get(name) for name in ("iteration", "loss", "grad_norm", "skipped")}
    if as_json:
        return json.dumps({**facts, "config": config}, indent=2)
    lines = [f"{name:24} {value}" for name, value in facts.items()]
    lines += ["", "settings"] + [f"  {name:36} {value}" for name, value in _flat(config)]
    return "\n".join(lines)


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in config.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows
