"""Pipelines of diffusers as teachers: every family is called as its own pipeline calls it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import trigflow
from models import pipelines
from trigflow.models.foreign import FAMILIES, family_of, import_pipeline, plain, wrap
from trigflow.models.foreign.adapters import read_adapters
from trigflow.models.foreign.base import open_base
from trigflow.models.foreign.family import known, unpacked
from trigflow.models.foreign.network import Foreign, check_moves
from trigflow.runtime.errors import UserError
from trigflow.tangent import jvp

NAMES = list(pipelines.PIPELINES)
SIZES = {"wan": 64, "skyreels": 64}
BACKWARDS = {"lumina2", "z-image"}
"""Pipelines that tell their flow model 1 - sigma, and predict data - noise."""
ROUNDING = 1e-5
"""Of networks in float32, as a share of the largest value."""
LOOSER = {"chroma": 3e-5, "z-image": 2e-5}
"""Of those with waves of a time near 1000, which is known to 6e-5."""
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
                patch.setattr(plain, "FRAMES", 3)
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


def spread(name, x, shape):
    """What a pipeline tells its denoiser, with latents that are packed, or whose frames come first, in their own shape."""
    if name in ("flux", "chroma", "qwen-image"):
        return unpacked(x, x.new_empty(len(x), *shape))
    if name in ("flux2", "flux2-klein", "ltx"):
        return x.mT.reshape(len(x), *shape)
    if name in ("cogvideox", "cogvideox-1.5"):
        return x.transpose(1, 2)
    return x.squeeze(2) if name == "z-image" else x


def said(model):
    """Something that the model can be told."""
    return {name: value for name, value in {"text": PROMPT, "label": 3}.items() if name in model.conditioner.inputs}


@pytest.mark.parametrize("name", NAMES)
def test_velocity_and_x0_are_those_of_the_pipelines_own_step(name, folders, teachers):
    model = trigflow.load(teachers(name), "cpu")
    network, family = model.network, open_base(str(folders(name))).family
    embedded, rounding = "guidance" in network.takes, LOOSER.get(name, ROUNDING)
    calls, made = recorded(folders(name), model, guidance_scale=3.5 if embedded else 0.0)
    told = model.conditioner.conditions(said(model), 1)
    if embedded:
        told["guidance"] = torch.tensor([3.5])
    assert len(calls) >= 3
    for given, predicted in calls:
        x, time = given.get("sample", given.get("hidden_states")), torch.as_tensor(given["timestep"]).double().reshape(-1)[:1]
        x, predicted = (spread(name, batched(value), model.shape).double() for value in (x, predicted))
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
        torch.testing.assert_close(found, velocity, rtol=1e-5, atol=rounding * float(velocity.abs().max()))
        back = torch.cos(t) * x_t - torch.sin(t) * found
        torch.testing.assert_close(back, x0, rtol=1e-5, atol=rounding * float(x0.abs().max().clamp_min(1)))
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
def test_output_follows_the_time_in_half_precision(name, teachers):
    model = trigflow.load(teachers(name), "cpu")
    network = Foreign(dataclasses.replace(model.spec, dtype="bfloat16"))
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


def test_pipelines_of_early_days_say_less_of_their_denoiser(folders, tmp_path):
    for name, kind in (("dit", "DiTTransformer2DModel"), ("pixart", "PixArtTransformer2DModel")):
        folder = shutil.copytree(folders(name), tmp_path / name)
        changed(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
        changed(folder / "transformer/config.json", _class_name="Transformer2DModel")
        assert import_pipeline(str(folder), tmp_path / f"{name}-teacher", size=32)["denoiser"] == kind
        assert type(trigflow.load(tmp_path / f"{name}-teacher", "cpu").network.model).__name__ == kind


def test_unet_of_classes_has_to_be_told_one(tmp_path):
    torch.manual_seed(0)
    pipelines.ddpm(num_class_embeds=5).save_pretrained(tmp_path / "base")
    import_pipeline(str(tmp_path / "base"), tmp_path / "teacher")
    model = trigflow.load(tmp_path / "teacher", "cpu")
    assert model.num_classes == 5
    assert not model.sampling.guided
    random = torch.Generator().manual_seed(1)
    x, t, label = torch.randn(2, *model.shape, generator=random), torch.tensor([0.4, 0.9]), torch.tensor([1, 4])
    with torch.no_grad():
        predicted = model.network.model(x, model.network.bridge.schedule(t), class_labels=label).sample
        found = model.network(x, t, label=label)
    cos, sin = (f(t)[:, None, None, None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(found, (predicted - sin * x) / cos, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no label"):
        model.network(x, t)
    assert model.sample(2, steps=1, labels=[1, 4]).shape == (2, 3, 8, 8)


def test_labels_are_not_left_out_in_training(teachers):
    model = trigflow.load(teachers("dit"), "cpu")
    x, t, label = torch.randn(64, *model.shape), torch.full((64,), 0.9), torch.arange(64)
    with torch.no_grad():
        torch.testing.assert_close(model.network.train()(x, t, label=label), model.network.eval()(x, t, label=label))


def test_plain_call_is_guessed_by_names_and_said(folders, tmp_path):
    facts = import_pipeline(str(folders("skyreels")), tmp_path / "teacher", size=64)
    assert facts["assumed"] == "hidden_states, timestep, encoder_hidden_states"
    assert facts["latents"] == "16 x 21 x 8 x 8"
    assert "assumed" not in import_pipeline(str(folders("sd3")), tmp_path / "other", size=32)

    class Masked:
        def forward(self, sample, t, encoder_hidden_states, encoder_attention_mask, return_dict=True): ...

    found = family_of("Masked", Masked)
    assert found.conditions == ("text", "text_mask")
    assert found.call(lambda **told: (tuple(told),), None, None, text=None, text_mask=None) == (
        "sample", "t", "encoder_hidden_states", "encoder_attention_mask"
    )  # fmt: skip


def test_denoiser_that_wants_more_needs_a_family():
    for kind in (diffusers.CogView3PlusTransformer2DModel, diffusers.LuminaNextDiT2DModel):
        with pytest.raises(UserError, match=rf"no family knows {kind.__name__}(.|\n)*--plugin FILE(.|\n)*class Sana\(Family\)"):
            family_of(kind.__name__, kind)


def test_any_denoiser_is_wrapped():
    torch.manual_seed(0)
    denoiser = diffusers.CogView3PlusTransformer2DModel(
        in_channels=3, out_channels=3, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=8,
        time_embed_dim=8, condition_dim=8, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    alphas = diffusers.CogVideoXDDIMScheduler().alphas_cumprod

    def call(model, x, time, text):
        size = x.new_full((len(x), 2), 64.0)
        return model(x, text, timestep=time, original_size=size, target_size=size, crop_coords=0 * size, return_dict=False)[0]

    model = wrap(
        denoiser, call, (3, 8, 8), predicts="v", schedule=alphas, takes=["text"], null={"text": torch.zeros(4, 8)}
    )  # fmt: skip
    x, text = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8)
    t = torch.acos(alphas[torch.tensor([300, 700])].double().sqrt()).float()
    with torch.no_grad():
        expected = call(denoiser, x, torch.tensor([300.0, 700.0]), text)
        torch.testing.assert_close(model.network(x, t, text=text), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.network(x, t), model.network(x, t, text=torch.zeros(2, 4, 8)))
    assert model.sample(2, steps=1).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="without a schedule"):
        wrap(denoiser, call, (3, 8, 8), predicts="v")


def test_time_that_is_rounded_on_the_way_is_noticed(teachers, monkeypatch):
    model = trigflow.load(teachers("sd3"), "cpu")
    check_moves(model.network, model.shape)

    class Rounded(type(known()["sd3"])):
        def call(self, model, x, time, **told):
            return super().call(model, x, time.long() if self.name == "whole" else time.round(), **told)

    for name in ("whole", "round"):
        monkeypatch.setitem(FAMILIES, name, type("Made", (Rounded,), {"name": name})())
        network = Foreign(dataclasses.replace(model.spec, family=name))
        network.load_state_dict(model.network.state_dict())
        with pytest.raises(UserError, match="SD3Transformer2DModel that is told its time in whole steps"):
            check_moves(network, model.shape)


def changed(path, **values):
    """Change a file of JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def dropped(part):
    return lambda folder: shutil.rmtree(folder / part)


