"""Faults are tried on real processes, and what does not survive them is noticed."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from fault_cases import damage, images, runs  # noqa: E402

import programs  # noqa: E402
from training.tiny import tiny_trainer  # noqa: E402
from trigflow.runtime.files import read_tensors, write_tensors  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")


def faults(*options: object) -> subprocess.CompletedProcess[str]:
    return programs.run([BENCHMARKS / "faults.py", *options])


def test_one_fault_of_several_kinds(tmp_path: Path) -> None:
    out, folder = tmp_path / "new" / "faults.json", tmp_path / "runs"
    kinds = ("kill", "checkpoint", "images", "numbers")
    done = faults("--only", *kinds, "--at-most", 1, "--seed", 3, "--json", out, "--folder", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["survived"] == result["tried"] == 4
    assert list(result["kinds"]) == list(kinds)
    assert result["kinds"]["kill"]["counts"]["kills"] > 0
    assert result["kinds"]["checkpoint"]["counts"]["refused"] == 1
    assert result["seed"] == 3
    assert not list(folder.glob("*-0*"))  # nothing is kept of what was survived
    assert "4 / 4 survived" in done.stdout


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    done = faults("--only", "lightning", "--json", tmp_path / "x.json")
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


# What is noticed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "run"
    tiny_trainer(folder, {"loop.checkpoint_every": 2}).run()
    return folder


@pytest.fixture
def bench(tmp_path: Path, finished: Path) -> runs.Bench:
    made = runs.Bench(tmp_path, 0)
    made.references["teacher"] = finished
    return made


@pytest.fixture
def other(tmp_path: Path, finished: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "other"))


def test_a_run_is_the_same_as_its_copy(bench: runs.Bench, other: Path) -> None:
    bench.check_same(other)


@pytest.mark.parametrize("file", ["network.safetensors", "checkpoints/00000006/state.safetensors"])
def test_a_single_bit_makes_another_run(file: str, bench: runs.Bench, other: Path) -> None:
    tensors = {name: value.clone() for name, value in read_tensors(other / file, "file").items()}
    name = next(name for name, value in tensors.items() if value.dtype == torch.float32 and value.numel() > 1)
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    write_tensors(other / file, tensors)
    with pytest.raises(runs.Lost, match="differs from that of an uninterrupted run in 1 tensors"):
        bench.check_same(other)


def test_missing_lines_and_leftovers_are_noticed(bench: runs.Bench, other: Path) -> None:
    log = other / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(runs.Lost, match=r"lines in metrics\.jsonl"):
        bench.check_same(other)
    bench.check_same(other, lines=False)
    (other / "checkpoints" / ".00000008-progress").mkdir()
    with pytest.raises(runs.Lost, match=r"left behind: checkpoints/\.00000008-progress"):
        bench.check_same(other, lines=False)
    assert runs.being_written(other) == [".00000008-progress"]


@pytest.mark.parametrize(
    ("said", "fine"),
    [
        ("trigflow: error: a; b; c\n", True),
        ("trigflow: warning: w\ntrigflow: error: a; b; c\n", True),
        ("trigflow: warning: w\n", False),
        ("trigflow: error: a\ntrigflow: error: b\n", False),
        ("Traceback (most recent call last):\ntrigflow: error: a\n", False),
    ],
)
def test_one_line_is_one_line(said: str, fine: bool) -> None:
    if fine:
        assert runs.one_line(said) == "trigflow: error: a; b; c"
    else:
        with pytest.raises(runs.Lost):
            runs.one_line(said)


@pytest.mark.parametrize("way", damage.WAYS)
def test_harm_is_done_to_files(way: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for seed in range(5):
        file.write_bytes(bytes(range(100)))
        damage.harm(file, way, random.Random(seed))
        now = file.read_bytes() if file.exists() else None
        if way == "bit flipped":
            assert now is not None
            changed = [a ^ b for a, b in zip(now, range(100), strict=True) if a != b]
            assert len(changed) == 1
            assert changed[0].bit_count() == 1
        else:
            assert now == {"truncated": bytes(range(len(now or b""))), "emptied": b"", "gone": None}[way]
            assert now is None or len(now) < 100


@pytest.mark.parametrize("form", images.FORMATS)
def test_pictures_are_sound_until_they_are_spoilt(form: str) -> None:
    generator = random.Random(1)
    content = images.picture(form, generator)
    assert images.can_be_decoded(content) is (form in images.KNOWN)
    for way in ("empty", "text"):
        assert not images.can_be_decoded(images.spoil(content, form, way, generator))
    assert images.spoil(content, form, "absurd size", generator) != content
    assert content.startswith(images.spoil(content, form, "truncated", generator))


def test_a_bomb_is_small_and_claims_to_be_large() -> None:
    content = images.bomb(random.Random(0))
    assert len(content) < 2_000_000
    assert int.from_bytes(content[16:20], "big") >= 14_000
    assert not images.can_be_decoded(content)


def test_damaged_images_lie_among_sound_ones(tmp_path: Path) -> None:
    path = images.pack(tmp_path, "a/damaged.png", b"no image", "deflated zip", random.Random(0))
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert len(archive.namelist()) == images.SOUND + 1
        assert archive.read("a/damaged.png") == b"no image"
        assert all(images.can_be_decoded(archive.read(name)) for name in archive.namelist() if "damaged" not in name)
