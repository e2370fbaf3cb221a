"""The operators: every backend equals the float64 reference, and every gradient is right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.geometry import reflect_pad

SHAPES = [((1, 1), (4, 4)), ((3, 5), (7, 4)), ((4, 4), (8, 8)), ((7, 5), (9, 13)), ((9, 8), (5, 4))]


def backends_for(operator, *arguments):
    """Every backend but the oracle that can run on these arguments."""
    names = [name for name in dispatch.BACKENDS if name != "reference"]
    return [n for n in names if dispatch.reason_against(operator, n, *arguments) is None]


@pytest.mark.parametrize(("grid", "size"), SHAPES)
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_every_backend_equals_the_reference(grid, size, radius):
    generator = torch.Generator().manual_seed(0)
    taps = (2 * radius + 1) ** 2
    features = torch.randn(2, 5, *grid, generator=generator)
    weights = torch.randn(2, taps, *size, generator=generator)
    expected = functional.joint_bilateral_upsample(
        features.double(), weights.double(), backend="reference"
    )
    for backend in backends_for("joint_bilateral_upsample", features, weights):
        out = functional.joint_bilateral_upsample(features, weights, backend=backend)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["adaptive_conv2d", "joint_bilateral_upsample"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradients_of_all_taps(operator, backend):
    generator = torch.Generator().manual_seed(1)
    size = (5, 4)
    shape = (11, 10) if operator == "adaptive_conv2d" else (3, 2)
    values = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 49, *size, dtype=torch.float64, generator=generator)
    call = getattr(functional, operator)
    assert torch.autograd.gradcheck(
        lambda a, b: call(a, b, backend=backend),
        (values.requires_grad_(), weights.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_bilateral_weights_gradients(backend):
    keys = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.9)]
    assert torch.autograd.gradcheck(
        lambda q, t, s: functional.bilateral_weights(q, t, s, radius=2, backend=backend),
        (keys, *scalars),
        fast_mode=True,
    )


def test_bilateral_weights_sum_to_one_and_backends_agree():
    keys = torch.randn(2, 6, 9, 4)
    expected = functional.bilateral_weights(keys.double(), 0.8, 0.6, backend="reference")
    torch.testing.assert_close(expected.sum(1), torch.ones(2, 9, 4, dtype=torch.float64))
    out = functional.bilateral_weights(keys, 0.8, 0.6, backend="eager")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    radius=st.integers(0, 2),
)
@settings(deadline=None, max_examples=40)
def test_neighbourhood_upsample_is_its_definition(grid, size, radius):
    features = torch.randn(2, 3, *grid, dtype=torch.float64)
    weights = torch.randn(2, (2 * radius + 1) ** 2, *size, dtype=torch.float64)
    out = functional.neighbourhood_upsample(features, weights)
    expected = torch.zeros_like(out)
    rows = ((torch.arange(size[0]) + 0.5) * grid[0] / size[0]).floor().long()
    columns = ((torch.arange(size[1]) + 0.5) * grid[1] / size[1]).floor().long()
    offsets = range(-radius, radius + 1)
    for tap, (dy, dx) in enumerate((dy, dx) for dy in offsets for dx in offsets):
        shifted = features[:, :, (rows + dy).clamp(0, grid[0] - 1)]
        shifted = shifted[:, :, :, (columns + dx).clamp(0, grid[1] - 1)]
        expected += shifted * weights[:, tap : tap + 1]
    torch.testing.assert_close(out, expected)


def test_reflection_wider_than_the_map():
    row = torch.arange(3.0).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert reflect_pad(row, 4)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert torch.equal(reflect_pad(torch.ones(1, 1, 1, 1), 3), torch.ones(1, 1, 7, 7))


def test_empty_batch_gives_an_empty_result():
    out = functional.joint_bilateral_upsample(torch.ones(0, 3, 2, 2), torch.ones(0, 49, 8, 8))
    assert out.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("features", "weights", "words"),
    [
        (torch.ones(2, 3, 4, 4), torch.ones(1, 49, 8, 8), "batch size"),
        (torch.ones(1, 3, 4, 4), torch.ones(1, 48, 8, 8), "48 taps"),
        (torch.ones(1, 3, 4, 4), torch.ones(1, 36, 8, 8), "36 taps"),
        (torch.ones(3, 4, 4), torch.ones(1, 49, 8, 8), "4 dimensions"),
        (torch.ones(1, 3, 4, 4), torch.ones(1, 49, 8, 8, dtype=torch.float64), "float64"),
        (torch.ones(1, 3, 0, 4), torch.ones(1, 49, 8, 8), "0×4"),
        (torch.ones(1, 3, 4, 4).int(), torch.ones(1, 49, 8, 8), "int32"),
    ],
)
def test_bad_arguments_are_named(features, weights, words):
    with pytest.raises(ValueError, match=words):
        functional.joint_bilateral_upsample(features, weights)


def test_padding_of_the_wrong_size_and_unknown_backends():
    with pytest.raises(ValueError, match="pad by the radius"):
        functional.adaptive_conv2d(torch.ones(1, 3, 8, 8), torch.ones(1, 49, 8, 8))
    with pytest.raises(ValueError, match='"cuda" is unknown'):
        functional.joint_bilateral_upsample(
            torch.ones(1, 3, 4, 4), torch.ones(1, 49, 8, 8), backend="cuda"
        )


@pytest.mark.parametrize("backend", ["auto", "reference", "eager"])
def test_autocast_rounds_nothing(backend):
    torch.manual_seed(0)
    queries, keys, values = (
        torch.randn(1, 8, 6, 8),
        torch.randn(1, 8, 3, 4),
        torch.randn(1, 5, 3, 4),
    )
    rows, columns = [0] * 6 + [3] * 6, [0] * 8 + [4] * 8
    expected = functional.window_attention(
        queries, keys, values, rows, columns, backend="reference"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = functional.window_attention(queries, keys, values, rows, columns, backend=backend)
    torch.testing.assert_close(found, expected)


def test_mixed_dtypes_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = functional.joint_bilateral_upsample(
            torch.ones(1, 2, 4, 4, dtype=torch.bfloat16), torch.ones(1, 9, 8, 8)
        )
    assert out.shape == (1, 2, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize(
    ("temperature", "sigma", "size"),
    [(1e4, 0.5, 1.0), (1e5, 0.5, 0.02), (-3.0, 0.1, 1.0), (1.0, 1e-4, 1.0)],
)
def test_weights_of_16_bits_are_rounded_once(dtype, backend, temperature, sigma, size):
    """In 16 bits, the products' rounding times the temperature would decide, or overflow."""
    torch.manual_seed(0)
    image, grid = ((size * torch.randn(1, 8, *sides)).to(dtype) for sides in ((9, 8), (3, 4)))
    for weights in (
        lambda cast, backend: functional.bilateral_weights(
            cast(image), temperature, sigma, backend=backend
        ),
        lambda cast, backend: functional.neighbourhood_weights(
            cast(image), cast(grid), temperature, sigma, backend=backend
        ),
    ):
        expected = weights(torch.Tensor.double, "reference")
        found = weights(lambda x: x, backend)
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sigma", [0, 1e-20, -1e-30])
def test_sigmas_whose_square_is_0_are_refused(sigma):
    image = torch.randn(1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"sigma_spatial=.* must not be 0, nor that close to it"):
        functional.bilateral_weights(image, 1.0, sigma)
    with pytest.raises(ValueError, match=r"sigma=.* must not be 0, nor that close to it"):
        functional.neighbourhood_weights(image, image, 1.0, sigma)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(backend, value):
    torch.manual_seed(0)
    weights, features, padded = (
        torch.randn(1, 9, 9, 8),
        torch.randn(1, 33, 3, 4),
        torch.randn(1, 33, 11, 10),
    )
    for operator, clean in (
        (functional.adaptive_conv2d, padded),
        (functional.joint_bilateral_upsample, features),
        (functional.neighbourhood_upsample, features),
    ):
        spoilt = clean.clone()
        spoilt[:, 17, 1] = value
        found = operator(spoilt, weights, backend=backend)
        others = [channel for channel in range(33) if channel != 17]
        assert torch.equal(found[:, others], operator(clean, weights, backend=backend)[:, others])
        assert not torch.isfinite(found[:, 17]).all()


def test_shapes_without_values():
    """Operators tell the shape of their result on the meta device."""
    features, weights = (torch.empty(1, n, s, s, device="meta") for n, s in ((4, 5), (25, 10)))
    assert functional.joint_bilateral_upsample(features, weights).shape == (1, 4, 10, 10)
    assert functional.bilateral_weights(features, 1.0, 0.5).shape == (1, 49, 5, 5)
