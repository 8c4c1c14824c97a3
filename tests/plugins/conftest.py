"""What a module's plugins have added is taken away after it, so that no other test sees it and no run folder names them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trigflow import conditions, plugins
from trigflow.codecs import CODECS
from trigflow.data.sources.opening import REGISTERED
from trigflow.lab.recipes import RECIPES
from trigflow.networks import NETWORKS
from trigflow.objectives import OBJECTIVES

TABLES: tuple[dict[str, object], ...] = (
    CODECS, REGISTERED, RECIPES, NETWORKS, OBJECTIVES, conditions.INPUTS, plugins.LOADED,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    before = [dict(table) for table in TABLES]
    plugins.LOADED.clear()
    yield
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)
