"""Drawing through diffusers: the same samples as without it, and what the arguments do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SCMScheduler
from torch import Tensor

from deploy.students import student
from tiny_vae import reference_vae, write_vae
from trigflow import samplers
from trigflow.codecs import Latents
from trigflow.codecs.vae import VAESource
from trigflow.deploy.pipeline import TrigFlowPipeline
from trigflow.models.model import Model
from trigflow.networks import CustomConfig
from trigflow.runtime.errors import UserError

GUIDED = student({"objective.guidance_max": 2.0}, times={2: (1.56, 0.7)})
"""Has searched times for two steps, and takes guidance."""


def pipeline(model: Model = GUIDED) -> TrigFlowPipeline:
    pipe = TrigFlowPipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_draws_what_the_consistency_sampler_draws_from_the_same_noise(steps: int) -> None:
    labels, generator = torch.tensor([3, 7, 1]), seeded()
    drawn = pipeline()(labels, steps, 1.5, generator=seeded(), output_type="latent").images

    noise = 0.5 * torch.randn(3, 1, 8, 8, generator=generator)
    times = GUIDED.times.get(steps) or samplers.consistency_times(GUIDED.process, steps)
    velocity = GUIDED.velocity({"label": labels}, 1.5)
    expected = samplers.flow_map_sample(velocity, GUIDED.process, noise, times, gamma=1, generator=generator)

    torch.testing.assert_close(0.5 * drawn, expected, atol=2e-6, rtol=1e-5)
    plain = GUIDED.velocity({"label": labels}, 1.0)
    other = samplers.flow_map_sample(plain, GUIDED.process, noise, times, gamma=1, generator=seeded())
    assert (0.5 * drawn - other).abs().max() > 1e-3  # the network has a say


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_network_fits_a_loop_of_the_stock_scheduler(steps: int) -> None:
    """Written out as one would with diffusers alone, with the scheduler's own times."""
    pipe, labels = pipeline(), torch.tensor([0, 9])
    scheduler, generator = SCMScheduler(sigma_data=0.5), seeded()
    scheduler.set_timesteps(steps, max_timesteps=1.5, intermediate_timesteps=1.1 if steps == 2 else None)
    x = 0.5 * torch.randn(2, 1, 8, 8, generator=generator)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(pipe.network(x, t, labels, 1.0), t, x, generator=generator).prev_sample

    times = scheduler.timesteps[:-1].tolist()
    drawn = pipe(labels, timesteps=times, generator=seeded(), output_type="latent").images
    assert torch.equal(drawn, x / 0.5)
    noise_source = seeded()
    noise = 0.5 * torch.randn(2, 1, 8, 8, generator=noise_source)
    velocity = GUIDED.velocity({"label": labels}, 1.0)
    ours = samplers.flow_map_sample(velocity, GUIDED.process, noise, times, gamma=1, generator=noise_source)
    torch.testing.assert_close(x, ours, atol=2e-6, rtol=1e-5)


