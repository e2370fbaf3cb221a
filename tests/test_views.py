"""Views: one exact map of coordinates, applied alike to images and to features of any size."""

import pytest
import torch
from hostile import refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from upfeat.views import (
    Jitter,
    apply_jitter,
    apply_jitter_adjoint,
    reflect,
    sample_jitters,
    spread_jitters,
    warp,
)

SIZE = (37, 50)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _views(n: int = 6, size: tuple[int, int] = SIZE, *, pad: float = 9, seed: int = 0) -> Jitter:
    return sample_jitters(
        n,
        size=size,
        max_pad=pad,
        max_zoom=2.5,
        zoom_probability=0.7,
        subpixel=True,
        generator=_generator(seed),
    )


def _random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=dtype)


def _one(size: tuple[int, int], **changes: object) -> Jitter:
    """A single view; what is not given leaves the image as it is."""
    values: dict[str, object] = {"pad": [[0, 0]], "zoom": [1], "offset": [[0, 0]], "flip": [False]}
    values.update(changes)
    parts = ("pad", "zoom", "offset", "flip")
    return Jitter(size, *(torch.tensor(values[part], dtype=torch.float64) for part in parts))


def _grid(size: tuple[int, int]) -> Tensor:
    """All pixel indices (H·W, 2) in float64, row by row."""
    axes = [torch.arange(n, dtype=torch.float64) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


def _published(x: Tensor, pad: int, zoom: float, top: int, left: int, *, flip: bool) -> Tensor:
    """The recipe in four steps on pixels."""
    height, width = x.shape[-2:]
    x = functional.pad(x, (pad,) * 4, mode="reflect")
    if zoom > 1:
        x = functional.interpolate(x, scale_factor=zoom, mode="bilinear", align_corners=False)
    x = x[..., top : top + height, left : left + width]
    return x.flip(-1) if flip else x


class TestWarp:
    """The warp itself."""

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(("zoom", "top", "left"), [(1.0, 0, 18), (1.0, 7, 3), (1.63, 20, 31)])
    def test_equals_pad_zoom_crop_flip(
        self, zoom: float, top: int, left: int, *, flip: bool
    ) -> None:
        x = _random(1, 3, *SIZE)
        jitter = _one(SIZE, pad=[[9, 9]], zoom=[zoom], offset=[[top, left]], flip=[flip])
        expected = _published(x, 9, zoom, top, left, flip=flip)
        torch.testing.assert_close(apply_jitter(x, jitter), expected, rtol=0, atol=1e-12)

    def test_unzoomed_view_copies_pixels_to_the_last_bit(self) -> None:
        x = _random(1, 2, *SIZE, dtype=torch.float32)
        jitter = sample_jitters(8, size=SIZE, zoom_probability=0, generator=_generator())
        for one in jitter:
            top, left = (int(v) for v in one.offset[0])
            expected = _published(x, 20, 1, top, left, flip=bool(one.flip[0]))
            assert torch.equal(apply_jitter(x, one), expected)

    @pytest.mark.parametrize("scale", [1, 2])
    def test_ramp_is_exact_to_sub_pixel(self, scale: int) -> None:
        """A map of its own coordinates, warped, holds the coordinates that the view shows."""
        jitter = _views(pad=0)
        points = _grid((SIZE[0] * scale, SIZE[1] * scale))
        points = (points + 0.5) / scale - 0.5  # in pixels of the image
        ramp = points.T.reshape(1, 2, SIZE[0] * scale, SIZE[1] * scale)
        view = apply_jitter(ramp, jitter)
        source = jitter.to_source(_grid(SIZE)).mT.reshape(-1, 2, *SIZE)
        # Bilinear reading is flat beyond the outermost centres, and an antialiased one near them.
        inside = (source > 1).all(1) & (source < torch.tensor(SIZE).view(2, 1, 1) - 2).all(1)
        magnified = (jitter.zoom >= scale)[:, None, None].expand_as(inside)
        error = (view - source).abs().amax(1)
        assert (inside & magnified).sum() > 1000
        assert error[inside & magnified].max() < 1e-11
        assert error[inside].max() < 0.05  # a discrete triangle's centre of mass is less exact

    def test_ramp_is_exact_in_single_precision_at_full_size(self) -> None:
        size = (224, 224)
        jitter = _views(4, size, pad=0)
        ramp = _grid(size).T.reshape(1, 2, *size)
        view = apply_jitter(ramp.float(), jitter).double()
        assert (view - apply_jitter(ramp, jitter)).abs().max() < 1e-4

    def test_features_of_another_size_move_as_the_image(self) -> None:
        """Smooth content given at two resolutions gives one view, padding included."""

        def content(size: tuple[int, int]) -> Tensor:
            y, x = ((_grid(size) + 0.5) / torch.tensor(size)).T
            wave = torch.sin(3 * y + 1) * torch.cos(4 * x)
            return wave.reshape(1, 1, *size)

        jitter = _views(pad=20)
        fine = apply_jitter(content((SIZE[0] * 8, SIZE[1] * 8)), jitter)
        plain = apply_jitter(content(SIZE), jitter)
        assert (fine - plain).abs().max() < 6e-3

    def test_output_size_samples_the_same_view(self) -> None:
        jitter, x = _views(), _random(1, 2, *SIZE)
        height, width = SIZE
        triple = apply_jitter(x, jitter, output_size=(3 * height, 3 * width))
        # The middle of each 3×3 group lies on the centre of the pixel.
        torch.testing.assert_close(triple[..., 1::3, 1::3], apply_jitter(x, jitter))

    def test_reduction_averages(self) -> None:
        x = _random(1, 1, 64, 64)
        jitter = Jitter.identity(1, size=(16, 16))
        small = apply_jitter(x, jitter)
        expected = functional.interpolate(
            x, size=(16, 16), mode="bilinear", antialias=True, align_corners=False
        )
        torch.testing.assert_close(small, expected)

    def test_flip_commutes(self) -> None:
        x, plain = _random(1, 3, *SIZE), _views()
        turned = Jitter(plain.size, plain.pad, plain.zoom, plain.offset, ~plain.flip)
        torch.testing.assert_close(apply_jitter(x, turned), apply_jitter(x, plain).flip(-1))

    @given(
        size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        other=st.tuples(st.integers(1, 70), st.integers(1, 70)),
        pad=st.floats(0, 40),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_size_keeps_constants_and_bounds(
        self, size: tuple[int, int], other: tuple[int, int], pad: float, seed: int
    ) -> None:
        """Tiny images under a pad larger than themselves included."""
        jitter = _views(3, size, pad=pad, seed=seed)
        x = torch.rand(3, 1, *other, generator=_generator(seed), dtype=torch.float64)
        view = apply_jitter(x, jitter)
        assert view.shape == (3, 1, *size)
        assert (view <= x.amax((2, 3), keepdim=True) + 1e-12).all()
        assert (view >= x.amin((2, 3), keepdim=True) - 1e-12).all()
        ones = apply_jitter(torch.ones_like(x), jitter)
        torch.testing.assert_close(ones, torch.ones_like(ones))

    def test_matrices_are_the_warp(self) -> None:
        jitter, x = _views(), _random(6, 2, 41, 80)
        rows, columns = jitter.matrices((41, 80), (30, 33), dtype=torch.float64)
        expected = torch.einsum("nyh,nchw,nxw->ncyx", rows, x, columns)
        torch.testing.assert_close(apply_jitter(x, jitter, output_size=(30, 33)), expected)
        for matrix in (rows, columns):
            assert (matrix >= 0).all()
            torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:2]).double())

    def test_batches_equal_single_views(self) -> None:
        jitter, x = _views(4), _random(4, 2, *SIZE)
        together = apply_jitter(x, jitter)
        shared = apply_jitter(x[:1], jitter)
        alike = apply_jitter(x, jitter[2])
        for i, one in enumerate(jitter):
            torch.testing.assert_close(together[i : i + 1], apply_jitter(x[i : i + 1], one))
            torch.testing.assert_close(shared[i : i + 1], apply_jitter(x[:1], one))
            torch.testing.assert_close(alike[i : i + 1], apply_jitter(x[i : i + 1], jitter[2]))

    def test_non_contiguous_and_half(self) -> None:
        jitter = _views(2)
        x = _random(2, *SIZE, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(apply_jitter(x, jitter), apply_jitter(x.contiguous(), jitter))
        half = apply_jitter(x.bfloat16(), jitter)
        assert half.dtype == torch.bfloat16
        exact = apply_jitter(x.bfloat16().double(), jitter)
        torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-2)

    def test_autocast_does_not_round_coordinates(self) -> None:
        jitter, x = _views(2), _random(2, 3, *SIZE, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            cast = apply_jitter(x, jitter)
        assert torch.equal(cast, apply_jitter(x, jitter))


class TestAdjoint:
    """Gradients and the transpose."""

    @pytest.mark.parametrize("maps", [1, 4])
    def test_inner_products_agree(self, maps: int) -> None:
        jitter, x, y = _views(4), _random(maps, 3, 44, 61), _random(4, 3, *SIZE, seed=2)
        forward = (apply_jitter(x, jitter) * y).sum()
        back = apply_jitter_adjoint(y, jitter, input_size=(44, 61))
        torch.testing.assert_close(forward, (x * back).sum())

    @pytest.mark.parametrize(("maps", "views"), [(1, 1), (1, 3), (3, 1), (3, 3)])
    def test_gradcheck(self, maps: int, views: int) -> None:
        jitter = _views(views, (5, 7), pad=4)
        x = _random(maps, 2, 6, 9).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: apply_jitter(x, jitter), x)
        assert torch.autograd.gradgradcheck(lambda x: apply_jitter(x, jitter), x)

    def test_gradient_is_the_adjoint_beyond_one_block(self) -> None:
        size = (75, 90)
        jitter, y = _views(3, size), _random(3, 2, *size)
        x = _random(1, 2, *size).requires_grad_()
        apply_jitter(x, jitter).backward(y)
        expected = apply_jitter_adjoint(y, jitter).sum(0, keepdim=True)
        torch.testing.assert_close(x.grad, expected)


