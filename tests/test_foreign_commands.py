"""The commands on pipelines of diffusers, from the folder of a pipeline to a picture of a student."""

import dataclasses
import importlib.util
import json
import math
import runpy
import shutil
import subprocess
import sys
import types
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import trigflow
from models import pipelines
from trigflow.cli import main
from trigflow.data import open_dataset
from trigflow.lab.plan import memory, student_of
from trigflow.lab.plan.step import Step
from trigflow.models.foreign.family import packed, unpacked
from trigflow.objectives import objective_of
from trigflow.runtime.errors import UserError
from trigflow.training.config import read_config
from trigflow.training.trainer import Trainer

CASES = {"sd3": 32, "sdxl": 32, "flux": 32, "sana": 32, "wan": 32}
WORDS = ["a red heart", "a green apple", "a blue circle", "the lighthouse at dawn"]


def run(*words):
    main([*map(str, words)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (40, 32, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(WORDS[i % 4])
    return folder


@pytest.mark.parametrize("name", CASES)
def test_five_commands(name, photos, tmp_path):
    pipelines.save(name, tmp_path / "base")
    at = tmp_path.__truediv__
    more = ["--frames", 1] if name == "wan" else []
    run("import", at("base"), "--out", at("teacher"), "--size", CASES[name], *more)
    assert not any(path.stat().st_size > 200_000 for path in at("teacher").iterdir())
    run("encode", photos, "--with", at("teacher"), "--out", at("cache"), "--quiet")
    run(
        "distill", at("teacher"), "--data", at("cache"), "--lora", 2, "--iterations", 3, "--loop.batch-size", 2,
        "--loop.sample-every", 2, "--loop.log-every", 1, "--quiet", "--out", at("student"),
    )  # fmt: skip
    weights = load_file(at("student") / "network.safetensors")
    assert {key for key in weights if not key.startswith("none_")}
    assert all("lora_" in key or key.startswith("none_") for key in weights)
    assert any(bool(value.any()) for key, value in weights.items() if "lora_B" in key)
    losses = [json.loads(line)["loss"] for line in (at("student") / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    run("sample", at("student"), "--prompt", WORDS[0], "--steps", 2, "--num", 2, "--quiet", "--out", at("x.png"))
    assert Image.open(at("x.png")).size[0] >= 64
    assert [path.suffix for path in (at("student") / "samples").iterdir()] == [".png"]
    if name == "sd3":  # in a process that has loaded nothing of it
        said = subprocess.run([sys.executable, "-m", "trigflow", "info", at("student")], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert "diffusers" in said.stdout
    run("export", at("student"), at("out"), "--to", "diffusers")
    pipe = DiffusionPipeline.from_pretrained(at("base"))
    pipe.load_lora_weights(str(at("out")))
    assert pipe.get_active_adapters()
    student, teacher = trigflow.load(at("student"), "cpu"), trigflow.load(at("teacher"), "cpu")
    shared = {id(p) for p in teacher.network.parameters()} & {id(p) for p in student.network.parameters()}
    assert len(shared) == sum(1 for _ in teacher.network.parameters())  # one copy of the base
    assert not torch.equal(
        student.sample(1, steps=2, prompt=WORDS[0], decode=False), teacher.sample(1, steps=2, prompt=WORDS[0], decode=False)
    )


STUDENTS = ["sd", "sdxl", "sd3", "flux", "sana"]


@pytest.fixture(scope="module", params=STUDENTS)
def student(request, photos, tmp_path_factory):
    """A student whose adapters do something, of two iterations at a large rate."""
    folder = tmp_path_factory.mktemp(request.param)
    pipelines.save(request.param, folder / "base")
    run("import", folder / "base", "--out", folder / "teacher", "--size", 32)
    run("encode", photos, "--with", folder / "teacher", "--out", folder / "cache", "--quiet")
    run(
        "distill", folder / "teacher", "--data", folder / "cache", "--lora", 2, "--iterations", 2, "--loop.batch-size", 2,
        "--optimizer.lr", 0.05, "--optimizer.warmup", 0, "--loop.sample-every", 0, "--quiet", "--out", folder / "student",
    )  # fmt: skip
    return folder


def drawn_by_diffusers(pipe, noise, model, steps, how):
    """Latents as the pipeline draws them from this noise, the first for the start."""
    rows = packed if "Flux" in type(pipe).__name__ else torch.Tensor.clone
    given = [rows(one) for one in (*noise[1:], torch.zeros_like(noise[0]))]  # of a flow also after the last step, times 0
    fresh = mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", side_effect=given)
    other = mock.patch("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", side_effect=given)
    pipe.set_progress_bar_config(disable=True)
    more = {"use_resolution_binning": False} if "Sana" in type(pipe).__name__ else {}
    with fresh, other, torch.no_grad():
        found = pipe(
            WORDS[0], height=32, width=32, latents=rows(noise[0]), num_inference_steps=steps,
            output_type="latent", **how, **more,
        ).images  # fmt: skip
    return unpacked(found, noise[0]) if "Flux" in type(pipe).__name__ else found


@pytest.mark.parametrize("student", [*STUDENTS, "cogview4"], indirect=True)
@pytest.mark.parametrize("form", ["adapter", "pipeline"])
def test_stock_schedulers_draw_the_same(student, form, tmp_path):
    out = tmp_path / form
    run("export", student / "student", out, "--to", "diffusers", *(["--whole"] if form == "pipeline" else []))
    model, said = trigflow.load(student / "student", "cpu"), json.loads((out / "trigflow.json").read_text())
    if form == "adapter":
        assert said["base"] == "base"  # where it lies here is not published
        assert str(student) not in (out / "README.md").read_text()
        pipe = DiffusionPipeline.from_pretrained(student / "base")
        pipe.load_lora_weights(str(out))
        name = "FlowMatchLCMScheduler" if said["predicts"] == "flow" else "LCMScheduler"
        pipe.scheduler = getattr(diffusers, name).from_pretrained(out / "scheduler")
    else:
        pipe = DiffusionPipeline.from_pretrained(out)
    steps, how = 2, said["calls"]["2"]
    if said["predicts"] == "flow":
        sigmas = how["sigmas"] if "sigmas" in how else [t / 1000 for t in how["timesteps"]]
        times = [math.atan2(s, 1 - s) for s in sigmas]
    else:
        times = [float(torch.acos(pipe.scheduler.alphas_cumprod[i].double().sqrt())) for i in how["timesteps"]]
    noise = [model.noise(0, k, 0, 1) / model.process.sigma_data for k in range(steps)]
    conditions = {"guidance": 1.0} if "guidance" in model.takes else {}
    ours = model.sample(1, times=times, prompt=WORDS[0], decode=False, conditions=conditions or None)
    ours = (ours - torch.tensor(model.codec.raw_mean)[:, None, None]) / torch.tensor(model.codec.raw_std)[:, None, None]
    theirs = drawn_by_diffusers(pipe, noise, model, steps, how)
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(ours.abs().max())
    plain = DiffusionPipeline.from_pretrained(student / "base")
    plain.scheduler = pipe.scheduler
    assert float((drawn_by_diffusers(plain, noise, model, steps, how) - ours).abs().max()) > 1e-3  # the adapter has a say


def test_drawing_begins_at_the_last_step_of_a_schedule(student):
    process = trigflow.load(student / "student", "cpu").process
    scheduler = DiffusionPipeline.from_pretrained(student / "base").scheduler
    if hasattr(scheduler, "alphas_cumprod"):
        assert process.t_max == pytest.approx(math.acos(float(scheduler.alphas_cumprod[-1].double().sqrt())), rel=1e-12)
        assert process.sigma_max < 80
    else:
        assert process.sigma_max == 80


def test_card_says_how(student, tmp_path):
    run("export", student / "student", tmp_path / "out", "--to", "diffusers")
    said = (tmp_path / "out" / "README.md").read_text()
    assert "@" not in said
    assert "base_model: base\n" in said
    assert "LCMScheduler" in said
    assert ("sigmas=[1.0, " in said) or ("timesteps=[999, " in said)


def test_another_adapter_stacks_on_it(student, tmp_path):
    run("export", student / "student", tmp_path / "out", "--to", "diffusers")
    pipe = DiffusionPipeline.from_pretrained(student / "base")
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="fast")
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="style")
    pipe.set_adapters(["fast", "style"], [1.0, 0.5])
    assert pipe.get_active_adapters() == ["fast", "style"]


@pytest.mark.parametrize("student", ["sd"], indirect=True)
def test_a_control_net_goes_beside_it(student, tmp_path):
    run("export", student / "student", tmp_path / "out", "--to", "diffusers")
    base = DiffusionPipeline.from_pretrained(student / "base")
    control = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8))
    for part in control.controlnet_down_blocks:  # which begin at zero
        torch.nn.init.normal_(part.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    pipe = diffusers.StableDiffusionControlNetPipeline(**base.components, controlnet=control)
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="fast")
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    how = json.loads((tmp_path / "out" / "trigflow.json").read_text())["calls"]["2"]
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))

    def drawn(scale):
        return pipe(
            WORDS[0], image=edges, height=32, width=32, controlnet_conditioning_scale=scale, output_type="latent",
            generator=torch.Generator().manual_seed(0), **how,
        ).images  # fmt: skip

    without, steered = drawn(0.0), drawn(1.0)
    assert float((steered - without).abs().max()) > 1e-3
    pipe.disable_lora()
    assert float((drawn(1.0) - steered).abs().max()) > 1e-3


