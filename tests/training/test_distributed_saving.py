"""Checkpoints of several processes: whatever wrote them, whatever goes on with them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

import programs
from training.distributed_cases import make_trainer
from training.saving_worker import CHANGES
from training.shared import free_ports, made_once, run_group
from training.tiny import differing
from trigflow.models.model import load
from trigflow.training.checkpoint import list_checkpoints, open_checkpoint, tensors_of
from trigflow.training.consolidate import consolidate

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)

TWO = [
    ("save", "ddp2", "ddp"),
    ("save", "fsdp2", "fsdp"),
    ("resume alone", "alone-ddp2", "ddp"),
    ("resume alone", "alone-fsdp2", "fsdp"),
    ("resume ddp2", "ddp2-fsdp2", "fsdp"),
    ("resume fsdp2", "fsdp2-ddp2", "ddp"),
    ("fill", "filled", "ddp"),
    ("damage", "damaged", "ddp"),
]
FOUR = [("resume fsdp2", "fsdp2-fsdp4", "fsdp"), ("resume ddp2", "ddp2-ddp4", "ddp")]


def run(folder: Path, tasks: list[tuple[str, str, str]], processes: int) -> None:
    codes = run_group(folder, "saving_worker", [json.dumps(tasks)], processes, str(free_ports(1)[0]), 250)
    assert codes == [0] * processes, (folder / "output").read_text()[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one, two and four processes below one folder; what was printed is in `output`."""

    def make(folder: Path) -> None:
        trainer = make_trainer("teacher", folder / "alone", CHANGES)
        trainer.step()
        trainer.step()
        trainer.save_checkpoint()
        run(folder, TWO, 2)
        run(folder, FOUR, 4)

    return made_once(tmp_path_factory, "saved", make)


def stored(run: Path) -> dict[str, Tensor]:
    """What the newest checkpoint of a run holds."""
    with open_checkpoint(list_checkpoints(run)[-1]) as found:
        return {name: found.read(name) for name in found.shapes}


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_what_several_processes_write_beside_training_is_the_state_as_it_was(runs: Path, name: str) -> None:
    processes = int(name[-1])
    path = list_checkpoints(runs / name)[-1]
    files = [f"state-{i + 1:05d}-of-{processes:05d}.safetensors" for i in range(processes)]
    assert sorted(file.name for file in path.iterdir()) == [*files, "state.json"]
    assert not list((runs / name / "checkpoints").glob(".*"))
    held = load_file(runs / f"{name}-0.safetensors")
    assert len(held) > 100
    assert differing(stored(runs / name), held) == []
    sizes = [(path / file).stat().st_size for file in files]
    assert min(sizes) > 0.5 * max(sizes)


def test_each_tensor_is_written_once(runs: Path) -> None:
    for name in ("ddp2", "fsdp2"):
        path = list_checkpoints(runs / name)[-1]
        counted = 0
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                counted += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
        assert counted == sum(value.numel() for value in stored(runs / name).values())


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_one_process_goes_on_with_what_several_wrote(runs: Path, name: str) -> None:
    trainer = make_trainer("teacher", runs / name, CHANGES, resume=True)
    assert trainer.iteration == 2
    found = tensors_of({**trainer.modules, **trainer.ema.modules}, trainer.optimizers)
    assert differing({key: value.detach() for key, value in found.items()}, load_file(runs / f"{name}-0.safetensors")) == []


@pytest.mark.parametrize("name", ["alone-ddp2", "alone-fsdp2", "ddp2-fsdp2", "fsdp2-ddp2", "fsdp2-fsdp4", "ddp2-ddp4"])
def test_several_processes_go_on_with_what_others_wrote(runs: Path, name: str) -> None:
    before, after = name.split("-")
    expected = stored(runs / before)
    for i in range(int(after[-1])):
        assert differing(load_file(runs / f"{name}-{i}.safetensors"), expected) == []


def test_a_model_folder_of_what_several_wrote(runs: Path, tmp_path: Path) -> None:
    (runs / "fsdp2" / "config.json").write_bytes((runs / "filled" / "config.json").read_bytes())
    consolidate(runs / "fsdp2", tmp_path / "out", everything=True)
    assert differing(load_file(tmp_path / "out" / "state.safetensors"), stored(runs / "fsdp2")) == []


def test_a_disk_that_is_full_for_one_process_is_warned_of_once_and_all_go_on(runs: Path) -> None:
    lines = [line for line in (runs / "output").read_text().splitlines() if "cannot write checkpoint" in line]
    assert len(lines) == 1
    assert "00000002' (No space left on device)" in lines[0]
    assert sorted(path.name for path in (runs / "filled" / "checkpoints").iterdir()) == ["00000004", "00000005"]
    assert load(runs / "filled", "cpu").kind == "diffusion"


def test_damage_to_the_file_of_another_process_is_noticed_by_all(runs: Path) -> None:
    names = sorted(path.name for path in (runs / "damaged" / "checkpoints").iterdir())
    assert names == ["00000001", "00000002-damaged"]
    assert (runs / "output").read_text().count("the checksum of 'state-00002-of-00002.safetensors' does not match") == 1
    for i in range(2):
        assert differing(load_file(runs / f"damaged-{i}.safetensors"), stored(runs / "damaged")) == []


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """It goes on in processes as torchrun would start them, but in less time."""
    out = tmp_path / "run"
    command = [
        "train", "--out", str(out), "--resume", "auto", "--network.width", "8", "--network.blocks", "1",
        "--network.conditioning.width", "8", "--batch-size", "8", "--loop.device", "cpu", "--quiet",
        "--loop.sample-every", "0", "--loop.log-every", "1",
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", programs.__file__, "-m", "trigflow"]
    process = programs.start([*torchrun, *command, "--iterations", "100000"], stderr=subprocess.PIPE)
    try:
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1  # torchrun's own
    assert err.count("trigflow: terminated; what was saved can be resumed") == 2
    done = int(list_checkpoints(out)[-1].name)
    assert done >= 1
    codes = run_group(tmp_path, "command_worker", [*command, "--iterations", str(done + 1)], 2, str(free_ports(1)[0]), 250)
    assert codes == [0, 0], (tmp_path / "output").read_text()[-2000:]
    assert int(list_checkpoints(out)[-1].name) == done + 1
    assert load(out, "cpu").kind == "diffusion"
