"""Saved pipelines: what the folder holds, who can open it, and what cannot be opened."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deploy.students import student
from tiny_vae import write_vae
from trigflow.codecs import Latents
from trigflow.codecs.vae import VAESource
from trigflow.deploy import pipeline as module
from trigflow.deploy import pipeline_network as parts
from trigflow.deploy.pipeline import TrigFlowPipeline
from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.runtime.files import write_json

FIGURES = [{"model": "student", "nfe": 2, "fd": 0.5724582298, "precision": 0.7845, "num": 2000}]

FRESH = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline

def draw(pipe):
    return pipe([3, 7], 2, 1.5, generator=torch.Generator().manual_seed(4), output_type="np").images

stock = draw(DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True))
from trigflow.deploy.pipeline import TrigFlowPipeline
np.savez(sys.argv[2], stock=stock, ours=draw(TrigFlowPipeline.from_pretrained(sys.argv[1])))
"""


def make_pipeline(**changes: Any) -> TrigFlowPipeline:
    model = student({"objective.guidance_max": 2.0, "data.source": "/home/someone/digits", **changes})
    pipe = TrigFlowPipeline.from_model(dataclasses.replace(model, times={2: (1.56, 0.7)}), FIGURES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: TrigFlowPipeline) -> np.ndarray:
    return pipe([3, 7], 2, 1.5, generator=torch.Generator().manual_seed(4), output_type="np").images


@pytest.fixture(scope="module")
def pipe() -> TrigFlowPipeline:
    return make_pipeline(**{"loop.channels_last": True})


@pytest.fixture
def folder(pipe: TrigFlowPipeline, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "saved", samples=20)
    return tmp_path / "saved"


