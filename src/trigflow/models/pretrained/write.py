"""A snapshot becomes a run folder: `config.json`, `model.json`, `network.safetensors`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from trigflow.data.latents import LatentNormalization
from trigflow.models.model import Model
from trigflow.models.pretrained.nvidia import Snapshot, open_snapshot
from trigflow.networks import EDM2Config
from trigflow.process import Proposal, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, replacing, write_folder, write_json
from trigflow.training.config import DataConfig, EMAConfig, ObjectiveConfig, RunConfig, to_dict

LONGEST_EMA = 0.28
"""Upper bound on the relative length of a power-function average."""


def import_snapshot(path: str | Path, out: str | Path) -> dict[str, str]:
    """Turn a network snapshot of EDM or EDM2 into a run folder that `trigflow.load` takes.

    Nothing in the file is run. The weights are read, converted to float32 and written one tensor at a time, so that memory is
    needed for the largest of them only.

    Args:
        path: a `.pkl` as NVIDIA's code writes it, snapshots of post-hoc EMA included.
        out: the folder to create; it must not exist, or be empty.

    Returns:
        What was found, as names and values to print.

    Raises:
        UserError: see `open_snapshot`; and when `out` exists or cannot be written. Nothing is written then.
    """
    path, out = Path(path), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"'{out}' exists; expected a folder to create; choose another --out, or remove it first")
    with open_snapshot(path) as snapshot:
        model = _model(snapshot)

        def fill(folder: Path) -> None:
            write_weights(folder / "network.safetensors", snapshot)
            write_json(folder / "config.json", to_dict(model.config))
            write_json(folder / "model.json", model.description())

        ensure_folder(out.parent)
        write_folder(out, fill)
        return describe(snapshot)


def write_weights(path: Path, snapshot: Snapshot) -> None:
    """Write the weights as float32, one at a time, those of the output layer with the other sign.

    A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and place of each
    tensor) and the numbers.

    Raises:
        UserError: for weights that are not finite.
    """
    header, place = {}, 0
    for name, tensor in snapshot.tensors.items():
        end = place + 4 * tensor.numel
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in snapshot.tensors.items():
            values = tensor.read(snapshot.source).to(torch.float32)
            if not bool(values.isfinite().all()):
                snapshot.source.refuse(f"is damaged: the weight '{name}' is not finite")
            if name in snapshot.flipped:
                values = -values
            file.write(values.reshape(-1).numpy().astype("<f4", copy=False).data)


def describe(snapshot: Snapshot) -> dict[str, str]:
    """What was found, in words."""
    config, classes = snapshot.config, snapshot.config.conditioning.num_classes
    content = "latents" if isinstance(snapshot.normalization, LatentNormalization) else "pixels"
    found = {
        "network": snapshot.network_class,
        "parameters": f"{snapshot.parameters / 1e6:.6f}M",
        "stored as": snapshot.dtype,
        "resolution": f"{config.resolution}x{config.resolution}, {config.channels} channels of {content}",
        "classes": str(classes) if classes else "none (unconditional)",
        "sigma_data": f"{snapshot.sigma_data:g}",
    }
    if snapshot.noise_levels is not None:
        mean, std = snapshot.noise_levels
        found["noise levels"] = f"P_mean {mean:g}, P_std {std:g}"
    if snapshot.kimg is not None:
        found["trained for"] = f"{snapshot.kimg} kimg"
    if snapshot.ema is not None:
        found["EMA length"] = f"{snapshot.ema:.3f}"
    if snapshot.dataset is not None:
        found["data"] = snapshot.dataset
    return found


def _model(snapshot: Snapshot) -> Model:
    """The model of the run folder, its network without numbers."""
    config, normalization = snapshot.config, snapshot.normalization
    latents = isinstance(normalization, LatentNormalization)
    ema = EMAConfig() if isinstance(config, EDM2Config) else EMAConfig(kind="halflife")
    if snapshot.ema is not None and 0 < snapshot.ema < LONGEST_EMA:
        ema = EMAConfig(kind="power", sigma_rel=snapshot.ema)
    objective = ObjectiveConfig(kind="diffusion", label_dropout=0.0)
    if snapshot.noise_levels is not None:
        objective = ObjectiveConfig(kind="diffusion", label_dropout=0.0, proposal=Proposal(*snapshot.noise_levels))
    run = RunConfig(
        data=DataConfig(source=snapshot.dataset or "images", normalize="edm2" if latents else "symmetric"),
        process=TrigFlow(sigma_data=snapshot.sigma_data),
        network=config,
        objective=objective,
        ema=ema,
    )
    shape = (config.channels, config.resolution, config.resolution)
    names = tuple(str(label) for label in range(config.conditioning.num_classes))
    return Model(snapshot.network, run, "diffusion", shape, names, normalization)