def test_image_forms_are_the_same_bytes() -> None:
    pipe = pipeline()
    drawn = {form: pipe([1, 2], generator=seeded(), output_type=form).images for form in ("pil", "np", "pt", "latent")}
    expected = GUIDED.codec.stored(0.5 * drawn["latent"])
    assert len(expected.unique()) > 20
    assert drawn["pt"].shape == (2, 1, 8, 8)
    assert torch.equal(drawn["pt"], expected.float() / 255)
    assert drawn["np"].shape == (2, 8, 8, 1)
    assert np.array_equal(drawn["np"], drawn["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in drawn["pil"]] == ["L", "L"]
    assert all(np.array_equal(np.asarray(image), expected[i, 0]) for i, image in enumerate(drawn["pil"]))
    assert torch.equal(pipe([1, 2], generator=seeded(), output_type="pt", return_dict=False)[0], drawn["pt"])


def test_latents_in_take_the_place_of_the_first_noise() -> None:
    pipe, generator = pipeline(), seeded()
    latents = torch.randn(2, 1, 8, 8, generator=generator)
    given = pipe([4, 5], latents=latents, generator=generator, output_type="latent").images
    assert torch.equal(given, pipe([4, 5], generator=seeded(), output_type="latent").images)


def test_one_generator_per_image_makes_an_image_independent_of_the_others() -> None:
    pipe = pipeline()
    three = pipe([1, 2, 3], generator=[seeded(i) for i in range(3)], output_type="latent").images
    alone = pipe([2], generator=[seeded(1)], output_type="latent").images
    torch.testing.assert_close(three[1:2], alone, atol=1e-5, rtol=1e-5)


def test_labels_and_batch_sizes() -> None:
    pipe = pipeline()

    def draw(*args: Any, **options: Any) -> Tensor:
        return pipe(*args, generator=seeded(), output_type="latent", **options).images

    assert len(draw()) == 1
    assert torch.equal(draw(batch_size=12), draw([*range(10), 0, 1]))
    assert torch.equal(draw(3, batch_size=4), draw([3] * 4))
    assert torch.equal(draw(latents=torch.ones(2, 1, 8, 8)), draw([0, 1], latents=torch.ones(2, 1, 8, 8)))


def test_callback_sees_and_changes_the_state_after_each_step() -> None:
    pipe, seen = pipeline(), []

    def watch(pipe: TrigFlowPipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(t), tensors["latents"].clone()))
        return tensors

    def blank(pipe: TrigFlowPipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    drawn = pipe([1], generator=seeded(), output_type="latent", callback_on_step_end=watch).images
    assert [(step, round(t, 4)) for step, t, _ in seen] == [(0, 1.56), (1, 0.7)]
    assert torch.equal(seen[-1][2] / 0.5, drawn)
    assert torch.equal(pipe([1], output_type="latent", callback_on_step_end=blank).images, torch.zeros(1, 1, 8, 8))


def test_a_student_of_latents_decodes_with_its_autoencoder(tmp_path: Any) -> None:
    folder = write_vae(tmp_path / "vae")
    model = student({"network.channels": 4})
    codec = Latents((4, 8, 8), vae=VAESource(str(folder), "symmetric"))
    model = dataclasses.replace(model, codec=codec)
    pipe = pipeline(model)
    z = codec.stored(0.5 * pipe([1, 2], generator=seeded(), output_type="latent").images)
    with torch.no_grad():
        pixels = reference_vae(folder).decode(z).sample
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255) / 255
    drawn = pipe([1, 2], generator=seeded(), output_type="pt").images
    assert drawn.shape == (2, 3, 16, 16)
    torch.testing.assert_close(drawn, expected, atol=1.1 / 255, rtol=0)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (student({"objective.kind": "diffusion"}, kind="diffusion"), "a diffusion teacher for a diffusers pipeline"),
        (student({"objective.segments": 4}), "a multistep student of 4 segments for a diffusers pipeline"),
        (student({"objective.kind": "meanflow"}), r"a student of average velocities \(meanflow\) for a diffusers"),
    ],
)
def test_models_that_the_scheduler_cannot_draw_from(model: Model, what: str) -> None:
    with pytest.raises(UserError, match=what):
        TrigFlowPipeline.from_model(model)


def test_a_network_of_ones_own_cannot_be_built_again() -> None:
    model = student()
    with pytest.raises(UserError, match="a network of your own for a diffusers pipeline"):
        TrigFlowPipeline.from_model(dataclasses.replace(model, spec=CustomConfig(channels=1)))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"class_labels": [10]}, "10"),
        ({"class_labels": []}, "an empty list of class_labels; expected at least one class"),
        ({"class_labels": [1, 2, 3], "batch_size": 2}, "3 class_labels for 2 images"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 3, "latents": torch.zeros(2, 1, 8, 8)}, "batch_size 3 and latents"),
        ({"latents": torch.zeros(2, 1, 8, 9)}, "latents of shape"),
        ({"num_inference_steps": 0}, "0 sampling steps"),
        ({"timesteps": [1.0, 1.2]}, "timesteps"),
        ({"timesteps": [1.5, 0.0]}, "without the 0 at the end"),
        ({"guidance_scale": 2.5}, "guidance 2.5"),
        ({"guidance_scale": float("nan")}, "guidance nan"),
        ({"generator": [seeded()], "batch_size": 2}, "1 generators for 2 images"),
        ({"output_type": "jpeg"}, "output_type 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "expected latents"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        pipeline()(**arguments)
    assert "\n" not in str(caught.value)


def test_a_scheduler_of_another_sigma_data_is_refused() -> None:
    pipe = pipeline()
    with pytest.raises(UserError, match=r"sigma_data 1.0; expected an SCMScheduler with trigflow and 0.5"):
        TrigFlowPipeline(pipe.network, SCMScheduler(sigma_data=1.0))


@pytest.mark.parametrize("steps", [1, 3])
def test_double_precision_draws_the_same_picture_to_rounding(steps: int) -> None:
    expected = pipeline()([1, 2], steps, 1.5, generator=seeded(), output_type="latent").images
    pipe = pipeline().to(torch.float64)
    drawn = pipe([1, 2], steps, 1.5, generator=seeded(), output_type="latent").images
    assert drawn.dtype == torch.float64
    assert 0 < (drawn - expected).abs().max() < 1e-4
    given = torch.randn(2, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    exact, rounded = (pipe([1, 2], 1, latents=z, output_type="latent").images for z in (given, given.float()))
    assert 0 < (exact - rounded).abs().max() < 1e-5


def test_half_precision_weights_are_refused_and_autocast_is_not() -> None:
    pipe = pipeline()
    exact = pipe([1], generator=seeded(), output_type="latent").images
    with torch.autocast("cpu", torch.bfloat16):
        cast = pipe([1], generator=seeded(), output_type="latent").images
    assert cast.dtype == torch.float32
    assert 0 < (cast - exact).abs().max() < 0.1
    with pytest.raises(UserError, match=r"torch\.autocast"):
        pipe.to(torch.float16)([1])
