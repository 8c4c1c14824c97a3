"""Which tensors a run consists of, and how they get back into its modules and optimizers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.models.weights import check_fits
from trigflow.runtime.errors import UserError
from trigflow.runtime.wrappers import entries, load_entries
from trigflow.training.checkpoint.folder import check_checkpoint, files_of
from trigflow.training.checkpoint.stored import Stored


def tensors_of(modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of modules and optimizers, sharing memory with them: `<name>.<entry>` and `<name>.<parameter>.<entry>`."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in entries(module).items()}
    for name, optimizer in optimizers.items():
        positions = _positions(optimizer)
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{positions[index]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore modules and optimizers in place; returns the content of `state.json`.

    Every process of a run calls this, and reads what it holds. Nothing changes unless the checkpoint is sound and fits.

    Raises:
        DamagedCheckpointError: when a file is not what was written.
        UserError: when the checkpoint belongs to another network or optimizer.
    """
    state = check_checkpoint(path)
    with Stored(path, list(files_of(state))) as stored:
        for name, module in modules.items():
            shapes = {rest: stored.shapes[full] for rest, full in stored.below(name).items()}
            check_fits(entries(module), shapes, f"checkpoint '{path}' ({name})")
        for name, optimizer in optimizers.items():
            _check_moments(optimizer, stored, name)
        for name, module in modules.items():
            own, names = entries(module), stored.below(name)
            load_entries(module, {key: stored.read_like(names[key], own[key]) for key in own})
        for name, optimizer in optimizers.items():
            _load_moments(optimizer, stored, name)
    return state


def _positions(optimizer: torch.optim.Optimizer) -> list[int]:
    """Which of all parameters each parameter of an optimizer is, in the order of its state; see `build_optimizer`."""
    positions: list[int] = []
    for group in optimizer.param_groups:
        positions += group.get("positions", range(len(positions), len(positions) + len(group["params"])))
    return positions


def _check_moments(optimizer: torch.optim.Optimizer, stored: Stored, name: str) -> None:
    have = {int(key.split(".", 1)[0]) for key in stored.below(name)}
    positions = _positions(optimizer)
    if not have <= {*positions}:
        raise UserError(
            f"checkpoint '{stored.path}' has optimizer state for {max(have) + 1} parameters; expected {len(positions)}; "
            "resume with the configuration that wrote it"
        )


def _load_moments(optimizer: torch.optim.Optimizer, stored: Stored, name: str) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    at = {position: i for i, position in enumerate(_positions(optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, full in stored.below(name).items():
        position, entry = key.split(".", 1)
        parameter = parameters[at[int(position)]]
        alike = stored.shapes[full] == tuple(parameter.shape)
        value = stored.read_like(full, parameter) if alike else stored.read(full)
        state.setdefault(at[int(position)], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for entry, value in moments.items():
            if value.dim() and value.shape == parameter.shape:  # fused optimizers expect the parameter's memory order
                moments[entry] = torch.empty_like(parameter, requires_grad=False).copy_(value)
