"""Before the first step: the data, the weights a run starts from, what must fit together, and the run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from trigflow.data import (
    ImageDataset,
    LatentDataset,
    LatentNormalization,
    Normalization,
    normalization_for,
    open_dataset,
    require_classes,
)
from trigflow.data.latents import NO_FLIP
from trigflow.data.sources.opening import EMBEDDED
from trigflow.models.model import Model
from trigflow.models.negative import check_guidance
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, read_json
from trigflow.training.checkpoint import clear_unfinished
from trigflow.training.config import DataConfig, RunConfig, from_dict, to_dict

MAY_CHANGE = frozenset(
    {
        "device", "log_every", "sample_every", "checkpoint_every", "checkpoint_minutes", "keep", "keep_every", "iterations",
        "instruments", "accumulate",
    }
)  # fmt: skip
"""Loop settings that a resumed run may have otherwise than before; and all of those of `parallel` and `guard`."""


READING = frozenset({"data.memory_gib", "data.workers", "data.ahead"})
"""How data are read, which has no say in what is read."""
PATHS = frozenset({"data.source", "teacher", "start", "negative"})
"""Settings that name a file or folder, where `photos` and `./photos/` are the same."""


def load_data(config: DataConfig, progress: bool = False) -> ImageDataset:
    """The data set of a configuration, read with a progress bar on a terminal; see `trigflow.data.open_dataset`.

    Raises:
        UserError: as `open_dataset`, and for labelled data of one class only.
    """
    dataset = open_dataset(
        config.source,
        resize=config.resize,
        channels=config.channels,
        skip_corrupt=config.skip_corrupt,
        progress=progress and sys.stderr.isatty(),
        memory_limit_gib=config.memory_gib,
        workers=config.workers,
    )
    if dataset.labels is not None:
        require_classes(dataset)
    return dataset


def choose_normalization(
    config: RunConfig, dataset: ImageDataset, teacher: Model | None
) -> Normalization | LatentNormalization:
    """The teacher's where there is one; otherwise the one the configuration names.

    Raises:
        UserError: when the data cannot be used as the configuration says.
    """
    if isinstance(dataset, LatentDataset) and config.data.flip:
        raise UserError(NO_FLIP)
    if teacher is not None:
        return teacher.normalization
    return normalization_for(dataset, config.data.normalize, config.process.sigma_data)


def check_teacher(
    config: RunConfig, dataset: ImageDataset, teacher: Model | None, negative: Model | None = None
) -> None:
    """Check that the teacher, and the negative of its guidance, are what this configuration and these data need.

    Raises:
        UserError: naming the first thing that does not fit.
    """
    if teacher is None:
        if config.objective.distills:
            raise UserError("distillation without a teacher; expected a teacher run folder; pass --teacher RUN")
        return
    if config.objective.distills and teacher.kind != "diffusion":
        raise UserError(
            "the teacher is a consistency model; expected a diffusion model; distill the run of its teacher"
        )
    _check_fits(config, dataset, teacher, "teacher")
    if config.negative is not None and negative is None:
        raise UserError(f"the negative '{config.negative}' is not loaded; expected a model; pass negative=load(RUN)")
    if not config.network.conditioning.takes_guidance:
        return
    if not teacher.num_classes and negative is None:
        raise UserError(
            f"objective.guidance_max is {config.objective.guidance_max} and the teacher is unconditional; expected a "
            "class-conditional teacher, which guidance needs, or a negative; set objective.guidance_max to 1"
        )
    check_guidance(teacher, negative)


def check_start(
    config: RunConfig, dataset: ImageDataset, start: Model | None, normalization: Normalization | LatentNormalization
) -> None:
    """Check that a student of this configuration can start from the weights of `start`.

    Raises:
        UserError: naming the first thing that does not fit.
    """
    if start is None:
        if config.start is not None:
            raise UserError(
                f"no model to start from; expected that of start = '{config.start}'; load and pass it as start"
            )
        return
    _check_fits(config, dataset, start, "start")
    if start.normalization != normalization:
        raise UserError(
            "the start was trained on data normalized otherwise; expected the teacher's normalization; "
            "start from a student of this teacher"
        )


def _check_fits(config: RunConfig, dataset: ImageDataset, model: Model, name: str) -> None:
    """Images, classes and process of a model that has a part in this run are those of the data."""
    for what, mine, theirs in (
        ("images of shape", dataset.shape, model.shape),
        ("classes", config.network.conditioning.num_classes, model.num_classes),
        ("sigma_data", config.process.sigma_data, model.config.process.sigma_data),
    ):
        if mine != theirs:
            raise UserError(
                f"the data have {what} {mine} and the {name} {theirs}; expected the same; use the {name}'s data"
            )
    if isinstance(dataset, LatentDataset) and isinstance(model.normalization, LatentNormalization):
        dataset.vae.check_same(model.normalization.vae, "the data", f"those of the {name}")


def start_from(student: nn.Module, source: nn.Module, what: str = "teacher") -> None:
    """Copy the weights of `source`, named `what` in messages, into the student.

    The student may have inputs for guidance and the end of a jump that the source lacks: entries with `guidance` or `end_time`
    somewhere in their dotted name. They keep the values they have, which in a new network are without effect.

    Raises:
        UserError: when the networks differ otherwise.
    """
    own, given = student.state_dict(), source.state_dict()
    missing = []
    for name, value in own.items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        elif name in given or not any(extra in name for extra in ("guidance", "end_time")):
            missing.append(name)
    unexpected = [name for name in given if name not in own]
    if missing or unexpected:
        raise UserError(
            f"the student's network differs from that of the {what} (first difference '{(missing + unexpected)[0]}'); "
            "expected the same architecture; give both the same network settings"
        )


def claim_folder(folder: Path, config: RunConfig, resume: bool) -> Path:
    """The run folder, created; it must be free unless the same run is resumed. What a killed run left is cleared up.

    Raises:
        UserError: when it holds another run, or cannot be written.
    """
    existing = folder / "config.json"
    if resume and existing.is_file():
        compare_configs(to_dict(from_dict(read_json(existing, "configuration"))), to_dict(config))
    elif existing.is_file():
        raise UserError(
            f"'{folder}' already holds a run; expected a new folder; choose another --out, or --resume to go on with it"
        )
    ensure_folder(folder)
    clear_unfinished(folder)
    return folder


def compare_configs(old: dict[str, Any], new: dict[str, Any], path: str = "") -> None:
    """Raise a UserError naming the first setting that a resumed run may not change."""
    for name in {**old, **new}:
        where = f"{path}{name}"
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            compare_configs(a, b, f"{where}.")
        elif (
            a != b
            and not (where in PATHS and _same_path(a, b))
            and path not in ("parallel.", "guard.")
            and where not in READING
            and not (path == "loop." and name in MAY_CHANGE)
        ):
            raise UserError(
                f"the run to resume has {where} = {a}, now it is {b}; expected the same; restore the setting or start anew"
            )


def _same_path(one: str | None, other: str | None) -> bool:
    """Whether two settings lead from here to one place. The names of data that come along are no paths."""
    if one is None or other is None or {one, other} & set(EMBEDDED):
        return False
    return Path(one).resolve() == Path(other).resolve()