class TestCoordinates:
    """Where views look."""

    def test_round_trip(self) -> None:
        jitter, points = _views(), _random(50, 2).abs() * 10
        points = points.clamp(max=36)
        torch.testing.assert_close(
            jitter.to_source(jitter.to_view(points)), points.expand(6, -1, 2)
        )

    def test_positions_are_on_the_device_of_the_points(self) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        points = torch.rand(5, 2, device=device)
        for found in (_views().to_source(points), _views().to_view(points)):
            assert found.device.type == device.type
            assert found.dtype == torch.float64

    def test_points_equal_the_matrices(self) -> None:
        jitter = _views()
        ramp = _grid(SIZE).T.reshape(1, 2, *SIZE)
        source = jitter.to_source(_grid(SIZE)).mT.reshape(-1, 2, *SIZE)
        torch.testing.assert_close(apply_jitter(ramp, jitter), source)

    def test_reflection_repeats(self) -> None:
        folded = reflect(torch.arange(-7, 9), 4).tolist()
        assert folded == [1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2][-16:]
        assert reflect(torch.arange(-2, 3), 1).tolist() == [0] * 5


class TestSampling:
    """Parameters drawn at random or spread evenly."""

    @pytest.mark.parametrize("sample", [sample_jitters, spread_jitters])
    def test_follows_the_recipe(self, sample) -> None:
        jitter = sample(2000, size=SIZE, max_pad=9, max_zoom=1.8, generator=_generator())
        zoomed = jitter.zoom > 1
        assert abs(zoomed.double().mean() - 0.5) < 0.05
        assert abs(jitter.flip.double().mean() - 0.5) < 0.05
        assert abs(jitter.zoom[zoomed].mean() - 1.4) < 0.03
        assert jitter.zoom.max() <= 1.8
        assert torch.equal(jitter.offset, jitter.offset.floor())
        room = (torch.tensor(SIZE) + 18) * jitter.zoom[:, None] - torch.tensor(SIZE)
        assert (jitter.offset >= 0).all()
        assert (jitter.offset <= room).all()
        assert jitter.offset[~zoomed].amax(0).tolist() == [18, 18]

    @pytest.mark.parametrize("sample", [sample_jitters, spread_jitters])
    def test_generator_decides(self, sample) -> None:
        state = torch.get_rng_state()
        first, again, other = (
            sample(5, size=SIZE, generator=_generator(seed)) for seed in (0, 0, 1)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.offset, again.offset)
        assert not torch.equal(first.offset, other.offset)

    def test_extreme_probabilities(self) -> None:
        always = sample_jitters(
            50, size=SIZE, zoom_probability=1, flip_probability=1, generator=_generator()
        )
        assert (always.zoom > 1).all()
        assert always.flip.all()
        never = sample_jitters(
            50, size=SIZE, zoom_probability=0, flip_probability=0, generator=_generator()
        )
        assert (never.zoom == 1).all()
        assert not never.flip.any()

    def test_spread_leaves_smaller_gaps(self) -> None:
        """The largest empty interval of positions, averaged over seeds, is clearly smaller."""

        def gap(sample) -> float:
            gaps = []
            for seed in range(20):
                jitter = sample(
                    32, size=SIZE, zoom_probability=0, subpixel=True, generator=_generator(seed)
                )
                gaps.append(jitter.offset[:, 0].sort().values.diff().max())
            return float(torch.stack(gaps).mean())

        assert gap(spread_jitters) < 0.6 * gap(sample_jitters)

    def test_index_iterate_join(self) -> None:
        jitter = _views(5)
        again = Jitter.cat(list(jitter))
        assert torch.equal(again.offset, jitter.offset)
        assert torch.equal(jitter[-1].zoom, jitter.zoom[-1:])
        assert len(jitter[1:3]) == 2
        assert torch.equal(jitter[torch.tensor([3, 0])].pad, jitter.pad[[3, 0]])
        with pytest.raises(IndexError):
            jitter[5]

    def test_identity(self) -> None:
        x = _random(1, 2, *SIZE, dtype=torch.float32)
        assert torch.equal(apply_jitter(x, Jitter.identity(1, size=SIZE)), x)


