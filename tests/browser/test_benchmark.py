"""The benchmark of the page measures what it says it measures."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from browser.helpers import LIMITS
from scripts import load_script
from serve.helpers import reader, running
from trigflow.serve.app import create_app
from trigflow.serve.offers import offer_of


@pytest.mark.parametrize("what", ["slider", "key"])
def test_figures(what: str, browser: Any, port: int) -> None:
    benchmark = load_script("page")
    app = create_app([offer_of(reader(), LIMITS)], LIMITS)
    with running(app) if what == "key" else contextlib.nullcontext(port) as served:
        found = benchmark.measure(browser, f"http://127.0.0.1:{served}/", openings=2, seconds=0.5)
    assert len(found["first_frame_s"]["each"]) == 2
    assert found["walk_frames_per_second"] > 0
    slides = found[f"{what}_ms"]
    assert slides["pictures"] >= 1
    assert 0 < slides["p50"] <= slides["p95"] <= slides["max"]
    measured = [bar["measured"] for bar in found["bars"]]
    expected = [max(found["first_frame_s"]["each"]), found["walk_frames_per_second"], slides["p95"]]
    assert measured == pytest.approx(expected if what == "slider" else [expected[0], expected[2]])
    for bar in found["bars"]:
        sign, limit = bar["bar"].split()
        assert bar["met"] is (bar["measured"] <= float(limit) if sign == "<=" else bar["measured"] >= float(limit))
