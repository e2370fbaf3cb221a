"""The compiled encoder of the neighbourhood upsampler against PyTorch's layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upfeat
from upfeat.backends import dispatch
from upfeat.backends.cpu import operators as cpu
from upfeat.types import Window
from upfeat.upsamplers.encoder import PyramidEncoder, plan, unit
from upfeat.upsamplers.maps import cut

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

# Image, window (top, left, height, width), width of queries, levels: even and odd sides, tiny,
# fewer levels than there could be and more, widths beside any vector.
CASES = [
    ((48, 64), (0, 0, 48, 64), 32, 4),
    ((61, 45), (0, 0, 61, 45), 8, 4),
    ((61, 45), (17, 30, 9, 15), 33, 3),
    ((90, 77), (40, 3, 1, 1), 32, 5),
    ((1, 1), (0, 0, 1, 1), 4, 3),
    ((2, 40), (1, 5, 1, 30), 5, 4),
    ((30, 31), (4, 4, 26, 27), 64, 1),
    ((5, 7), (0, 2, 5, 5), 1, 9),
]


def make(width, levels, channels=3):
    torch.manual_seed(width + levels)
    encoder = PyramidEncoder(width, levels, channels).requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "last" in name:  # 0 at the start
            nn.init.normal_(parameter, std=0.5 / width**0.5)
    return encoder


def draw(size, channels=3, batch=2):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(batch, channels, *size, generator=generator)


def run(encoder, guidance, window, *, of_unit_length=True):
    parameters = encoder.parameters_in_order()
    return dispatch.call("pyramid_queries", "cpu", guidance, parameters, window, of_unit_length)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_layers(isa, case):
    size, window, width, levels = case
    encoder, guidance = make(width, levels), draw(size)
    exact = encoder.double()(guidance.double())
    found = run(encoder.float(), guidance, window, of_unit_length=False)
    expected = cut(exact, Window(*window))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * scale)
    found = run(encoder, guidance, window)
    torch.testing.assert_close(found.double(), unit(expected), rtol=0, atol=3e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window_is_the_window_of_the_whole(case):
    size, window, width, levels = case
    encoder, guidance = make(width, levels).double(), draw(size).double()
    expected = cut(encoder(guidance), Window(*window))
    found = encoder.window(guidance, Window(*window))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(plan(encoder.sizes(size), Window(*window))) <= levels


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 9), (15, 16)])
def test_means_over_cells_are_those_of_the_queries(isa, case, grid):
    size, _, width, levels = case
    encoder, guidance = make(width, levels), draw(size)
    expected = F.adaptive_avg_pool2d(unit(encoder.double()(guidance.double())), grid)
    parameters = encoder.float().parameters_in_order()
    for top, left in ((0, 0), (grid[0] // 2, grid[1] // 3)):
        cells = (top, left, grid[0] - top, max((grid[1] - left) // 2, 1))
        found = dispatch.call("pyramid_means", "cpu", guidance, parameters, grid, cells)
        wanted = cut(expected, Window(*cells))
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_bands_without_corrections(isa, channels):
    encoder = PyramidEncoder.untrained(16, 3, channels)
    guidance = draw((40, 30), channels)
    expected = unit(encoder(guidance))[:, :, 10:30]
    found = run(encoder, guidance, (10, 0, 20, 30))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_colours_far_beyond_the_usual(isa):
    encoder, guidance = make(32, 2), 1e5 * draw((20, 24))
    entry = encoder.entry(guidance).double()
    expected = encoder.join[0].double()(torch.sin(entry))
    encoder = make(32, 1)
    encoder.join[0].load_state_dict(make(32, 2).join[0].state_dict())
    encoder.entry.load_state_dict(make(32, 2).entry.state_dict())
    # Products of 1e5 are rounded to 0.01: it is the sine of nearly the same.
    found = run(encoder, guidance, (0, 0, 20, 24), of_unit_length=False)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().median() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_is_rounded_once(isa, dtype):
    encoder, guidance = make(32, 3), draw((33, 40)).to(dtype)
    expected = run(encoder, guidance.float(), (3, 4, 20, 30))
    found = run(encoder, guidance, (3, 4, 20, 30))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_strides_and_threads_do_not_matter(isa, threads):
    encoder, guidance = make(32, 4), draw((130, 90))
    big = torch.full((5, 3, 261, 181), torch.nan)
    big[1::2, :, 1::2, 1::2] = guidance
    changed = [
        guidance.contiguous(memory_format=torch.channels_last),
        big[1::2, :, 1::2, 1::2],
        guidance.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    threads(1)
    expected = run(encoder, guidance, (2, 3, 120, 80))
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for count in (1, 2, 5):
        threads(count)
        for one in changed:
            assert torch.equal(run(encoder, one, (2, 3, 120, 80)), expected)


def test_what_does_not_fit_is_refused():
    encoder, guidance = make(8, 2), draw((20, 24))
    with pytest.raises(ValueError, match="does not lie in"):
        run(encoder, guidance, (10, 0, 11, 24))
    with pytest.raises(ValueError, match=r"entry has shape \(8, 3, 3, 3\); it must be \(8, 4"):
        run(encoder, draw((20, 24), 4), (0, 0, 20, 24))
    with pytest.raises(ValueError, match="float64"):
        run(encoder, guidance.double(), (0, 0, 20, 24))


def test_upsamplers_run_it_and_nothing_else_changes(monkeypatch):
    up = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=3).eval()
    features, guidance = torch.randn(1, 4, 5, 6), draw((40, 48), batch=1)
    ran = []
    compiled = dispatch.BACKENDS["cpu"].pyramid_queries
    monkeypatch.setattr(
        dispatch.BACKENDS["cpu"], "pyramid_queries", lambda *a: ran.append(1) or compiled(*a)
    )
    with torch.no_grad():
        found = up(features, guidance)
        assert ran == [1]
        up.set_backend("eager")
        torch.testing.assert_close(up(features, guidance), found, rtol=0, atol=1e-5)
    assert ran == [1]
    up.set_backend("auto")
    up(features, guidance).sum().backward()  # gradients go through PyTorch's layers
    assert ran == [1]


@pytest.mark.slow
def test_opcheck():
    encoder, guidance = make(8, 3), draw((20, 24), batch=1)
    arguments = (guidance, encoder.parameters_in_order(), [2, 3, 10, 12], True)
    torch.library.opcheck(torch.ops.upfeat.pyramid_queries_cpu.default, arguments)
    arguments = (guidance, encoder.parameters_in_order(), [3, 5], [1, 0, 2, 4])
    torch.library.opcheck(torch.ops.upfeat.pyramid_means_cpu.default, arguments)
