"""A pipeline of diffusers as the run folder of a teacher, which refers to it and copies nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trigflow.codecs import Codec, Latents, Pixels
from trigflow.codecs.vae import VAESource, channels_of, factor_of, scaling_of
from trigflow.conditions import Conditioner, Input
from trigflow.migrations import stamped
from trigflow.models.foreign.base import Base, Dtype, open_base
from trigflow.models.foreign.family import Family
from trigflow.models.foreign.network import ForeignConfig
from trigflow.models.foreign.words import Prompts, digest_of_encoders, read
from trigflow.networks import ConditioningConfig, network_state
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, write_json, write_tensors
from trigflow.runtime.places import check_place
from trigflow.samplers import Sampling


def import_pipeline(
    name: str, out: str | Path, *, size: int | None = None, dtype: Dtype = "float32", sigma_data: float = 0.5
) -> dict[str, Any]:
    """Write a run folder that refers to a pipeline of diffusers; returns facts about it, names to values.

    The text encoders are loaded, to learn what the empty text means to them; denoiser and autoencoder are not.

    Args:
        name: folder of the pipeline, or its id on the hub.
        out: the folder to write: `model.json`, and `network.safetensors` with the rows that mean "none".
        size: pixels of the side of a picture; by default what the pipeline was made for.
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
    predicts = base.predicts()
    if predicts != "flow":
        base.alphas_cumprod()
    codec, factor = codec_of(base, told, config, size, sigma_data)
    pixels = tuple(factor * side for side in codec.shape[-2:])
    takes = told.takes(config)
    conditioner, none = said_to(base, told, takes, pixels, config)
    network = ForeignConfig(
        base=base.name, digest=base.digest(), family=told.name, predicts=predicts, dtype=dtype,
        rows={key: list(row.shape) for key, row in none.items()},
        conditioning=ConditioningConfig(takes=tuple(sorted({*takes} - {"label", "sizes"}))),
    )  # fmt: skip
    embedded = "guidance" in takes
    sampling = Sampling(guided=bool(none) and not embedded, guidance_max=30.0 if embedded else 1.0)
    description = {
        "process": vars(TrigFlow(sigma_data=sigma_data)), "network": network_state(network), "codec": codec.state(),
        "conditioner": conditioner.state(), "sampling": sampling.state(), "times": {}, "channels_last": False,
        "origin": {"imported": base.name, "family": told.name},
    }  # fmt: skip
    ensure_folder(folder)
    write_tensors(folder / "network.safetensors", {f"none_{key}": row.contiguous() for key, row in none.items()})
    write_json(folder / "model.json", stamped("model", description))
    return {
        "pipeline": base.name, "denoiser": base.denoiser, "family": told.name, "predicts": predicts,
        "latents": " x ".join(map(str, codec.shape)), "picture": " x ".join(map(str, pixels)),
        "told": ", ".join(takes) or "nothing",
    }  # fmt: skip


def codec_of(base: Base, told: Family, config: dict[str, Any], size: int | None, sigma_data: float) -> tuple[Codec, int]:
    """The way from what is drawn to x0, and pixels a place of it is wide and high."""
    if "vae" not in base.components:
        return Pixels.symmetric(told.shape(config, 1, size)), 1
    vae = base.config("vae")
    factor = factor_of(vae)
    mean, std = told.scaling(vae) or scaling_of(vae)
    source = VAESource(base.name, "symmetric", subfolder="vae", channels=channels_of(vae))
    shape = told.shape(config, factor, size)
    if size is not None and size % factor:
        raise UserError(f"--size {size}; expected a multiple of {factor}, the pixels of a latent; change it")
    return Latents(shape, mean, std, sigma_data, source), factor


def said_to(
    base: Base, told: Family, takes: tuple[str, ...], size: tuple[int, ...], config: dict[str, Any]
) -> tuple[Conditioner, dict[str, Any]]:
    """What makes conditions of what people say, and the rows that mean "none", by name."""
    if "label" in takes:
        num = told.classes_of(config)
        return Conditioner.of_classes(num), {"label": torch.tensor(num)}
    if "text" not in takes:
        return Conditioner(), {}
    none = {key: row for key, row in read(base.name, told.name, size, "").items() if key in takes}
    shapes = {key: tuple(row.shape) for key, row in none.items() if key not in ("sizes", "guidance")}
    prompts: Input = Prompts(base.name, told.name, size, shapes, digest_of_encoders(base.folder))
    return Conditioner({"text": prompts}), none
