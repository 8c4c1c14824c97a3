"""A pipeline of diffusers as the run folder of a teacher, which refers to it and copies nothing heavy."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.codecs import Codec, Latents, Pixels
from trigflow.codecs.vae import VAESource, channels_of, factor_of, scaling_of
from trigflow.conditions import Conditioner, Input
from trigflow.models.bridges import Adapter, Schedule
from trigflow.models.foreign.base import Base, Dtype, Predicts, bridge_of, open_base, process_of
from trigflow.models.foreign.family import Family
from trigflow.models.foreign.network import ForeignConfig
from trigflow.models.foreign.words import Prompts, digest_of_encoders, read
from trigflow.models.model import Model
from trigflow.models.outside import model_of
from trigflow.networks import ConditioningConfig
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, write_json, write_tensors
from trigflow.runtime.places import check_place
from trigflow.samplers import Sampling


def import_pipeline(
    name: str,
    out: str | Path,
    *,
    size: int | None = None,
    frames: int | None = None,
    dtype: Dtype = "float32",
    sigma_data: float = 0.5,
) -> dict[str, Any]:
    """Write a run folder that refers to a pipeline of diffusers; returns facts about it, names to values.

    The text encoders are loaded, to learn what the empty text means to them; denoiser and autoencoder are not.

    Args:
        name: folder of the pipeline, or its id on the hub.
        out: the folder to write: `model.json`, and `network.safetensors` with the rows that mean "none".
        size: pixels of the side of a picture; by default what the pipeline was made for.
        frames: of the latents of a video; 1 for pictures.
        dtype: in which weights are kept that are not trained.
        sigma_data: of the process; latents are scaled to it.

    Raises:
        UserError: for a pipeline that is none, that no family knows, or with a scheduler that says nothing.
        MissingExtraError: without diffusers or transformers.
    """
    folder = check_place(out, "new folder")
    base = open_base(name)
    told = base.family
    config = base.config(base.component)
    if told.assumed and base.config("scheduler", "scheduler_config.json").get("invert_sigmas"):
        raise UserError(
            f"'{base.name}' counts its time from noise to data, and no family knows {base.denoiser}; expected one that is told "
            "1000 sigma, as is assumed of others; write a file with its family, and pass it as --plugin"
        )
    predicts = base.predicts()
    process = process_of(None if predicts == "flow" else base.schedule(), sigma_data)
    try:
        codec, factor = codec_of(base, told, config, size, frames, sigma_data)
        pixels = tuple(factor * side for side in codec.shape[1:][-2:])
        takes = told.takes(config)
        conditioner, none = said_to(base, told, takes, pixels, config)
    except KeyError as error:
        raise UserError(
            f"the configurations of '{base.name}' do not say {error}; expected those of a denoiser and an autoencoder as "
            "diffusers writes them; restore them, or take another pipeline"
        ) from None
    network = ForeignConfig(
        base=base.name, digest=base.digest(), family=told.name, predicts=predicts, dtype=dtype,
        rows={key: list(row.shape) for key, row in none.items()},
        conditioning=ConditioningConfig(takes=tuple(sorted({*takes} - ({"label", "sizes"} & none.keys())))),
    )  # fmt: skip
    embedded = "guidance" in takes
    sampling = Sampling(guided=bool(none) and not embedded, guidance_max=30.0 if embedded else 1.0)
    origin = {"imported": base.name, "family": told.name}
    model = Model(nn.Identity(), network, process, codec, sampling, conditioner, origin=origin)
    ensure_folder(folder)
    write_tensors(folder / "network.safetensors", {f"none_{key}": row.contiguous() for key, row in none.items()})
    write_json(folder / "model.json", model.description())
    return {
        "pipeline": base.name, "denoiser": base.denoiser, "family": told.name, "predicts": predicts,
        "latents": " x ".join(map(str, codec.shape)), "picture": " x ".join(map(str, pixels)),
        "told": ", ".join(takes) or "nothing", **({"assumed": told.assumed} if told.assumed else {}),
    }  # fmt: skip


def codec_of(
    base: Base, told: Family, config: dict[str, Any], size: int | None, frames: int | None, sigma_data: float
) -> tuple[Codec, int]:
    """The way from what is drawn to x0, and pixels a place of it is wide and high."""
    vae = base.config("vae") if "vae" in base.components else None
    factor = 1 if vae is None else factor_of(vae)
    patch = told.patch or config.get("patch_size") or 1
    step = factor * (max(patch) if isinstance(patch, list | tuple) else patch)
    if size is not None and (size < 1 or size % step):
        raise UserError(f"--size {size}; expected a multiple of {step}, the pixels of a patch of latents; change it")
    shape = told.shape(config, factor, size)
    if vae is None:
        return Pixels(shape, (0.0,) * shape[0], sigma_data, sigma_data), 1  # to the denoiser, pixels are in [-1, 1]
    mean, std = told.scaling(vae, functools.partial(base.weight, "vae")) or scaling_of(vae)
    source = VAESource(base.name, "symmetric", subfolder="vae", channels=channels_of(vae))
    if frames is not None:
        if len(shape) != 4 or frames < 1:
            raise UserError(f"--frames {frames}; expected at least 1, and a pipeline of videos; change it, or leave it out")
        shape = (shape[0], frames, *shape[2:])
    return Latents(shape, tuple(mean), tuple(std), sigma_data, source), factor


def said_to(
    base: Base, told: Family, takes: tuple[str, ...], size: tuple[int, ...], config: dict[str, Any]
) -> tuple[Conditioner, dict[str, Any]]:
    """What makes conditions of what people say, and the rows that mean "none", by name."""
    if "label" in takes:
        num = told.classes_of(config)
        return Conditioner.of_classes(num), {"label": torch.tensor(num)} if told.null_label else {}
    if "text" not in takes:
        return Conditioner(), {}
    none = {key: row for key, row in read(base.name, told.name, size, "").items() if key in takes}
    shapes = {key: tuple(row.shape) for key, row in none.items() if key not in ("sizes", "guidance")}
    if "guidance" in takes:
        none["guidance"] = torch.tensor(told.scale)
    prompts: Input = Prompts(base.name, told.name, size, shapes, digest_of_encoders(base.folder))
    return Conditioner({"text": prompts}), none


def wrap(
    network: nn.Module, call: Adapter, shape: tuple[int, ...], *, predicts: Predicts = "flow", time_scale: float = 1000.0,
    schedule: Tensor | Schedule | None = None, takes: Iterable[str] = (), null: Mapping[str, Tensor] | None = None,
    codec: Codec | None = None, conditioner: Conditioner | None = None, num_classes: int = 0, sigma_data: float = 0.5,
) -> Model:  # fmt: skip
    """Any denoiser at hand as a model, to draw from or as the teacher of a `Trainer`; see `Family.call` and `model_of`.

    Args:
        network: the denoiser, of data of about unit variance; it is frozen.
        call: `call(network, x, time, **conditions)`, its prediction, `(b, *shape)`; of a flow noise - data.
        shape: of one sample.
        predicts: flow, epsilon, v or x0.
        time_scale: a flow is told this many times sigma.
        schedule: of others, `alphas_cumprod` of their training steps, as their scheduler has them.
        takes: names of the conditions.
        null: what means "none", by name, without batch axis; where it is left out, the condition always has to be told.
        codec: stored data to x0; by default pixels, in [-1, 1] to the denoiser.

    Raises:
        UserError: for arguments that do not go together.
    """
    process = process_of(None if predicts == "flow" else schedule, sigma_data)
    bridge = bridge_of(network, call, process, predicts, schedule, time_scale, takes=takes, null=null)
    codec = codec or Pixels(shape, (0.0,) * shape[0], sigma_data, sigma_data)
    return model_of(bridge, shape, process=process, codec=codec, conditioner=conditioner, num_classes=num_classes)