def test_names_for_comfyui(student, tmp_path):
    run("export", student / "student", tmp_path / "out", "--to", "comfyui")
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    base = DiffusionPipeline.from_pretrained(student / "base")
    unet = hasattr(base, "unet")
    denoiser = base.unet if unet else base.transformer
    # as comfy.lora names the weights of a model that diffusers wrote: with dots, or for U-Nets with underscores
    known = {
        f"lora_unet_{name.replace('.', '_')}" if unet else f"transformer.{name}"
        for name, part in denoiser.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    roles = ("lora_up.weight", "lora_down.weight", "alpha") if unet else ("lora_A.weight", "lora_B.weight", "alpha")
    found = {key.rpartition("." + role)[0]: role for key in weights for role in roles if key.endswith("." + role)}
    assert found
    assert found.keys() <= known
    assert all(f"{path}.{role}" in weights for path in found for role in roles)


def test_nodes_for_comfyui_draw_as_the_student(student, tmp_path, monkeypatch):
    run("export", student / "student", tmp_path / "out", "--to", "comfyui")
    made = []
    samplers = types.SimpleNamespace(KSAMPLER=lambda function: made.append(function) or "sampler")
    monkeypatch.setitem(sys.modules, "comfy", types.SimpleNamespace(samplers=samplers))
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    spec = importlib.util.spec_from_file_location("trigflow_nodes", tmp_path / "out" / "trigflow_nodes" / "__init__.py")
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    model = trigflow.load(student / "student", "cpu")
    (sigmas,) = nodes.NODE_CLASS_MAPPINGS["TrigFlowSigmas"]().levels(2)
    assert len(sigmas) == 3
    assert nodes.NODE_CLASS_MAPPINGS["TrigFlowSampler"]().sampler() == ("sampler",)
    flow = model.spec.predicts == "flow"
    noise = [model.noise(0, k, 0, 1) / model.process.sigma_data for k in range(2)]

    class Scaling:  # what ComfyUI calls CONST, or EPS
        def noise_scaling(self, sigma, noise, latent, max_denoise=False):
            if flow:
                return sigma * noise + (1 - sigma) * latent
            return latent + (torch.sqrt(1 + sigma**2) if max_denoise else sigma) * noise

    scaling = Scaling()
    told = model.conditioner.conditions({"text": WORDS[0]}, 1)

    def denoise(x, sigma, **_):
        """x0 of the student, as ComfyUI asks for it: x is (1 - s) x0 + s n, or x0 + sigma n."""
        t = torch.atan(sigma / (1 - sigma)) if flow else torch.atan(sigma)
        m = torch.cos(t) + torch.sin(t) if flow else torch.cos(t)
        with torch.no_grad():
            found = model.network(x * m, t, **told)
        return torch.cos(t) * x * m - torch.sin(t) * found

    denoise.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=scaling))
    if not flow:  # which is how ComfyUI tells that pure noise is meant
        last = float(DiffusionPipeline.from_pretrained(student / "base").scheduler.alphas_cumprod[-1])
        assert float(sigmas[0]) >= math.sqrt(1 / last - 1) * (1 - 1e-5)
    start = scaling.noise_scaling(sigmas[0], noise[0], torch.zeros_like(noise[0]), True)
    drawn = made[0](denoise, start, sigmas, noise_sampler=lambda *_: noise[1])
    ours = model.sample(1, steps=2, prompt=WORDS[0], decode=False)
    ours = (ours - torch.tensor(model.codec.raw_mean)[:, None, None]) / torch.tensor(model.codec.raw_std)[:, None, None]
    assert float((drawn - ours).abs().max()) <= 1e-3 * float(ours.abs().max())


