"""Downsamplers: constants, symmetry, exact borders, any grid, and the published arithmetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from upfeat.downsamplers import (
    AttentionDownsampler,
    CellDownsampler,
    SimpleDownsampler,
    gaussian_blur,
    pool_patches,
)

# (map, grid, kernel): tiled, overlapping, half-pixel taps, broken strides, gaps, tiny, wide.
GEOMETRIES = [
    ((32, 48), (4, 6), 8),
    ((32, 48), (4, 6), 16),
    ((32, 48), (4, 6), 13),
    ((37, 50), (5, 7), 7),
    ((37, 50), (5, 7), 12),
    ((32, 48), (4, 6), 3),
    ((3, 2), (2, 1), 9),
    ((9, 200), (3, 50), 5),
    ((5, 4), (5, 4), 1),
]
KINDS = ["simple", "attention", "blurred"]


def _random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _attention(
    embed_dim: int = 3, kernel_size: int = 4, *, blur: bool = False, dropout: float = 0.2
) -> AttentionDownsampler:
    generator = torch.Generator().manual_seed(0)
    return AttentionDownsampler(
        embed_dim, kernel_size, blur=blur, dropout=dropout, generator=generator
    ).double()


def _make(kind: str, kernel_size: int) -> torch.nn.Module:
    if kind == "simple":
        return SimpleDownsampler(kernel_size).double()
    return _attention(3, kernel_size, blur=kind == "blurred").eval()


def _reference(values: Tensor, weights: Tensor) -> Tensor:
    """The rule of the module, cell by cell: read k×k taps by position, then sum."""
    batch, height, width, k, _ = weights.shape
    rows, columns = values.shape[2:]

    def read(n: int, cells: int, cell: int) -> Tensor:
        """Interpolation matrix (k, n) of one cell's taps."""
        matrix = torch.zeros(k, n, dtype=torch.float64)
        for t in range(k):
            position = (cell + 0.5) * n / cells - 0.5 + t - (k - 1) / 2
            low = int(position // 1)
            for index, share in ((low, low + 1 - position), (low + 1, position - low)):
                while n > 1 and not 0 <= index < n:
                    index = -index if index < 0 else 2 * (n - 1) - index
                matrix[t, index if n > 1 else 0] += share
        return matrix

    out = torch.empty(batch, values.shape[1], height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            patch = read(rows, height, i) @ values @ read(columns, width, j).T
            out[:, :, i, j] = (patch * weights[:, i, j][:, None]).sum((2, 3))
    return out


class TestGeometry:
    """One rule for every size, stride and kernel."""

    @pytest.mark.parametrize(("size", "grid", "kernel_size"), GEOMETRIES)
    def test_pooling_equals_the_rule(
        self, size: tuple[int, int], grid: tuple[int, int], kernel_size: int
    ) -> None:
        values = _random(2, 3, *size)
        weights = _random(2, *grid, kernel_size, kernel_size, seed=2)
        torch.testing.assert_close(pool_patches(values, weights), _reference(values, weights))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("size", "grid", "kernel_size"), GEOMETRIES)
    def test_constants_are_kept(
        self, kind: str, size: tuple[int, int], grid: tuple[int, int], kernel_size: int
    ) -> None:
        values = torch.tensor([3.0, -2.0, 7.0]).double().view(1, 3, 1, 1).expand(2, -1, *size)
        pooled = _make(kind, kernel_size)(values, grid)
        assert pooled.shape == (2, 3, *grid)
        torch.testing.assert_close(pooled, values[:, :, :1, :1].expand(2, 3, *grid))

    @pytest.mark.parametrize("axis", [2, 3])
    @pytest.mark.parametrize(("size", "grid", "kernel_size"), GEOMETRIES)
    def test_mirrored_maps_give_mirrored_grids(
        self, axis: int, size: tuple[int, int], grid: tuple[int, int], kernel_size: int
    ) -> None:
        downsampler, values = SimpleDownsampler(kernel_size).double(), _random(1, 2, *size)
        pooled = downsampler(values.flip(axis), grid)
        torch.testing.assert_close(pooled, downsampler(values, grid).flip(axis))

    @pytest.mark.parametrize(("size", "grid", "kernel_size"), GEOMETRIES)
    def test_transposed_maps_give_transposed_grids(
        self, size: tuple[int, int], grid: tuple[int, int], kernel_size: int
    ) -> None:
        downsampler, values = SimpleDownsampler(kernel_size).double(), _random(1, 2, *size)
        pooled = downsampler(values.mT, grid[::-1])
        torch.testing.assert_close(pooled, downsampler(values, grid).mT)

    @pytest.mark.parametrize("kernel_size", [4, 5, 8, 9])
    def test_cells_are_centred(self, kernel_size: int) -> None:
        """Away from the border, a box over a ramp returns the cell's centre, for broken strides."""
        size, cells = 50, 7
        ramp = torch.arange(size, dtype=torch.float64).expand(1, 1, size, size)
        pooled = SimpleDownsampler(kernel_size).double()(ramp, (cells, cells))
        centres = (torch.arange(cells) + 0.5) * size / cells - 0.5
        torch.testing.assert_close(pooled[0, 0, 3, 1:-1], centres[1:-1].double())

    def test_tiles_equal_average_pooling(self) -> None:
        values = _random(2, 3, 24, 40)
        pooled = SimpleDownsampler(8).double()(values, (3, 5))
        torch.testing.assert_close(pooled, functional.avg_pool2d(values, 8))

    @given(
        height=st.integers(1, 30),
        width=st.integers(1, 30),
        cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        kernel_size=st.integers(1, 12),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_grid_keeps_bounds(
        self, height: int, width: int, cells: tuple[int, int], kernel_size: int, seed: int
    ) -> None:
        grid = (min(cells[0], height), min(cells[1], width))
        values = _random(1, 3, height, width, seed=seed)
        pooled = _attention(3, kernel_size, blur=True).eval()(values, grid)
        assert (pooled <= values.amax((2, 3), keepdim=True) + 1e-12).all()
        assert (pooled >= values.amin((2, 3), keepdim=True) - 1e-12).all()

    def test_non_contiguous_half_and_single(self) -> None:
        values = _random(2, 32, 48, 3).permute(0, 3, 1, 2)
        downsampler = _attention(3, 8).eval()
        expected = downsampler(values.contiguous(), (4, 6))
        torch.testing.assert_close(downsampler(values, (4, 6)), expected)
        downsampler = downsampler.float()
        single = downsampler(values.float(), (4, 6))
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)
        half = pool_patches(values.bfloat16(), downsampler.weights(_random(2, 1, 32, 48), (4, 6)))
        assert half.dtype == torch.bfloat16


class TestGradients:
    """Exact in values, saliency and parameters."""

    @pytest.mark.parametrize(("maps", "kernels"), [(2, 2), (2, 1), (1, 1)])
    @pytest.mark.parametrize("kernel_size", [3, 4, 6])
    def test_pool_patches(self, maps: int, kernels: int, kernel_size: int) -> None:
        values = _random(maps, 2, 7, 6).requires_grad_()
        weights = _random(kernels, 2, 3, kernel_size, kernel_size, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(pool_patches, (values, weights))
        assert torch.autograd.gradgradcheck(pool_patches, (values, weights))

    def test_adjoint(self) -> None:
        values, grid = _random(2, 3, 37, 50).requires_grad_(), _random(2, 3, 5, 7, seed=3)
        weights = _random(2, 5, 7, 9, 9, seed=2)
        pooled = pool_patches(values, weights)
        (back,) = torch.autograd.grad(pooled, values, grid)
        torch.testing.assert_close((pooled * grid).sum(), (values * back).sum())

    @pytest.mark.parametrize("blur", [False, True])
    def test_attention(self, blur: bool) -> None:
        downsampler = _attention(2, 3, blur=blur).eval()
        values = _random(1, 2, 6, 7).requires_grad_()

        def run(values: Tensor, *_: Tensor) -> Tensor:
            return downsampler(values, (2, 3))

        assert torch.autograd.gradcheck(run, (values, *downsampler.parameters()))

    def test_simple(self) -> None:
        downsampler = SimpleDownsampler(3).double()
        with torch.no_grad():
            downsampler.kernel_weight.copy_(_random(3, 3))
        values = _random(1, 2, 6, 7).requires_grad_()

        def run(values: Tensor, *_: Tensor) -> Tensor:
            return downsampler(values, (2, 3))

        assert torch.autograd.gradcheck(run, (values, *downsampler.parameters()))


class TestSimple:
    """The learned blur."""

    def test_kernel_is_non_negative_and_sums_to_one(self) -> None:
        downsampler = SimpleDownsampler(5)
        with torch.no_grad():
            downsampler.kernel_weight.copy_(_random(5, 5))
        kernel = downsampler.kernel()
        assert (kernel >= 0).all()
        torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))

    def test_equals_a_convolution_where_nothing_reflects(self) -> None:
        downsampler, values = SimpleDownsampler(8).double(), _random(2, 3, 32, 48)
        with torch.no_grad():
            downsampler.kernel_weight.copy_(_random(8, 8, seed=3))
        kernel = downsampler.kernel().expand(3, 1, -1, -1)
        expected = functional.conv2d(values, kernel, stride=8, groups=3)
        torch.testing.assert_close(downsampler(values, (4, 6)), expected)


