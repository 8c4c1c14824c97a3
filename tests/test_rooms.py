"""Imports go one way: the rooms of the package, read off its source."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import trigflow

ROOT = Path(trigflow.__file__).parent
ORDER = (
    ("cli",),
    ("lab", "serve", "deploy"),
    ("training", "evaluation"),
    ("data",),
    ("models",),
    ("objectives", "samplers"),
    ("networks", "codecs", "conditions"),
    ("segments", "migrations"),
    ("process", "plugins"),
)
"""From the rooms that import to those that are imported; the files beside the rooms are rooms of their own here."""
ALONE = ("tangent", "runtime")
"""Import nothing else of the package but its version."""
ANYWHERE = ("runtime", "tangent", "version")
"""May be imported by everything."""
OUTSIDE = ("", "__main__", "moved")
"""The package itself, which imports what it offers when it is asked for."""


@functools.cache
def modules() -> dict[str, Path]:
    """From the dotted name below `trigflow` to the file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(name: str, lazy: bool) -> frozenset[str]:
    """Modules of the package that a module imports: at its top, or with `lazy` anywhere but for type checkers."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    found = set()
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trigflow":
            base = ".".join(node.module.split(".")[1:])
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in modules() else base)
        elif isinstance(node, ast.Import):
            found |= {".".join(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "trigflow"}
    return frozenset(found - {name})


def room(name: str) -> str:
    return name.split(".")[0]


def level(name: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room(name) in rooms)


def test_every_module_has_a_room() -> None:
    known = {*ALONE, *ANYWHERE, *OUTSIDE, *(name for rooms in ORDER for name in rooms)}
    assert {room(name) for name in modules()} <= known


def test_what_is_installed_does_without_the_studies() -> None:
    assert not [
        name for name, path in modules().items() if re.search(r"^\s*(from|import) studies\b", path.read_text("utf-8"), re.M)
    ]


@pytest.mark.parametrize("alone", ALONE)
def test_some_rooms_stand_alone(alone: str) -> None:
    foreign = {
        (name, other)
        for name in modules()
        if room(name) == alone
        for other in imports(name, True)
        if room(other) not in (alone, "version")
    }
    assert foreign == set()


def test_no_arrow_points_up() -> None:
    wrong = {
        (name, other)
        for name in modules()
        if room(name) not in (*ALONE, *ANYWHERE, *OUTSIDE)
        for other in imports(name, True)
        if room(other) not in ANYWHERE and (room(other) in OUTSIDE or level(other) < level(name))
    }
    assert wrong == set()


def test_no_circle_of_files() -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done:
            return
        for other in sorted(imports(name, False)):
            walk(other, (*path, name))
        done.add(name)

    for name in sorted(modules()):
        if room(name) not in OUTSIDE:
            walk(name, ())
