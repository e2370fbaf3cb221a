"""Losses: their minimisers, their zeros, their gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from upfeat import losses
from upfeat.views import apply_jitter, sample_jitters


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=dtype)


def _constant(shape: tuple[int, int, int, int]) -> Tensor:
    return _random(*shape[:2], 1, 1).expand(shape).clone().requires_grad_()


class TestUncertainty:
    """The predicted standard deviation and the likelihood."""

    def test_starts_near_one_tenth_above_one(self) -> None:
        scale = losses.SpatialUncertainty(384, generator=_generator())
        features = _random(2, 384, 5, 7, dtype=torch.float32)
        assert scale(features).shape == (2, 1, 5, 7)
        assert (scale(features).log() - 0.1).abs().max() < 0.5

    def test_never_below_its_floor(self) -> None:
        scale = losses.SpatialUncertainty(3)
        with torch.no_grad():
            scale.bias.fill_(-100)
        assert (scale(torch.zeros(1, 3, 2, 2)) == 1e-4).all()

    def test_equals_the_published_formula(self) -> None:
        scale, features = losses.SpatialUncertainty(3).double(), _random(2, 3, 4, 5)
        linear = torch.einsum("bchw,c->bhw", features, scale.weight.view(-1)) + scale.bias
        torch.testing.assert_close(scale(features)[:, 0], (linear + 0.1).exp())

    def test_generator_decides(self) -> None:
        first, again = (losses.SpatialUncertainty(8, generator=_generator()) for _ in range(2))
        assert torch.equal(first.weight, again.weight)
        assert first.weight.abs().max() <= 0.1 / 8**0.5

    def test_best_scale_is_the_residual_rms(self) -> None:
        predicted, target = _random(4, 6, 5, 5), _random(4, 6, 5, 5, seed=2)
        rms = (predicted - target).square().mean(dim=(0, 1), keepdim=True).sqrt()
        scale = rms.clone().requires_grad_()
        best = losses.gaussian_reconstruction(predicted, target, scale)
        (slope,) = torch.autograd.grad(best, scale)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
        for factor in (0.9, 1.1):
            assert losses.gaussian_reconstruction(predicted, target, factor * rms) > best

    def test_unit_scale_is_half_the_squared_error(self) -> None:
        predicted, target = _random(2, 3, 4, 5), _random(2, 3, 4, 5, seed=2)
        loss = losses.gaussian_reconstruction(predicted, target, torch.ones(2, 1, 4, 5).double())
        torch.testing.assert_close(loss, (predicted - target).square().mean() / 2)

    def test_gradcheck(self) -> None:
        predicted, target = _random(1, 2, 2, 3).requires_grad_(), _random(1, 2, 2, 3, seed=2)
        scale = (_random(1, 1, 2, 3, seed=3).abs() + 0.5).requires_grad_()
        assert torch.autograd.gradcheck(
            losses.gaussian_reconstruction, (predicted, target.requires_grad_(), scale)
        )


class TestMagnitude:
    """Lengths of feature vectors and their smoothness."""

    def test_length(self) -> None:
        x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, -1, 3, 5)
        assert (losses.magnitude(x) == 5).all()
        assert losses.magnitude(x).shape == (2, 1, 3, 5)

    def test_gradient_at_zero_is_finite(self) -> None:
        x = torch.zeros(1, 2, 3, 3, requires_grad=True)
        losses.magnitude_variation(x).backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    def test_variation_of_a_ramp(self) -> None:
        ramp = torch.arange(6.0).expand(2, 1, 4, 6)
        torch.testing.assert_close(losses.total_variation(ramp), torch.tensor(4 * 5 / 24.0))
        torch.testing.assert_close(
            losses.total_variation(2 * ramp.mT), torch.tensor(4 * 4 * 5 / 24.0)
        )

    @pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 6)])
    @pytest.mark.parametrize(
        "loss", [losses.total_variation, losses.magnitude_variation, losses.blur_pin]
    )
    def test_constants_cost_nothing(self, loss, size: tuple[int, int]) -> None:
        x = _constant((2, 3, *size))
        value = loss(x)
        value.backward()
        assert x.grad is not None
        assert value < 1e-12
        assert x.grad.abs().max() < 1e-12

    def test_consistency(self) -> None:
        target = _random(2, 3, 4, 5)
        other = _random(2, 3, 4, 5, seed=2)
        assert losses.magnitude_consistency(-target, target) == 0
        by_map = losses.magnitude_consistency(losses.magnitude(other), target)
        torch.testing.assert_close(losses.magnitude_consistency(other, target), by_map)
        assert by_map > 0

    @pytest.mark.parametrize(
        "loss", [losses.total_variation, losses.magnitude_variation, losses.blur_pin]
    )
    def test_gradcheck(self, loss) -> None:
        assert torch.autograd.gradcheck(loss, _random(1, 2, 4, 5).requires_grad_())


class TestCRF:
    """The pairwise term."""

    def test_equals_the_sum_over_pairs(self) -> None:
        features, image = _random(2, 5, 6, 9), _random(2, 3, 6, 9, seed=2)
        loss = losses.crf_pairwise(features, image, n_points=20, shift=0.1, generator=_generator())
        generator = _generator()
        y = torch.randint(6, (20,), generator=generator)
        x = torch.randint(9, (20,), generator=generator)
        total = torch.zeros(()).double()
        for b in range(2):
            for i in range(20):
                for j in range(20):
                    place = ((y[i] - y[j]) ** 2 + (x[i] - x[j]) ** 2) / 81
                    a, c = image[b, :, y[i], x[i]], image[b, :, y[j], x[j]]
                    colour = (a - c).square().sum()
                    kernel = 10 * torch.exp(-place / 0.2 - colour / 0.3)
                    kernel = kernel + 3 * torch.exp(-place / 0.01) - 0.1
                    f, g = features[b, :, y[i], x[i]], features[b, :, y[j], x[j]]
                    total = total + kernel * (f - g).square().sum()
        torch.testing.assert_close(loss, total / 800)

    def test_constant_features_have_no_gradient(self) -> None:
        features = _constant((2, 4, 7, 9))
        value = losses.crf_pairwise(features, _random(2, 3, 7, 9), n_points=50)
        value.backward()
        assert features.grad is not None
        assert value == 0
        assert (features.grad == 0).all()

    def test_without_kernels_there_is_no_gradient(self) -> None:
        features = _random(1, 4, 7, 9).requires_grad_()
        losses.crf_pairwise(features, _random(1, 3, 7, 9), n_points=50, w1=0, w2=0).backward()
        assert features.grad is not None
        assert (features.grad == 0).all()

    def test_one_point_costs_nothing(self) -> None:
        assert losses.crf_pairwise(_random(1, 4, 7, 9), _random(1, 3, 7, 9), n_points=1) == 0

    def test_an_edge_across_one_colour_costs_more_than_along_a_change(self) -> None:
        features = torch.zeros(1, 1, 16, 16)
        features[..., 8:] = 1
        flat = torch.zeros(1, 3, 16, 16)
        edge = (features * 4).expand(-1, 3, -1, -1)
        cost = [
            losses.crf_pairwise(features, image, n_points=200, generator=_generator())
            for image in (edge, flat)
        ]
        assert 0 < cost[0] < 0.2 * cost[1]

    def test_one_frame_beats_two(self) -> None:
        """Features that follow the image cost least beside the image warped as they are."""
        # Two tones in vertical stripes; features are the tones themselves.
        image = (torch.arange(48) // 8 % 2).double().expand(1, 3, 48, 48) * 3
        jitter = sample_jitters(8, size=(48, 48), zoom_probability=1, generator=_generator())
        features = apply_jitter(image, jitter)
        like, unlike = (
            losses.crf_pairwise(features, other, n_points=300, w2=0, generator=_generator())
            for other in (features, image.expand(8, -1, -1, -1))
        )
        assert like < 0.7 * unlike

    def test_gradcheck(self) -> None:
        image = _random(1, 3, 4, 5, seed=2)

        def run(features: Tensor) -> Tensor:
            return losses.crf_pairwise(features, image, n_points=9, generator=_generator())

        assert torch.autograd.gradcheck(run, _random(1, 2, 4, 5).requires_grad_())


class TestProjection:
    """Random unit directions."""

    def test_columns_have_length_one(self) -> None:
        projection = losses.random_projection(384, 30, generator=_generator())
        assert projection.shape == (384, 30)
        torch.testing.assert_close(projection.norm(dim=0), torch.ones(30))
        again = losses.random_projection(384, 30, generator=_generator(), dtype=torch.float32)
        assert torch.equal(projection, again)

    def test_keeps_squared_lengths_on_average(self) -> None:
        x = _random(64)
        projection = losses.random_projection(64, 4000, generator=_generator()).double()
        share = (x @ projection).square().mean() * 64 / x.square().sum()
        assert abs(share - 1) < 0.1


class TestErrors:
    """Each names the argument, the value and the fix."""

    def test_shapes(self) -> None:
        x, y = _random(1, 3, 4, 5), _random(1, 3, 4, 4)
        with pytest.raises(ValueError, match=r"predicted \(1, 3, 4, 5\) and target \(1, 3, 4, 4\)"):
            losses.gaussian_reconstruction(x, y, torch.ones(1))
        with pytest.raises(
            ValueError, match=r"scale must spread over target .* got \(1, 1, 3, 3\)"
        ):
            losses.gaussian_reconstruction(x, x, torch.ones(1, 1, 3, 3))
        with pytest.raises(ValueError, match="must have the same shape"):
            losses.magnitude_consistency(x, y)
        with pytest.raises(ValueError, match="warp both by the same jitter"):
            losses.crf_pairwise(x, y)
        with pytest.raises(ValueError, match=r"features must have shape \(B, 4, h, w\)"):
            losses.SpatialUncertainty(4).double()(x)

    def test_counts(self) -> None:
        with pytest.raises(ValueError, match="n_points=0 must be 1 or more"):
            losses.crf_pairwise(_random(1, 3, 4, 5), _random(1, 3, 4, 5), n_points=0)
        with pytest.raises(ValueError, match="n=0 must be 1 or more"):
            losses.random_projection(3, 0)
        with pytest.raises(ValueError, match="embed_dim=0 must be 1 or more"):
            losses.SpatialUncertainty(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_16_bits_are_those_of_float32(dtype: torch.dtype) -> None:
    features = (20 * _random(1, 16, 96, 96)).to(dtype)
    image = _random(1, 3, 96, 96, seed=2).to(dtype)
    terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reconstruction": lambda x, _: losses.gaussian_reconstruction(x, -x, x.abs() + 1),
        "variation": lambda x, _: losses.total_variation(x),
        "magnitude": lambda x, _: losses.magnitude_consistency(x, x.flip(3)),
        "magnitude variation": lambda x, _: losses.magnitude_variation(x),
        "pin": lambda x, _: losses.blur_pin(x),
        "crf": lambda x, g: losses.crf_pairwise(x, g, generator=_generator(3)),
    }
    for name, term in terms.items():
        expected = term(features.float(), image.float())
        assert term(features, image) == pytest.approx(float(expected), rel=1e-2), name
        with torch.autocast("cpu", torch.bfloat16):
            within = term(features.float(), image.float())
        assert within == pytest.approx(float(expected), rel=1e-3), name