def own_code(folder):
    (folder / "text_encoder" / "evil.py").write_text("raise RuntimeError('the code of a pipeline was run')")
    changed(folder / "model_index.json", text_encoder=["evil", "Evil"])


FAULTS = {
    "no scheduler": (dropped("scheduler"), "the scheduler of .* has no scheduler/scheduler_config.json"),
    "prediction": (
        lambda folder: changed(folder / "scheduler/scheduler_config.json", prediction_type="score"),
        "says that the model predicts 'score'; expected one of epsilon, v_prediction",
    ),
    "schedule": (
        lambda folder: changed(folder / "scheduler/scheduler_config.json", _class_name="KarrasVeScheduler"),
        "has no alphas_cumprod",
    ),
    "no text encoder": (dropped("text_encoder"), "has no folder text_encoder; expected all that"),
    "no denoiser": (dropped("transformer"), "the transformer of .* has no transformer/config.json"),
    "no autoencoder": (dropped("vae"), "the vae of .* has no vae/config.json"),
    "class": (
        lambda folder: changed(folder / "model_index.json", transformer=["diffusers", "TomorrowTransformer2DModel"]),
        "is made of a TomorrowTransformer2DModel, which diffusers .* has not",
    ),
    "pipeline": (
        lambda folder: changed(folder / "model_index.json", _class_name="TomorrowPipeline"),
        "is made of a TomorrowPipeline, which diffusers .* has not",
    ),
    "own code": (own_code, r"wants its own text_encoder/evil.py run; expected classes of diffusers"),
    "prediction of no name": (
        lambda folder: changed(folder / "scheduler/scheduler_config.json", prediction_type=["v"]),
        r"says that the model predicts \['v'\]; expected one of",
    ),
    "no model": (
        lambda folder: changed(folder / "model_index.json", transformer=["diffusers", "StableDiffusionPipeline"]),
        "no family knows StableDiffusionPipeline",
    ),
    "no class": (
        lambda folder: changed(folder / "model_index.json", transformer=["diffusers", "logging"]),
        "is made of a logging, which diffusers .* has not",
    ),
    "nothing of the autoencoder": (
        lambda folder: (folder / "vae/config.json").write_text("{}"), "the configurations of .* do not say '.*'; expected those"
    ),
    "nothing of the denoiser": (
        lambda folder: (folder / "transformer/config.json").write_text("{}"), "the configurations of .* do not say 'in_ch"
    ),
    "two": (
        lambda folder: changed(folder / "model_index.json", transformer_2=["diffusers", "SD3Transformer2DModel"]),
        "has a transformer_2 as well",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_pipelines_with_a_fault_are_refused_in_a_line(fault, folders, tmp_path):
    break_it, message = FAULTS[fault]
    break_it(folder := shutil.copytree(folders("sd3" if fault != "schedule" else "dit"), tmp_path / "base"))
    with pytest.raises(UserError, match=message) as raised:
        import_pipeline(str(folder), tmp_path / "teacher", size=32)
    assert "\n" not in str(raised.value) or fault == "no model"  # which says what to write
    assert not (tmp_path / "teacher").exists()


def test_names_that_lead_nowhere_are_refused_in_a_line(tmp_path, monkeypatch):
    def download(name, **settings):
        raise OSError("Repository Not Found\nfor url")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    for name, message in {
        "x.safetensors": "is a checkpoint in one file",
        "hf:nobody/nothing": "cannot be had from the hub .*Repository Not Found",
        "nowhere": "is no folder",
        str(tmp_path): "has no .*model_index.json that can be read",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            import_pipeline(name, tmp_path / "teacher")
        assert "\n" not in str(raised.value)


def test_pipelines_that_change_after_the_import_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders("sd3"), tmp_path / "base")
    import_pipeline(str(folder), tmp_path / "teacher", size=32)
    model = trigflow.load(tmp_path / "teacher", "cpu")
    for part, name in (("text_encoder", "model"), ("transformer", "diffusion_pytorch_model")):
        weights = load_file(folder / part / f"{name}.safetensors")
        save_file({key: value + 1 for key, value in weights.items()}, folder / part / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"the text encoders of .* have changed since it was imported"):
        model.conditioner.conditions({"text": "a dog of the lighthouse"})
    del model
    with pytest.raises(UserError, match=r"the transformer of .* has changed since it was imported"):
        trigflow.load(tmp_path / "teacher", "cpu")


@pytest.mark.parametrize(("name", "size"), [("sd3", 0), ("sd3", -32), ("sd3", 18), ("flux", 18), ("z-image", 18), ("ddpm", -8)])
def test_sizes_that_a_denoiser_cannot_take(name, size, folders, tmp_path):
    with pytest.raises(UserError, match=rf"--size {size}; expected a multiple of [1-9]"):
        import_pipeline(str(folders(name)), tmp_path / "teacher", size=size)


def test_a_guess_is_not_made_of_a_time_that_runs_backwards(folders, tmp_path):
    folder = shutil.copytree(folders("skyreels"), tmp_path / "base")
    changed(folder / "scheduler/scheduler_config.json", invert_sigmas=True)
    with pytest.raises(UserError, match=r"counts its time from noise to data, and no family knows .*; expected one"):
        import_pipeline(str(folder), tmp_path / "teacher", size=64)


def test_a_denoiser_that_is_gone_after_the_import(folders, tmp_path):
    folder = shutil.copytree(folders("sd3"), tmp_path / "base")
    (folder / "text_encoder_notes.txt").write_text("a file beside the encoders")
    import_pipeline(str(folder), tmp_path / "teacher", size=32)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(UserError, match=r"the transformer of .* has changed since it was imported"):
        trigflow.load(tmp_path / "teacher", "cpu")


def test_a_module_without_weights_is_wrapped():
    class Nothing(torch.nn.Module):
        def forward(self, x, time):
            return -x

    model = wrap(Nothing(), lambda network, x, time: network(x, time), (1, 4, 4))
    assert model.sample(2, steps=1).shape == (2, 1, 4, 4)


def test_time_looked_up_in_a_table_is_refused(tmp_path):
    pipelines.ddpm(time_embedding_type="learned", num_train_timesteps=10).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="told its time as 'learned'"):
        import_pipeline(str(tmp_path / "base"), tmp_path / "teacher")


def test_documented_families_are_those_that_there_are():
    text = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
    rows = {line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ") and line.count("|") == 4}
    classes = {name for found in known().values() for name in found.classes}
    assert classes <= rows


@pytest.mark.parametrize(
    ("note", "factor"),
    [
        (None, 1.0), ({}, 1.0), ({"transformer.r": 4, "transformer.lora_alpha": 4}, 1.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 16}, 4.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": True}, 8.0),
    ],
)  # fmt: skip
def test_adapters_keep_the_strength_that_their_file_notes(note, factor, tmp_path):
    given = {f"transformer.blocks.0.to_q.lora_{role}.weight": torch.ones(2, 2) for role in "AB"}
    own = {f"bridge.model.blocks.0.to_q.lora_{role}.default.weight": torch.zeros(2, 2) for role in "AB"}
    save_file(given, tmp_path / "x.safetensors", None if note is None else {"lora_adapter_metadata": json.dumps(note)})
    first, second = read_adapters(tmp_path / "x.safetensors", own).values()
    assert torch.equal(first, torch.ones(2, 2))
    assert torch.equal(second, torch.full((2, 2), factor))


@pytest.mark.parametrize("note", ["{", "[]", '{"a.r": 0}', '{"a.r": 2, "a.lora_alpha": "x"}'])
def test_notes_on_adapters_that_make_no_sense(note, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"lora_adapter_metadata": note})
    with pytest.raises(UserError, match="has a note on its adapters that makes no sense"):
        read_adapters(tmp_path / "x.safetensors", {})
