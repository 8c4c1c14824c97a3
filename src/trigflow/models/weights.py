"""Weights into a network that they have to fit."""

from collections.abc import Mapping

from torch import Tensor, nn

from trigflow.runtime.distributed.shards import cut_like
from trigflow.runtime.errors import UserError
from trigflow.runtime.wrappers import entries, load_entries, plain_name


def load_weights(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """`load_state_dict` with an error that names the first missing, unexpected and misshapen entries. Raises a UserError when
    the entries do not fit the module."""
    own = entries(module)
    tensors = {plain_name(name, own): value for name, value in tensors.items()}
    check_fits(own, {name: tuple(value.shape) for name, value in tensors.items()}, what)
    load_entries(module, {name: cut_like(value, own[name]) for name, value in tensors.items()})


def check_fits(own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise a UserError that names the first missing, unexpected and misshapen entries, where there are any."""
    missing = [name for name in own if name not in shapes]
    extra = [name for name in shapes if name not in own]
    misshapen = [name for name in own if name in shapes and tuple(own[name].shape) != shapes[name]]
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing, first '{missing[0]}'")
    if extra:
        faults.append(f"{len(extra)} unexpected, first '{extra[0]}'")
    if misshapen:
        name = misshapen[0]
        faults.append(f"{len(misshapen)} misshapen, first '{name}' {tuple(shapes[name])} instead of {tuple(own[name].shape)}")
    if faults:
        raise UserError(
            f"{what} belongs to another network ({'; '.join(faults)}); expected the network of the configuration; "
            "use the matching run folder or network settings"
        )