@pytest.mark.parametrize("student", ["sd", "sd3", "flux"], indirect=True)
def test_a_space_runs(student, tmp_path, monkeypatch):
    run("export", student / "student", tmp_path / "out", "--to", "space")
    shown = {}

    def interface(draw, inputs, outputs):
        shown["draw"] = draw
        return types.SimpleNamespace(launch=lambda: None)

    part = lambda *_, **__: None  # noqa: E731
    monkeypatch.setitem(
        sys.modules, "gradio", types.SimpleNamespace(Interface=interface, Textbox=part, Number=part, Image=part)
    )
    monkeypatch.chdir(tmp_path / "out")
    runpy.run_path("app.py", run_name="__main__")
    drawn = shown["draw"](WORDS[0], 1)
    assert drawn.size[0] == drawn.size[1] >= 16
    assert {"diffusers", "peft", "gradio"} <= {
        line.partition(">")[0] for line in (tmp_path / "out" / "requirements.txt").read_text().split()
    }


@pytest.mark.parametrize("student", ["flux"], indirect=True)
def test_plan_says_what_fits_and_distill_takes_it(student, tmp_path, capsys):
    run("plan", student / "teacher", "--lora", 2, "--json")
    plan = json.loads(capsys.readouterr().out)
    model = trigflow.load(student / "student", "cpu")
    adapters = sum(p.numel() for name, p in model.network.named_parameters() if "lora_" in name)
    base = sum(p.numel() for name, p in model.network.named_parameters() if "lora_" not in name)
    assert plan["parameters"] == {"student": adapters, "teacher": base}
    kept = trigflow.load(student / "teacher", "cpu").network
    size = sum(value.numel() * value.element_size() for value in (*kept.parameters(), *kept.buffers()))
    assert plan["memory_gib"]["ddp"]["teacher"] == pytest.approx(size / 2**30, rel=1e-4)
    need = plan["memory_gib"]["ddp"]
    one = need["total"] - need["activations"] * (1 - 1 / plan["batch_gpu"])
    run(
        "distill", student / "teacher", "--data", student / "cache", "--lora", 2, "--memory", f"{4 * one:.6f}G",
        "--iterations", 1, "--loop.batch-size", 8, "--loop.sample-every", 0, "--quiet", "--out", tmp_path / "out",
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["loop"]["accumulate"] in (2, 4, 8)
    with pytest.raises(SystemExit):
        run(
            "distill",
            student / "teacher",
            "--data",
            student / "cache",
            "--lora",
            2,
            "--memory",
            "0.0001G",
            "--out",
            tmp_path / "no",
        )
    said = capsys.readouterr().err
    assert "one sample at a time needs" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8", "nf4"])
def test_a_base_in_few_bits(dtype, photos, tmp_path, monkeypatch):
    """Adapters on a base that is kept in few bits: what is trained is float32, and the teacher shares the base."""
    from trigflow.models.foreign import base as room

    quantize = room.quantize
    monkeypatch.setattr(room, "quantize", lambda model, kind: quantize(model, kind, smallest=1))  # the layers here are tiny
    pipelines.save("sd3", tmp_path / "base")
    at = tmp_path.__truediv__
    run("import", at("base"), "--out", at("teacher"), "--size", 32, "--dtype", dtype)
    run("encode", photos, "--with", at("teacher"), "--out", at("cache"), "--quiet")
    run(
        "distill", at("teacher"), "--data", at("cache"), "--lora", 2, "--iterations", 2, "--loop.batch-size", 2,
        "--loop.sample-every", 0, "--optimizer.lr", 0.05, "--optimizer.warmup", 0, "--quiet", "--out", at("student"),
    )  # fmt: skip
    student, teacher = trigflow.load(at("student"), "cpu"), trigflow.load(at("teacher"), "cpu")
    weights = load_file(at("student") / "network.safetensors")
    assert all(value.dtype == torch.float32 for key, value in weights.items() if "lora_" in key)
    full = trigflow.models.foreign.open_base(str(at("base")))
    assert full.family.name == "sd3"
    one, other = (model.sample(1, steps=2, prompt=WORDS[0], decode=False, seed=1) for model in (student, teacher))
    assert bool(one.isfinite().all())
    assert not torch.equal(one, other)
    if dtype != "bfloat16":
        stored = {id(value) for name, value in teacher.network.named_buffers() if name.endswith("stored")}
        assert stored
        assert stored <= {id(value) for value in student.network.buffers()}


def test_a_student_starts_from_adapters_of_somebody_else(student, tmp_path, capsys):
    run("export", student / "student", tmp_path / "lora", "--to", "diffusers")
    how = [
        "distill",
        student / "teacher",
        "--data",
        student / "cache",
        "--loop.sample-every",
        0,
        "--loop.batch-size",
        2,
        "--quiet",
    ]
    run(*how, "--lora", 2, "--from", tmp_path / "lora", "--iterations", 1, "--optimizer.lr", 1e-12, "--out", tmp_path / "out")
    found, expected = (load_file(folder / "network.safetensors") for folder in (tmp_path / "out", student / "student"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(*how, "--lora", 3, "--from", tmp_path / "lora", "--out", tmp_path / "no")
    assert "which the student has not; expected adapters of the same denoiser" in capsys.readouterr().err


@pytest.mark.parametrize(
    "how",
    [
        ["--lora", 2, "--dora"],
        ["--full"],
        ["--lora", 2, "--objective.kind", "scd-vsd"],
        ["--lora", 2, "--objective.guidance", 3],
    ],
    ids=["dora", "full", "vsd", "guided"],
)
def test_other_ways_to_train(how, photos, tmp_path):
    pipelines.save("sd3", tmp_path / "base")
    at = tmp_path.__truediv__
    run("import", at("base"), "--out", at("teacher"), "--size", 32)
    run("encode", photos, "--with", at("teacher"), "--out", at("cache"), "--quiet")
    run(
        "distill", at("teacher"), "--data", at("cache"), *how, "--iterations", 2, "--loop.batch-size", 2,
        "--optimizer.lr", 0.01, "--optimizer.warmup", 0, "--loop.sample-every", 0, "--loop.log-every", 1, "--quiet",
        "--out", at("student"),
    )  # fmt: skip
    weights = load_file(at("student") / "network.safetensors")
    assert ("--dora" in how) == any("magnitude" in name for name in weights)
    assert ("--full" in how) != all("lora_" in name or name.startswith("none_") for name in weights)
    run("export", at("student"), at("out"), "--to", "diffusers")
    pipe, said = DiffusionPipeline.from_pretrained(at("base")), json.loads((at("out") / "trigflow.json").read_text())
    if "--full" in how:
        pipe = DiffusionPipeline.from_pretrained(at("out"))
    else:
        pipe.load_lora_weights(str(at("out")))
        pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_pretrained(at("out") / "scheduler")
    model = trigflow.load(at("student"), "cpu")
    noise = [model.noise(0, k, 0, 1) / model.process.sigma_data for k in range(2)]
    times = [math.atan2(s, 1 - s) for s in said["calls"]["2"]["sigmas"]]
    ours = model.sample(1, times=times, prompt=WORDS[0], decode=False)
    ours = (ours - torch.tensor(model.codec.raw_mean)[:, None, None]) / torch.tensor(model.codec.raw_std)[:, None, None]
    theirs = drawn_by_diffusers(pipe, noise, model, 2, said["calls"]["2"])
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(ours.abs().max())


def test_one_copy_of_the_base_in_training(student, tmp_path):
    teacher = trigflow.load(student / "teacher", "cpu")
    config = read_config(student / "student")
    objective = objective_of("scd-vsd", proposal=config.objective.proposal)
    loop = dataclasses.replace(config.loop, iterations=1)
    config = dataclasses.replace(config, objective=objective, loop=loop)
    trainer = Trainer(config, tmp_path / "run", teacher=teacher, progress=False)
    base = {id(p) for p in teacher.network.parameters()}
    for network in (trainer.network, trainer.ema.network, trainer.fake.network):
        assert base < {id(p) for p in network.parameters()}
    own = [p for p in trainer.network.parameters() if id(p) not in base]
    averaged = [p for p in trainer.ema.network.parameters() if id(p) not in base]
    faked = [p for p in trainer.fake.network.parameters() if id(p) not in base]
    assert len({id(p) for p in (*own, *averaged, *faked)}) == 3 * len(own)


def test_a_run_of_adapters_goes_on_bit_for_bit_and_keeps_them_alone(student, tmp_path):
    how = [
        "distill", student / "teacher", "--data", student / "cache", "--lora", 2, "--loop.batch-size", 2,
        "--optimizer.lr", 0.01, "--loop.sample-every", 0, "--loop.checkpoint-every", 2, "--quiet",
    ]  # fmt: skip
    run(*how, "--iterations", 4, "--out", tmp_path / "whole")
    run(*how, "--iterations", 2, "--out", tmp_path / "parts")
    run(*how, "--iterations", 4, "--resume", "--out", tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "network.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    kept = load_file(next((tmp_path / "whole" / "checkpoints").glob("*4/*.safetensors")))
    assert kept
    assert all("lora_" in name for name in kept if "bridge.model" in name)


def test_a_teacher_of_diffusers_wants_data(student, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("distill", student / "teacher", "--lora", 2, "--out", tmp_path / "no")
    assert "no data for a teacher from diffusers" in capsys.readouterr().err


@pytest.mark.parametrize("student", ["sd3"], indirect=True)
def test_a_cache_follows_its_captions_and_refuses_other_pictures(student, photos, tmp_path, capsys):
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    words = ["encode", own, "--with", student / "teacher", "--out", tmp_path / "cache", "--quiet"]
    run(*words)
    before = (tmp_path / "cache" / "latents.zip").read_bytes()
    run(*words)
    assert (tmp_path / "cache" / "latents.zip").read_bytes() == before
    (own / "0.txt").write_text("a violet square")
    with mock.patch("trigflow.codecs.vae.VAE.encode", side_effect=AssertionError):  # latents are not made again
        run(*words)
    data = open_dataset(str(tmp_path / "cache"))
    assert data.captions.texts[0] == ("a violet square",)
    assert len(data) == 8
    fresh = ["encode", own, "--with", student / "teacher", "--out", tmp_path / "fresh", "--quiet"]
    run(*fresh)
    assert (tmp_path / "cache" / "latents.zip").read_bytes() == (tmp_path / "fresh" / "latents.zip").read_bytes()
    kept = (tmp_path / "cache" / "latents.zip").read_bytes()
    shutil.copy(own / "1.png", own / "0.png")
    for wrong in ("another '0.png'", "8 images, now 9"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2
        assert wrong in capsys.readouterr().err
        shutil.copy(own / "1.png", own / "8.png")
    assert (tmp_path / "cache" / "latents.zip").read_bytes() == kept
    (tmp_path / "cache" / "latents.zip").write_bytes(kept[:500])
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


def test_longer_videos_cannot_be_taught_by_pictures(photos, tmp_path, capsys):
    pipelines.save("wan", tmp_path / "base")
    run("import", tmp_path / "base", "--out", tmp_path / "teacher", "--size", 32)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("encode", photos, "--with", tmp_path / "teacher", "--out", tmp_path / "cache", "--quiet")
    assert "21 frames of latents" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    pipelines.save("sd3", tmp_path / "pictures")
    with pytest.raises(SystemExit):
        run("import", tmp_path / "pictures", "--out", tmp_path / "no", "--frames", 1)
    assert "a pipeline of videos" in capsys.readouterr().err


@pytest.mark.parametrize("student", ["sd", "flux"], indirect=True)
def test_activations_are_computed_again_by_the_switch_of_diffusers(student, tmp_path):
    """The same gradients, while each part that the library marks runs once more; and so it is planned."""
    config, teacher = read_config(student / "student"), trigflow.load(student / "teacher", "cpu")
    found, calls = {}, {}
    for again in (False, True):
        parallel = dataclasses.replace(config.parallel, recompute=again)
        loop = dataclasses.replace(config.loop, iterations=1)
        own = dataclasses.replace(config, parallel=parallel, loop=loop)
        trainer = Trainer(own, tmp_path / str(again), teacher=teacher, progress=False)
        model, seen = trainer.network.model, []
        assert model.is_gradient_checkpointing == again
        assert not teacher.network.model.is_gradient_checkpointing
        kind = "resnets" if hasattr(model, "down_blocks") else "transformer_blocks"
        part = (model.up_blocks[-1] if kind == "resnets" else model).get_submodule(f"{kind}.0")
        part.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        trainer.run()
        found[again] = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        calls[again] = len(seen)
    assert calls[True] == calls[False] + 1
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="--lora 0; expected a rank of at least 1"):
        student_of(student / "teacher", 0)
    run = student_of(student / "teacher", 2)
    plain, again = (Step(run, checkpointing=value).count(16) for value in (False, True))
    sized = Step(run)
    assert memory(sized, "fsdp2", 2).gathered >= 4 * (sum(sized.student.blocks[:2]) + sized.student.blocks[0])
    forward = sized.forward * 16
    assert plain.total < again.total < plain.total + 2.2 * forward
    assert again.activations < plain.activations


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_a_whole_pipeline_of_a_base_in_few_bits_has_all_weights_and_what_was_trained(dtype):
    from trigflow.deploy.adapters import merged
    from trigflow.models.foreign.adapters import AdapterConfig, add_adapters
    from trigflow.models.foreign.quantized import quantize

    def weights():
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 64)}).bfloat16()

    model = weights()
    if dtype != "bfloat16":
        quantize(model, dtype, smallest=1)
    base = model["to_q"].weight.float()
    add_adapters(model, AdapterConfig(rank=2), ("to_q",))
    torch.nn.init.constant_(model["to_q"].lora_B["default"].weight, 1e-5)
    more = (model["to_q"].lora_B["default"].weight @ model["to_q"].lora_A["default"].weight).detach()
    whole = merged(types.SimpleNamespace(model=model)).state_dict()
    assert whole.keys() == weights().state_dict().keys()
    torch.testing.assert_close(whole["to_q.weight"], base + more, rtol=0, atol=1e-8)


def test_a_schedule_without_a_name_is_exported_as_it_is(tmp_path):
    from trigflow.deploy.adapters import scheduler_of
    from trigflow.models.foreign import open_base

    base = pipelines.save("sd", tmp_path / "base")
    for one in (
        diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0),
        diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    ):
        one.save_pretrained(base / "scheduler")
        opened = open_base(str(base))
        made = scheduler_of(opened, types.SimpleNamespace(predicts=opened.predicts()))
        torch.testing.assert_close(made.alphas_cumprod.double(), one.alphas_cumprod.double(), rtol=0, atol=1e-6)
        assert made.config.prediction_type == one.config.prediction_type


def test_every_weight_of_a_base_in_few_bits_is_not_trained(tmp_path, photos, capsys):
    pipelines.save("sd3", tmp_path / "base")
    run("import", tmp_path / "base", "--out", tmp_path / "teacher", "--size", 32, "--dtype", "int8")
    run("encode", photos, "--with", tmp_path / "teacher", "--out", tmp_path / "cache", "--quiet")
    with pytest.raises(SystemExit):
        run("distill", tmp_path / "teacher", "--data", tmp_path / "cache", "--full", "--quiet", "--out", tmp_path / "no")
    assert "kept as int8, which cannot be trained" in capsys.readouterr().err


def test_values_of_large_files_are_in_the_digest(tmp_path):
    from trigflow.models.foreign.base import digest_of_files

    content, file = bytearray(1 << 20), tmp_path / "model.safetensors"
    file.write_bytes(content)
    before, old = digest_of_files([tmp_path]), digest_of_files([tmp_path], 0)
    content[1 << 16 :] = b"\1" * (len(content) - (1 << 16))
    file.write_bytes(content)
    assert digest_of_files([tmp_path]) != before
    assert digest_of_files([tmp_path], 0) == old  # of runs imported before


def test_states_too_large_for_half_precision_are_kept_whole():
    from trigflow.conditions.encoded import halved

    states = torch.tensor([1.0, 1e5])
    assert torch.equal(halved(states), states)
    assert halved(states[:1]).dtype == torch.float16


@pytest.mark.parametrize("name", ["flux2", "pixart"])
def test_the_card_and_the_app_can_be_followed(name, photos, tmp_path, capsys):
    at = tmp_path.__truediv__
    pipelines.save(name, at("base"))
    run("import", at("base"), "--out", at("teacher"), "--size", 32)
    run("encode", photos, "--with", at("teacher"), "--out", at("cache"), "--quiet")
    run(
        "distill", at("teacher"), "--data", at("cache"), "--lora", 2, "--iterations", 1, "--loop.batch-size", 2,
        "--loop.sample-every", 0, "--quiet", "--out", at("student"),
    )  # fmt: skip
    if name == "pixart":
        with pytest.raises(SystemExit):
            run("export", at("student"), at("no"), "--to", "diffusers")
        assert "loads no adapters" in capsys.readouterr().err
        return
    run("export", at("student"), at("out"), "--to", "space")
    assert "put the name that the base has on the hub into app.py" in capsys.readouterr().out
    card = (at("out") / "README.md").read_text()
    assert 'pipe(prompt="a lighthouse at dawn", sigmas=[1.0, ' in card
    assert "height=32, width=32" in card
