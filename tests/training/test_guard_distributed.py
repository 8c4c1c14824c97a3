"""Float16, clipping and numbers that go wrong: two processes decide and compute what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.numbers_cases import CASES, TWO, folder_of, run_case
from training.shared import free_ports, made_once, run_group
from training.test_distributed import needs_gloo, series, weights
from trigflow.training.log import read_metrics

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes, below one folder; what they printed is in `output`."""

    def make(folder: Path) -> None:
        run_group(folder, "numbers_cases", [], 2, str(free_ports(1)[0]), 300)

    return made_once(tmp_path_factory, "guarded", make)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the folder of a case, run by this process."""
    root, made = tmp_path_factory.mktemp("alone"), set()

    def folder(case: str) -> Path:
        if case not in made:
            made.add(case)
            run_case(case, root / case, {})
        return root / case

    return folder


def flat(folder: Path) -> Tensor:
    return torch.cat([value.double().flatten() for name, value in sorted(weights(folder).items())])


@pytest.mark.parametrize(("name", "changes"), TWO)
def test_two_processes_do_what_one_does(several: Path, alone: Any, name: str, changes: dict[str, Any]) -> None:
    here, there = alone(name), several / folder_of(name, changes)
    lines = [read_metrics(run) for run in (here, there)]
    assert len(lines[1]) == CASES[name]["loop.iterations"], (several / "output").read_text()[-3000:]
    for figure in ("skipped", "rollbacks", "spikes", "overflows", "loss_scale"):
        assert [line.get(figure) for line in lines[1]] == [line.get(figure) for line in lines[0]]
    half = "loop.precision" in CASES[name]
    close = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    for figure in ("loss", "grad_norm"):
        known = [line[figure] is not None for line in lines[0]]
        torch.testing.assert_close(series_of(there, figure, known), series_of(here, figure, known), **close)
    one, two = flat(here), flat(there)
    assert bool(two.isfinite().all())
    assert float((two - one).norm() / one.norm()) < (2e-2 if half else 1e-5)


def series_of(folder: Path, name: str, known: list[bool]) -> Tensor:
    if all(known):
        return series(folder, name)
    return torch.tensor([line[name] for line, fine in zip(read_metrics(folder), known, strict=True) if fine])


def test_the_cases_go_wrong_as_they_say(alone: Any) -> None:
    last = {name: read_metrics(alone(name))[-1] for name in CASES}
    assert all(line["grad_norm"] > 0.05 for line in read_metrics(alone("clipped")))
    assert last["overflow"]["overflows"] == 1
    assert last["overflow"]["skipped"] == 0
    assert (last["row of steps"]["skipped"], last["row of steps"]["rollbacks"]) == (2, 1)
    assert (last["average"]["skipped"], last["average"]["rollbacks"]) == (0, 1)
