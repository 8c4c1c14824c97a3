"""The commands on pipelines of diffusers, from the folder of a pipeline to a picture of a student."""

import json

import numpy as np
import pytest
import torch
from models import pipelines
from PIL import Image
from safetensors.torch import load_file

import trigflow
from trigflow.cli import main

CASES = {"sd3": 32, "sdxl": 32, "flux": 32, "sana": 32}
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
    run("import", at("base"), "--out", at("teacher"), "--size", CASES[name])
    assert not any(path.stat().st_size > 200_000 for path in at("teacher").iterdir())
    run("encode", photos, "--with", at("teacher"), "--out", at("cache"), "--quiet")
    run(
        "distill", at("teacher"), "--data", at("cache"), "--lora", 2, "--iterations", 3, "--loop.batch-size", 2,
        "--loop.sample-every", 0, "--loop.log-every", 1, "--quiet", "--out", at("student"),
    )  # fmt: skip
    weights = load_file(at("student") / "network.safetensors")
    assert {key for key in weights if not key.startswith("none_")}
    assert all("lora_" in key or key.startswith("none_") for key in weights)
    assert any(bool(value.any()) for key, value in weights.items() if "lora_B" in key)
    losses = [json.loads(line)["loss"] for line in (at("student") / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    run("sample", at("student"), "--prompt", WORDS[0], "--steps", 2, "--num", 2, "--quiet", "--out", at("x.png"))
    assert Image.open(at("x.png")).size[0] >= 64
    student, teacher = trigflow.load(at("student"), "cpu"), trigflow.load(at("teacher"), "cpu")
    shared = {id(p) for p in teacher.network.parameters()} & {id(p) for p in student.network.parameters()}
    assert len(shared) == sum(1 for _ in teacher.network.parameters())  # one copy of the base
    assert not torch.equal(
        student.sample(1, steps=2, prompt=WORDS[0], decode=False), teacher.sample(1, steps=2, prompt=WORDS[0], decode=False)
    )
