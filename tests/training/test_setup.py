"""What happens before the first step: weights to start from, settings of a run that goes on, what a killed run left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import programs
from training.tiny import differing, state_of, tiny_trainer, untrained_teacher
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import clear_leftovers, owned, replacing, write_folder, write_json, write_text
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.setup import compare_configs, start_from

# Weights to start from ----------------------------------------------------------------------------------------------


def net(**parts: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(parts))
        for module in parts.values():
            for p in module.parameters():
                nn.init.normal_(p)
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("name", ["guidance", "emb_guidance", "map_guidance_scale"])
def test_a_guidance_input_keeps_its_start(name: str) -> None:
    """Wherever it is in the network, and whatever is written around the word."""
    source = net(unet=net(emb=nn.Linear(3, 3)))
    student = net(unet=net(emb=nn.Linear(3, 3), **{name: nn.Linear(2, 2)}))
    kept = student["unet"][name].weight.detach().clone()
    start_from(student, source)
    assert torch.equal(student["unet"]["emb"].weight, source["unet"]["emb"].weight)
    assert torch.equal(student["unet"][name].weight, kept)


def test_a_guidance_input_that_both_have_is_copied() -> None:
    source, student = net(guidance=nn.Linear(2, 2)), net(guidance=nn.Linear(2, 2), other_guidance=nn.Linear(1, 1))
    start_from(student, source)
    assert torch.equal(student["guidance"].weight, source["guidance"].weight)


@pytest.mark.parametrize(
    ("student", "source", "first"),
    [
        (net(a=nn.Linear(2, 2), b=nn.Linear(2, 2)), net(a=nn.Linear(2, 2)), "b.weight"),
        (net(a=nn.Linear(2, 2)), net(a=nn.Linear(2, 2), guidance=nn.Linear(2, 2)), "guidance.weight"),
        (net(guidance=nn.Linear(3, 2)), net(guidance=nn.Linear(2, 2)), "guidance.weight"),
    ],
)
def test_other_differences_are_named(student: nn.Module, source: nn.Module, first: str) -> None:
    with pytest.raises(UserError, match=rf"differs from that of the start \(first difference '{first}'\)"):
        start_from(student, source, "start")


# What a killed run left ----------------------------------------------------------------------------------------------

KILLED = """
import os, sys, time
from pathlib import Path
from trigflow.runtime import files

def die(path):
    (path / "state.json").write_text("half of it")
    os._exit(9)

path, when = Path(sys.argv[1]), sys.argv[2]
if when == "setting aside":
    rename, calls = Path.rename, []

    def renaming(self, target):
        calls.append(target)
        return rename(self, target) if len(calls) == 1 else os._exit(9)

    Path.rename = renaming
    files.write_folder(path, lambda folder: (folder / "state.json").write_text("new"))
elif when == "writing":
    files.write_folder(path, die)
else:
    def wait(folder):
        while not os.path.exists(sys.argv[3]):
            time.sleep(0.01)
        (folder / "state.json").write_text("theirs")

    files.write_folder(path, wait)
