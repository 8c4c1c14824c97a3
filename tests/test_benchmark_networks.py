"""The page on the networks of others, and the networks of the benchmark that no test of diffusers has."""

from __future__ import annotations

import sys
from unittest import mock

import pytest

from scripts import BENCHMARKS, load_script

pytest.importorskip("diffusers", reason="diffusers is not installed; it is a development dependency")


def test_the_page_is_made_of_the_results() -> None:
    with mock.patch.object(sys, "path", [*sys.path, str(BENCHMARKS)]), pytest.raises(SystemExit) as done:
        load_script("networks").main(["--check"])
    assert done.value.code == 0, "docs/networks.md is not up to date; run: python benchmarks/networks.py --page"
