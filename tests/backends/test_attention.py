"""Attention from pixels to rectangles of cells: every backend against the reference."""

import pytest
import torch

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.upsamplers.attention import relative_window, shifted_window, whole_window

REASON = dispatch.availability()["cpu"]
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
OPTIONS = {
    "relative": lambda cells, length: relative_window(cells, length, 0.1),
    "shifted": lambda cells, length: shifted_window(cells, length, 3),
    "whole": whole_window,
}
# grid, output, channels of queries, heads, channels of values, blocks, window
CASES = [
    ((7, 5), (49, 35), 16, 4, 8, None, "relative"),
    ((4, 6), (61, 47), 32, 2, 8, [3, 5], "shifted"),
    ((12, 10), (24, 35), 20, 4, 37, [10, 2, 0, 25], "shifted"),
    ((1, 2), (5, 3), 2, 2, 3, None, "whole"),
    ((9, 11), (5, 4), 128, 4, 100, None, "relative"),
    ((3, 20), (8, 60), 64, 1, 5, None, "whole"),
    ((3, 17), (20, 100), 8, 4, 64, [16] * 4, "shifted"),
    ((9, 11), (20, 37), 16, 2, 20, None, "whole"),
]


def inputs(case, dtype=torch.float64, batch=2):
    grid, size, depth, heads, channels, blocks, window = case
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, depth, *size), (batch, depth, *grid), (batch, channels, *grid))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ranges = [OPTIONS[window](*pair) for pair in zip(grid, size, strict=True)]
    return [each.to(dtype) for each in tensors], ranges, {"heads": heads, "blocks": blocks}


def run(case, backend, dtype, batch=2):
    tensors, ranges, options = inputs(case, dtype, batch)
    tensors = [each.requires_grad_() for each in tensors]
    out = functional.window_attention(*tensors, *ranges, **options, backend=backend)
    weighting = torch.linspace(-1, 1, out.shape[3]).to(dtype)
    return [out, *torch.autograd.grad((out * weighting).sum(), tensors)]


def error(found, expected):
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


@pytest.mark.parametrize("case", CASES)
def test_eager_equals_the_reference(case):
    for found, expected in zip(
        run(case, "eager", torch.float64), run(case, "reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(found, expected)


@needs_library
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)]
)
def test_compiled_equals_the_reference(case, dtype, most, rounding):
    exact = [each.to(dtype).double() for each in inputs(case)[0]]
    exact = [each.requires_grad_() for each in exact]
    _, ranges, options = inputs(case)
    out = functional.window_attention(*exact, *ranges, **options, backend="reference")
    weighting = torch.linspace(-1, 1, out.shape[3]).to(dtype).double()
    expected = [out, *torch.autograd.grad((out * weighting).sum(), exact)]
    for found, wanted in zip(run(case, "cpu", dtype), expected, strict=True):
        assert found.dtype == dtype
        assert error(found, wanted) < most + rounding


@needs_library
def test_layouts_and_types(isa):
    case = CASES[2]
    (queries, keys, values), ranges, options = inputs(case, torch.float32)
    expected = functional.window_attention(queries, keys, values, *ranges, **options)
    last = values.contiguous(memory_format=torch.channels_last)
    out = functional.window_attention(
        queries.contiguous(memory_format=torch.channels_last), keys, last, *ranges, **options
    )
    assert out.stride(1) == 1
    assert torch.equal(out, expected)
    wide = torch.cat([queries, queries], dim=1)[:, ::2]
    part = functional.window_attention(wide, keys, values, *ranges, **options)
    again = functional.window_attention(wide.contiguous(), keys, values, *ranges, **options)
    assert torch.equal(part, again)
    half = functional.window_attention(queries, keys, values.half(), *ranges, **options)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)


@needs_library
@pytest.mark.parametrize(("blocks", "window"), [([70, 70], "shifted"), (None, "relative")])
def test_large_planar_output_and_threads(blocks, window, threads, rounding):
    """Past 16 MiB planes are written past the caches; nothing depends on the threads."""
    case = ((5, 9), (130, 251), 16, 2, 140, blocks, window)
    expected = None
    for count in (1, 3):
        threads(count)
        found = run(case, "cpu", torch.float32, batch=1)
        expected = found if expected is None else expected
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    exact = run(case, "eager", torch.float64, batch=1)
    for found, wanted in zip(expected, exact, strict=True):
        assert error(found, wanted) < rounding


@needs_library
def test_nan_stays_where_it_is():
    tensors, ranges, options = inputs(CASES[1], torch.float32)
    tensors[0][0, :, 5, 7] = torch.nan
    out = functional.window_attention(*tensors, *ranges, **options, backend="cpu")
    assert out[0, :, 5, 7].isnan().all()
    assert int(out.isnan().sum()) == out.shape[1]


@needs_library
@pytest.mark.slow
def test_opcheck():
    (queries, keys, values), ranges, options = inputs(CASES[1], torch.float32)
    arguments = (*ranges, options["heads"], 0.25, options["blocks"])
    op = torch.ops.upfeat.window_attention_cpu.default
    torch.library.opcheck(op, (queries, keys, values, *arguments))


def test_bad_input_in_one_line():
    (queries, keys, values), (rows, columns), _ = inputs(CASES[0])

    def refused(match, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            functional.window_attention(*arguments, **options)

    given = (queries, keys, values)
    refused("rows has 4 numbers", *given, rows[:4], columns)
    refused("each range must hold one", *given, [3] * len(rows), columns)
    refused("blocks=\\[3, 4\\]", *given, rows, columns, heads=2, blocks=[3, 4])
    refused("multiple of heads=3", *given, rows, columns, heads=3)
    refused("batch and grid", queries, keys, values[:1], rows, columns)
    refused("convert it with", queries, keys, values.long(), rows, columns)
    refused("has no such operator|float64", *given, rows, columns, backend="cpu")


@needs_library
def test_logits_far_apart(isa):
    """Weights that underflow are 0 (and take no longer); a row of equal logits keeps equal ones."""
    queries, keys = torch.full((1, 4, 8, 24), 20.0), torch.zeros(1, 4, 2, 3)
    keys[..., 1] = 20.0
    values = torch.arange(6.0).reshape(1, 1, 2, 3)
    rows, columns = whole_window(2, 8), whole_window(3, 24)
    out = functional.window_attention(queries, keys, values, rows, columns, heads=2)
    assert torch.equal(out, torch.full((1, 1, 8, 24), 2.5))  # the mean of cells 1 and 4


@needs_library
@pytest.mark.parametrize("cells", [(2, 3), (8, 9)])
def test_faint_weights_are_zero(isa, cells):
    """Subnormal weights would slow down every sum that they are part of."""
    generator = torch.Generator().manual_seed(0)
    queries = 60 * torch.randn(1, 8, 16, 40, generator=generator)
    keys = torch.randn(1, 8, *cells, generator=generator)
    values = torch.eye(cells[0] * cells[1]).reshape(1, -1, *cells)  # the output is the weights
    rows, columns = whole_window(cells[0], 16), whole_window(cells[1], 40)
    weights = functional.window_attention(queries, keys, values, rows, columns, heads=2)
    faint = weights[(weights != 0) & (weights < 1e-25)]
    assert (weights == 0).float().mean() > 0.15
    assert (faint >= torch.finfo(torch.float32).tiny).all()
