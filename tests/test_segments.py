"""Segments of the quarter circle: exact at their ends, in every precision."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trigflow.process import HALF_PI, Proposal, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.segments import segment_bounds, segment_ends, segment_times

PROCESS = TrigFlow(sigma_data=0.5)
COUNTS = (1, 2, 3, 4, 7, 8, 16)
DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("segments", COUNTS)
def test_ends_are_even_and_exact_at_both_sides(segments: int) -> None:
    ends = segment_ends(segments)
    assert len(ends) == segments + 1
    assert (ends[0], ends[-1]) == (0.0, HALF_PI)
    assert ends == pytest.approx([k * math.pi / 2 / segments for k in range(segments + 1)], rel=1e-15)
    assert list(ends) == sorted(set(ends))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", COUNTS)
def test_an_end_belongs_to_the_segment_below_it_and_the_next_number_to_the_one_above(segments: int, dtype: torch.dtype) -> None:
    ends = torch.tensor(segment_ends(segments), dtype=torch.float64).to(dtype)
    lower, upper = segment_bounds(ends[1:], segments)
    assert torch.equal(lower, ends[:-1])
    assert torch.equal(upper, ends[1:])
    above = torch.nextafter(ends[:-1], torch.full_like(ends[:-1], 2.0))  # of 0, the smallest number there is
    below = torch.nextafter(ends[1:], torch.zeros_like(ends[1:]))
    for t in (above, below):
        assert [bound.tolist() for bound in segment_bounds(t, segments)] == [ends[:-1].tolist(), ends[1:].tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", COUNTS)
def test_the_outermost_times_are_in_the_outermost_segments(segments: int, dtype: torch.dtype) -> None:
    """Time 0, and pi/2 rounded up beyond the float64 number."""
    t = torch.tensor([0.0, PROCESS.t_max, HALF_PI, math.nextafter(HALF_PI, 2.0)], dtype=dtype)
    lower, upper = segment_bounds(t, segments)
    ends = torch.tensor(segment_ends(segments), dtype=torch.float64).to(dtype)
    assert lower.tolist() == [0.0, *[ends[-2].item()] * 3]
    assert upper.tolist() == [ends[1].item(), *[ends[-1].item()] * 3]
    assert lower.dtype == upper.dtype == dtype


@given(st.floats(0, HALF_PI), st.integers(1, 40))
def test_bounds_hold_every_time(t: float, segments: int) -> None:
    time = torch.tensor([[t]], dtype=torch.float64)
    lower, upper = segment_bounds(time, segments)
    assert lower.shape == upper.shape == time.shape
    assert lower.item() < t <= upper.item() or t == lower.item() == 0.0
    assert upper.item() - lower.item() == pytest.approx(HALF_PI / segments, rel=1e-12)


@pytest.mark.parametrize("segments", COUNTS)
def test_training_times_lie_within_their_bounds(segments: int) -> None:
    t = Proposal(-0.5, 2.0).sample(PROCESS, 10_000, torch.Generator().manual_seed(0))
    lower, upper = segment_bounds(t, segments)
    assert torch.all((lower < t) & (t <= upper))
    assert len(lower.unique()) == segments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", COUNTS)
def test_the_sampler_jumps_from_each_time_to_the_lower_end_of_its_segment(segments: int, dtype: torch.dtype) -> None:
    """Also after both are rounded, so a network is asked for the jumps that it was trained on."""
    times = segment_times(PROCESS, segments)
    assert len(times) == segments
    assert times[0] == PROCESS.t_max
    for t, end in pairwise([*times, 0.0]):
        lower, _ = segment_bounds(torch.full((2,), t, dtype=dtype), segments)
        assert torch.equal(lower, torch.full((2,), end, dtype=dtype))


def test_impossible_numbers_are_refused() -> None:
    for segments in (0, -2):
        with pytest.raises(UserError, match=rf"^{segments} segments of the quarter circle; expected at least 1; raise"):
            segment_ends(segments)
        with pytest.raises(UserError, match="expected at least 1"):
            segment_bounds(torch.ones(1), segments)
    low = TrigFlow(sigma_data=0.5, sigma_max=0.8)  # t_max = 1.012
    assert len(segment_times(low, 2)) == 2
    said = r"^4 segments .* begins at 1\.1781; expected it to begin below t_max = 1\.0122; use fewer segments"
    with pytest.raises(UserError, match=said):
        segment_times(low, 4)
