"""`trigflow export`: what is written gives what PyTorch gives, and what cannot be written leaves nothing behind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import programs
from deploy.students import student
from trigflow import samplers
from trigflow.deploy import export
from trigflow.deploy.export import Velocity, export_network, export_run
from trigflow.deploy.pipeline import TrigFlowPipeline
from trigflow.models.model import Model, load
from trigflow.networks import DDPMPPConfig, build
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "export.md"

MODELS = {
    "student": student(times={2: (1.56, 0.7)}),
    "guided": student({"objective.guidance_max": 2.0}),
    "multistep": student({"objective.segments": 4}),
    "meanflow": student({"objective.kind": "meanflow"}),
    "teacher": student({"objective.kind": "diffusion"}, kind="diffusion"),
}
INPUTS = {
    "student": ["x", "t", "label"],
    "guided": ["x", "t", "label", "guidance"],
    "multistep": ["x", "t", "label", "end"],
    "meanflow": ["x", "t", "label", "end"],
    "teacher": ["x", "t", "label"],
}


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided student whose end of a jump is an input as well: every input there is."""
    folder = tmp_path_factory.mktemp("onnx")
    model = student({"objective.guidance_max": 2.0, "objective.segments": 2})
    model.save(folder / "run")
    export_run(folder / "run", folder / "out", "onnx")
    return folder


@pytest.mark.parametrize("b", [1, 2, 5])
def test_onnx_gives_the_velocity_for_any_batch_size(onnx_folder: Path, b: int) -> None:
    model = load(onnx_folder / "run", "cpu")
    session = onnxruntime.InferenceSession(str(onnx_folder / "out" / "network.onnx"))
    generator = torch.Generator().manual_seed(b)
    x = 0.5 * torch.randn(b, 1, 8, 8, generator=generator)
    t = 0.1 + 1.4 * torch.rand(b, generator=generator)
    label, guidance = torch.arange(b) + 10 - b + 1, 1 + torch.rand(b, generator=generator)  # 10 is the null label
    velocity = model.velocity({"label": label}, guidance)(x, t, t / 2)  # type: ignore[call-arg]
    given = {"x": x, "t": t, "label": label, "guidance": guidance, "end": t / 2}
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    assert velocity.abs().max() > 0.1
    np.testing.assert_allclose(found, velocity.numpy(), atol=1e-4)
    assert json.loads((onnx_folder / "out" / "model.json").read_text())["inputs"] == list(given)


def test_the_numpy_sampler_of_the_page_draws_what_trigflow_draws(onnx_folder: Path) -> None:
    """By jumps of two segments; the noise is NumPy's."""
    draw = page_sampler()
    images = draw(onnx_folder / "out", [3, 7], 2, np.random.default_rng(0), guidance=1.5)
    model = load(onnx_folder / "run", "cpu")
    noise = torch.from_numpy(0.5 * np.random.default_rng(0).standard_normal((2, 1, 8, 8))).float()
    velocity = model.velocity({"label": torch.tensor([3, 7])}, 1.5)
    x0 = samplers.flow_map_sample(velocity, model.process, noise, samplers.segment_times(model.process, 2))
    difference = images.astype(int) - model.codec.stored(x0).numpy().astype(int)
    assert np.abs(difference).max() <= 1


