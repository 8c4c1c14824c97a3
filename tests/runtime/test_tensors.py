"""Files of tensors are those that safetensors reads, and nothing of a killed writer stays."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import programs
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import clear_leftovers, write_tensors
from trigflow.runtime.tensors import DTYPES, layout
from trigflow.training.checkpoint.part import Part, digest_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_format_as_safetensors_writes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {
        "whole": values,
        "turned": values.t(),
        "number": values[1, 1],
        "none": values[:0],
        "byte": torch.tensor([True, False, True]),
    }
    part = Part(tensors)
    part.fill(tensors)
    record = part.write(tmp_path / "part")
    assert record == {"bytes": (tmp_path / "part").stat().st_size, "sha256": digest_of(tmp_path / "part")}
    write_tensors(tmp_path / "mine", tensors)
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "part").read_bytes()
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, tmp_path / "theirs")
    mine, theirs = load_file(tmp_path / "mine"), load_file(tmp_path / "theirs")
    assert mine.keys() == theirs.keys() == tensors.keys()
    for name, value in tensors.items():
        assert mine[name].dtype == theirs[name].dtype == value.dtype
        assert mine[name].shape == theirs[name].shape == value.shape
        assert mine[name].tolist() == theirs[name].tolist() == value.tolist()


def test_other_number_formats_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'b' is of torch.complex128.*; expected one of float64, .*; convert it"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_the_header_is_padded_and_holds_the_metadata(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(3, dtype=torch.uint8), "a": torch.zeros(2, 3), "c": torch.zeros(1, dtype=torch.float64)}
    for length in range(9):
        metadata = {"note": "x" * length, "größe": "ü"}
        head, names = layout(tensors, metadata)
        assert names == ["c", "a", "b"]
        assert len(head) % 8 == 0
        assert list(json.loads(head[8:])) == ["__metadata__", "c", "a", "b"]
        write_tensors(tmp_path / "file", tensors, metadata)
        assert (tmp_path / "file").read_bytes()[: len(head)] == head
        with safe_open(tmp_path / "file", "pt") as file:
            assert file.metadata() == metadata
    write_tensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


def test_numbers_may_be_read_one_after_another(tmp_path: Path) -> None:
    shapes = {name: torch.empty(size, 2, device="meta") for name, size in (("b", 3), ("a", 1))}
    asked = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full(shapes[name].shape, float(len(asked)))

    write_tensors(tmp_path / "file", shapes, read=read)
    assert asked == ["a", "b"]
    found = load_file(tmp_path / "file")
    assert found["a"].tolist() == [[1, 1]]
    assert found["b"].tolist() == [[2, 2]] * 3


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from trigflow.runtime.files import write_tensors

write_tensors(
    Path(sys.argv[1]), {"a": torch.zeros(9), "b": torch.zeros(9)},
    read=lambda name: torch.zeros(9) if name == "a" else os.kill(os.getpid(), signal.SIGKILL),
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_writer_that_is_killed_leaves_what_the_next_start_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    killed = programs.run(["-c", KILLED, path])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    clear_leftovers(tmp_path, {"network.safetensors"}.__contains__)
    assert list(tmp_path.iterdir()) == []
