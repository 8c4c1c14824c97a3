"""The whole way of a run whose data, network, codec or objective a plugin brings, by the commands that a user would call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from starlette.testclient import TestClient

import trigflow
from trigflow.cli import main
from trigflow.runtime.files import read_tensors
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["--quiet", "--optimizer.schedule", "constant", "--loop.batch-size", "16", "--loop.sample-every", "0"]


def command(plugin: str, *words: object) -> None:
    """`trigflow WORDS --plugin examples/PLUGIN`, in this process."""
    main([*map(str, words), "--plugin", str(EXAMPLES / plugin)])


def resumed(plugin: str, folder: Path, *start: object) -> Path:
    """Train for 6 steps at once, and for 3 and 3 more; the weights are the same bit for bit. Returns the second folder."""
    once, twice = folder / "once", folder / "twice"
    command(plugin, *start, "--out", once, "--loop.iterations", 6, *SHORT)
    command(plugin, *start, "--out", twice, "--loop.iterations", 3, *SHORT)
    command(plugin, *start, "--out", twice, "--loop.iterations", 6, "--resume", *SHORT)
    first, second = (read_tensors(run / "network.safetensors", "weights") for run in (once, twice))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    return twice


def evaluated(plugin: str, run: Path) -> None:
    """`trigflow evaluate` measures it against its own data."""
    out = run / "figures.json"
    command(plugin, "evaluate", run, "--num", 32, "--quiet", "--out", out)
    figures = json.loads(out.read_text())
    assert np.isfinite(figures["fd"])
    assert figures["num"] == 32


def exported(plugin: str, run: Path, inputs: list[str]) -> None:
    """`trigflow export` writes TorchScript and ONNX files with these inputs, which give what PyTorch gives."""
    model = trigflow.load(run, "cpu")
    told = model.conditioner.conditions(None, 5)
    x, t = torch.randn(5, *model.shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1.5, 5)
    expected = model.velocity(told)(x, t)
    for form in ("torchscript", "onnx"):
        out = run / form
        command(plugin, "export", run, out, "--to", form)
        description = json.loads((out / "model.json").read_text())
        assert description["inputs"] == inputs
        given = {"x": x, "t": t, **told}
        if form == "torchscript":
            found = torch.jit.load(str(out / "network.pt"))(*(given[name] for name in inputs))
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(out / "network.onnx"), providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {name: given[name].numpy() for name in inputs})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def served(run: Path, request: dict[str, object]) -> np.ndarray:
    """The pictures, uint8 `(n, c, h, w)`, that the server answers a request with."""
    app = create_app([offer_of(trigflow.load(run, "cpu"), Limits())])
    with TestClient(app) as client:
        answer = client.post("/v1/images", json={**request, "format": "npy"})
        assert answer.status_code == 200, answer.text
        import io

        return np.load(io.BytesIO(answer.content))
