"""A network from outside as a model: a bridged teacher, or any module `F(x_t / sd, t, **conditions)`, ready to use."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from torch import nn

from trigflow.codecs import Codec, Pixels
from trigflow.conditions import Conditioner, in_order, null, takes
from trigflow.models.model import Kind, Model
from trigflow.networks import CustomConfig
from trigflow.networks.custom import describe
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.wrappers import unwrapped
from trigflow.samplers import Sampling


def model_of(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    process: TrigFlow | None = None,
    num_classes: int = 0,
    class_names: Sequence[str] = (),
    codec: Codec | None = None,
    conditioner: Conditioner | None = None,
    kind: Kind = "diffusion",
    data: str = "digits",
) -> Model:
    """A `Model` around a network, to draw from, to evaluate, or as the teacher of a `Trainer`.

    The network is put into eval mode and frozen; pass a copy where it is to be trained further.

    Args:
        network: `F(x_t / sd, t, **conditions)`, such as a `trigflow.models.bridges.Bridge`.
        shape: of one x0, `(c, h, w)` of an image.
        process: the process that the network belongs to; that of a bridge by default.
        num_classes: classes of a network that takes `label`; by default those of the conditioner, or as many as `class_names`.
        class_names: names of the classes.
        codec: stored data to x0 and back; pixels in [-1, 1] by default (`Pixels.symmetric`).
        conditioner: makes conditions of what people say; for classes by default.
        kind: `diffusion`, or `consistency` for a student.
        data: what it was trained on, for `evaluate_model`: digits, mnist, a folder or a zip.

    Raises:
        UserError: if the network is no module, the kind is unknown, or shape and codec, or classes and what it takes, do not go
            together.
    """
    if kind not in get_args(Kind):
        raise UserError(f"a model of the kind {kind!r}; expected one of {', '.join(get_args(Kind))}; correct kind")
    network = unwrapped(network) if isinstance(network, nn.Module) else network
    if process is None:
        process = getattr(network, "process", None) or TrigFlow()
    known = describe(network, 0, "guidance" in takes(network))
    if conditioner is None:
        conditioner = Conditioner.of_classes(num_classes or len(class_names), class_names)
    classes = conditioner.classes.num if conditioner.classes else 0
    names = conditioner.classes.names if conditioner.classes else ()
    agree = num_classes in (0, classes) and tuple(class_names) in ((), names)
    if not agree or ("label" in takes(network)) != ("label" in conditioner.inputs):
        raise UserError(
            f"a network that takes {', '.join(in_order(takes(network))) or 'no conditions'}, {num_classes or classes} "
            f"classes and {len(class_names)} names; expected classes for exactly the networks that take label, each with a "
            "name or none, those of the conditioner where there is one; correct the arguments"
        )
    conditioning = replace(known.conditioning, num_classes=classes)
    spec = CustomConfig(channels=shape[0], dropout=known.dropout, conditioning=conditioning)
    codec = Pixels.symmetric(shape) if codec is None else codec
    if tuple(codec.shape) != tuple(shape):
        raise UserError(f"a codec of shape {codec.shape} for a model of shape {tuple(shape)}; expected the same; correct one")
    sampling = Sampling() if kind == "diffusion" else Sampling("flow_map")
    sampling = replace(sampling, guided=kind == "diffusion" and bool(null(network)))
    origin = {"data": {"source": data}}
    network = network.eval().requires_grad_(False)
    return Model(network, spec, process, codec, sampling, conditioner, origin=origin)
