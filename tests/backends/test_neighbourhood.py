"""Neighbourhoods: weights from queries and keys, and the sum over cells, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.backends.cpu import library as cpu_library
from upfeat.backends.cpu import operators as cpu

# (B, D, C), (h, w), (H, W), radius: whole and odd ratios, tiny, not square, broken ratios, ratios
# on both sides of 1, one cell, channels beside any block, pixels on the border of two cells.
CASES = [
    ((1, 32, 31), (3, 2), (48, 32), 2),
    ((2, 6, 5), (4, 3), (9, 7), 1),
    ((2, 5, 100), (3, 5), (21, 35), 2),
    ((1, 1, 1), (1, 1), (1, 2), 2),
    ((2, 9, 33), (2, 3), (5, 15), 2),
    ((1, 40, 24), (6, 7), (3, 9), 2),
    ((1, 16, 17), (7, 5), (40, 33), 3),
    ((3, 3, 7), (6, 6), (6, 6), 1),
    ((2, 5, 3), (6, 11), (6, 11), 4),
    ((1, 4, 2), (9, 5), (9, 5), 8),
    ((1, 4, 3), (3, 3), (1, 1), 1),
]


@pytest.fixture(params=["eager", *cpu_library.ISAS])
def backend(request, monkeypatch):
    if request.param == "eager":
        return "eager"
    if cpu.unavailable_reason() is not None:
        pytest.skip(str(cpu.unavailable_reason()))
    if request.param not in cpu.library_info()["available"]:
        pytest.skip(f"this machine or build has no {request.param}")
    monkeypatch.setenv("UPFEAT_CPU_ISA", request.param)
    return "cpu"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=1)


def attention(case, temperature=6.0, sigma=0.7):
    (batch, depth, _), grid, size, _ = case
    scalars = (torch.tensor(temperature), torch.tensor(sigma))
    return unit(batch, depth, *size), unit(batch, depth, *grid, seed=1), *scalars


def values(case):
    (batch, _, channels), grid, size, radius = case
    weights = randn(batch, (2 * radius + 1) ** 2, *size, seed=3).softmax(1)
    return randn(batch, channels, *grid, seed=2), weights


def with_gradients(operator, backend, inputs, grad):
    dtype = torch.float64 if backend == "reference" else torch.float32
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in inputs]
    out = operator(*leaves, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad.to(dtype))


def close(actual, expected, tolerance=2e-5):
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("temperature", "sigma"), [(6.0, 0.7), (60.0, 0.1), (0.0, -20.0)])
def test_weights_and_their_gradients_equal_the_reference(backend, case, temperature, sigma):
    def weights(*inputs, backend):
        return functional.neighbourhood_weights(*inputs, radius=case[-1], backend=backend)

    inputs = attention(case, temperature, sigma)
    (batch, *_), _, size, radius = case
    grad = randn(batch, (2 * radius + 1) ** 2, *size, seed=4)
    found = with_gradients(weights, backend, inputs, grad)
    expected = with_gradients(weights, "reference", inputs, grad)
    tolerance = 1e-4 * max(1.0, temperature / 6)  # the scalars sum thousands of signed terms
    for a, b in zip(found, expected, strict=True):
        close(a, b, tolerance)
    close(found[0].sum(1), torch.ones(batch, *size))
    assert found[0].min() >= 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_upsample_and_its_gradients_equal_the_reference(backend, case, layout):
    (batch, _, channels), _, size, _ = case
    features, weights = values(case)
    features = features.contiguous(memory_format=layout)
    grad = randn(batch, channels, *size, seed=4).contiguous(memory_format=layout)
    operator = functional.neighbourhood_upsample
    found = with_gradients(operator, backend, (features, weights), grad)
    expected = with_gradients(operator, "reference", (features, weights), grad)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_the_reference_is_the_formula():
    grid, size, radius = (2, 3), (5, 4), 1
    queries, keys = unit(1, 3, *size).double(), unit(1, 3, *grid, seed=1).double()
    out = functional.neighbourhood_weights(queries, keys, 5.0, 0.6, radius=1, backend="reference")
    for y in range(size[0]):
        for x in range(size[1]):
            place = [(p + 0.5) * c / s for p, c, s in zip((y, x), grid, size, strict=True)]
            shares = []
            for tap in range(9):
                cell = [
                    math.floor(p) + d - radius for p, d in zip(place, divmod(tap, 3), strict=True)
                ]
                apart = [p - (c + 0.5) for p, c in zip(place, cell, strict=True)]
                i, j = (min(max(c, 0), n - 1) for c, n in zip(cell, grid, strict=True))
                product = (queries[0, :, y, x] * keys[0, :, i, j]).sum().item()
                near = max(abs(a) for a in apart) < radius + 0.5 - 1e-4
                distance = sum(a * a for a in apart) / (2 * 0.6**2)
                shares.append(near * math.exp(5.0 * product - distance))
            expected = torch.tensor(shares, dtype=torch.float64) / sum(shares)
            close(out[0, :, y, x], expected, 1e-12)


def test_eager_gradients_are_exact():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 5, 3), (1, 2, 2, 3), (), ()]
    inputs = [
        torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()
        for shape in shapes
    ]
    assert torch.autograd.gradcheck(
        lambda *v: functional.neighbourhood_weights(*v, radius=1, backend="eager"), inputs
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_constants_and_bounds_are_kept(backend, case):
    features, weights = values(case)
    constant = torch.full_like(features, 0.7)
    out = functional.neighbourhood_upsample(constant, weights, backend=backend)
    close(out, torch.full_like(out, 0.7), 1e-6)
    out = functional.neighbourhood_upsample(features, weights, backend=backend)
    assert out.min() >= features.min() - 1e-5
    assert out.max() <= features.max() + 1e-5


@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flips_commute(backend, case, dims):
    def upsample(features, queries, keys, temperature, sigma):
        weights = functional.neighbourhood_weights(
            queries, keys, temperature, sigma, radius=case[-1], backend=backend
        )
        return functional.neighbourhood_upsample(features, weights, backend=backend)

    queries, keys, *scalars = attention(case)
    features, _ = values(case)
    flipped = [value.flip(dims) for value in (features, queries, keys)]
    close(upsample(*flipped, *scalars).flip(dims), upsample(features, queries, keys, *scalars))


def test_a_pixel_between_two_cells_sees_as_many_on_either_side(backend):
    queries, keys = torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 1, 2)
    out = functional.neighbourhood_weights(queries, keys, 1.0, 1.0, radius=1, backend=backend)
    row = out.reshape(3, 3, 5)[1, :, 2]  # the pixel at 1, between cell 0 and its own, cell 1
    assert row[2] == 0
    assert row[0] == row[1] > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows(backend, bad):
    queries, keys = torch.ones(1, 3, 6, 20), torch.ones(1, 3, 2, 5)
    queries[0, 1, 2, 7] = bad
    out = functional.neighbourhood_weights(queries, keys, 2.0, 0.7, backend=backend)
    wrong = torch.zeros(6, 20, dtype=torch.bool)
    wrong[2, 7] = True
    assert torch.equal(out.isnan().any(1)[0], wrong)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window_equals_the_window_of_the_whole(backend, case):
    _, _, (height, width), radius = case
    queries, *rest = attention(case)
    options = {"radius": radius, "backend": backend}
    whole = functional.neighbourhood_weights(queries, *rest, **options)
    for top, left in ((0, 0), (height // 2, width // 3), (height - 1, 0)):
        tall, wide = height - top, max(1, (width - left) // 2)
        rows, columns = slice(top, top + tall), slice(left, left + wide)
        out = functional.neighbourhood_weights(
            queries[:, :, rows, columns],
            *rest,
            output_size=(height, width),
            window=(top, left, tall, wide),
            **options,
        )
        close(out, whole[:, :, rows, columns], 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window_of_the_sum_equals_the_window_of_the_whole(backend, case):
    features, weights = values(case)
    (batch, _, channels), _, (height, width), _ = case
    whole = functional.neighbourhood_upsample(features, weights, backend="reference")
    for top, left in ((0, 0), (height // 2, width // 3), (height - 1, 0)):
        tall, wide = height - top, max(1, (width - left) // 2)
        rows, columns = slice(top, top + tall), slice(left, left + wide)
        place = {"output_size": (height, width), "window": (top, left, tall, wide)}

        def operator(*inputs, backend, place=place):
            return functional.neighbourhood_upsample(*inputs, **place, backend=backend)

        inputs = features, weights[:, :, rows, columns]
        grad = randn(batch, channels, tall, wide, seed=4)
        found = with_gradients(operator, backend, inputs, grad)
        expected = with_gradients(operator, "reference", inputs, grad)
        for a, b in zip(found, expected, strict=True):
            close(a, b)
        close(found[0], whole[:, :, rows, columns])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cells_that_a_window_reads_are_enough(backend, case):
    (batch, *_), grid, (height, width), radius = case
    queries, keys, *scalars = attention(case)
    features, _ = values(case)
    for window in ((height // 2, width // 3, 1 + height // 3, 1), (0, width - 1, height, 1)):
        rows, columns = (
            slice(start, start + count) for start, count in zip(*pairs(window), strict=True)
        )
        ends = [
            [(2 * at + 1) * cells // (2 * length) for at in (start, start + count - 1)]
            for start, count, cells, length in zip(
                *pairs(window), grid, (height, width), strict=True
            )
        ]
        spans = [
            (max(low - radius, 0), min(high + radius + 1, cells))
            for (low, high), cells in zip(ends, grid, strict=True)
        ]
        cells = (*(low for low, _ in spans), *(high - low for low, high in spans))
        near = tuple(slice(*span) for span in spans)
        whole = {"output_size": (height, width), "window": window, "backend": backend}
        part = {**whole, "grid_size": grid, "cells": cells}
        seen = queries[:, :, rows, columns]
        weights = functional.neighbourhood_weights(seen, keys, *scalars, radius=radius, **whole)
        inputs = seen, keys[(..., *near)], *scalars
        out = functional.neighbourhood_weights(*inputs, radius=radius, **part)
        close(out, weights, 1e-6)
        grad = randn(batch, features.shape[1], *weights.shape[2:], seed=4)
        found, expected = (
            with_gradients(
                lambda f, w, *, backend, o=options: functional.neighbourhood_upsample(
                    f, w, **{**o, "backend": backend}
                ),
                backend,
                (given, weights),
                grad,
            )
            for given, options in ((features[(..., *near)], part), (features, whole))
        )
        close(found[0], expected[0], 1e-6)
        close(found[1], expected[1][(..., *near)], 1e-5)
        close(found[2], expected[2], 1e-5)


def pairs(window):
    return window[:2], window[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_is_rounded_once(isa, dtype):
    case = ((2, 20, 19), (4, 5), (13, 20), 2)
    queries, keys, *scalars = (value.to(dtype) for value in attention(case))
    grad = randn(2, 25, 13, 20, seed=5).to(dtype)
    weights, *grads = with_half_gradients(queries, keys, *scalars, grad=grad)
    expected = with_gradients(
        functional.neighbourhood_weights, "reference", (queries, keys, *scalars), grad
    )
    for a, b in zip((weights, *grads), expected, strict=True):
        assert a.dtype == dtype
        close(a, b, torch.finfo(dtype).eps)
    features = values(case)[0].to(dtype)
    out = functional.neighbourhood_upsample(features, weights, backend="cpu")
    wanted = functional.neighbourhood_upsample(
        features.double(), weights.double(), backend="reference"
    )
    close(out, wanted, torch.finfo(dtype).eps)


def with_half_gradients(*inputs, grad):
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = functional.neighbourhood_weights(*leaves, backend="cpu")
    return out, *torch.autograd.grad(out, leaves, grad)


def test_strides_do_not_matter(backend):
    case = ((2, 6, 20), (4, 5), (13, 20), 2)
    queries, keys, *scalars = attention(case)
    features, weights = values(case)

    def sparse(value):
        big = torch.full([2 * size + 1 for size in value.shape], torch.nan)
        big[:, 1::2][:, : value.shape[1], 1::2, 1::2][: value.shape[0]] = value
        return big[: value.shape[0], 1::2, 1::2, 1::2]

    def last(value):
        return value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def transposed(value):
        return value.transpose(2, 3).contiguous().transpose(2, 3)

    wanted = functional.neighbourhood_weights(queries, keys, *scalars, backend=backend)
    summed = functional.neighbourhood_upsample(features, weights, backend=backend)
    grad = randn(*wanted.shape)
    for change in (sparse, last, transposed):
        inputs = [change(queries).detach().requires_grad_(), change(keys).requires_grad_()]
        out = functional.neighbourhood_weights(*inputs, *scalars, backend=backend)
        close(out, wanted, 1e-6)
        found = torch.autograd.grad(out, inputs, change(grad))
        expected = with_gradients(
            functional.neighbourhood_weights, "reference", (queries, keys, *scalars), grad
        )
        for a, b in zip(found, expected[1:3], strict=True):
            close(a, b)
        out = functional.neighbourhood_upsample(change(features), change(weights), backend=backend)
        close(out, summed, 1e-6)
    expanded = features[:1, :, :1].expand(2, -1, 4, -1)
    out = functional.neighbourhood_upsample(expanded, weights, backend=backend)
    close(out, functional.neighbourhood_upsample(expanded.clone(), weights, backend=backend), 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_empty_batches_and_no_channels(backend):
    if backend == "cpu" and cpu.unavailable_reason() is not None:
        pytest.skip(str(cpu.unavailable_reason()))
    queries, keys = torch.zeros(0, 4, 6, 6), torch.zeros(0, 4, 3, 3)
    out = functional.neighbourhood_weights(queries, keys, 1.0, 1.0, backend=backend)
    assert out.shape == (0, 25, 6, 6)
    features = torch.zeros(2, 0, 3, 3)
    out = functional.neighbourhood_upsample(features, torch.zeros(2, 9, 6, 6), backend=backend)
    assert out.shape == (2, 0, 6, 6)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the library")
def test_the_library_leaves_far_smaller_outputs_to_pytorch():
    features, weights = randn(1, 2, 9, 4), randn(1, 9, 2, 4)
    reason = dispatch.reason_against(
        "neighbourhood_upsample", "cpu", features, weights, (2, 4), (0, 0), (9, 4), (0, 0)
    )
    assert "a quarter of the grid" in reason
    with pytest.raises(ValueError, match="a quarter of the grid"):
        functional.neighbourhood_weights(randn(1, 2, 2, 4), features, 1.0, 1.0, backend="cpu")
    assert functional.neighbourhood_upsample(features, weights).shape == (1, 2, 2, 4)


def test_bad_arguments_are_named():
    queries, keys = unit(1, 4, 6, 6), unit(1, 4, 3, 3)
    weights = functional.neighbourhood_weights
    with pytest.raises(ValueError, match="radius=0 must be 1 or more"):
        weights(queries, keys, 1.0, 1.0, radius=0)
    with pytest.raises(ValueError, match="4 channels and keys 2"):
        weights(queries, keys[:, :2], 1.0, 1.0)
    with pytest.raises(ValueError, match="queries has batch size 1 and keys 2"):
        weights(queries, keys.expand(2, 4, 3, 3), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"queries is .*float32 and keys .*float64"):
        weights(queries, keys.double(), 1.0, 1.0)
    with pytest.raises(ValueError, match="keys is 0×3"):
        weights(queries, keys[:, :, :0], 1.0, 1.0)
    with pytest.raises(ValueError, match="queries are 6×6 but window is 3×4"):
        weights(queries, keys, 1.0, 1.0, output_size=(9, 9), window=(0, 0, 3, 4))
    with pytest.raises(ValueError, match="does not lie in the output of 9×9"):
        weights(queries, keys, 1.0, 1.0, output_size=(9, 9), window=(4, 0, 6, 6))


ENLARGING = [case for case in CASES if case[1][0] <= case[2][0] and case[1][1] <= case[2][1]]


def unkept(queries, keys, scalars, radius, size, grid, window=None, cells=None):
    """Arguments of the operators that keep no weights, for a window of pixels."""
    window = window or (0, 0, *size)
    cells = cells or (0, 0, *grid)
    (rows, columns), (down, across) = (
        tuple(slice(start, start + count) for start, count in zip(*pairs(one), strict=True))
        for one in (window, cells)
    )
    seen, near = queries[:, :, rows, columns], keys[:, :, down, across]
    return seen, near, *scalars, radius, size, window[:2], grid, cells[:2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ENLARGING, ids=str)
def test_weights_that_are_not_kept_give_the_same_sums_and_means(isa, case, layout):
    _, grid, size, radius = case
    queries, keys, *scalars = attention(case)
    features, _ = values(case)
    exact = functional.neighbourhood_weights(
        *(one.double() for one in (queries, keys, *scalars)), radius=radius, backend="reference"
    )
    given = [one.contiguous(memory_format=layout) for one in (queries, keys, features)]
    arguments = unkept(given[0], given[1], scalars, radius, size, grid)
    for channels in (1, features.shape[1]):  # few channels are summed in another way
        some = given[2][:, :channels]
        out = dispatch.call("neighbourhood_attention", "cpu", some, *arguments)
        wanted = functional.neighbourhood_upsample(some.double(), exact, backend="reference")
        close(out, wanted)
    means = dispatch.call("neighbourhood_mean_weights", "cpu", *arguments)
    rows, columns = (
        (torch.arange(length) * 2 + 1) * cells // (2 * length) == torch.arange(cells)[:, None]
        for length, cells in zip(size, grid, strict=True)
    )
    rows, columns = rows.double(), columns.double()
    counts = rows.sum(1)[:, None] * columns.sum(1)
    close(means, rows @ exact @ columns.T / counts)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ENLARGING, ids=str)
def test_lengths_are_factors_of_the_queries(isa, case, layout):
    """Every query's products are multiplied, also in tiles that end beyond the image."""
    _, grid, size, radius = case
    queries, keys, *scalars = attention(case)
    features, _ = values(case)
    lengths = 1 + 3 * torch.rand(len(queries), 1, *size)
    lengths = lengths.contiguous(memory_format=layout)
    longer = unkept(lengths * queries, keys, scalars, radius, size, grid)
    arguments = *unkept(queries, keys, scalars, radius, size, grid), lengths
    for operator, given in (("attention", [features]), ("mean_weights", [])):
        wanted = dispatch.call(f"neighbourhood_{operator}", "cpu", *given, *longer)
        close(dispatch.call(f"neighbourhood_{operator}", "cpu", *given, *arguments), wanted)


