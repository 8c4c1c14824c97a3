"""A snapshot becomes a folder that `trigflow.load` takes: `model.json`, `network.safetensors`."""

from pathlib import Path

import torch
from torch import Tensor

from trigflow.conditions import Conditioner
from trigflow.models.model import Model
from trigflow.models.pretrained.nvidia import Snapshot, open_snapshot
from trigflow.process import TrigFlow
from trigflow.runtime.files import write_folder, write_json, write_tensors
from trigflow.runtime.places import check_place
from trigflow.samplers import Sampling


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
    path, out = Path(path), check_place(out, "new folder")
    with open_snapshot(path) as snapshot:
        model = _model(snapshot)

        def fill(folder: Path) -> None:
            write_weights(folder / "network.safetensors", snapshot)
            write_json(folder / "model.json", model.description())

        write_folder(out, fill)
        return describe(snapshot)


def write_weights(path: Path, snapshot: Snapshot) -> None:
    """Write the weights as float32, one at a time, those of the output layer with the other sign. Raises a UserError for
    weights that are not finite."""

    def read(name: str) -> Tensor:
        values = snapshot.tensors[name].read(snapshot.source).to(torch.float32)
        if not bool(values.isfinite().all()):
            snapshot.source.refuse(f"is damaged: the weight '{name}' is not finite")
        return -values if name in snapshot.flipped else values

    shapes = {name: torch.empty(tensor.shape, device="meta", dtype=torch.float32) for name, tensor in snapshot.tensors.items()}
    write_tensors(path, shapes, read=read)


def describe(snapshot: Snapshot) -> dict[str, str]:
    """What was found, in words."""
    config, classes = snapshot.config, snapshot.config.conditioning.num_classes
    found = {
        "network": snapshot.network_class,
        "parameters": f"{snapshot.parameters / 1e6:.6f}M",
        "stored as": snapshot.dtype,
        "resolution": f"{config.resolution}x{config.resolution}, {config.channels} channels of {snapshot.codec.kind}",
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
    """The model of the folder, its network without numbers; whether it was trained for guidance is not known."""
    classes = snapshot.config.conditioning.num_classes
    conditioner = Conditioner.of_classes(classes, tuple(map(str, range(classes))))
    facts = {"noise_levels": snapshot.noise_levels, "ema_sigma_rel": snapshot.ema, "kimg": snapshot.kimg}
    normalize = "edm2" if snapshot.codec.kind == "latents" else "symmetric"
    origin = {
        "objective": "diffusion",
        "data": {"source": snapshot.dataset or "images", "normalize": normalize},
        **{name: value for name, value in facts.items() if value is not None},
    }
    process = TrigFlow(sigma_data=snapshot.sigma_data)
    return Model(snapshot.network, snapshot.config, process, snapshot.codec, Sampling(), conditioner, origin=origin)
