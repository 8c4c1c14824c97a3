"""Checkpoints: exact, whole or absent, and refused when they do not fit."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.tiny import differing
from trigflow.models.weights import load_weights
from trigflow.runtime.errors import UserError
from trigflow.training.checkpoint import (
    CheckpointWriter,
    DamagedCheckpointError,
    check_checkpoint,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    tensors_of,
)
from trigflow.training.checkpoint.folder import seal
from trigflow.training.checkpoint.part import Part, Piece
from trigflow.training.config import OptimizerConfig
from trigflow.training.optimizer import build_optimizer


def save_checkpoint(
    folder: Path,
    iteration: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Any],
    extra: dict[str, Any],
    keep: int = 2,
) -> Path:
    """One checkpoint, whole on return."""
    writer = CheckpointWriter(folder, keep)
    writer.begin(iteration, tensors_of(modules, optimizers), extra)
    writer.finish()
    return writer.path


class Setup:
    """A network with a buffer, its weight function, and an optimizer, after a few steps."""

    def __init__(self, name: Any = "adam", seed: int = 0, steps: int = 3, channels_last: bool = False) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2))
            if channels_last:
                network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.modules: dict[str, nn.Module] = {"network": network, "weight": nn.Linear(2, 1)}
            self.optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.01), self.modules.values())
        for i in range(steps):
            self.step(i)

    def step(self, i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        self.optimizer.zero_grad()
        x = torch.randn(4, 2, 8, 8, generator=generator)
        loss = self.modules["network"](x).square().mean() + self.modules["weight"](x[:, :, 0, 0]).square().mean()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        state = {f"{n}.{key}": value for n, module in self.modules.items() for key, value in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        return {name: value.detach().clone() for name, value in state.items()}

    def save(self, folder: Path, iteration: int = 3, keep: int = 2) -> Path:
        return save_checkpoint(folder, iteration, self.modules, {"optimizer": self.optimizer}, {"skipped": 1}, keep)

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, self.modules, {"optimizer": self.optimizer})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_round_trip_is_exact_and_training_goes_on_the_same(name: str, channels_last: bool, tmp_path: Path) -> None:
    old = Setup(name, channels_last=channels_last)
    path = old.save(tmp_path)
    new = Setup(name, seed=1, steps=0, channels_last=channels_last)
    assert differing(new.state(), old.state())
    state = new.load(path)
    assert (state["iteration"], state["skipped"]) == (3, 1)
    assert differing(new.state(), old.state()) == []
    assert any(key.endswith("exp_avg_sq") for key in old.state())
    for i in (3, 4):
        old.step(i)
        new.step(i)
    assert differing(new.state(), old.state()) == []


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_steps_of_a_single_number_are_counted_as_those_of_others(name: Any, tmp_path: Path) -> None:
    """In its own number format, where bfloat16 would stop at 256."""
    weight = nn.Module()
    weight.gain = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    optimizer = build_optimizer(OptimizerConfig(name=name), [weight])
    weight.gain.grad = torch.ones_like(weight.gain)
    optimizer.step()
    optimizer.state[weight.gain]["step"].fill_(257.0)
    path = save_checkpoint(tmp_path, 1, {"weight": weight}, {"optimizer": optimizer}, {"skipped": 0})
    load_checkpoint(path, {"weight": weight}, {"optimizer": optimizer})
    assert {key: value.dtype for key, value in optimizer.state[weight.gain].items()} == {
        "step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16,
    }  # fmt: skip
    assert optimizer.state[weight.gain]["step"].item() == 257


def test_the_copy_is_waited_for_on_the_device_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one: `loop.device` may be cuda:1."""
    waited = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def synchronize(self) -> None:
            waited.append(self.device)

    class Elsewhere:
        """As much of a tensor on cuda:1 as a part looks at."""

        is_cuda, device, dtype, shape = True, torch.device("cuda:1"), torch.float32, torch.Size([2])

        def numel(self) -> int:
            return 2

        def element_size(self) -> int:
            return 4

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **settings: empty(*size, **settings))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    tensors: Any = {"x": Elsewhere()}
    part = Part(tensors)
    part.fill({"x": torch.tensor([1.0, 2.0])})
    assert waited == [torch.device("cuda:1")]
    assert part.views[0].tolist() == [1, 2]


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    old, new = Setup(steps=0), Setup(seed=1, steps=2)
    new.load(old.save(tmp_path, iteration=0))
    assert differing(new.state(), old.state()) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    setup = Setup()
    for iteration in (9, 10, 100, 11_000):
        setup.save(tmp_path, iteration, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00000100", "00011000"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000100", "00011000"]
    setup.save(tmp_path, 11_001, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00011001"]
    for iteration in (99_999_999, 100_000_000):
        setup.save(tmp_path, iteration, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["99999999", "100000000"]


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("same_iteration", [False, True])
@pytest.mark.parametrize("method", ["_write", "_seal"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("broken")])
def test_a_write_that_fails_leaves_the_previous_one_whole(
    error: Exception, method: str, same_iteration: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup()
    setup.save(tmp_path, 3)
    before = setup.state()

    def failing(writer: CheckpointWriter) -> None:
        writer._temporary.mkdir(exist_ok=True)
        (writer._temporary / "state.json").write_bytes(b"half of it")
        raise error

    setup.step(3)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, method, failing)
        with pytest.raises(UserError, match=r"cannot write checkpoint .*(No space left on device|RuntimeError: broken)"):
            setup.save(tmp_path, 3 if same_iteration else 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]
    fresh = Setup(seed=1)
    fresh.load(list_checkpoints(tmp_path)[-1])
    assert differing(fresh.state(), before) == []


def test_the_same_iteration_can_be_written_again(tmp_path: Path) -> None:
    setup = Setup()
    setup.save(tmp_path)
    setup.step(3)
    path = setup.save(tmp_path)
    fresh = Setup(seed=1)
    fresh.load(path)
    assert differing(fresh.state(), setup.state()) == []
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


def test_others_may_read_what_the_user_lets_them(tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("size", [0, 5, 300, -1])
@pytest.mark.parametrize("old", [False, True])
def test_truncated_tensors(old: bool, size: int, tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    if old:
        make_old(path)
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read .*; expected the files that training wrote"):
        Setup().load(path)


def test_missing_tensors(tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    (path / "state.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"'state\.safetensors' does not exist"):
        Setup().load(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    for name in ("state.safetensors", "state.json"):
        file = path / name
        content = file.read_bytes()
        for at in range(0, len(content), 97 if name == "state.safetensors" else 11):
            if content[at : at + 1].isspace():  # of JSON, where it may be any
                continue
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(DamagedCheckpointError):
                check_checkpoint(path)
        file.write_bytes(content)
    assert check_checkpoint(path)["iteration"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no state of a run"),
        ("[]", "no state of a run"),
        ("3", "no state of a run"),
        ('{"format": 1, "iteration": 3}', "no state of a run"),
        ('{"format": 1, "iteration": "3", "skipped": 0}', "no state of a run"),
        ('{"format": 1, "iteration": -3, "skipped": 0}', "no state of a run"),
        ('{"format": 1, "iteration": true, "skipped": 0}', "no state of a run"),
        ('{"format": 2, "iteration": 3, "skipped": 0}', "no state of a run, or has been changed"),
        ('{"format": 99, "iteration": 3, "skipped": 0}', "has format 99; expected 2"),
        ('{"iteration": 3, "skipped": 0}', "has format None; expected 2"),
    ],
)
def test_edited_state(content: str, message: str, tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    (path / "state.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Setup().load(path)


def test_state_is_readable_json_with_the_checksums_that_sha256sum_prints(tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    state = json.loads((path / "state.json").read_text())
    content = (path / "state.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert state.pop("checksum")
    assert state == {
        "format": 2, "iteration": 3, "skipped": 1, "files": {"state.safetensors": {"bytes": len(content), "sha256": digest}},
    }  # fmt: skip


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    setup = Setup()
    tensors = load_file(setup.save(tmp_path) / "state.safetensors")
    assert differing(tensors, setup.state()) == []


def make_old(path: Path) -> None:
    """Have a checkpoint as the first format had it."""
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({"format": 1, "iteration": state["iteration"], "skipped": state["skipped"]}))


def test_checkpoints_of_the_first_format_can_be_read(tmp_path: Path) -> None:
    setup = Setup()
    path = setup.save(tmp_path)
    make_old(path)
    fresh = Setup(seed=1)
    assert fresh.load(path) == {"format": 1, "iteration": 3, "skipped": 1}
    assert differing(fresh.state(), setup.state()) == []


def split_in_pieces(path: Path, setup: Setup) -> None:
    """Have a checkpoint as three processes would write it: rows cut in three, some with none, the rest written by the first."""
    state = json.loads((path / "state.json").read_text())
    (path / "state.safetensors").unlink()
    state["files"] = {}
    for i in range(3):
        tensors, pieces = {}, {}
        for name, value in setup.state().items():
            rows = -(-len(value) // 3) if value.dim() else 0
            part = value[rows * i : rows * (i + 1)] if value.dim() else value
            if value.dim() or i == 0:
                tensors[name] = part
                pieces[name] = Piece(
                    (min(rows * i, len(value)), *[0] * (value.dim() - 1)) if value.dim() else (), tuple(part.shape)
                )
        file = f"state-{i + 1:05d}-of-00003.safetensors"
        written = Part(tensors, pieces)
        written.fill(tensors)
        state["files"][file] = written.write(path / file)
    del state["checksum"]
    (path / "state.json").write_text(json.dumps(seal(state)))


def test_pieces_are_put_together(tmp_path: Path) -> None:
    setup = Setup()
    path = setup.save(tmp_path)
    split_in_pieces(path, setup)
    fresh = Setup(seed=1)
    fresh.load(path)
    assert differing(fresh.state(), setup.state()) == []
    with open_checkpoint(path) as stored:
        weight = setup.modules["network"].state_dict()["0.weight"]
        for origin in range(4):
            for rows in range(1, 5 - origin):
                piece = Piece((origin, 1, 0, 0), (rows, 1, 3, 2))
                assert torch.equal(stored.read("network.0.weight", piece), weight[origin : origin + rows, 1:2, :, :2])
        assert stored.read("network.0.weight", Piece((4, 0, 0, 0), (0, 2, 3, 3))).shape == (0, 2, 3, 3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_reads_pieces_too(tmp_path: Path) -> None:
    """With the reader of `torch.distributed.checkpoint` for safetensors."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    setup = Setup()
    path = setup.save(tmp_path)
    split_in_pieces(path, setup)
    expected = {name: value for name, value in setup.state().items() if value.dim()}
    found = {name: torch.full_like(value, 7) for name, value in expected.items()}
    load(found, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert differing(found, expected) == []


def test_another_network_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    other = Setup(seed=1)
    other.modules["network"] = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 2))
    before = other.state()
    with pytest.raises(UserError, match=r"another network .*first '0\.weight' \(4, 2, 3, 3\) instead of \(5, 2, 3, 3\)"):
        other.load(path)
    assert differing(other.state(), before) == []


def test_moments_of_too_many_parameters(tmp_path: Path) -> None:
    path = Setup().save(tmp_path)
    other = Setup()
    other.optimizer = build_optimizer(OptimizerConfig(), [nn.BatchNorm2d(4)])
    before = other.state()
    with pytest.raises(UserError, match="optimizer state for 8 parameters; expected 2"):
        other.load(path)
    assert differing(other.state(), before) == []


def test_load_weights_names_the_first_of_each_kind() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    tensors = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "2.weight": torch.zeros(1), "3.x": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        load_weights(module, tensors, "'somewhere'")
    assert str(caught.value).startswith(
        "'somewhere' belongs to another network (2 missing, first '1.weight'; 2 unexpected, first '2.weight'; "
        "1 misshapen, first '0.bias' (4,) instead of (3,)); expected"
    )
