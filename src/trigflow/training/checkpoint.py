"""Checkpoints: everything a run needs to go on as if it had never stopped.

One folder per checkpoint, `checkpoints/<iteration>/`, with `state.safetensors` (weights, average, optimizer moments) and
`state.json` (counters). It is written under a temporary name and renamed, so a checkpoint is whole or absent. Random
streams and data order are functions of (seed, iteration) and need no state.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.distributed import is_first
from trigflow.distributed.shards import collect, cut_like
from trigflow.errors import UserError
from trigflow.files import clear_leftovers, read_json, read_tensors, write_folder, write_json, write_tensors

FORMAT = 1
COUNTERS = ("iteration", "skipped")
"""Whole numbers that every `state.json` has."""

RUN_FILES = frozenset({"config.json", "metrics.jsonl", "model.json", "network.safetensors"})
"""What a run writes into its folder beside checkpoints."""


def save_checkpoint(
    folder: Path,
    iteration: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    extra: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `iteration` below the run folder and drop all but the newest `keep`.

    Modules and optimizers are kept under the names they are given by, `<name>.<entry>` and `<name>.<parameter>.<entry>`.
    Every process of a run calls this; the first one writes, and sharded tensors are whole in the file.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= collect({f"{name}.{key}": value for key, value in module.state_dict().items()})
    for name, optimizer in optimizers.items():
        positions = _positions(optimizer)
        for index, state in optimizer.state_dict()["state"].items():
            entries = {f"{name}.{positions[index]}.{key}": torch.as_tensor(value) for key, value in state.items()}
            tensors |= collect(entries)

    def fill(target: Path) -> None:
        write_tensors(target / "state.safetensors", tensors)
        write_json(target / "state.json", {"format": FORMAT, "iteration": iteration, **extra})

    root = folder / "checkpoints"
    path = root / f"{iteration:08d}"
    if not is_first():
        return path
    root.mkdir(exist_ok=True)
    write_folder(path, fill)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return sorted(path for path in found if (path / "state.json").is_file())


def clear_unfinished(folder: Path) -> None:
    """Remove the unfinished checkpoints, snapshots, pictures and files that a killed run left in its folder."""
    clear_leftovers(folder / "checkpoints", str.isdigit)
    clear_leftovers(folder / "ema", lambda name: name.endswith((".safetensors", ".json")))
    clear_leftovers(folder / "samples", lambda name: name.endswith(".png"))
    clear_leftovers(folder, RUN_FILES.__contains__)


def load_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore modules and optimizers in place; returns the content of `state.json`.

    Raises:
        UserError: when a file is damaged, or belongs to another network or optimizer.
    """
    state: dict[str, Any] = read_json(path / "state.json", "checkpoint")
    if not isinstance(state, dict) or not all(type(state.get(name)) is int and state[name] >= 0 for name in COUNTERS):
        raise UserError(
            f"'{path / 'state.json'}' is no state of a run; expected the numbers {', '.join(COUNTERS)}; "
            "delete this checkpoint to resume from the one before"
        )
    if state.get("format") != FORMAT:
        raise UserError(
            f"checkpoint '{path}' has format {state.get('format')}; expected {FORMAT}; resume with the version that wrote it"
        )
    tensors = read_tensors(path / "state.safetensors", "checkpoint")
    for name, module in modules.items():
        load_weights(module, _below(tensors, name), f"checkpoint '{path}' ({name})")
    for name, optimizer in optimizers.items():
        _load_moments(optimizer, _below(tensors, name), path)
    return state


def _positions(optimizer: torch.optim.Optimizer) -> list[int]:
    """Which of all parameters each parameter of an optimizer is, in the order of its state; see `build_optimizer`."""
    positions: list[int] = []
    for group in optimizer.param_groups:
        positions += group.get("positions", range(len(positions), len(positions) + len(group["params"])))
    return positions


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, entry = key.split(".", 1)
        moments.setdefault(int(index), {})[entry] = value
    positions = _positions(optimizer)
    if moments and max(moments) >= len(positions):
        raise UserError(
            f"checkpoint '{path}' has optimizer state for {max(moments) + 1} parameters; expected {len(positions)}; "
            "resume with the configuration that wrote it"
        )
    state = {at: moments[position] for at, position in enumerate(positions) if position in moments}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for at, entries in state.items():
        for name, value in entries.items():
            if value.shape == parameters[at].shape:
                entries[name] = cut_like(value, parameters[at])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if value.shape == parameter.shape:  # fused optimizers expect the parameter's memory order
                entries[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """`load_state_dict` with an error that names the first missing, unexpected and misshapen entries.

    Raises:
        UserError: when the entries do not fit the module.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    misshapen = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing, first '{missing[0]}'")
    if extra:
        faults.append(f"{len(extra)} unexpected, first '{extra[0]}'")
    if misshapen:
        name = misshapen[0]
        faults.append(
            f"{len(misshapen)} misshapen, first '{name}' {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        )
    if faults:
        raise UserError(
            f"{what} belongs to another network ({'; '.join(faults)}); expected the network of the configuration; "
            "use the matching run folder or network settings"
        )
    module.load_state_dict({name: cut_like(value, own[name]) for name, value in tensors.items()})


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
