"""Compiled encoder layers against PyTorch's, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from upfeat.backends import dispatch
from upfeat.backends.cpu.encoder import Before, apply, layer, match_patterns, pool, turns
from upfeat.geometry import reflect_pad
from upfeat.upsamplers.anyup import FeatureBasis

REASON = dispatch.availability()["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
WINOGRAD = 2e-6
"""Relative error of 3x3 layers, which combine products at points up to 1.5."""


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize(
    "shape",  # batch, inputs, outputs, height, width, kernel
    [
        (2, 3, 128, 20, 33, 1),
        (1, 128, 128, 17, 70, 1),
        (2, 3, 128, 9, 70, 3),
        (2, 48, 64, 9, 70, 3),
        (1, 32, 48, 1, 1, 3),
        (1, 32, 24, 2, 129, 3),
        (1, 20, 24, 33, 65, 3),
        (1, 16, 16, 3, 1, 3),
        (1, 128, 128, 18, 67, 3),
        (1, 200, 40, 5, 130, 3),
    ],
)
def test_convolutions(shape, reflect, rounding):
    batch, inputs, outputs, height, width, kernel = shape
    x, bias = random(batch, inputs, height, width), random(outputs)
    weight = random(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
    residual = random(batch, outputs, height, width)
    before, seen = None, x.double()
    if inputs >= 16:
        before = Before(
            scale=random(batch, inputs),
            shift=random(batch, inputs + 1)[:, 1:],
            silu=reflect,
            relu=not reflect,
        )
        scale, shift = (each.double()[..., None, None] for each in (before.scale, before.shift))
        seen = (F.silu if reflect else F.relu)(seen * scale + shift)
    if kernel == 3:
        seen = reflect_pad(seen, 1) if reflect else F.pad(seen, (1, 1, 1, 1))
    expected = F.conv2d(seen, weight.double(), bias.double()) + residual
    sums = torch.stack(
        [each.reshape(batch, 8, -1).sum(2) for each in (expected, expected.square())], dim=2
    )
    rounding = max(rounding, WINOGRAD) if kernel == 3 else rounding
    out, found = layer(x, weight, bias, before=before, residual=residual, reflect=reflect, groups=8)
    assert error(out, expected) < rounding
    assert error(found.values, sums) < rounding
    half, _ = layer(x.half(), weight, bias, before=before, residual=residual, reflect=reflect)
    assert half.dtype == torch.float16
    assert error(half, expected) < 2e-3


@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 17])
def test_every_pixel_of_every_small_size(height, reflect, isa):
    """Tiles of 2x2 or 4x4 pixels and tasks of 16x64 pixels end anywhere; each pixel is as exact."""
    weight = random(16, 20, 3, 3) / 180**0.5
    for width in (1, 2, 3, 4, 5, 6, 7, 8, 31, 61, 62, 63, 64, 65, 66, 67):
        x = random(2, 20, height, width)
        seen = x.double()
        seen = reflect_pad(seen, 1) if reflect else F.pad(seen, (1, 1, 1, 1))
        found, _ = layer(x, weight, reflect=reflect)
        assert (found - F.conv2d(seen, weight.double())).abs().max() < 1e-5, width


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_of_any_magnitude(kernel, rounding):
    """Inputs whose weights are as small as the inputs are large count as much as the others."""
    generator = torch.Generator().manual_seed(0)
    powers = 10.0 ** torch.randint(-6, 7, (1, 40, 1, 1), generator=generator)
    x, weight = random(1, 40, 12, 37) * powers, random(48, 40, kernel, kernel) / powers
    padded = reflect_pad(x.double(), kernel // 2)
    expected = F.conv2d(padded, weight.double())
    assert error(layer(x, weight)[0], expected) < max(rounding, WINOGRAD)


def test_pixels_of_any_magnitude(rounding):
    powers = 10.0 ** torch.randint(
        -18, 19, (1, 1, 9, 21), generator=torch.Generator().manual_seed(0)
    )
    x, weight = random(1, 64, 9, 21), random(32, 64)
    found, _ = layer(x * powers, weight)
    assert error(found / powers, F.conv2d(x.double(), weight.double()[..., None, None])) < rounding


def test_relu_keeps_nan(isa):
    x = random(1, 48, 2, 3).index_fill(3, torch.tensor([1]), torch.nan)
    found = apply(x.clone(), Before(scale=torch.ones(1, 48), shift=torch.zeros(1, 48), relu=True))
    assert torch.equal(found.nan_to_num(9.0), F.relu(x).nan_to_num(9.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_pixel(bad, isa):
    x, weight = random(1, 32, 5, 40), random(32, 32)
    expected, _ = layer(x, weight)
    x[0, 7, 2, 33] = bad
    found, _ = layer(x, weight)
    assert not found[..., 2, 33].isfinite().any()
    found[..., 2, 33] = expected[..., 2, 33]
    assert torch.equal(found, expected)
    weight[3, 5] = bad
    assert not layer(x, weight)[0][:, 3].isfinite().any()


def test_zeros(isa):
    x, weight, bias = torch.zeros(1, 20, 3, 35), torch.zeros(24, 20, 3, 3), random(24)
    assert torch.equal(layer(x, weight, bias)[0], bias[:, None, None].expand(1, 24, 3, 35))


def test_in_place_and_by_threads(threads, isa):
    x, weight = random(2, 32, 70, 41), random(32, 32)
    fresh, sums = layer(x, weight, residual=x, groups=4)
    for count in (1, 3):
        threads(count)
        buffer = x.clone()
        out, found = layer(buffer, weight, residual=buffer, groups=4, out=buffer)
        assert out is buffer
        assert torch.equal(out, fresh)
        assert torch.equal(found.values, sums.values)


def test_group_norm_of_sums():
    x, weight = random(2, 16, 11, 9), torch.eye(16)
    _, sums = layer(x, weight, groups=4)
    gain, bias = random(16), random(16)
    before = sums.norm(gain, bias, 1e-5)
    assert error(pool(x, (11, 9), before), F.group_norm(x, 4, gain, bias)) < 1e-6
    found = apply(x.clone(), sums.norm(gain, bias, 1e-5, silu=True))
    assert error(found, F.silu(F.group_norm(x, 4, gain, bias))) < 1e-6
    part = sums.part(8, 16).norm(None, None, 1e-5)
    assert error(pool(x[:, 8:], (11, 9), part), F.group_norm(x[:, 8:], 2)) < 1e-6


@pytest.mark.parametrize("pair", [32, 16, 4, 2])
def test_rotation(pair, isa):
    x, angles = random(2, 64, 10, 12), (random(10, 64), random(12, 64))
    both = (angles[0][:, None] + angles[1]).permute(2, 0, 1).double()
    turned = both.unflatten(0, (-1, 2, pair))
    first, second = x.double().unflatten(1, (-1, 2, pair)).unbind(2)
    expected = torch.stack(
        [
            first * turned[:, 0].cos() - second * turned[:, 0].sin(),
            second * turned[:, 1].cos() + first * turned[:, 1].sin(),
        ],
        dim=2,
    ).flatten(1, 3)
    assert error(apply(x.clone(), Before(rotate=turns(angles), pair=pair)), expected) < 1e-6


def test_pooling_and_unit_scale(rounding):
    x = random(2, 48, 10, 13)
    before = Before(scale=torch.full((2, 48), 2.0), shift=torch.zeros(2, 48), silu=True)
    expected = F.adaptive_avg_pool2d(F.silu(2 * x), (3, 5))
    assert error(pool(x, (3, 5), before), expected) < 1e-6
    assert error(pool(x, (20, 30)), F.adaptive_avg_pool2d(x, (20, 30))) < 1e-6
    weight = random(32, 48)
    expected = F.linear(F.rms_norm(x.permute(0, 2, 3, 1), (48,), eps=1e-6), weight)
    out, _ = layer(x, weight, before=Before(unit=1e-6))
    assert error(out, expected.permute(0, 3, 1, 2)) < rounding


@pytest.mark.parametrize(("width", "channels"), [(16, 5), (24, 32), (128, 50)])
def test_patterns(width, channels, isa):
    torch.manual_seed(0)
    basis, features = (
        FeatureBasis(width, 5).double().requires_grad_(False),
        random(2, channels, 4, 6),
    )
    expected = basis(features.double())
    assert error(match_patterns(features, basis.basis.float()), expected) < 1e-6


@pytest.mark.parametrize("kernel", [1, 3])
def test_kept_packed_weights_follow_every_change(kernel, monkeypatch, isa):
    x = random(1, 32, 6, 7)
    weight = nn.Parameter(random(16, 32, kernel, kernel), requires_grad=False)

    def check():
        padded = reflect_pad(x, kernel // 2).double()
        assert error(layer(x, weight)[0], F.conv2d(padded, weight.double())) < 5e-5

    check()
    check()
    weight.data[3, 5] *= -2  # changes no version counter
    check()
    weight.mul_(3)
    check()
    weight.data = weight.data.bfloat16()
    check()
    monkeypatch.setenv("UPFEAT_CPU_ISA", "baseline")  # packs in another order
    check()