def test_the_numpy_sampler_of_the_page_adds_noise_as_trigflow_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a TorchScript file in place of the ONNX file: the loop is what is tested."""
    model = MODELS["student"]
    export_network(model, tmp_path, "torchscript")
    network = torch.jit.load(str(tmp_path / "network.pt"))

    class Session:
        def __init__(self, path: str) -> None: ...

        def run(self, names: None, given: dict[str, Any]) -> list[np.ndarray]:
            return [network(*map(torch.from_numpy, given.values())).numpy()]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for steps in (1, 2, 4):
        images = page_sampler()(tmp_path, [3, 7], steps, np.random.default_rng(1))
        rng = np.random.default_rng(1)
        noise = [torch.from_numpy(0.5 * rng.standard_normal((2, 1, 8, 8))).float() for _ in range(steps)]
        times = model.times.get(steps) or samplers.consistency_times(model.process, steps)
        velocity = model.velocity({"label": torch.tensor([3, 7])})
        x0 = samplers.flow_map_sample(velocity, model.process, noise[0], times, gamma=1, fresh=noise[1:])
        difference = images.astype(int) - model.codec.stored(x0).numpy().astype(int)
        assert np.abs(difference).max() <= 1


def page_sampler() -> Callable[..., np.ndarray]:
    """The function `draw` of the page."""
    (code,) = re.findall(r"```python\n(import json\n.*?)\n\n\nimages =", DOCS.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["draw"]


@pytest.mark.parametrize("name", MODELS)
def test_torchscript_of_every_kind_of_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    said = export_network(model, tmp_path, "torchscript")
    assert ", ".join(INPUTS[name]) in said
    read, velocity = torch.jit.load(str(tmp_path / "network.pt")), Velocity(model)
    for b in (1, 4):
        given = export._inputs(model, velocity, b)
        expected = velocity(*given)
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(read(*given), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampler", "times"),
    [
        ("student", "renoise", {"1": (1.564546,), "2": (1.56, 0.7), "4": (1.564546, 1.1, 0.733333, 0.366667)}),
        ("multistep", "jump", {"4": (1.564546, 1.178097, 0.785398, 0.392699)}),
        ("meanflow", "jump", {"1": (1.564546,), "2": (1.564546, 0.785398), "4": (1.564546, 1.249046, 0.785398, 0.321751)}),
    ],
)
def test_model_json_says_when_to_call_it(name: str, sampler: str, times: dict[str, tuple[float, ...]], tmp_path: Path) -> None:
    export_network(MODELS[name], tmp_path, "torchscript")
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["sampler"] == sampler
    assert about["null"] == {"label": 10}
    assert about["guidance"] is None
    assert {steps: tuple(round(t, 6) for t in ts) for steps, ts in about["times"].items()} == times


def test_a_teacher_has_the_times_of_the_solver(tmp_path: Path) -> None:
    export_network(MODELS["teacher"], tmp_path, "torchscript")
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["sampler"] == "jump"
    assert about["times"]["18"] == samplers.sigma_grid(TrigFlow(), 18)[:-1].tolist()


def test_a_network_of_fixed_weights_is_exported_in_its_form_for_sampling() -> None:
    """A module with `for_sampling` is asked for it, and its function stays the same."""
    model = student()
    copy = student().network
    model.network.for_sampling = lambda: copy  # type: ignore[assignment]
    assert Velocity(model).network is copy


def test_ddpmpp_keeps_the_batch_open() -> None:
    network = build(DDPMPPConfig(channels=1, width=8, mult=(1,), blocks=1, attention=(), resolution=8)).eval()
    batch = torch.export.Dim("batch")
    given = (torch.zeros(2, 1, 8, 8), torch.ones(2))
    graph = torch.export.export(network, given, dynamic_shapes=({0: batch}, {0: batch}))
    assert graph.module()(torch.zeros(5, 1, 8, 8), torch.ones(5)).shape == (5, 1, 8, 8)


def test_a_file_that_differs_from_pytorch_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MODELS["student"].save(tmp_path / "run")
    monkeypatch.setattr(export, "_torchscript", lambda velocity, given, path: lambda inputs: inputs[0])
    with pytest.raises(UserError, match="differs from PyTorch by"):
        export_run(tmp_path / "run", tmp_path / "out", "torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_command_writes_a_pipeline(student_folder: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("export", student_folder, tmp_path / "out", "--to", "diffusers")
    assert result.code == 0
    assert "TrigFlowPipeline.from_pretrained" in result.out
    pipe = TrigFlowPipeline.from_pretrained(tmp_path / "out")
    weights = load(student_folder, "cpu").network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in pipe.network.network.state_dict().items())
    assert (tmp_path / "out" / "samples.png").is_file()


def test_command_says_what_it_cannot_do(
    teacher_folder: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = cli("export", *args)
        assert result.code == 2
        assert result.out == ""
        assert result.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return result.err

    out = tmp_path / "out"
    assert "a diffusion teacher" in refused(teacher_folder, out, "--to", "diffusers")
    assert "does not exist" in refused(tmp_path / "none", out, "--to", "onnx")
    assert "expected options" in refused(teacher_folder, out, "--to", "tensorrt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "expected a new or empty folder" in refused(teacher_folder, tmp_path / "full", "--to", "torchscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "trigflow[onnx]" in refused(teacher_folder, out, "--to", "onnx")


def test_models_are_not_changed(tmp_path: Path) -> None:
    model: Model = MODELS["guided"]
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    export_network(model, tmp_path, "torchscript")
    TrigFlowPipeline.from_model(model).network.network.load_state_dict({k: 0 * v for k, v in before.items()})
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())


FULL = """
import resource, sys
from trigflow import cli

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
cli.main(["export", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("to", ["torchscript", "diffusers"])
def test_a_full_disk_is_said_in_one_line(to: str, tmp_path: Path) -> None:
    """The writers of PyTorch and of diffusers end in an abort, and in an error of their own."""
    student().save(tmp_path / "run")
    done = programs.run(["-c", FULL, tmp_path / "run", tmp_path / "out", "--to", to])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"cannot write '{tmp_path / 'out'}'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["torchscript", "onnx"])
def test_a_network_in_double_precision_is_refused(to: Any, tmp_path: Path) -> None:
    model = student()
    model.network.double()
    with pytest.raises(UserError, match=r"^a network of torch\.float64; expected float32; convert it with model\.network"):
        export_network(model, tmp_path, to)
    assert list(tmp_path.iterdir()) == []
