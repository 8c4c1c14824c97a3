"""A network of the user's own: any module `F(x_t / sd, t, **conditions)`, trained and loaded from Python."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from trigflow.conditions import check_declared, in_order, takes
from trigflow.networks.embeddings import ConditioningConfig, NetworkConfig
from trigflow.runtime.errors import UserError

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPPING = (nn.MultiheadAttention, nn.RNNBase)
"""Layers of PyTorch with dropout of their own, of probability `dropout`."""


@dataclass(frozen=True)
class CustomConfig(NetworkConfig):
    """What is known of a module that was passed as `network=`. It says what goes in and out, not how to build it."""

    channels: int = 3
    """Image or latent channels."""
    dropout: float = 0.0
    """Largest probability among its dropout layers, in [0, 1)."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """`num_classes` and `takes`; the rest is up to the module."""
    own_precision: ClassVar[bool] = True


class Custom(nn.Module):
    """Stands for a module of the user's own where there is none to be had: building it is an error that says so."""

    def __init__(self, config: CustomConfig, sigma_data: float = 0.5) -> None:
        raise UserError(
            "the network is a module of your own; expected the module itself; use Python and pass it: "
            "Trainer(..., network=module), load(folder, network=module)"
        )


def describe(network: nn.Module, num_classes: int, guided: bool) -> CustomConfig:
    """The configuration of a module of the user's own, for data of `num_classes` classes; channels are left to the data.

    The module may have the attributes of a network, `takes` and `null`; where they are missing, it takes no conditions.

    Raises:
        UserError: if it is no module, has the attributes of earlier versions, or takes a guidance scale that the run does not
            draw (or the other way round).
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"a {type(network).__name__} as the network; expected a torch.nn.Module; pass a module")
    check_declared(network)
    if ("guidance" in takes(network)) != guided:
        raise UserError(
            f"the network takes {', '.join(in_order(takes(network))) or 'no conditions'} and the run draws "
            f"{'guidance scales' if guided else 'no guidance scales'}; expected both or neither; set objective.guidance_max to "
            "1, or above 1 for a network that takes guidance"
        )
    rates = [m.p if isinstance(m, DROPOUT) else m.dropout for m in network.modules() if isinstance(m, (*DROPOUT, *DROPPING))]
    classes = num_classes if "label" in takes(network) else 0
    return CustomConfig(
        dropout=max(rates, default=0.0),
        conditioning=ConditioningConfig(num_classes=classes, takes=in_order(takes(network) - {"label"})),
    )


def check_end(config: CustomConfig, given: bool, needed: bool) -> None:
    """Raise a UserError if a module takes the ends of jumps and the run has none (`given`), or takes none where nothing can be
    learned without (`needed`). (The segments of a multistep student follow from the time.)"""
    told = "end" in config.conditioning.takes
    if told and not given:
        raise UserError(
            "the network takes end and the run has no jumps with ends; expected a network without, a multistep "
            "objective or meanflow; set objective.segments above 1 or take end out of takes"
        )
    if needed and not told:
        raise UserError(
            "the network does not take end and the run learns average velocities, which depend on the end of a jump; "
            "expected a network F(x, t, end=...); add the input and name it in takes"
        )


def check_trainable(network: nn.Module) -> None:
    """Raise a UserError if no weight of the module can be trained, as in a copy of a teacher's network, which is frozen."""
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError("every weight of the network is frozen; expected some to train; call network.requires_grad_(True)")


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise a UserError if the student's module holds weights of the teacher's: training one would move the other."""
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise UserError(
            "the student's network and the teacher's share their weights; expected two modules; pass copy.deepcopy(network)"
        )
