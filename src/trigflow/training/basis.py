"""What a run stands on: its data, and the models that it starts from or is taught by. A resumed run has to have the same.

Every checkpoint keeps a fingerprint of them in its `state.json`. Those of earlier versions have none; of these only the names
of the classes, the shape and the normalization are known.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trigflow.codecs import Codec
from trigflow.data import Dataset
from trigflow.models.model import Model
from trigflow.runtime.errors import UserError
from trigflow.runtime.tensors import content
from trigflow.runtime.wrappers import entries
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.checkpoint.folder import read_state

BYTES = 1 << 14
"""Of each tensor of a model that go into its fingerprint; training changes them all."""


def basis_of(dataset: Dataset, models: Mapping[str, Model | None]) -> dict[str, Any]:
    """The fingerprint of data and models, in plain types: what is kept in checkpoints under `basis`."""
    return {"data": dataset.fingerprint(), **{name: _weights(model) for name, model in models.items() if model}}


def begun(folder: Path, resume: bool | str) -> dict[str, Any]:
    """What the newest checkpoint of the run to resume whose `state.json` is sound says there; empty for a run that begins.
    Raises a UserError when the run has to go on (`resume` is True) and there is no checkpoint."""
    found = list_checkpoints(folder) if resume else []
    if resume is True and not found:
        raise UserError(f"nothing to resume in '{folder}'; expected a checkpoint; drop --resume to start, or use --resume auto")
    for path in reversed(found):
        state = read_state(path)
        if state is not None and "model" in state:
            return state
    return {}


def numbered(dataset: Dataset, state: Mapping[str, Any], models: Mapping[str, Model | None]) -> Dataset:
    """The data with classes numbered as in the run that goes on from this state, or else in the first of these models. Raises a
    UserError for data of other classes."""
    if state:
        return dataset.numbered_as(_class_names(state["model"]), "the run to resume")
    known = ((name, model) for name, model in models.items() if model is not None)
    return next((dataset.numbered_as(model.class_names, f"the {name}") for name, model in known), dataset)


def check_same(state: Mapping[str, Any], basis: Mapping[str, Any], codec: Codec) -> None:
    """Require that a run goes on from this state with what it began with. Raises a UserError naming the first thing that
    differs, and both values."""
    before = state.get("basis", {})
    for part in basis:
        if part != "data" and part in before and before[part] != basis[part]:
            raise _differs(f"a {part} of other weights", before[part], basis[part], f"the {part} as it was")
    old, new = before.get("data", {}), basis["data"]
    for name in new:
        if name in old and old[name] != new[name] and None not in (old[name], new[name]):
            raise _differs(f"data of other {name}", old[name], new[name], "the data as they were")
    kept = state.get("model", {}).get("codec", {})
    for name, value in codec.state().items():
        if name in kept and not _alike(kept[name], value):
            raise _differs(f"data of another {name}", kept[name], value, "the data as they were")


def _differs(what: str, before: Any, now: Any, expected: str) -> UserError:
    shown = [text if len(text) < 80 else text[:76] + " ..." for text in map(str, (before, now))]
    if isinstance(before, str):
        shown = [text[:8] for text in shown]  # digests
    return UserError(
        f"the run to resume began with {what}: {shown[0]}, now {shown[1]}; expected {expected}; restore that, or start anew"
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two plain values are the same, numbers but for rounding."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)


def _class_names(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the model in a checkpoint; none where it does not say."""
    try:
        return tuple(map(str, model.get("class_names") or model["conditioner"]["label"]["names"]))
    except (AttributeError, KeyError, TypeError):
        return ()


def _weights(model: Model) -> str:
    """A digest of the beginning of every tensor of a network."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(entries(model.network).items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(content(value.detach().flatten()[: BYTES // value.element_size()].contiguous()))
    return found.hexdigest()
