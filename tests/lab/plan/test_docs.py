"""The plan shown in docs/recipes.md is the one that its command prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"


def test_the_plan_in_the_documentation_is_the_commands(cli: Callable[..., Any]) -> None:
    page = PAGE.read_text(encoding="utf-8").split("\n## Plans\n")[1]
    command = re.search(r"^    trigflow (plan .+)$", page, re.MULTILINE)
    block = re.search(r"^```\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    assert command is not None
    assert block is not None
    shown = block[1].rstrip().splitlines()
    printed = cli(*shlex.split(command[1]))
    assert printed.code == 0, printed.err
    lines = [line.rstrip() for line in printed.out.splitlines()]
    start = lines.index(shown[0])
    assert lines[start : start + len(shown)] == shown