class TestAttention:
    """Softmax weights from a saliency."""

    @pytest.mark.parametrize("blur", [False, True])
    @pytest.mark.parametrize(("size", "grid", "kernel_size"), GEOMETRIES)
    def test_weights_are_non_negative_and_sum_to_one(
        self,
        blur: bool,
        size: tuple[int, int],
        grid: tuple[int, int],
        kernel_size: int,
    ) -> None:
        weights = _attention(3, kernel_size, blur=blur).weights(_random(2, 1, *size), grid)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, *grid).double())

    def test_equals_the_published_patches(self) -> None:
        """Unfold, logits, softmax, weighted sum, on a grid that tiles the map."""
        downsampler, values, k = _attention(3, 8).eval(), _random(2, 3, 32, 48), 8
        patches = functional.unfold(values, k, stride=k).view(2, 3, k * k, 4, 6)
        saliency = torch.einsum("bcphw,oc->bphw", patches, downsampler.saliency_weight)
        logits = saliency + downsampler.saliency_bias
        logits = logits * downsampler.w.view(1, -1, 1, 1) + downsampler.b.view(1, -1, 1, 1)
        expected = (patches * logits.softmax(1)[:, None]).sum(2)
        torch.testing.assert_close(downsampler(values, (4, 6)), expected)

    @pytest.mark.parametrize(("size", "grid", "kernel_size"), GEOMETRIES)
    def test_blur_folded_into_weights_equals_blurring_first(
        self, size: tuple[int, int], grid: tuple[int, int], kernel_size: int
    ) -> None:
        blurred = _attention(3, kernel_size, blur=True).eval()
        plain = _attention(3, kernel_size).eval()
        values = _random(2, 3, *size)
        torch.testing.assert_close(blurred(values, grid), plain(gaussian_blur(values), grid))

    def test_zero_w_is_the_average_by_b(self) -> None:
        downsampler, values = _attention(3, 8).eval(), _random(2, 3, 32, 48)
        with torch.no_grad():
            downsampler.w.zero_()
            downsampler.b.copy_(_random(8, 8, seed=3))
        kernel = downsampler.b.flatten().softmax(0).view(1, 1, 8, 8).expand(3, -1, -1, -1)
        expected = functional.conv2d(values, kernel, stride=8, groups=3)
        torch.testing.assert_close(downsampler(values, (4, 6)), expected)

    def test_saliency_commutes_with_projection(self) -> None:
        downsampler, values = _attention(5, 8).eval(), _random(2, 5, 32, 48)
        projection = _random(2, 5, seed=3)[..., None, None]
        whole = functional.conv2d(downsampler(values, (4, 6)), projection)
        projected = functional.conv2d(values, projection)
        saliency = downsampler.saliency(values)
        torch.testing.assert_close(downsampler(projected, (4, 6), saliency=saliency), whole)

    def test_dropout_only_while_training(self) -> None:
        downsampler, saliency = _attention(3, 8, dropout=0.5), _random(2, 1, 32, 48)

        def weights(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return downsampler.weights(saliency, (4, 6), generator=generator)

        assert torch.equal(weights(0), weights(0))
        assert not torch.equal(weights(0), weights(1))
        average = downsampler.b.flatten().softmax(0).view(8, 8)
        dropped = (weights(0) - average).abs().amax((3, 4)) < 1e-12
        assert 0 < dropped.sum() < dropped.numel()
        downsampler.eval()
        assert torch.equal(weights(0), weights(1))

    def test_initial_values_follow_the_generator(self) -> None:
        first, again = _attention(3, 29), _attention(3, 29)
        for a, b in zip(first.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
        assert abs(first.w.mean() - 1) < 0.01
        assert abs(first.b.mean()) < 0.01
        assert 0.005 < first.b.std() < 0.02
        assert "kernel_size=29" in repr(first)


class TestErrors:
    """Each names the argument, the value and the fix."""

    @pytest.mark.parametrize("grid", [(0, 4), (33, 4), (4, 49)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_grid(self, kind: str, grid: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=r"output_size must lie between .* got \("):
            _make(kind, 4)(_random(1, 3, 32, 48), grid)

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="kernel_size=0 must be 1 or more"):
            SimpleDownsampler(0)
        with pytest.raises(ValueError, match="embed_dim=0 must be 1 or more"):
            AttentionDownsampler(0, 4)
        with pytest.raises(ValueError, match="dropout=1 must be a number below 1"):
            AttentionDownsampler(3, 4, dropout=1)

    @pytest.mark.parametrize("value", [2.5, "4", None, True, torch.ones(2)])
    def test_numbers_of_other_types_are_named(self, value: object) -> None:
        calls: dict[str, Callable[[Any], object]] = {
            "kernel_size": SimpleDownsampler,
            "blur_size": CellDownsampler,
            "embed_dim": lambda one: AttentionDownsampler(one, 4),
            "dropout": lambda one: AttentionDownsampler(3, 4, dropout=one),
        }
        for name, call in calls.items():
            with pytest.raises(ValueError, match=f"{name}=.* must be a") as caught:
                call(value)
            assert "\n" not in str(caught.value)

    def test_shapes(self) -> None:
        downsampler = _attention()
        with pytest.raises(ValueError, match=r"features must have shape \(B, 3, H, W\).*saliency="):
            downsampler(_random(1, 2, 8, 8), (2, 2))
        with pytest.raises(ValueError, match="saliency must match values"):
            downsampler(_random(1, 2, 8, 8), (2, 2), saliency=_random(1, 1, 4, 4))
        with pytest.raises(ValueError, match="saliency must have one channel"):
            downsampler.weights(_random(1, 2, 8, 8), (2, 2))
        with pytest.raises(ValueError, match="values must have shape"):
            SimpleDownsampler(4)(torch.rand(3, 8, 8), (2, 2))
        with pytest.raises(ValueError, match="weights must have shape"):
            pool_patches(_random(1, 2, 8, 8), _random(1, 2, 2, 4, 3))
        with pytest.raises(ValueError, match="weights must be for 1 or 2 maps, got 3"):
            pool_patches(_random(2, 2, 8, 8), _random(3, 2, 2, 4, 4))
