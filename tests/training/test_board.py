"""Logs are written record by record, and a full disk costs records, not the run."""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import programs
from trigflow.training.log import Appended, Board, MetricLog, read_metrics

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes while the block lasts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@linux
def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    file = Appended(tmp_path / "file")
    assert not file.append(b"abc\n")
    with largest_file(6):
        assert file.append(b"defg\n")  # two of its bytes would fit
        assert file.trouble
        assert not file.append(b"hijk\n")  # not the first one
    assert (tmp_path / "file").read_bytes() == b"abc\n"
    assert not file.append(b"lm\n")
    assert not file.trouble
    file.close()
    assert not file.append(b"n\n")
    assert (tmp_path / "file").read_bytes() == b"abc\nlm\nn\n"


def test_a_file_that_cannot_be_opened_is_told_once(tmp_path: Path) -> None:
    file = Appended(tmp_path / "missing" / "file")
    assert [file.append(b"a"), file.append(b"b")] == [True, False]
    (tmp_path / "missing").mkdir()
    assert not file.append(b"c")
    assert file.path.read_bytes() == b"c"


@linux
def test_lines_that_find_no_room_are_left_out_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 1.0})
    with largest_file((tmp_path / "metrics.jsonl").stat().st_size + 5):
        log.write(2, {"loss": 1.0})
        log.write(3, {"loss": 1.0})
    log.write(4, {"loss": 1.0})
    log.close()
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 4]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("trigflow: warning: no line in")
    assert "iteration 2" in said[0]


def test_boards_of_a_run_that_was_resumed_are_read_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    threads = threading.active_count()
    first = Board(tmp_path)
    for i in range(1, 5):
        first.scalars({"loss": i / 4, "rate": 2.0}, i)
    first.close()
    second = Board(tmp_path, 3)
    second.scalars({"loss": 9.0}, 3)
    second.picture("samples", np.full((2, 3, 3), 7, np.uint8), 3)
    second.close()
    assert threading.active_count() == threads
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 9.0)]
    assert [(e.width, e.height) for e in events.Images("samples")] == [(3, 2)]


def test_a_board_whose_folder_cannot_be_made_leaves_the_run_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file" / "tensorboard")
    board.scalars({"loss": 1.0}, 1)
    board.close()
    assert board.file.trouble


def test_the_writer_of_pytorch_reads_the_same(tmp_path: Path) -> None:
    """Records of both are equal but for the time."""
    pytest.importorskip("tensorboard")
    code = (
        "import sys\n"
        "from torch.utils.tensorboard import SummaryWriter\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "import json\n"
        "from trigflow.training.log import Board\n"
        "theirs = SummaryWriter(sys.argv[1] + '/theirs', purge_step=2)\n"
        "mine = Board(__import__('pathlib').Path(sys.argv[1]) / 'mine', 2)\n"
        "for i in (2, 3):\n"
        "    theirs.add_scalar('a/b', i / 3, i)\n"
        "    mine.scalars({'a/b': i / 3}, i)\n"
        "theirs.close(), mine.close()\n"
        "found = []\n"
        "for name in ('theirs', 'mine'):\n"
        "    events = EventAccumulator(sys.argv[1] + '/' + name)\n"
        "    events.Reload()\n"
        "    found.append([(e.step, e.value) for e in events.Scalars('a/b')])\n"
        "print(json.dumps(found))\n"
    )
    done = programs.run(["-c", code, tmp_path], timeout=120, check=True)
    theirs, mine = json.loads(done.stdout)
    assert theirs == mine
    assert len(mine) == 2
