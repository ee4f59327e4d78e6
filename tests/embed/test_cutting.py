"""Clips cover an interval at equal distances, whatever its length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avcl_jax.embed.cutting import clip_starts


@pytest.mark.parametrize(
    ("begin", "end", "span", "hop", "starts"),
    [
        (0.0, 6.0, 2.0, 2.0, [0, 2, 4]),
        (0.0, 6.09, 2.0, 2.0, [0, 2, 4]),  # a rest of less than a twentieth of a clip
        (0.0, 5.0, 2.0, 2.0, [0, 2, 3]),  # the last one ends with the interval
        (0.0, 5.0, 2.0, 1.0, [0, 1, 2, 3]),
        (0.0, 1.0, 2.0, 2.0, [0]),
        (0.5, 6.0, 2.0, 2.0, [0.5, 2, 4]),  # audio that begins late
        (0.05, 6.0, 2.0, 2.0, [0, 2, 4]),
        (0.0, 25.0, 2.0, 10.0, [0, 10, 20]),
        (0.0, 21.0, 2.0, 10.0, [0, 10]),  # a sample of a file, not its cover
        (3.0, 4.0, 2.0, 10.0, [3]),
    ],
)
def test_starts(begin, end, span, hop, starts):
    np.testing.assert_allclose(clip_starts(begin, end, span, hop), starts)


_SECONDS = st.floats(0.1, 50)


@given(st.floats(0, 20), _SECONDS, st.floats(0.2, 5), st.floats(0.1, 1))
def test_clips_without_gaps_cover_the_interval(begin, length, span, density):
    end, hop = begin + length, span * density
    starts = clip_starts(begin, end, span, hop)
    slack = 0.051 * span
    assert len(starts)
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= span + 1e-5).all()
    assert abs(starts[0] - begin) <= slack
    assert starts[-1] + span >= end - slack
    if length >= span:
        assert starts[-1] + span <= end + slack
    else:
        assert len(starts) == 1
