"""Run folders of words are read, drawn from and gone on with as they were.

`tests/fixtures/format3` was written with trigflow as of commit d4f7efd, in its folder, by::

    trigflow train --preset digits --data photos --out finished --iterations 4 --batch-size 8 --loop.checkpoint-every 2
        --loop.sample-every 0 --loop.keep 9 --network.width 8 --network.mult 1 --network.blocks 1 --network.patch 2
        --network.conditioning.width 8 --network.conditioning.text.length 16 --network.conditioning.text.width 8
        --network.conditioning.text.depth 1 --network.conditioning.text.heads 2 --network.conditioning.text.grams 13
    trigflow distill finished --out student --preset digits --loop.iterations 2 --loop.batch-size 8 --loop.sample-every 0

`middle` is what the first had written after two iterations.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trigflow
from trigflow.cli import main

SETTINGS = """--preset digits --data photos --iterations 4 --batch-size 8 --loop.checkpoint-every 2 --loop.sample-every 0
    --loop.keep 9 --network.width 8 --network.mult 1 --network.blocks 1 --network.patch 2 --network.conditioning.width 8
    --network.conditioning.text.length 16 --network.conditioning.text.width 8 --network.conditioning.text.depth 1
    --network.conditioning.text.heads 2 --network.conditioning.text.grams 13"""
WRITTEN = Path(__file__).parent / "fixtures" / "format3"


@pytest.mark.parametrize(
    ("run", "how", "first", "total"),
    [
        ("student", {"steps": 2}, [103, 77, 136, 138, 99, 124], 50656),
        ("finished", {"steps": 4, "guidance": 2.0}, [192, 172, 255, 119, 125, 133], 49338),
    ],
)
def test_pictures_of_words_are_those_of_then(run: str, how: dict[str, float], first: list[int], total: int) -> None:
    drawn = trigflow.load(WRITTEN / run, "cpu").sample(2, prompt="red heart", seed=3, **how).long()
    assert (drawn.flatten()[:6] - torch.tensor(first)).abs().max() <= 1  # rounding differs between machines
    assert abs(int(drawn.sum()) - total) <= 40


def test_a_run_goes_on_and_ends_as_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(WRITTEN / "middle", tmp_path / "run")
    shutil.copytree(WRITTEN / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    main(["train", "--out", "run", *SETTINGS.split(), "--resume", "--quiet"])
    found, expected = (load_file(run / "network.safetensors") for run in (tmp_path / "run", WRITTEN / "finished"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_of_before_captions_goes_on_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(WRITTEN / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    small = SETTINGS.split("--network.conditioning.text")[0].split()
    main(["train", "--out", "run", *small, "--iterations", "2", "--data.no-captions", "--quiet"])
    settings = Path("run/config.json")
    settings.write_text(settings.read_text().replace('"captions": false,', ""))  # as they were written then
    with pytest.raises(SystemExit):
        main(["train", "--out", "run", *small, "--resume", "--quiet"])  # other data: with captions
    main(["train", "--out", "run", *small, "--data.no-captions", "--resume", "--quiet"])
    assert trigflow.load("run", "cpu").takes == frozenset()