class TestErrors:
    """Each names the argument, the value and the fix."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_pad": -1}, "max_pad=-1 must be a number of at least 0"),
            ({"max_zoom": 0.5}, r"max_zoom=0\.5 must be a number of at least 1"),
            ({"zoom_probability": 1.5}, r"zoom_probability=1\.5 must be a number from 0 to 1"),
            ({"flip_probability": -0.1}, r"flip_probability=-0\.1 must be a number from 0 to 1"),
            ({"size": (0, 4)}, r"size=\(0, 4\) must be \(height, width\)"),
        ],
    )
    def test_sampling(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sample_jitters(2, **{"size": SIZE, **changes})

    @pytest.mark.parametrize("sample", [sample_jitters, spread_jitters])
    def test_hostile_values(self, sample) -> None:
        given = {"n": 2, "size": SIZE}
        refuses(sample, "n", **given)
        refuses(sample, "size", **given)
        refuses(sample, "max_zoom", (float,), **given)
        for name in ("max_pad", "zoom_probability", "flip_probability"):
            refuses(sample, name, (float, int), **given)

    @pytest.mark.parametrize("name", ["pad", "zoom", "offset", "flip"])
    def test_hostile_parameters(self, name: str) -> None:
        good = _views(2)
        given = {one: getattr(good, one) for one in ("size", "pad", "zoom", "offset", "flip")}
        refuses(Jitter, name, (torch.Tensor,), **given)
        refuses(Jitter, "size", **given)
        for value in (torch.nan, torch.inf):
            if name in ("pad", "offset"):
                with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
                    Jitter(**{**given, name: given[name] + value})

    @pytest.mark.parametrize("size", [0, (0, 4), (4,), (4, 4.5), "44", (4, None)])
    def test_sizes(self, size: object) -> None:
        jitter = _views(2)
        with pytest.raises(ValueError, match="input_size="):
            jitter.matrices(size)
        with pytest.raises(ValueError, match="output_size="):
            apply_jitter(torch.rand(2, 1, *SIZE), jitter, output_size=size)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"zoom": [0.0]}, "zoom must be positive"),
            ({"zoom": [[1.0]]}, r"zoom must have shape \(N,\)"),
            ({"pad": [[0, 0], [0, 0]]}, "pad must have shape"),
            ({"flip": [True, False]}, "flip must have shape"),
        ],
    )
    def test_parameters(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _one(SIZE, **changes)

    def test_shapes(self) -> None:
        jitter = _views(2)
        with pytest.raises(ValueError, match=r"x must have shape \(B, C, h, w\)"):
            apply_jitter(torch.rand(3, 4), jitter)
        with pytest.raises(ValueError, match="x must be floating point"):
            apply_jitter(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), jitter)
        with pytest.raises(ValueError, match="x must hold 1 or 2 maps"):
            apply_jitter(torch.rand(3, 1, 4, 4), jitter)
        with pytest.raises(ValueError, match="points must have shape"):
            jitter.to_source(torch.rand(4, 3))
        with pytest.raises(ValueError, match="points must list 1 or 2 views"):
            jitter.to_source(torch.rand(3, 4, 2))
        with pytest.raises(ValueError, match="jitters must share one size"):
            Jitter.cat([jitter, _views(2, (4, 4))])
        rows, columns = jitter.matrices()
        with pytest.raises(ValueError, match="rows and columns"):
            warp(torch.rand(2, 1, *SIZE), rows, columns[:1])
        with pytest.raises(ValueError, match="to fit the matrices"):
            warp(torch.rand(2, 1, 5, 5), rows, columns)
