"""Pipelines of diffusers as teachers: every family is called as its own pipeline calls it."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from diffusers import DiffusionPipeline

import trigflow
from models import pipelines
from trigflow.models.foreign import import_pipeline
from trigflow.models.foreign.base import open_base
from trigflow.models.foreign.family import known
from trigflow.models.foreign.network import Foreign, check_moves
from trigflow.runtime.errors import UserError
from trigflow.tangent import jvp

NAMES = list(pipelines.PIPELINES)
SIZES = {"wan": 64}
BACKWARDS = {"lumina2", "z-image"}
"""Pipelines that tell their flow model 1 - sigma, and predict data - noise."""
ROUNDING = 3e-5
"""Of networks in float32: a time near 1000 is known to 6e-5, and waves of it no better."""
PROMPT = "a red heart"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Makes each pipeline once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name):
        path = root / name
        return path if path.is_dir() else pipelines.save(name, path)

    return folder


@pytest.fixture(scope="session")
def teachers(folders, tmp_path_factory):
    """Imports each pipeline once, those of videos with few frames."""
    root = tmp_path_factory.mktemp("teachers")

    def teacher(name):
        out = root / name
        if not out.is_dir():
            with pytest.MonkeyPatch.context() as patch:
                for found in known().values():
                    patch.setattr(type(found), "frames", min(found.frames, 3))
                import_pipeline(str(folders(name)), out, size=SIZES.get(name, 32))
        return out

    return teacher


def recorded(folder, model, **how):
    """What the pipeline itself tells its denoiser, and the answer: the arguments of each call by name, and the result; and what
    it makes of it in the end, bytes `(1, 3, h, w)`, frames of a video side by side."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, open_base(str(folder)).component)
    calls, run = [], denoiser.forward

    def forward(*args, **kwargs):
        out = run(*args, **kwargs)
        names = ("sample", "timestep")
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, batched(out[0]).clone()))
        return out

    denoiser.forward = forward
    asked = {
        "prompt": PROMPT, "class_labels": [3], "num_inference_steps": 3, "output_type": "np", "use_resolution_binning": False,
        "height": 0, "width": 0, "generator": torch.Generator().manual_seed(0), **how,
    }  # fmt: skip
    taken = inspect.signature(pipeline.__call__).parameters
    if "height" in taken:
        asked |= dict.fromkeys(("height", "width"), model.codec.drawn_shape[-1])
    if len(model.shape) == 4:
        asked["num_frames"] = getattr(pipeline, "vae_temporal_compression_ratio", 4) * (model.shape[1] - 1) + 1
    with torch.no_grad():
        made = torch.as_tensor(pipeline(**{name: value for name, value in asked.items() if name in taken})[0]) * 255
    if made.ndim == 5:
        made = made.movedim(1, 2).flatten(2, 3)
    return calls, made.movedim(-1, 1)


def batched(value):
    """What a denoiser takes or gives, with a batch axis."""
    return torch.stack(list(value)) if isinstance(value, list) else value


def said(model):
    """Something that the model can be told."""
    return {name: value for name, value in {"text": PROMPT, "label": 3}.items() if name in model.conditioner.inputs}


