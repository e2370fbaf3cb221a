"""The Triton kernels against a float64 oracle: on a GPU, or else in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from backends.interpreter import DEVICE, RUNS, TOLERANCE, interpret

from upfeat.backends import eager
from upfeat.backends.triton import launch as triton_launch
from upfeat.backends.triton import operators as kernels
from upfeat.backends.triton.tables import bicubic_axis, plain_axis, replicated_axis


def reflected(x, radius):
    """Reflect-pad by bouncing, one index at a time."""

    def bounce(i, length):
        while length > 1 and not 0 <= i < length:
            i = -i if i < 0 else 2 * (length - 1) - i
        return i if length > 1 else 0

    for axis in (2, 3):
        length = x.shape[axis]
        x = x.index_select(
            axis, torch.tensor([bounce(i, length) for i in range(-radius, length + radius)])
        )
    return x


def windowed_sum(padded, weights):
    side = round(weights.shape[1] ** 0.5)
    height, width = weights.shape[2:]
    shifts = [(k // side, k % side) for k in range(side * side)]
    return sum(
        padded[:, :, i : i + height, j : j + width] * weights[:, k, None]
        for k, (i, j) in enumerate(shifts)
    )


def upsampled(features, weights):
    resized = F.interpolate(features, weights.shape[2:], mode="bicubic", align_corners=False)
    return windowed_sum(reflected(resized, round(weights.shape[1] ** 0.5) // 2), weights)


def normalised(keys, temperature, sigma, radius):
    height, width = keys.shape[2:]
    padded = reflected(keys, radius)
    side = 2 * radius + 1
    scores = [
        (keys * padded[:, :, i : i + height, j : j + width]).sum(1)
        for i in range(side)
        for j in range(side)
    ]
    share = torch.softmax(temperature * torch.stack(scores, 1), 1)
    u = torch.linspace(-1, 1, side, dtype=torch.float64)
    spatial = torch.exp(-(u[:, None] ** 2 + u[None, :] ** 2) / (2 * sigma**2)).reshape(1, -1, 1, 1)
    kernel = share * spatial
    return kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)


ORACLES = {
    "joint_bilateral_upsample": upsampled,
    "adaptive_conv2d": windowed_sum,
    "neighbourhood_upsample": eager.neighbourhood_upsample,
}


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(found, wanted, dtype, name=""):
    found = found.detach().double().cpu()
    assert found.shape == wanted.shape, name
    assert torch.isfinite(found).all(), f"{name}: not written, or not finite"
    error = (found - wanted).norm() / wanted.norm().clamp(min=1e-12)
    assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def check_pair(operator, source, weights, *options):
    """Forward and both gradients of a (source, weights) operator against its oracle."""
    exact = [t.double().cpu().requires_grad_() for t in (source, weights)]
    wanted = ORACLES[operator](*exact, *options)
    grad = draw(*wanted.shape, dtype=source.dtype, seed=1)
    gradients = torch.autograd.grad(wanted, exact, grad.double().cpu())
    out = getattr(kernels, operator)(source, weights, *options)
    backward = getattr(kernels, operator + "_backward")
    found = backward(grad, source, weights, True, True, *options)
    assert (out.dtype, found[0].dtype, found[1].dtype) == (
        source.dtype,
        source.dtype,
        weights.dtype,
    )
    assert_close(out, wanted.detach(), source.dtype, "output")
    assert_close(found[0], gradients[0], source.dtype, "gradient of the source")
    assert_close(found[1], gradients[1], source.dtype, "gradient of the weights")
    return out, found


# (B, C, h, w), (H, W), radius. What each is for stands beside it.
SIZES = [
    ((2, 5, 4, 3), (8, 6), 3),  # doubling
    ((1, 2, 2, 34), (4, 68), 3),  # several tiles of the planar kernels
    ((1, 37, 3, 9), (6, 18), 3),  # C no multiple of a block, several channel blocks
    ((1, 3, 5, 4), (5, 4), 3),  # ratio 1
    ((2, 3, 4, 4), (7, 7), 3),  # 1.75
    ((1, 2, 2, 3), (8, 12), 3),  # 4
    ((1, 2, 10, 5), (6, 3), 3),  # 0.6
    ((1, 3, 3, 5), (6, 9), 2),  # a ratio per axis, one of them exactly 2
    ((1, 3, 1, 1), (1, 1), 3),
    ((1, 3, 1, 2), (2, 4), 3),  # borders wider than the map
    ((1, 3, 2, 3), (4, 6), 1),
    ((1, 3, 2, 3), (4, 6), 0),
]


class TestOnDevice:
    __test__ = RUNS

    @pytest.mark.parametrize(("shape", "size", "radius"), SIZES)
    def test_upsample(self, shape, size, radius):
        weights = draw(shape[0], (2 * radius + 1) ** 2, *size, seed=2)
        out, _ = check_pair("joint_bilateral_upsample", draw(*shape), weights)
        assert out.is_contiguous()

    @pytest.mark.parametrize(
        ("shape", "size"),
        [((2, 5, 4, 3), (8, 6)), ((1, 37, 3, 9), (6, 18)), ((1, 9, 3, 4), (5, 7))],
    )
    def test_upsample_channels_last(self, shape, size):
        features = draw(*shape).contiguous(memory_format=torch.channels_last)
        out, found = check_pair("joint_bilateral_upsample", features, draw(shape[0], 49, *size))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert found[0].is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize(
        ("dtype", "form"),
        [
            (torch.float16, torch.contiguous_format),
            (torch.float16, torch.channels_last),
            (torch.bfloat16, torch.contiguous_format),
        ],
    )
    def test_half_precision(self, dtype, form):
        features = draw(1, 19, 5, 9, dtype=dtype).contiguous(memory_format=form)
        check_pair("joint_bilateral_upsample", features, draw(1, 49, 10, 18, dtype=dtype, seed=2))

    def test_mixed_precision_computes_in_float32(self):
        features, weights = draw(1, 3, 3, 4, dtype=torch.float16), draw(1, 49, 6, 8, seed=2)
        out = kernels.joint_bilateral_upsample(features, weights)
        wanted = upsampled(features.double().cpu(), weights.double().cpu())
        assert_close(out, wanted, torch.float16)
        wide = kernels.joint_bilateral_upsample(features.float(), weights.half())
        assert_close(
            wide, upsampled(features.double().cpu(), weights.half().double().cpu()), torch.float32
        )

    @pytest.mark.parametrize("radius", [0, 1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_adaptive_conv(self, radius, dtype):
        padded = draw(2, 5, 5 + 2 * radius, 7 + 2 * radius, dtype=dtype)
        weights = draw(2, (2 * radius + 1) ** 2, 5, 7, dtype=dtype, seed=2)
        check_pair("adaptive_conv2d", padded, weights)

    @pytest.mark.parametrize("size", [(8, 12), (7, 9)])
    def test_neighbourhood(self, size):
        features, weights = draw(1, 3, 4, 3), draw(1, 25, *size, seed=2)
        check_pair("neighbourhood_upsample", features, weights, size, (0, 0), (4, 3), (0, 0))
        part = draw(1, 3, 8, 7)  # of a grid of 9×7, all that the window reads
        check_pair("neighbourhood_upsample", part, weights, (19, 23), (8, 5), (9, 7), (1, 0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_strided_arguments(self, dtype):
        features = draw(2, 10, 6, 9, dtype=dtype)[:, ::2, 1:5, 2:8:2]
        weights = draw(2, 8, 6, 49, dtype=dtype, seed=2).permute(0, 3, 1, 2)
        check_pair("joint_bilateral_upsample", features, weights)
        padded = draw(2, 20, 14, 24, dtype=dtype)[:, ::2, :, ::2]
        check_pair("adaptive_conv2d", padded, weights)

    def test_expanded_arguments(self):
        features = draw(1, 3, 3, 3).expand(2, 3, 3, 3)
        weights = draw(1, 49, 6, 6, seed=2).expand(2, 49, 6, 6)
        grad = torch.ones((), device=DEVICE).expand(2, 3, 6, 6)
        found = kernels.joint_bilateral_upsample_backward(grad, features, weights)
        dense = kernels.joint_bilateral_upsample_backward(
            grad.contiguous(), features.contiguous(), weights.contiguous()
        )
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))

    def test_every_tap_gets_a_gradient(self):
        _, found = check_pair("joint_bilateral_upsample", draw(1, 2, 5, 5), draw(1, 49, 10, 10))
        assert (found[1].abs().amax((0, 2, 3)) > 0).all()

    def test_gradients_asked_for_alone(self):
        features, weights, grad = draw(1, 2, 3, 3), draw(1, 49, 6, 6), draw(1, 2, 6, 6)
        both = kernels.joint_bilateral_upsample_backward(grad, features, weights)
        first = kernels.joint_bilateral_upsample_backward(grad, features, weights, True, False)
        second = kernels.joint_bilateral_upsample_backward(grad, features, weights, False, True)
        assert first[1] is None
        assert second[0] is None
        # Bit for bit: the order of every sum is fixed.
        assert torch.equal(first[0], both[0])
        assert torch.equal(second[1], both[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_wide_offsets_change_nothing(self, dtype, monkeypatch):
        features, weights = draw(1, 3, 3, 4, dtype=dtype), draw(1, 49, 6, 8, dtype=dtype)
        keys = draw(1, 3, 6, 8, dtype=dtype)
        grad = draw(1, 3, 6, 8, dtype=dtype)

        def everything():
            return (
                kernels.joint_bilateral_upsample(features, weights),
                *kernels.joint_bilateral_upsample_backward(grad, features, weights),
                kernels.bilateral_weights(keys, 1.0, 1.0, 3),
                *kernels.bilateral_weights_backward(weights, keys, 1.0, 1.0, 3),
            )

        narrow = everything()
        monkeypatch.setattr(triton_launch, "INT32_REACH", 0)
        assert all(torch.equal(a, b) for a, b in zip(narrow, everything(), strict=True))

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_memory_format_of_the_result(self, channels_last):
        form = torch.channels_last if channels_last else torch.contiguous_format
        arguments = draw(1, 3, 3, 4), draw(1, 49, 6, 8)
        out = kernels.joint_bilateral_upsample(*arguments, channels_last=channels_last)
        assert out.is_contiguous(memory_format=form)
        assert torch.equal(out, kernels.joint_bilateral_upsample(*arguments))

    @pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 0)])
    def test_nothing_to_do(self, batch, channels):
        features, weights = draw(batch, channels, 3, 4), draw(batch, 49, 6, 8)
        padded = draw(batch, channels, 12, 14)
        for operator, source in (
            ("joint_bilateral_upsample", features),
            ("adaptive_conv2d", padded),
        ):
            out = getattr(kernels, operator)(source, weights)
            assert out.shape == (batch, channels, 6, 8)
            found = getattr(kernels, operator + "_backward")(out, source, weights)
            assert found[0].shape == source.shape
            assert torch.equal(found[1], torch.zeros_like(weights))
        assert kernels.bilateral_weights(draw(0, 4, 6, 8), 1.0, 1.0, 3).shape == (0, 49, 6, 8)

    @pytest.mark.parametrize(
        ("shape", "radius"),
        [
            ((2, 4, 5, 9), 3),
            ((1, 5, 3, 2), 3),
            ((1, 3, 1, 1), 2),
            ((1, 2, 4, 18), 1),
            ((1, 2, 2, 2), 5),
        ],
    )
    def test_bilateral_weights(self, shape, radius):
        keys = draw(*shape)
        exact = [keys.double().cpu(), torch.tensor(0.8).double(), torch.tensor(0.6).double()]
        exact = [t.requires_grad_() for t in exact]
        wanted = normalised(*exact, radius)
        grad = draw(*wanted.shape, seed=1)
        gradients = torch.autograd.grad(wanted, exact, grad.double().cpu())
        out = kernels.bilateral_weights(keys, torch.tensor(0.8), 0.6, radius)
        found = kernels.bilateral_weights_backward(grad, keys, 0.8, torch.tensor(0.6), radius)
        assert_close(out, wanted.detach(), torch.float32, "weights")
        assert_close(out.sum(1), torch.ones(shape[0], *shape[2:]).double(), torch.float32, "sum")
        if min(shape[2:]) > 1:
            assert_close(found[0], gradients[0], torch.float32, "keys")
        # Two long sums of both signs: judged beside the size of what they add up.
        scale = grad.double().norm().cpu()
        assert abs(found[1].item() - gradients[1]) <= 1e-6 * scale
        assert abs(found[2].item() - gradients[2]) <= 1e-6 * scale

    def test_bilateral_weights_in_half_precision_and_strided(self):
        keys = draw(2, 9, 12, 5, dtype=torch.float16).permute(0, 3, 1, 2)
        exact = keys.double().cpu().requires_grad_()
        wanted = normalised(exact, 0.5, 1.0, 3)
        grad = draw(*wanted.shape, dtype=torch.float16, seed=1)
        out = kernels.bilateral_weights(keys, 0.5, 1.0, 3)
        found = kernels.bilateral_weights_backward(grad, keys, 0.5, 1.0, 3)
        assert out.dtype == found[0].dtype == torch.float16
        assert_close(out, wanted.detach(), torch.float16)
        (gradient,) = torch.autograd.grad(wanted, exact, grad.double().cpu())
        assert_close(found[0], gradient, torch.float16)

    def test_a_vanishing_sum_is_bounded(self):
        # Every tap but far ones is shut out by σ, and the nearest by its score.
        keys = draw(1, 2, 5, 5) * 8
        wanted = normalised(keys.double().cpu(), 1.0, torch.tensor(0.05).double(), 3)
        assert (wanted.sum(1) < 0.99).any()
        assert_close(kernels.bilateral_weights(keys, 1.0, 0.05, 3), wanted, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="this is the process that runs them")
def test_in_the_interpreter():
    interpret(__file__)


@pytest.mark.parametrize(
    ("source", "target"), [(4, 8), (3, 3), (4, 7), (2, 9), (9, 4), (1, 1), (1, 5), (30, 3)]
)
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_windows_hold_all_of_the_resize_and_the_border(source, target, radius):
    axis = bicubic_axis(source, target, radius)
    eye = torch.eye(source, dtype=torch.float64)[None, :, :, None]  # (1, C, h, 1)
    resized = F.interpolate(eye, (target, 1), mode="bicubic", align_corners=False)
    wanted = reflected(resized, radius)[0, :, :, 0].T  # (H + 2r, h)
    assert axis.coefficients is not None
    for y in range(target):
        found = torch.zeros(2 * radius + 1, source)
        for i in range(axis.window):
            position = int(axis.start[y]) + i
            if 0 <= position < source:
                found[:, position] += axis.coefficients[y, :, i]
            else:
                assert not axis.coefficients[y, :, i].any()
        assert torch.allclose(found.double(), wanted[y : y + 2 * radius + 1], atol=1e-6)


@pytest.mark.parametrize(
    "axis",
    [
        *(bicubic_axis(4, 8, 3), bicubic_axis(5, 7, 2), plain_axis(5, 3)),
        *(replicated_axis(3, 10, 1), replicated_axis(9, 10, 1, 30, 17, 11, 2)),
    ],
)
def test_begin_and_end_are_the_windows_turned_round(axis):
    for position in range(axis.source):
        readers = [
            y for y in range(axis.target) if 0 <= position - int(axis.start[y]) < axis.window
        ]
        assert readers == list(range(int(axis.begin[position]), int(axis.end[position])))


def test_exact_doubling_reads_seven_cells():
    assert [bicubic_axis(112, 224, 3).window, bicubic_axis(112, 224, 3).factor] == [7, 2]
    assert [bicubic_axis(30, 30, 3).window, bicubic_axis(30, 30, 3).factor] == [7, 1]
    assert bicubic_axis(16, 28, 3).factor == 0


@pytest.mark.skipif(RUNS, reason="something can run here")
def test_reasons():
    x, weights = torch.zeros(1, 1, 2, 2), torch.zeros(1, 9, 4, 4)
    reason = kernels.can_run_joint_bilateral_upsample(x, weights)
    assert reason is not None
    assert "CUDA" in reason or "Triton" in reason
    assert kernels.can_run_bilateral_weights(x, 1.0, 1.0, 8) is not None
    assert kernels.unavailable_reason() is not None


def test_wrong_shapes_never_reach_a_kernel():
    with pytest.raises(ValueError, match="padded is"):
        kernels.adaptive_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 9, 4, 4))
    with pytest.raises(ValueError, match="batches differ"):
        kernels.joint_bilateral_upsample(torch.zeros(2, 1, 4, 4), torch.zeros(1, 9, 4, 4))
    with pytest.raises(ValueError, match="nothing to upsample"):
        kernels.joint_bilateral_upsample(torch.zeros(1, 1, 0, 4), torch.zeros(1, 9, 4, 4))


def test_importing_the_backend_does_not_import_triton():
    code = "import sys, upfeat.backends.triton.operators; assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