"""


@pytest.mark.parametrize("when", ["writing", "setting aside"])
def test_a_killed_write_is_cleared_up_and_nothing_is_lost(when: str, tmp_path: Path) -> None:
    path = tmp_path / "00000003"
    path.mkdir()
    (path / "state.json").write_text("whole")
    killed = programs.run(["-c", KILLED, path, when])
    assert killed.returncode == 9
    left = sorted(p.name for p in tmp_path.iterdir())
    assert len(left) == 2
    assert path.exists() == (when == "writing")
    clear_leftovers(tmp_path, str.isdigit)
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    with pytest.raises(RuntimeError):
        write_folder(path, Mock(side_effect=RuntimeError))
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]
    assert (path / "state.json").read_text() == "whole"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    go_on = tmp_path_factory.mktemp("go") / "on"
    writers = [programs.start(["-c", KILLED, tmp_path / "00000003", "waiting", go_on]) for _ in range(2)]
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    write_text(tmp_path / ".00000003-archived", "of a user")
    writers[0].kill()
    writers[0].wait()
    write_folder(tmp_path / "00000003", lambda folder: write_text(folder / "state.json", "mine"))
    assert len(list(tmp_path.iterdir())) == 3
    go_on.touch()
    assert writers[1].wait(60) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".00000003-archived", "00000003"]
    assert (tmp_path / "00000003" / "state.json").read_text() == "theirs"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_files_and_folders_are_owned_under_any_name(tmp_path: Path) -> None:
    for name, make in ((".config-a1b2c3d4.json", Path.touch), (".00000007-progress", Path.mkdir)):
        path = tmp_path / name
        make(path)
        with owned(path), owned(path):
            moved = path.rename(tmp_path / name.replace("0", "1"))
            clear_leftovers(tmp_path, lambda name: True)
            assert moved.exists()
        clear_leftovers(tmp_path, lambda name: True)
        assert not moved.exists()
    with replacing(tmp_path / "config.json") as temporary:
        clear_leftovers(tmp_path, lambda name: True)
        assert temporary.exists()


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    others = [".git", ".notes-abcdefgh.txt", ".00000003", "00000004", ".config-short.json", "config.json", ".x-ABCDEFGH"]
    mine = [".config-a1b2c3_4.json", ".config-zzzzzzzz.json"]
    for name in others + mine:
        (tmp_path / name).write_text("text")
    clear_leftovers(tmp_path, {"config.json"}.__contains__)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)
    clear_leftovers(tmp_path / "missing", str.isdigit)


def test_a_run_that_goes_on_clears_up_and_one_that_may_not_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begun = tiny_trainer(folder, {"loop.iterations": 2})
    begun.run()
    before = state_of(begun)
    (folder / "ema").mkdir()
    unfinished = [
        folder / "checkpoints" / ".00000002-abcdefgh",
        folder / "checkpoints" / ".00000002-abcdefgi-before",
        folder / ".network-abcdefgh.safetensors",
        folder / "ema" / ".00000002-0.05-abcdefgh.safetensors",
        folder / ".tmpA1b2C3",
        folder / "ema" / ".tmpzzzzzz",
    ]
    for path in unfinished[:2]:
        path.mkdir()
        write_json(path / "state.json", {})
    for path in unfinished[2:]:
        path.write_bytes(b"half")
    with pytest.raises(UserError, match="already holds a run"):
        tiny_trainer(folder, {"loop.iterations": 2})
    assert all(path.exists() for path in unfinished)
    resumed = tiny_trainer(folder, {"loop.iterations": 2}, resume=True)
    assert not any(path.exists() for path in unfinished)
    assert [path.name for path in list_checkpoints(folder)] == ["00000002"]
    assert differing(state_of(resumed), before) == []


TRAINS = """
import os, sys, time
from pathlib import Path
from trigflow.runtime.files import alone

with alone(Path(sys.argv[1])):
    if os.fork() == 0:  # as a process that reads data, which may outlast the training
        time.sleep(60)
        os._exit(0)
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny_trainer(folder, {"loop.iterations": 1}).run()
    waiting = tiny_trainer(tmp_path / "new", {"loop.iterations": 1})
    before = (folder / "metrics.jsonl").stat()
    others = [programs.start(["-c", TRAINS, path], stdout=subprocess.PIPE, session=True) for path in (folder, tmp_path / "new")]
    try:
        assert [other.stdout is not None and other.stdout.readline() for other in others] == ["begun\n", "begun\n"]
        with pytest.raises(UserError, match=r"another process is training in '.*run'; expected one at a time"):
            tiny_trainer(folder, {"loop.iterations": 2}, resume=True)
        with pytest.raises(UserError, match=r"another process is training in '.*new'"):
            waiting.run()
        assert not any((tmp_path / "new").iterdir())
        assert (folder / "metrics.jsonl").stat() == before
        for other in others:
            other.kill()
            other.wait()
        tiny_trainer(folder, {"loop.iterations": 2}, resume=True).run()
        waiting.run()
    finally:
        for other in others:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(other.pid, signal.SIGKILL)


@pytest.mark.parametrize("again", ["photos/", "./photos", "other/../photos", "HERE/photos"])
def test_a_path_may_be_spelled_otherwise_when_a_run_goes_on(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = again.replace("HERE", str(tmp_path))
    compare_configs({"data": {"source": "photos"}, "teacher": "photos"}, {"data": {"source": again}, "teacher": again})


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data.source", "photos", "more/photos"),
        ("data.source", "digits", "./digits"),
        ("teacher", None, "photos"),
        ("loop.name", "photos", "./photos"),
    ],
)
def test_another_place_is_another_setting(name: str, old: str | None, new: str) -> None:
    part, _, setting = name.rpartition(".")
    one, other = ({setting: value} for value in (old, new))
    with pytest.raises(UserError, match=f"the run to resume has {name} = {old}, now it is {new}"):
        compare_configs(*(({part: settings} if part else settings) for settings in (one, other)))


def test_a_folder_with_a_model_of_no_run_is_not_trained_into(tmp_path: Path) -> None:
    """As `trigflow import` and `trigflow ema` write it: without the settings of a training."""
    untrained_teacher().save(tmp_path / "imported")
    before = {path.name: path.read_bytes() for path in (tmp_path / "imported").iterdir()}
    assert "config.json" not in before
    with pytest.raises(UserError, match="already holds a run; expected a new folder"):
        tiny_trainer(tmp_path / "imported", {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "imported").iterdir()} == before
