"""A run folder written before `parallel.compile` became `loop.compile` is read, drawn from and gone on with.

`tests/fixtures/format2` was written with trigflow as of commit 1a81a7f by::

    trigflow train --data digits --out finished --iterations 4 --batch-size 8 --loop.checkpoint-every 2 --loop.sample-every 0
        --loop.keep 9 --network.width 8 --network.mult 1 --network.blocks 1 --network.patch 2 --network.conditioning.width 8
        --parallel.compile

`middle` is what that had written after two iterations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trigflow
from trigflow.cli import main
from trigflow.training import compiled
from trigflow.training.config import read_config

SETTINGS = """--data digits --iterations 4 --batch-size 8 --loop.checkpoint-every 2 --loop.sample-every 0 --loop.keep 9
    --network.width 8 --network.mult 1 --network.blocks 1 --network.patch 2 --network.conditioning.width 8"""
WRITTEN = Path(__file__).parent / "fixtures" / "format2"


def test_settings() -> None:
    assert json.loads((WRITTEN / "finished" / "config.json").read_text())["format"] == 2
    assert read_config(WRITTEN / "finished").loop.compile == "on"


def test_a_run_goes_on_and_ends_as_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    shutil.copytree(WRITTEN / "middle", tmp_path / "run")
    main(["train", "--out", str(tmp_path / "run"), *SETTINGS.split(), "--compile", "on", "--resume", "--quiet"])
    found, expected = (load_file(run / "network.safetensors") for run in (tmp_path / "run", WRITTEN / "finished"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["loop"]["compile"] == "on"
    assert "compile" not in written["parallel"]
    assert trigflow.load(tmp_path / "run").sample(2, seed=0).shape == (2, 1, 8, 8)
