"""Tiles cover a map once, halos stay inside, blends are a partition of unity."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upfeat.tiling import overlapping, raised_cosine, split

sides = st.integers(1, 40)


@given(sides, sides, st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_cores_cover_the_map_once_and_outer_windows_hold_the_halo(height, width, step, tiles, halo):
    covered = np.zeros((height, width), dtype=int)
    for tile in split((height, width), step * tiles, halo=halo, step=step):
        core, outer, inner = tile.core, tile.outer, tile.inner
        covered[core.top : core.bottom, core.left : core.right] += 1
        assert outer.top % step == 0
        assert outer.left % step == 0
        assert 0 <= outer.top <= max(core.top - halo, 0)
        assert min(core.bottom + halo, height) <= outer.bottom <= height
        assert min(core.right + halo, width) <= outer.right <= width
        assert (inner.top + outer.top, inner.left + outer.left) == core[:2]
        assert inner[2:] == core[2:]
    assert (covered == 1).all()


@given(sides, sides, st.integers(1, 12), st.data())
def test_overlapping_windows_cover_the_map_and_blend_to_one(height, width, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    weights = np.zeros((height, width))
    for part in overlapping((height, width), window, overlap):
        assert part[2:] == (min(window, height), min(window, width))
        assert part.bottom <= height
        assert part.right <= width
        down = raised_cosine(part.top, part.height, height, overlap)
        across = raised_cosine(part.left, part.width, width, overlap)
        weights[part.top : part.bottom, part.left : part.right] += np.outer(down, across)
    assert (weights > 0).all()


def test_a_blend_falls_smoothly_and_never_at_the_border_of_the_map():
    weights = raised_cosine(0, 8, 20, 4)
    assert weights[:4] == [1, 1, 1, 1]
    assert all(a > b for a, b in pairwise(weights[3:]))
    fall, rise = np.array(weights[4:]), np.array(raised_cosine(4, 8, 20, 4)[:4])
    np.testing.assert_allclose(fall + rise, 1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: list(split((4, 4), 0)), "tile=0"),
        (lambda: list(split((4, 4), 3, step=2)), "step=2"),
        (lambda: list(split((4, 4), 2, halo=-1)), "halo=-1"),
        (lambda: list(overlapping((4, 4), 2, 2)), "overlap=2"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
