"""Modules that have moved are still there under their old names, and say the new ones."""

from __future__ import annotations

import importlib
import sys

import pytest

from trigflow.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_has_what_the_new_one_has_and_says_so(old: str) -> None:
    for name in [name for name in sys.modules if name == old]:
        del sys.modules[name]
    with pytest.warns(FutureWarning, match=f"{old} is now {MOVED[old]}".replace(".", r"\.")):
        alias = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    public = [name for name in vars(new) if not name.startswith("__")]
    assert public
    assert all(getattr(alias, name) is getattr(new, name) for name in public)


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("trigflow.hub.nothing")
