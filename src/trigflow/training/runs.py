"""A training run in one call: a teacher, or a student of one."""

import dataclasses
from pathlib import Path

from torch import nn

from trigflow.models.model import Model
from trigflow.networks import NetworkConfig
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import kind_of
from trigflow.training.config import RunConfig
from trigflow.training.saving import Resume
from trigflow.training.trainer import Trainer


def train(
    config: RunConfig, folder: str | Path, *, network: nn.Module | None = None, resume: Resume = False, progress: bool = True
) -> Model:
    """Train a teacher (or a student from scratch, sCT) into a run folder and return the model; see `Trainer`."""
    return Trainer(config, folder, network=network, resume=resume, progress=progress).run()


def distill(
    config: RunConfig,
    teacher: Model,
    folder: str | Path,
    *,
    start: Model | None = None,
    negative: Model | None = None,
    network: nn.Module | None = None,
    resume: Resume = False,
    progress: bool = True,
) -> Model:
    """Train a student that starts from `teacher`, or from `start`, into a run folder and return the model; see `Trainer`.

    Network and process are the teacher's, whatever the configuration says of them; a `network` of your own is the exception,
    and dropout, which the configuration sets where its network is of the teacher's kind. Where guidance is trained, it leads
    away from `negative`, or from the teacher without the class.
    """
    kind_of(RunConfig, config=config)
    if not isinstance(teacher, Model):
        raise UserError(f"a {type(teacher).__name__} as the teacher; expected a Model; pass what trigflow.load returns")
    config = dataclasses.replace(
        config,
        process=teacher.process,
        network=with_dropout_of(config.network, teacher.spec),
        teacher=config.teacher or "teacher",
    )
    if start is not None:
        config = dataclasses.replace(config, start=config.start or "start")
    if negative is not None:
        config = dataclasses.replace(config, negative=config.negative or "negative")
    return Trainer(
        config, folder, teacher=teacher, start=start, negative=negative, network=network, resume=resume, progress=progress
    ).run()


def with_dropout_of(source: NetworkConfig, network: NetworkConfig) -> NetworkConfig:
    """`network` with the settings of dropout and adapters of `source`, where both are of one kind."""
    if type(source) is not type(network):
        return network
    settings = {name: getattr(source, name) for name in ("dropout", "dropout_up_to", "adapter") if hasattr(source, name)}
    return network.changed(**settings)