def test_lengths_of_another_size_are_refused(isa):
    queries, keys, *scalars = attention(((1, 4, 3), (3, 3), (6, 6), 1))
    arguments = unkept(queries, keys, scalars, 1, (6, 6), (3, 3))
    with pytest.raises(ValueError, match="lengths"):
        dispatch.call("neighbourhood_mean_weights", "cpu", *arguments, torch.ones(1, 1, 6, 5))


@pytest.mark.parametrize("case", ENLARGING, ids=str)
def test_parts_without_kept_weights_equal_those_of_the_whole(isa, threads, case):
    _, grid, size, radius = case
    queries, keys, *scalars = attention(case)
    features, _ = values(case)
    whole = unkept(queries, keys, scalars, radius, size, grid)
    operators = "neighbourhood_attention", "neighbourhood_mean_weights"
    threads(1)
    out = dispatch.call(operators[0], "cpu", features, *whole)
    means = dispatch.call(operators[1], "cpu", *whole)
    # The pixels of the cells from the middle on, and the cells that they read.
    firsts = [-((n - 2 * m * (n // 2)) // (2 * n)) for n, m in zip(grid, size, strict=True)]
    low = [max(n // 2 - radius, 0) for n in grid]
    window = (*firsts, *(m - first for m, first in zip(size, firsts, strict=True)))
    cells = (*low, *(n - first for n, first in zip(grid, low, strict=True)))
    part = unkept(queries, keys, scalars, radius, size, grid, window, cells)
    threads(3)
    near = features[:, :, low[0] :, low[1] :]
    close(
        dispatch.call(operators[0], "cpu", near, *part), out[:, :, firsts[0] :, firsts[1] :], 1e-6
    )
    again = dispatch.call(operators[1], "cpu", *part)
    close(again, means[:, :, grid[0] // 2 :, grid[1] // 2 :], 1e-6)
    assert torch.equal(dispatch.call(operators[0], "cpu", features, *whole), out)
    assert torch.equal(dispatch.call(operators[1], "cpu", *whole), means)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_without_kept_weights(isa, dtype):
    case = ((2, 20, 19), (4, 5), (13, 20), 2)
    queries, keys, *scalars = (value.to(dtype) for value in attention(case))
    features = values(case)[0].to(dtype)
    arguments = unkept(queries, keys, scalars, 2, (13, 20), (4, 5))
    out = dispatch.call("neighbourhood_attention", "cpu", features, *arguments)
    exact = [one.float() for one in (features, queries, keys, *scalars)]
    wanted = dispatch.call("neighbourhood_attention", "cpu", *exact, *arguments[4:])
    assert out.dtype == dtype
    close(out, wanted, torch.finfo(dtype).eps)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the library")
def test_smaller_outputs_keep_their_weights():
    case = ((1, 4, 3), (3, 3), (1, 1), 1)
    queries, keys, *scalars = attention(case)
    arguments = unkept(queries, keys, scalars, 1, (1, 1), (3, 3))
    with pytest.raises(ValueError, match="fewer pixels than the grid has cells"):
        dispatch.call("neighbourhood_mean_weights", "cpu", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the library")
def test_opcheck_without_kept_weights():
    queries, keys, *scalars = attention(((1, 8, 3), (3, 4), (9, 14), 1))
    arguments = unkept(queries, keys, scalars, 1, (9, 14), (3, 4))
    operators = torch.ops.upfeat
    torch.library.opcheck(operators.neighbourhood_mean_weights_cpu.default, arguments)
    features = randn(1, 3, 3, 4)
    torch.library.opcheck(operators.neighbourhood_attention_cpu.default, (features, *arguments))


def test_faint_weights_are_zero(backend):
    """Subnormal weights would slow down every sum that they are part of."""
    if backend == "eager":
        pytest.skip("PyTorch's softmax keeps subnormal weights")
    weights = functional.neighbourhood_weights(
        *attention(CASES[0], temperature=150.0), radius=2, backend=backend
    )
    assert (weights == 0).float().mean() > 0.1
    assert not ((weights != 0) & (weights < torch.finfo(torch.float32).tiny)).any()