def test_a_fresh_process_draws_the_same_bits(pipe: TrigFlowPipeline, folder: Path, tmp_path: Path) -> None:
    """With diffusers alone, which finds the class by the files in the folder, and with ours."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "drawn.npz")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    drawn, expected = np.load(tmp_path / "drawn.npz"), draw(pipe)
    assert expected.std() > 0.05
    assert np.array_equal(drawn["stock"], expected)
    assert np.array_equal(drawn["ours"], expected)


def test_folder_holds_safetensors_configurations_and_a_card(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "network/config.json",
        "network/diffusion_pytorch_model.safetensors",
        "network/trigflow.deploy.pipeline_network.py",
        "pipeline.py",
        "samples.png",
        "scheduler/scheduler_config.json",
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "TrigFlowPipeline"]
    assert index["scheduler"] == ["diffusers", "SCMScheduler"]
    assert Image.open(folder / "samples.png").width > 10 * 8  # a column for each class
    text = "".join((folder / name).read_text() for name in ("README.md", "network/config.json"))
    assert "someone" not in text  # folders of the machine that it was made on stay there
    assert "| student | 2 | 0.5725 | 0.7845 | 2000 |" in text
    assert "![samples](samples.png)" in text
    assert "from 1 to 2" in text


def test_what_was_opened_can_be_saved_again(pipe: TrigFlowPipeline, folder: Path, tmp_path: Path) -> None:
    opened = TrigFlowPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    opened.save_pretrained(tmp_path / "again", samples=20)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert np.array_equal(draw(TrigFlowPipeline.from_pretrained(tmp_path / "again")), draw(pipe))


def test_opening_runs_no_code_and_draws_no_random_numbers(folder: Path) -> None:
    for name in ("pipeline.py", "network/trigflow.deploy.pipeline_network.py"):
        (folder / name).write_text("raise SystemExit('run')")
    before = torch.get_rng_state()
    TrigFlowPipeline.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pipeline_of_latents_carries_its_autoencoder(tmp_path: Path) -> None:
    write_vae(tmp_path / "vae")
    model = student({"network.channels": 4})
    codec = Latents((4, 8, 8), vae=VAESource(str(tmp_path / "vae"), "symmetric"))
    pipe = TrigFlowPipeline.from_model(dataclasses.replace(model, codec=codec))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images
    pipe.save_pretrained(tmp_path / "saved", samples=4)
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    opened = TrigFlowPipeline.from_pretrained(tmp_path / "saved")
    drawn = opened([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert drawn.shape == (2, 3, 16, 16)
    assert torch.equal(drawn, expected)
    assert str(tmp_path) not in (tmp_path / "saved" / "network" / "config.json").read_text()


def test_variants_of_the_weights_are_opened_by_name(pipe: TrigFlowPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16", samples=0)
    assert np.array_equal(draw(TrigFlowPipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=True)), draw(pipe))
    for named in ({}, {"variant": "ema"}):
        with pytest.raises(UserError, match=r"'.*network' cannot be read .*; restore it, or name another variant$") as caught:
            TrigFlowPipeline.from_pretrained(tmp_path, **named)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^weights as a pickle; expected safetensors; "):
        TrigFlowPipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=False)


def test_weights_are_opened_in_another_precision(folder: Path) -> None:
    pipe = TrigFlowPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    assert pipe.dtype == torch.float64
    assert np.abs(draw(pipe) - draw(TrigFlowPipeline.from_pretrained(folder))).max() <= 1 / 255 + 1e-6
    half = TrigFlowPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(UserError, match=r"a network of torch\.float16; expected float32"):
        half()


def test_push_to_hub_uploads_the_folder(pipe: TrigFlowPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: dict[str, Any] = {}

    def create_repo(name: str, **options: Any) -> SimpleNamespace:
        sent["created"] = (name, options["private"])
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload(self: object, folder: Path, repo_id: str, **options: Any) -> str:
        sent["files"] = sorted(path.name for path in Path(folder).iterdir())
        sent["card"] = (Path(folder) / "README.md").read_text()
        sent["repo"] = repo_id
        return "address"

    monkeypatch.setattr(module, "create_repo", create_repo)
    monkeypatch.setattr(TrigFlowPipeline, "_upload_folder", upload)
    assert pipe.push_to_hub("digits", private=True, samples=0) == "address"
    assert sent["created"] == ("digits", True)
    assert sent["repo"] == "me/digits"
    assert sent["files"] == ["README.md", "model_index.json", "network", "pipeline.py", "scheduler"]
    assert "consistency" in sent["card"]
    pipe.save_pretrained(tmp_path / "named", samples=0, push_to_hub=True)
    assert sent["created"] == ("named", None)


def test_from_pretrained_takes_an_id_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(parts, "snapshot_download", snapshot_download)
    opened = TrigFlowPipeline.from_pretrained("me/digits", revision="v1")
    assert opened.network.model.times == {2: (1.56, 0.7)}
    ((name, options),) = asked
    assert name == "me/digits"
    assert options["revision"] == "v1"
    assert not [pattern for pattern in options["allow_patterns"] if pattern.endswith(".py")]


def test_folders_that_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an id of the Hugging Face hub"):
        TrigFlowPipeline.from_pretrained(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"the index .* does not exist"):
        TrigFlowPipeline.from_pretrained(tmp_path)

    config = json.loads((folder / "network" / "config.json").read_text())
    write_json(folder / "network" / "config.json", {**config, "model": {**config["model"], "process": {"sigma": 1}}})
    with pytest.raises(UserError, match="cannot be used"):
        TrigFlowPipeline.from_pretrained(folder)
    network = {**config["model"]["network"], "blocks": 2}
    write_json(folder / "network" / "config.json", {**config, "model": {**config["model"], "network": network}})
    with pytest.raises(UserError, match=r"other weights than its config.json asks for|cannot be read"):
        TrigFlowPipeline.from_pretrained(folder)
    write_json(folder / "network" / "config.json", config)

    scheduler = folder / "scheduler" / "scheduler_config.json"
    written = scheduler.read_text()
    scheduler.write_text(written[:20])
    with pytest.raises(UserError, match=r"expected a scheduler_config\.json"):
        TrigFlowPipeline.from_pretrained(folder)
    scheduler.write_text(written)
    with pytest.raises(UserError, match=r"device_map for TrigFlowPipeline\.from_pretrained; expected network, .*variant"):
        TrigFlowPipeline.from_pretrained(folder, device_map="auto")

    weights = folder / "network" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read") as caught:
        TrigFlowPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)

    for name in ("DiTPipeline", None):
        write_json(folder / "model_index.json", {"_class_name": name})
        with pytest.raises(UserError, match="holds another pipeline"):
            TrigFlowPipeline.from_pretrained(folder)


def test_places_that_cannot_be_written(pipe: TrigFlowPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder that can be written"):
        pipe.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="expected safetensors"):
        pipe.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_without_diffusers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("pipeline", "pipeline_network"):
        monkeypatch.delitem(sys.modules, f"trigflow.deploy.{name}")
    with pytest.raises(MissingExtraError, match=r"trigflow\[diffusers\]"):
        importlib.import_module("trigflow.deploy.pipeline")
