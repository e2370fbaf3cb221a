"""Parts of pooled and interpolated maps equal those that PyTorch makes whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from upfeat.resampling import bicubic, bilinear, corners, pool_to, pooled, resample, resize

SIDES = st.integers(1, 40)


def _antialiased(length, target, positions):
    return bilinear(length, target, positions, antialias=True, dtype=torch.float64)


def _corners(length, target, positions):
    return corners(length, target, positions, dtype=torch.float64)


def _with_corners(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


KINDS = {
    "corners": (_corners, _with_corners, 1e-12),
    "pooled": (pooled, F.adaptive_avg_pool2d, 1e-12),
    "bilinear": (bilinear, lambda x, size: F.interpolate(x, size, mode="bilinear"), 1e-12),
    "antialiased": (_antialiased, resize, 1e-12),
    "bicubic": (bicubic, lambda x, size: F.interpolate(x, size, mode="bicubic"), 1e-12),
}


@pytest.mark.parametrize("kind", KINDS)
@given(
    size=st.tuples(SIDES, SIDES),
    target=st.tuples(SIDES, SIDES),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(deadline=None, max_examples=40)
def test_a_part_is_part_of_the_whole(kind, size, target, shares):
    reads, whole, tolerance = KINDS[kind]
    x = torch.randn(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = []
    for axis in (0, 1):
        start = int(shares[axis] * (target[axis] - 1))
        count = 1 + int(shares[2 + axis] * (target[axis] - start - 1))
        places.append(torch.arange(start, start + count))
    rows, columns = (reads(*axis) for axis in zip(size, target, places, strict=True))
    expected = whole(x, target)[:, :, places[0]][..., places[1]]
    torch.testing.assert_close(resample(x, rows, columns), expected, rtol=0, atol=tolerance)
    part = x[:, :, rows.first : rows.stop, columns.first : columns.stop]
    found = resample(part, rows, columns, (rows.first, columns.first))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(256, 224), (20, 9), (1000, 999), (7, 30)])
def test_antialiased_weights_are_those_of_the_dtype(size, dtype):
    length, target = size
    unit = torch.eye(length, dtype=dtype)[None, None]
    expected = resize(unit, (target, length))
    reads = bilinear(length, target, torch.arange(target), antialias=True, dtype=dtype)
    found = resample(unit, reads, bilinear(length, length, torch.arange(length)))
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_results_one_pixel_wide():
    """Columns of a map alike across are alike at any width."""
    x = torch.randn(1, 2, 5, 1).expand(-1, -1, -1, 4)
    torch.testing.assert_close(resize(x, (3, 1)), resize(x, (3, 4))[..., :1])
    torch.testing.assert_close(resize(x.mT, (1, 3)), resize(x.mT, (4, 3))[..., :1, :])


def test_positions_come_in_any_order():
    x = torch.randn(1, 2, 6, 5)
    places = torch.tensor([3, 3, 0, 7])
    out = resample(x, bicubic(6, 9, places), bicubic(5, 9, places.flip(0)))
    expected = F.interpolate(x, (9, 9), mode="bicubic")[:, :, places][..., places.flip(0)]
    torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected a call")
@pytest.mark.parametrize("size", [(17, 23), (16, 24), (9, 12), (33, 12)])
def test_pooling_is_the_same_while_a_program_is_compiled(size):
    """PyTorch's compiler has no code for its own pooling to sizes that it does not know."""
    torch._dynamo.reset()
    compiled = torch.compile(pool_to, dynamic=True, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(compiled(x, (9, 12)), F.adaptive_avg_pool2d(x, (9, 12)))
    assert torch.equal(pool_to(x, (9, 12)), F.adaptive_avg_pool2d(x, (9, 12)))