@pytest.mark.parametrize("name", NAMES)
def test_velocity_and_x0_are_those_of_the_pipelines_own_step(name, folders, teachers):
    model = trigflow.load(teachers(name), "cpu")
    network, family = model.network, open_base(str(folders(name))).family
    embedded = "guidance" in network.takes
    calls, made = recorded(folders(name), model, guidance_scale=3.5 if embedded else 0.0)
    told = model.conditioner.conditions(said(model), 1)
    if embedded:
        told["guidance"] = torch.tensor([3.5])
    assert len(calls) >= 3
    for given, predicted in calls:
        x, time = given.get("sample", given.get("hidden_states")), torch.as_tensor(given["timestep"]).double().reshape(-1)[:1]
        x, predicted = (family.spread(batched(value), model.shape).double() for value in (x, predicted))
        predicted = predicted[:, : model.shape[0]]  # the variance comes after the noise
        if model.spec.predicts == "flow":
            b = time / (family.time_scale * getattr(network.model.config, "timestep_scale", 1.0))
            if name in BACKWARDS:
                b, predicted = 1 - b, -predicted
            a = 1 - b
            x0 = x - b * predicted
        else:
            schedule = open_base(str(folders(name))).schedule()
            a = schedule[time.long()].double().sqrt() if isinstance(schedule, torch.Tensor) else torch.cos(time * math.pi / 2)
            b = (1 - a**2).sqrt()
            x0 = (x - b * predicted) / a if model.spec.predicts == "epsilon" else a * x - b * predicted
        t = torch.atan2(b, a)
        x_t = x / (a**2 + b**2).sqrt()
        velocity = (torch.cos(t) * x_t - x0) / torch.sin(t)  # X = cos x0 + sin z, F = cos z - sin x0
        with torch.no_grad():
            found = network(x_t.float(), t.float(), **told).double()
        torch.testing.assert_close(found, velocity, rtol=1e-5, atol=ROUNDING * float(velocity.abs().max()))
        back = torch.cos(t) * x_t - torch.sin(t) * found
        torch.testing.assert_close(back, x0, rtol=1e-5, atol=ROUNDING * float(x0.abs().max().clamp_min(1)))
    latents = x0.float() * model.process.sigma_data  # of the last step, after which no noise is left
    if len(model.shape) == 2:
        with pytest.raises(UserError, match="sounds cannot be decoded yet"):
            model.codec.decode(latents)
    elif name != "wan":  # whose scheduler tells it rounded times
        torch.testing.assert_close(model.codec.decode(latents).float(), made.float(), rtol=0, atol=1.01)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dit", "ddpm")])
def test_texts_of_a_batch_are_read_each_for_itself(name, teachers):
    model = trigflow.load(teachers(name), "cpu")
    random = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, *model.shape, generator=random), torch.tensor([0.3, 0.9, 1.2])
    texts = [
        PROMPT,
        "a dog",
        "the lighthouse at dawn, green and blue, a cat of a heart of an apple of a circle of a dog at dawn",
    ]
    told = model.conditioner.conditions({"text": texts}, 3)
    if "guidance" in model.network.takes:
        told["guidance"] = torch.tensor([3.5, 1.0, 2.0])
    with torch.no_grad():
        together = model.network(x, t, **told)
        for i in range(3):
            alone = model.network(x[i : i + 1], t[i : i + 1], **{key: row[i : i + 1] for key, row in told.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=ROUNDING * float(alone.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_moves_with_a_fifth_of_a_step(name, dtype, teachers):
    model = trigflow.load(teachers(name), "cpu")
    network = Foreign(dataclasses.replace(model.spec, dtype=dtype))
    network.load_state_dict(model.network.state_dict())
    check_moves(network, model.shape)


@pytest.mark.parametrize("name", NAMES)
def test_tangent_is_the_difference_in_float64(name, teachers):
    network = trigflow.load(teachers(name), "cpu").network.double()
    model = trigflow.load(teachers(name), "cpu")
    random = torch.Generator().manual_seed(1)
    shape = model.shape
    x, dx = (torch.randn(1, *shape, generator=random, dtype=torch.float64) for _ in range(2))
    t, dt = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    told = {
        key: row.double() if row.is_floating_point() else row for key, row in model.conditioner.conditions(said(model)).items()
    }
    if "guidance" in network.takes:
        told["guidance"] = torch.tensor([3.5], dtype=torch.float64)
    _, tangent = jvp(lambda x, t: network(x, t, **told), (x, t), (dx, dt))
    h = 1e-4
    with torch.no_grad():
        expected = (network(x + h * dx, t + h * dt, **told) - network(x - h * dx, t - h * dt, **told)) / (2 * h)
    assert math.isfinite(float(expected.abs().sum()))
    assert float(expected.abs().max()) > 0
    error = float((tangent - expected).abs().max() / expected.abs().max())
    assert error < 1e-3, error  # parts of these networks are in float32
