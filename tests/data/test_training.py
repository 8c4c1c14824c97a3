"""Training on images that are not in memory is training on the same images, whatever reads them and wherever it was stopped."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from training.tiny import change, differing, state_of, tiny_config
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig
from trigflow.training.log import read_metrics
from trigflow.training.trainer import Trainer

Save = Callable[..., Path]


@pytest.fixture
def photos(save: Save) -> Path:
    """Nineteen images of noise in two classes: a run of six steps of eight passes through them more than twice."""
    rng = np.random.Generator(np.random.PCG64(0))
    for index in range(19):
        path = save(f"{'cats' if index % 2 else 'dogs'}/{index:02d}.png", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return path.parent.parent


def trainer(photos: Path, folder: Path, resume: bool = False, **changes: object) -> Trainer:
    settings = {"data.source": str(photos), "data.flip": True, **{name.replace("__", "."): v for name, v in changes.items()}}
    return Trainer(change(tiny_config(), settings), folder, resume=resume, progress=False)


def test_a_run_ends_with_the_same_weights_whatever_reads(photos: Path, tmp_path: Path) -> None:
    memory = trainer(photos, tmp_path / "memory")
    memory.run()
    for workers in (0, 2):
        streamed = trainer(photos, tmp_path / f"{workers}", data__memory_gib=0.0, data__workers=workers)
        assert streamed.dataset.rows is not None
        streamed.run()
        assert differing(state_of(memory), state_of(streamed)) == []


def test_a_run_stopped_in_an_epoch_goes_on_exactly_with_other_workers(photos: Path, tmp_path: Path) -> None:
    whole = trainer(photos, tmp_path / "whole")
    whole.run()
    first = trainer(photos, tmp_path / "run", data__memory_gib=0.0, data__workers=2)
    for _ in range(3):
        first.step()
    first.save_checkpoint()
    first.loader.close()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "run" / "config.json")
    second = trainer(photos, tmp_path / "run", resume=True, data__memory_gib=0.0, data__workers=1, data__ahead=3)
    assert second.iteration == 3
    second.run()
    assert differing(state_of(whole), state_of(second)) == []


def test_the_share_of_waiting_is_logged(photos: Path, tmp_path: Path) -> None:
    for name, memory in (("memory", 4.0), ("disk", 0.0)):
        trainer(photos, tmp_path / name, data__memory_gib=memory).run()
        shares = [line["data_wait"] for line in read_metrics(tmp_path / name)]
        assert len(shares) == 3
        assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize(("name", "value"), [("data.workers", -1), ("data.ahead", 0), ("data.memory_gib", -1.0)])
def test_settings_out_of_range(name: str, value: object) -> None:
    config: RunConfig = change(tiny_config(), {name: value})
    with pytest.raises(UserError, match=f"^{name} is {value}; expected .*; correct the setting"):
        config.validate()


def test_samples_of_every_epoch(photos: Path, tmp_path: Path) -> None:
    run = trainer(photos, tmp_path / "run", data__memory_gib=0.0)
    seen = list(itertools.chain.from_iterable(run.order.indices(step).tolist() for step in range(19)))
    assert all(sorted(seen[19 * epoch : 19 * (epoch + 1)]) == list(range(19)) for epoch in range(8))
