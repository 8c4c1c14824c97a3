"""`torch.set_default_dtype` has no say: every draw and constant says its own type. A default device is refused."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trigflow
from training.tiny import tiny_trainer, untrained_teacher
from trigflow.evaluation.evaluate_model import evaluate_model
from trigflow.models.model import Model, load
from trigflow.runtime.errors import UserError

SOURCE = Path(trigflow.__file__).parent
BUILT = ("networks", "evaluation/features")
"""Rooms of modules, which are made under `in_float32`."""
OTHERS = [torch.float64, torch.bfloat16, torch.float16]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "diffusion": {"objective.label_dropout": 0.5, "data.flip": True, "network.dropout": 0.1},
    "scd": {"objective.guidance_max": 2.0, "ema.kind": "halflife"},
    "meanflow": {"optimizer.name": "muon", "network.width": 32},
    "ct": {"optimizer.name": "radam"},
    "scd-vsd": {},
}


@pytest.fixture
def default() -> Iterator[Any]:
    """Sets the default dtype until the test ends."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    folder = untrained_teacher().save(tmp_path_factory.mktemp("model"))
    model = load(folder)
    return folder, pictures(model), evaluate_model(model, num=16, steps=2, progress=False)


def pictures(model: Model) -> dict[str, Tensor]:
    return {
        "noise": model.noise(0, 0, 3, 70),
        "heun": model.sample(4, steps=2),
        "guided": model.sample(4, steps=2, guidance=2.0, guidance_interval=(0.1, 5.0)),
        **{solver: model.sample(2, steps=3, solver=solver) for solver in ("ddim", "dpm2s", "dpm++2m")},
    }


@pytest.mark.parametrize("dtype", OTHERS)
def test_drawing(drawn: tuple[Path, dict[str, Tensor], dict[str, Any]], dtype: torch.dtype, default: Any) -> None:
    folder, expected, _ = drawn
    model = load(folder)
    default(dtype)
    for found in (pictures(model), pictures(load(folder))):
        assert {name: same(found[name], picture) for name, picture in expected.items()} == dict.fromkeys(expected, True)


def test_evaluation(drawn: tuple[Path, dict[str, Tensor], dict[str, Any]], default: Any) -> None:
    folder, _, expected = drawn
    default(torch.float64)
    found = evaluate_model(load(folder), num=16, steps=2, progress=False)
    assert {name: value for name, value in found.items() if "second" not in name} == {
        name: value for name, value in expected.items() if "second" not in name
    }


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training(kind: str, tmp_path: Path, default: Any) -> None:
    changes = {"objective.kind": kind, "loop.iterations": 3, **OBJECTIVES[kind]}
    found = []
    for dtype in (torch.float32, torch.float64):
        default(dtype)
        teacher = untrained_teacher() if kind not in ("diffusion", "meanflow", "ct") else None
        if teacher is not None:
            changes = {name: value for name, value in changes.items() if not name.startswith("network.")}
        model = tiny_trainer(tmp_path / str(dtype), changes, teacher=teacher).run()
        found.append((model.network.state_dict(), model.sample(2), load(tmp_path / str(dtype)).sample(2)))
    (weights, *first), (others, *second) = found
    assert all(same(weights[name], others[name]) for name in weights)
    assert all(map(same, first, second))


def test_a_default_device_is_refused(drawn: tuple[Path, dict[str, Tensor], dict[str, Any]], tmp_path: Path) -> None:
    folder, model = drawn[0], load(drawn[0])
    with torch.device("meta"):
        for use in (lambda: load(folder), lambda: model.sample(1), lambda: tiny_trainer(tmp_path / "run")):
            with pytest.raises(UserError, match="torch's default device is meta; expected none"):
                use()
    assert not (tmp_path / "run").exists()


def calls() -> list[str]:
    """Where the source makes a tensor of floats without saying of which type."""
    makers = {"randn", "rand", "zeros", "ones", "empty", "full", "linspace", "logspace", "normal", "eye"}
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith(BUILT):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in makers
                and not any(keyword.arg == "dtype" for keyword in node.keywords)
            ):
                found.append(f"{name}:{node.lineno}")
    return found


def test_every_draw_says_its_type() -> None:
    assert calls() == []
