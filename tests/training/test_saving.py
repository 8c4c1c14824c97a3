"""Checkpoints that are written while training goes on: clocks, full disks, damage, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import programs
from training.tiny import differing, state_of, tiny_trainer
from trigflow import cli
from trigflow.runtime.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from trigflow.runtime.interrupt import Stops, Terminated, terminable, uninterrupted
from trigflow.training import saving
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.checkpoint.part import Part
from trigflow.training.trainer import Trainer

TINY = [
    "--network.width", "8", "--network.blocks", "1", "--network.conditioning.width", "8", "--batch-size", "8",
    "--loop.sample-every", "0", "--loop.log-every", "1", "--loop.device", "cpu", "--quiet",
]  # fmt: skip


class Gate:
    """Holds the writing of checkpoints back until it is opened, and counts the files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, self.written = threading.Event(), threading.Event(), 0
        write = Part.write

        def held(part: Part, path: Path) -> dict[str, object]:
            self.reached.set()
            assert self.open.wait(60)
            self.written += 1
            return write(part, path)

        monkeypatch.setattr(Part, "write", held)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def fail_writes(monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
    """A disk that is full in the middle of the checkpoints of these iterations."""
    write = Part.write

    def full(part: Part, path: Path) -> dict[str, object]:
        if any(f"{i:08d}" in path.parent.name for i in iterations):
            path.write_bytes(part.head[:100])
            raise OSError(28, "No space left on device")
        return write(part, path)

    monkeypatch.setattr(Part, "write", full)


# Beside training ---------------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    trainer = tiny_trainer(tmp_path / "run")
    trainer.step()
    then = state_of(trainer)
    trainer.save_checkpoint(wait=False)
    assert gate.reached.wait(60)
    trainer.step()
    assert (trainer.iteration, list_checkpoints(tmp_path / "run")) == (2, [])
    assert differing(state_of(trainer), then)
    gate.open.set()
    trainer.saving.writer.finish()
    resumed = tiny_trainer(tmp_path / "run", resume=True)
    assert resumed.iteration == 1
    assert differing(state_of(resumed), then) == []


def test_a_checkpoint_is_whole_soon_after_the_step_at_which_it_was_written(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.step()
    trainer.save_checkpoint(wait=False)
    trainer.saving.writer.wait()
    trainer.step()
    assert trainer.saving.writer.busy
    trainer.saving.go_on()
    assert not trainer.saving.writer.busy
    assert names(tmp_path / "run") == ["00000001"]


def test_memory_of_a_checkpoint_is_used_again(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    places = []
    for _ in range(3):
        trainer.step()
        trainer.save_checkpoint()
        part = trainer.saving.writer._part
        assert part is not None
        places.append(part.content.data_ptr())
    assert len(set(places)) == 1


def test_one_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    trainer = tiny_trainer(tmp_path / "run")
    trainer.step()
    trainer.save_checkpoint(wait=False)
    trainer.step()
    threading.Timer(0.2, gate.open.set).start()
    assert gate.written == 0
    trainer.save_checkpoint(wait=False)
    assert "00000001" in names(tmp_path / "run")  # whole before the second begins, which may be whole by now too
    trainer.saving.writer.finish()
    assert names(tmp_path / "run") == ["00000001", "00000002"]


def test_minutes_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on 25 seconds a step, a checkpoint a minute."""
    trainer = tiny_trainer(tmp_path / "run", {"loop.iterations": 10, "loop.checkpoint_minutes": 1.0, "loop.keep": 99})
    monkeypatch.setattr(saving, "time", type("Clock", (), {"monotonic": lambda: 25.0 * trainer.iteration}))
    trainer.saving._saved_at = 0.0
    go_on = trainer.saving.go_on

    def patient() -> None:
        trainer.saving.writer.wait()
        trainer.saving._told["written"] = 1.0
        go_on()

    monkeypatch.setattr(trainer.saving, "go_on", patient)
    trainer.run()
    # Asked in the step that begins at iteration i: due from 25 i >= 60 on, at 3; then 60 after what was saved at 4, and so on.
    assert names(tmp_path / "run") == ["00000004", "00000008", "00000010"]


def test_milestones_are_made_and_kept(tmp_path: Path) -> None:
    changes = {"loop.iterations": 9, "loop.checkpoint_every": 2, "loop.keep": 1, "loop.keep_every": 3}
    tiny_trainer(tmp_path / "run", changes).run()
    assert names(tmp_path / "run") == ["00000003", "00000006", "00000009"]


def test_a_resumed_run_may_save_otherwise(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 1}).run()
    changes = {"loop.iterations": 2, "loop.checkpoint_minutes": 5.0, "loop.keep_every": 7}
    assert tiny_trainer(tmp_path / "run", changes, resume=True).iteration == 1


# A full disk -------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_is_warned_of_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"loop.checkpoint_every": 2, "loop.iterations": 5, "loop.keep": 1}
    fail_writes(monkeypatch, 4)
    kept: list[list[str]] = []
    step = Trainer.step

    def watched(self: Trainer) -> Any:
        if self.iteration == 4:
            self.saving.writer.wait()
        result = step(self)
        kept.append(names(tmp_path / "run"))
        return result

    monkeypatch.setattr(Trainer, "step", watched)
    tiny_trainer(tmp_path / "run", changes).run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trigflow: warning")]
    assert len(lines) == 1
    assert "00000004' (No space left on device); expected" in lines[0]
    assert "00000002" in kept[-1]
    assert names(tmp_path / "run") == ["00000005"]


def test_the_last_checkpoint_has_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch, 6)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*00000006' \(No space left on device\); expected"):
        tiny_trainer(tmp_path / "run", {"loop.checkpoint_every": 3}).run()
    assert names(tmp_path / "run") == ["00000003"]
    assert not (tmp_path / "run" / "model.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The operating system refuses to write the second half of a checkpoint."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from trigflow import cli; cli.main(sys.argv[1:])"
    )
    command = ["-c", program, "train", "--out", str(tmp_path / "run"), *TINY, "--iterations", "3"]
    done = programs.run([*command, "--loop.checkpoint-every", "1"], timeout=120)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["warning", "warning", "error"]
    assert all("File too large" in line for line in lines)
    assert names(tmp_path / "run") == []


# Damage ------------------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    file = path / ("state.json" if how in ("counter", "basis") else "state.safetensors")
    content = bytearray(file.read_bytes())
    if how == "bit":
        content[len(content) * 2 // 3] ^= 4
    elif how == "cut":
        del content[-1000:]
    elif how == "gone":
        file.unlink()
        return
    elif how == "basis":
        content = bytearray(content.replace(b'"number of samples": 100', b'"number of samples": 101'))
    else:
        content = bytearray(content.replace(b'"skipped": 0', b'"skipped": 1'))
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "counter", "basis"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"loop.checkpoint_every": 2, "loop.iterations": 4}
    whole = tiny_trainer(tmp_path / "run", changes)
    whole.run()
    damage(tmp_path / "run" / "checkpoints" / "00000004", how)
    with pytest.raises(UserError, match="delete this checkpoint to resume from the one before"):
        tiny_trainer(tmp_path / "run", changes, resume=True)
    assert names(tmp_path / "run") == ["00000002", "00000004"]

    resumed = tiny_trainer(tmp_path / "run", changes, resume="auto")
    warned = capsys.readouterr().err.splitlines()
    assert resumed.iteration == 2
    assert len(warned) == 1
    assert "00000004" in warned[0]
    assert "set aside as '00000004-damaged', and the one before is used" in warned[0]
    resumed.run()
    assert differing(state_of(resumed), state_of(whole)) == []
    assert names(tmp_path / "run") == ["00000002", "00000004", "00000004-damaged"]


def test_a_run_without_a_sound_checkpoint_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 1}).run()
    damage(tmp_path / "run" / "checkpoints" / "00000001", "bit")
    again = tiny_trainer(tmp_path / "run", {"loop.iterations": 1}, resume="auto")
    assert again.iteration == 0
    assert "checksum of 'state.safetensors' does not match" in capsys.readouterr().err
    assert tiny_trainer(tmp_path / "nothing", resume="auto").iteration == 0


def test_going_back_while_a_checkpoint_is_written_goes_back_to_that_one(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.step()
    trainer.save_checkpoint(wait=False)
    then = state_of(trainer)
    trainer.step()
    state = trainer.restore()
    assert state is not None
    assert (state["iteration"], trainer.iteration) == (1, 1)
    assert differing(state_of(trainer), then) == []


def test_going_back_without_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.step()
    assert trainer.restore() is None
    assert trainer.iteration == 1


# Signals -----------------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, iteration: int, number: int) -> None:
    step = Trainer.step

    def stopped(self: Trainer) -> Any:
        result = step(self)
        if self.iteration == iteration:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(Trainer, "step", stopped)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, EXIT_TERMINATED, "terminated"), (signal.SIGINT, EXIT_INTERRUPTED, "interrupted")],
)
def test_either_signal_saves_and_has_an_exit_code_of_its_own(
    number: int, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--out", str(tmp_path / "run"), *TINY, "--iterations", "4"]
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        with pytest.raises(SystemExit) as left:
            cli.main([*args, "--resume", "auto"])
    assert left.value.code == code
    assert capsys.readouterr().err == f"trigflow: {said}; what was saved can be resumed\n"
    assert names(tmp_path / "run") == ["00000002"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    cli.main([*args, "--resume", "auto"])
    assert names(tmp_path / "run") == ["00000002", "00000004"]
    with pytest.raises(SystemExit):
        cli.main(args)
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_leaves_those_that_read_data_until_the_run_is_saved(
    number: int, tmp_path: Path, photos: Any
) -> None:
    out = tmp_path / "run"
    command = [
        "-m", "trigflow", "train", "--out", str(out), *TINY, "--iterations", "100000",
        "--data", str(photos(*[f"{i}.png" for i in range(12)])), "--resize", "8", "--data.memory-gib", "0", "--workers", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = programs.start(command, stderr=subprocess.PIPE, environment=environment, session=True)
    try:
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (EXIT_TERMINATED if number == signal.SIGTERM else EXIT_INTERRUPTED), err
    assert len(err.splitlines()) == 1, err
    assert len(list_checkpoints(out)) == 1


def test_a_signal_while_the_end_is_written_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"loop.iterations": 1})
    finish = trainer.saving.writer.finish

    def signalled() -> None:
        if trainer.saving.writer.busy:
            signal.raise_signal(signal.SIGTERM)
        finish()

    monkeypatch.setattr(trainer.saving.writer, "finish", signalled)
    with pytest.raises(Terminated):
        trainer.run()
    assert names(tmp_path / "run") == ["00000001"]
    assert (tmp_path / "run" / "model.json").is_file()


def test_a_second_signal_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    stop_at(monkeypatch, 2, signal.SIGTERM)
    trainer = tiny_trainer(tmp_path / "run")
    process = os.getpid()

    def again() -> None:
        gate.reached.wait(60)
        time.sleep(0.1)
        os.kill(process, signal.SIGTERM)

    thread = threading.Thread(target=again)
    thread.start()
    with pytest.raises(Terminated):
        trainer.run()
    assert gate.written == 0
    assert list_checkpoints(tmp_path / "run") == []
    gate.open.set()
    thread.join()
    trainer.saving.writer.wait()


def test_of_several_processes_each_takes_notice_and_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with Stops(several=True) as stops:
        assert stops.tell() == {"SIGINT": 0.0, "SIGTERM": 0.0}
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what the scheduler has sent already
        assert stops.tell() == {"SIGINT": 0.0, "SIGTERM": 1.0}
        stops.hear({"SIGINT": 0.0, "SIGTERM": 0.0})
        assert stops.agreed == 0
        stops.hear({"SIGINT": 0.25, "SIGTERM": 0.0})
        assert stops.agreed == signal.SIGINT
        stops.hear({"SIGINT": 0.25, "SIGTERM": 0.5})
        assert stops.agreed == signal.SIGTERM


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("numbers", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_a_second_signal_ends_one_of_several_processes_at_once(numbers: tuple[str, str]) -> None:
    program = (
        "import signal\nfrom trigflow.runtime.interrupt import Stops\nwith Stops(several=True):\n"
        + "".join(f"    signal.raise_signal(signal.{name})\n" for name in numbers)
        + "print('still there')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    done = programs.run(["-c", program], environment=environment, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.Signals[numbers[1]], "")


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stops() as stops:
            signal.raise_signal(signal.SIGINT)
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
        assert stops.received == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_outside_of_training_is_an_exception_too() -> None:
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """SIGKILL with half a file on the disk; what is resumed ends as a run that was never killed."""
    changes: dict[str, Any] = {"loop.checkpoint_every": 2}
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from training.tiny import tiny_trainer\nfrom trigflow.training.checkpoint.part import Part\n"
        "write = Part.write\n"
        "def killed(part, path):\n"
        "    if '00000004' in path.parent.name:\n"
        "        path.write_bytes(part.head[:100])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(part, path)\n"
        "Part.write = killed\n"
        f"tiny_trainer(Path({str(tmp_path / 'run')!r}), {changes!r}).run()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # which sums are rounded by
    done = programs.run(["-c", program], timeout=120, environment=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path / "run") == [".00000004-progress", "00000002"]
    resumed = tiny_trainer(tmp_path / "run", changes, resume="auto")
    assert resumed.iteration == 2
    resumed.run()
    whole = tiny_trainer(tmp_path / "whole", changes)
    whole.run()
    assert differing(state_of(resumed), state_of(whole)) == []
    assert names(tmp_path / "run") == ["00000004", "00000006"]
