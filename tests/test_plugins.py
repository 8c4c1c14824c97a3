"""Plugins are imported as they are on the disk, and a file that cannot be imported leaves nothing behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trigflow import plugins
from trigflow.plugins import load_plugin
from trigflow.runtime.errors import UserError


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plugins, "LOADED", {})
    before = dict(sys.modules)
    yield
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


def test_what_runs_is_what_the_digest_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps bytecode by the time and the size of a file, which another version of it may share."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "own_thing.py"
    found = []
    for value in (1, 2):
        path.write_text(f"X = {value}\n")
        os.utime(path, (1e9, 1e9))
        found.append(load_plugin(path).X)
        plugins.LOADED.clear()
    assert found == [1, 2]


@pytest.mark.parametrize("content", ['raise ValueError("a\\nb")', "def", "raise KeyError"])
def test_a_plugin_that_fails_is_one_line_and_leaves_no_module(tmp_path: Path, content: str) -> None:
    path = tmp_path / "own_failing.py"
    path.write_text(content)
    with pytest.raises(UserError, match=r"own_failing.py' cannot be imported .*; expected one that runs") as said:
        load_plugin(path)
    assert "\n" not in str(said.value)
    assert path.stem not in sys.modules
    path.write_text("X = 3\n")
    assert load_plugin(path).X == 3


def test_a_plugin_takes_the_place_of_no_other_module(tmp_path: Path) -> None:
    path, module = tmp_path / "math.py", sys.modules["math"]
    path.write_text("X = 4\n")
    assert load_plugin(path).X == 4
    assert sys.modules["math"] is module


@pytest.mark.parametrize("path", ["a\0b.py", "missing.py"])
def test_a_path_that_is_none_is_said(path: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*; expected a Python file; correct --plugin"):
        load_plugin(path)
