"""Before the first step: the data, the weights a run starts from, what must fit together, and the run folder."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn

from trigflow.codecs import Codec
from trigflow.conditions import ORDER, Encoded, check_same_classes, in_order, null, takes
from trigflow.data import Dataset
from trigflow.data.config import data_of
from trigflow.data.sources.opening import EMBEDDED
from trigflow.models.model import Model
from trigflow.models.negative import check_guidance
from trigflow.networks import name_of
from trigflow.networks.custom import check_end, check_trainable, describe
from trigflow.objectives import Diffusion
from trigflow.process import Proposal
from trigflow.runtime.distributed import on_first
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import alone, ensure_folder
from trigflow.runtime.wrappers import entries
from trigflow.training.config import RunConfig, flattened, read_config, to_dict

MAY_CHANGE = frozenset(
    {
        *("data.memory_gib", "data.workers", "data.ahead"),  # how data are read, which has no say in what is read
        "data.captions",  # which are part of what `check_same` compares
        *("loop.device", "loop.iterations", "loop.accumulate", "loop.instruments", "loop.log_every", "loop.sample_every"),
        *("loop.checkpoint_every", "loop.checkpoint_minutes", "loop.keep", "loop.keep_every"),
    }
)
"""Settings that a resumed run may have otherwise than before; and all of those of `parallel` and `guard`."""
PATHS = frozenset({"data.source", "teacher", "start", "negative"})
"""Settings that name a file or folder, where `photos` and `./photos/` are the same."""


def fit_network(config: RunConfig, dataset: Dataset, network: nn.Module | None = None) -> RunConfig:
    """The configuration with the network's channels, classes, words and (where it has one) resolution taken from the data, and
    its inputs for guidance and the end of a jump from the objective.

    With a `network` of the user's own, the one in the configuration is replaced by what is known of that module. Raises a
    UserError for a network of samples of another number of axes, such as an MLP for images, or with weights to train in half
    precision.
    """
    told = config.objective.told
    num_classes = dataset.num_classes if dataset.num_classes > 1 else 0
    if network is not None:
        known = dataclasses.replace(describe(network, num_classes, "guidance" in told), channels=dataset.shape[0])
        check_end(known, "end" in told, config.objective.needs_end)
        check_trainable(network)
        half = [name for name, p in network.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
        if half:
            raise UserError(
                f"the network's weight '{half[0]}' is in half precision, where small updates and averages round to nothing; "
                "expected float32; call network.float(), and set loop.precision for half precision arithmetic"
            )
        dataset.check_tells(set(known.conditioning.takes) - set(told))
        return dataclasses.replace(config, network=known)
    if config.network.axes not in (None, len(dataset.shape)):
        vectors = len(dataset.shape) == 1
        given, wanted = ("samples of one axis", "mlp") if vectors else ("images", "unet, ddpmpp, edm2 or dit")
        kind = "an MLP" if not vectors else f"a {name_of(config.network)}"
        raise UserError(f"{kind} for {given}; expected a network for {given}; set the network to {wanted}")
    own = set(config.network.conditioning.takes) - set(ORDER)
    dataset.check_tells(own)
    takes = (*told, *in_order(own))
    text = config.network.conditioning.text
    if dataset.captions is None and text:
        dataset.check_tells(["text"])
    elif dataset.captions is not None and config.network.reads:
        read = dataset.captions.input
        if not text or isinstance(read, Encoded):
            text = dataclasses.replace(text, length=read.length, features=getattr(read, "features", 0))
    conditioning = dataclasses.replace(config.network.conditioning, num_classes=num_classes, takes=takes, text=text)
    sizes = {"features": dataset.shape[0], "channels": dataset.shape[0], "resolution": max(dataset.shape[1:], default=1)}
    changes = {name: size for name, size in sizes.items() if hasattr(config.network, name)}
    return dataclasses.replace(config, network=config.network.changed(conditioning=conditioning, **changes))


def config_of(folder: Path, model: Model | None) -> RunConfig:
    """The configuration of the run in a folder; of a model that no run of ours made, one with what is known of it. Raises a
    UserError when it is damaged."""
    if model is None or (folder / "config.json").is_file():
        return read_config(folder)
    objective = Diffusion(label_dropout=0.1 if model.sampling.guided else 0.0)
    if "noise_levels" in model.origin:
        objective = dataclasses.replace(objective, proposal=Proposal(*model.origin["noise_levels"]))
    return RunConfig(data_of(model.origin), model.process, model.spec, objective)


def choose_codec(config: RunConfig, dataset: Dataset, teacher: Model | None) -> Codec:
    """The teacher's where there is one; otherwise the one that the configuration names. Raises a UserError when the data cannot
    be used as the configuration says."""
    if config.data.flip:
        dataset.check_flip()
    if teacher is not None:
        return teacher.codec
    return dataset.codec(config.data.normalize, config.process.sigma_data)


def check_teacher(config: RunConfig, dataset: Dataset, teacher: Model | None, negative: Model | None = None) -> None:
    """Check that the teacher, and the negative of its guidance, are what this configuration and these data need. Raises a
    UserError naming the first thing that does not fit."""
    if teacher is None:
        if config.objective.distills:
            raise UserError("distillation without a teacher; expected a teacher run folder; pass --teacher RUN")
        return
    if config.objective.distills and teacher.kind != "diffusion":
        raise UserError("the teacher is a consistency model; expected a diffusion model; distill the run of its teacher")
    _check_fits(config, dataset, teacher, "teacher")
    if config.objective.distills and hasattr(teacher.spec, "adapter"):
        from trigflow.models.foreign.network import check_moves

        check_moves(cast(Any, teacher.network), teacher.shape)
    if config.negative is not None and negative is None:
        raise UserError(f"the negative '{config.negative}' is not loaded; expected a model; pass negative=load(RUN)")
    name = "guidance_max" if "guidance" in config.objective.told else "guidance"
    scale = getattr(config.objective, name, 1)
    if scale == 1 or not config.objective.distills:
        return
    if "guidance" in takes(teacher.network):
        if negative is not None or getattr(config.objective, "guidance_interval", None) is not None:
            raise UserError(
                "a guidance interval or negative for a teacher that takes the scale as an input; expected the scale alone; "
                "drop the other"
            )
        return
    if not null(teacher.network) and negative is None:
        raise UserError(
            f"objective.{name} is {scale} and the teacher is unconditional; expected a class-conditional teacher, which "
            f"guidance needs, or a negative; set objective.{name} to 1"
        )
    check_guidance(teacher, negative)


def check_start(config: RunConfig, dataset: Dataset, start: Model | None, codec: Codec) -> None:
    """Check that a student of this configuration can start from the weights of `start`. Raises a UserError naming the first
    thing that does not fit."""
    if start is None:
        if config.start is not None:
            raise UserError(f"no model to start from; expected that of start = '{config.start}'; load and pass it as start")
        return
    _check_fits(config, dataset, start, "start")
    if start.codec != codec:
        raise UserError(
            "the start was trained on data normalized otherwise; expected the teacher's normalization; "
            "start from a student of this teacher"
        )


def _check_fits(config: RunConfig, dataset: Dataset, model: Model, name: str) -> None:
    """Images, classes and process of a model that has a part in this run are those of the data."""
    for what, mine, theirs in (
        ("images of shape", dataset.shape, model.shape),
        ("classes", config.network.conditioning.num_classes, model.num_classes),
        ("sigma_data", config.process.sigma_data, model.process.sigma_data),
    ):
        if mine != theirs:
            raise UserError(f"the data have {what} {mine} and the {name} {theirs}; expected the same; use the {name}'s data")
    check_same_classes(dataset.class_names, model.class_names, "the data", f"the {name}")
    dataset.check_codec(model.codec, name)


def start_from(student: nn.Module, source: nn.Module, what: str = "teacher") -> None:
    """Copy the weights of `source`, named `what` in messages, into the student.

    The student may have inputs for guidance and the end of a jump that the source lacks: entries with `guidance` or `end_time`
    somewhere in their dotted name. They keep the values they have, which in a new network are without effect; so does a
    denoiser from diffusers, where the source has none of it. Raises a UserError when the networks differ otherwise.
    """
    own, given = entries(student), entries(source)
    at_hand = getattr(student, "at_hand", None)  # of a denoiser from diffusers: weights that it has read itself
    extras = ["guidance", "end_time", *([at_hand] if at_hand and not any(at_hand in name for name in given) else [])]
    missing = []
    for name, value in own.items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        elif name in given or not any(extra in name for extra in extras):
            missing.append(name)
    unexpected = [name for name in given if name not in own]
    if missing or unexpected:
        raise UserError(
            f"the student's network differs from that of the {what} (first difference '{(missing + unexpected)[0]}'); "
            "expected the same architecture; give both the same network settings"
        )


def claim_folder(folder: Path, config: RunConfig, resume: bool) -> Path:
    """The run folder, created; it must be free unless the same run is resumed. Raises a UserError when it holds another run, or
    cannot be written."""
    if resume and is_begun(folder):
        compare_configs(to_dict(read_config(folder)), to_dict(config))
    else:
        check_free(folder)
    return ensure_folder(folder)


@contextlib.contextmanager
def kept_alone(folder: Path) -> Iterator[None]:
    """Have no other process train in a run folder while the block lasts. All processes of a run call this together. Raises a
    UserError, in all of them, where one does."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(alone(folder)))
        yield


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run to go on with, be it from its beginning. Raises a UserError where it holds a model and no
    checkpoint, damaged ones included: the run would begin anew and write over it."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.json").is_file() and not any((folder / "checkpoints").glob("[0-9]*")):
        raise UserError(
            f"'{folder}' holds a model and no checkpoint to go on from; expected a run with checkpoints; choose another --out, "
            "or delete the model to start anew"
        )
    return True


def check_free(folder: Path) -> None:
    """Raise a UserError when a folder holds a run or a model."""
    if any((folder / name).is_file() for name in ("config.json", "model.json")):
        raise UserError(
            f"'{folder}' already holds a run; expected a new folder; choose another --out, or --resume to go on with it"
        )


def compare_configs(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise a UserError naming the first setting that a resumed run may not change."""
    before, now = flattened(old), flattened(new)
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        free = name in MAY_CHANGE or name.startswith(("parallel.", "guard."))
        if a != b and not free and not (name in PATHS and _same_path(a, b)):
            raise UserError(
                f"the run to resume has {name} = {a}, now it is {b}; expected the same; restore the setting or start anew"
            )


def _same_path(one: str | None, other: str | None) -> bool:
    """Whether two settings lead from here to one place. The names of data that come along are no paths."""
    if one is None or other is None or {one, other} & set(EMBEDDED):
        return False
    return Path(one).resolve() == Path(other).resolve()
