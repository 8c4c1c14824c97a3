"""The benchmark of the page measures what it says it measures."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import load_script


def test_figures(browser: Any, port: int) -> None:
    benchmark = load_script("page")
    found = benchmark.measure(browser, f"http://127.0.0.1:{port}/", openings=2, seconds=0.5)
    assert len(found["first_frame_s"]["each"]) == 2
    assert found["walk_frames_per_second"] > 0
    slides = found["slider_ms"]
    assert slides["pictures"] >= 1
    assert 0 < slides["p50"] <= slides["p95"] <= slides["max"]
    measured = [bar["measured"] for bar in found["bars"]]
    expected = [max(found["first_frame_s"]["each"]), found["walk_frames_per_second"], slides["p95"]]
    assert measured == pytest.approx(expected)
    for bar in found["bars"]:
        sign, limit = bar["bar"].split()
        assert bar["met"] is (bar["measured"] <= float(limit) if sign == "<=" else bar["measured"] >= float(limit))
