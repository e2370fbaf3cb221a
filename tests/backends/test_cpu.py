"""The compiled CPU kernels against the float64 reference, at every instruction set."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from upfeat.backends import reference
from upfeat.backends.cpu import library as cpu_library
from upfeat.backends.cpu import operators as cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

# (B, C, h, w), (H, W), radius: odd, tiny, not square, channels beside any block; ratios 2, 1, 1.75,
# 4, 0.6, below and above 1 at once, wide windows on one cell.
CASES = [
    ((1, 5, 7, 9), (14, 18), 3),
    ((2, 33, 8, 8), (16, 16), 3),
    ((1, 100, 1, 1), (4, 5), 3),
    ((1, 1, 2, 2), (4, 4), 1),
    ((1, 17, 4, 8), (7, 14), 2),
    ((2, 31, 6, 7), (24, 28), 3),
    ((1, 3, 10, 15), (6, 9), 3),
    ((1, 24, 5, 20), (11, 12), 2),
    ((1, 97, 16, 20), (32, 40), 3),
    ((3, 7, 6, 6), (6, 6), 0),
    ((1, 40, 10, 11), (37, 29), 3),
    ((1, 5, 3, 4), (40, 45), 5),
    # shorter than the radius: reflection bounces more than once
    ((2, 18, 1, 1), (1, 2), 3),
    ((1, 4, 1, 3), (3, 19), 5),
]


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def subnormal(x):
    return (x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)


def problem(case, seed=0):
    (batch, channels, h, w), (height, width), radius = case
    features = randn(batch, channels, h, w, seed=seed)
    weights = randn(batch, (2 * radius + 1) ** 2, height, width, seed=seed + 1)
    grad = randn(batch, channels, height, width, seed=seed + 2)
    return features, weights, grad


def stage_parameters(channels=3, width=32, radius=3, seed=0):
    taps = (2 * radius + 1) ** 2
    shapes = [(width, channels), (width,), (width, width), (width,)]
    shapes += [(taps, taps + channels), (taps,), (taps, taps), (taps,)]
    arrays = [randn(*s, seed=seed + i) / s[-1] ** 0.5 for i, s in enumerate(shapes)]
    return [*arrays[:4], 1.3, 0.8, *arrays[4:]]


def stage_weights_reference(guidance, parameters, radius, scale=0.1):
    p = [v.double()[..., None, None] if isinstance(v, torch.Tensor) and v.dim() == 2
         else v.double() if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=torch.double)
         for v in parameters]  # fmt: skip
    g = guidance.double()
    keys = F.conv2d(F.gelu(F.conv2d(g, p[0], p[1])), p[2], p[3])
    kernel = reference.bilateral_weights(keys, p[4], p[5], radius)
    hidden = F.gelu(F.conv2d(torch.cat([kernel, g], 1), p[6], p[7]))
    return kernel + scale * F.conv2d(hidden, p[8], p[9])


def close(actual, expected, tolerance=2e-5):
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def gradients(operator, grad, *inputs):
    leaves = [value.double().requires_grad_() for value in inputs]
    return torch.autograd.grad(operator(*leaves), leaves, grad.double())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_upsample_and_its_gradients_equal_the_reference(isa, case, layout):
    features, weights, grad = problem(case)
    features, grad = (v.contiguous(memory_format=layout) for v in (features, grad))
    expected = reference.joint_bilateral_upsample(features.double(), weights.double())
    close(cpu.joint_bilateral_upsample(features, weights), expected)
    actual = cpu.joint_bilateral_upsample_backward(grad, features, weights, True, True)
    wanted = gradients(reference.joint_bilateral_upsample, grad, features, weights)
    for a, b in zip(actual, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adaptive_conv_and_its_gradients_equal_the_reference(isa, case, layout):
    (batch, channels, *_), (height, width), radius = case
    _, weights, grad = problem(case)
    padded = randn(batch, channels, height + 2 * radius, width + 2 * radius)
    padded, grad = (v.contiguous(memory_format=layout) for v in (padded, grad))
    expected = reference.adaptive_conv2d(padded.double(), weights.double())
    close(cpu.adaptive_conv2d(padded, weights), expected)
    actual = cpu.adaptive_conv2d_backward(grad, padded, weights, True, True)
    wanted = gradients(reference.adaptive_conv2d, grad, padded, weights)
    for a, b in zip(actual, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("temperature", "sigma"), [(1.3, 0.8), (40.0, 0.09)])
def test_bilateral_weights_and_their_gradients_equal_the_reference(isa, case, temperature, sigma):
    (batch, depth, *_), (height, width), radius = case
    keys = randn(batch, depth, height, width) / depth**0.5
    scalars = [torch.tensor(v, dtype=torch.double) for v in (temperature, sigma)]
    expected = reference.bilateral_weights(keys.double(), *scalars, radius)
    close(cpu.bilateral_weights(keys, temperature, sigma, radius), expected)
    grad = randn(*expected.shape, seed=5)
    actual = cpu.bilateral_weights_backward(grad, keys, temperature, sigma, radius)
    wanted = gradients(lambda *v: reference.bilateral_weights(*v, radius), grad, keys, *scalars)
    # Keys with temperature 40 give gradients 40 times their rounding.
    for a, b in zip(actual, wanted, strict=True):
        close(torch.as_tensor(a), b, 2e-4)


@pytest.mark.parametrize(
    ("shape", "channels", "radius"), [((1, 9, 35), 3, 3), ((2, 16, 16), 3, 3), ((1, 4, 3), 2, 1)]
)
def test_stage_equals_its_parts(isa, shape, channels, radius):
    batch, height, width = shape
    guidance = randn(batch, channels, height, width)
    parameters = stage_parameters(channels, radius=radius)
    expected = stage_weights_reference(guidance, parameters, radius)
    close(cpu.jbu_stage_weights(guidance, *parameters), expected, 1e-5)
    features = randn(batch, 21, (height + 1) // 2, width // 2)
    close(
        cpu.jbu_stage(features, guidance, *parameters),
        reference.joint_bilateral_upsample(features.double(), expected),
    )


def test_gelu_is_exact(isa):
    """A stage whose fix-up network passes one number through shows the GELU alone."""
    x = torch.linspace(-8, 8, 32 * 32).reshape(1, 1, 32, 32)
    one, none = torch.ones(1, 1), torch.zeros(1)
    pick = torch.tensor([[0.0, 1.0]])  # of [kernel, guidance]
    out = cpu.jbu_stage_weights(
        x, one, none, one, none, 1.0, 1.0, pick, none, one, none, fixup_scale=1.0
    )
    close(out - 1, F.gelu(x.double()), 2e-7)


def test_weights_of_any_temperature_are_finite(isa):
    """Logits of 1e20 are rounded by 1e13, which must not make a weight of more than the largest."""
    keys = randn(1, 8, 12, 14)
    for temperature in (1e10, 1e20):
        weights = cpu.bilateral_weights(keys, temperature, 0.7, 3)
        torch.testing.assert_close(weights.sum(1), torch.ones(1, 12, 14))


@pytest.mark.parametrize("temperature", [100.0, 1000.0])
def test_distant_taps_have_weights_of_zero(isa, temperature):
    """Subnormal weights would slow down every sum that they are part of."""
    weights = cpu.bilateral_weights(randn(1, 8, 12, 14), temperature, 0.7, 3)
    assert not subnormal(weights).any()
    assert (weights == 0).float().mean() > 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_is_rounded_once(isa, dtype):
    case = ((2, 19, 5, 6), (10, 13), 3)
    features, weights, grad = (value.to(dtype) for value in problem(case))
    tolerance = torch.finfo(dtype).eps
    for f in (features, features.contiguous(memory_format=torch.channels_last)):
        out = cpu.joint_bilateral_upsample(f, weights)
        assert out.dtype == dtype
        close(out, reference.joint_bilateral_upsample(f.double(), weights.double()), tolerance)
        actual = cpu.joint_bilateral_upsample_backward(grad, f, weights, True, True)
        wanted = gradients(reference.joint_bilateral_upsample, grad, f, weights)
        for a, b in zip(actual, wanted, strict=True):
            assert a.dtype == dtype
            close(a, b, tolerance)
    keys = features / 8
    scalars = [torch.tensor(v, dtype=torch.double) for v in (1.0, 0.7)]
    close(
        cpu.bilateral_weights(keys, 1.0, 0.7, 2),
        reference.bilateral_weights(keys.double(), *scalars, 2),
        tolerance,
    )
    small = cpu.joint_bilateral_upsample(features, weights[..., :4, :5].contiguous())
    assert small.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_keeps_every_value(isa, dtype):
    """One tap of weight one on the same grid copies: subnormals, both zeros, the largest."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.where(every.isfinite(), every, 0).reshape(1, 1, 256, 256)
    out = cpu.adaptive_conv2d(finite, torch.ones_like(finite))
    torch.testing.assert_close(out, finite, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(isa, dtype):
    features, weights, grad = (v.to(dtype) for v in problem(((2, 20, 6, 7), (12, 15), 2)))
    wanted = cpu.joint_bilateral_upsample(features, weights)
    wanted_grads = cpu.joint_bilateral_upsample_backward(grad, features, weights, True, True)

    def sparse(value):
        big = torch.full([2 * size + 1 for size in value.shape], torch.nan, dtype=dtype)
        big[:, 1::2][:, : value.shape[1], 1::2, 1::2][: value.shape[0]] = value
        return big[: value.shape[0], 1::2, 1::2, 1::2]

    def last(value):
        return value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def transposed(value):
        return value.transpose(2, 3).contiguous().transpose(2, 3)

    for change in (sparse, last, transposed):
        f, w, g = change(features), change(weights), change(grad)
        for channels_last in (None, False, True):
            out = cpu.joint_bilateral_upsample(f, w, channels_last=channels_last)
            torch.testing.assert_close(out, wanted, rtol=0, atol=0)
        for a, b in zip(
            cpu.joint_bilateral_upsample_backward(g, f, w, True, True), wanted_grads, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_expanded_inputs(isa):
    features = randn(1, 6, 1, 5).expand(3, 6, 4, 5)
    weights = randn(1, 9, 1, 10).expand(3, 9, 8, 10)
    expected = reference.joint_bilateral_upsample(features.double(), weights.double())
    close(cpu.joint_bilateral_upsample(features, weights), expected)
    grad = torch.ones(()).expand(expected.shape)
    actual = cpu.joint_bilateral_upsample_backward(grad, features, weights, True, True)
    wanted = gradients(reference.joint_bilateral_upsample, grad, features, weights)
    for a, b in zip(actual, wanted, strict=True):
        close(a, b)


def test_constants_stay_constant_and_flips_commute(isa):
    features, weights, _ = problem(((2, 20, 7, 9), (21, 18), 3))
    normalised = weights.softmax(1)
    constant = torch.full_like(features, 0.7)
    close(
        cpu.joint_bilateral_upsample(constant, normalised),
        torch.tensor(0.7).double().expand(2, 20, 21, 18),
    )
    flipped = weights.unflatten(1, (7, 7)).flip(2, 4).flatten(1, 2)
    close(
        cpu.joint_bilateral_upsample(features.flip(3), flipped).flip(3),
        cpu.joint_bilateral_upsample(features, weights).double(),
    )


def test_memory_format_of_the_result():
    features, weights, _ = problem(((1, 8, 4, 4), (8, 8), 1))
    last = features.contiguous(memory_format=torch.channels_last)
    assert cpu.joint_bilateral_upsample(features, weights).is_contiguous()
    assert cpu.joint_bilateral_upsample(last, weights).is_contiguous(
        memory_format=torch.channels_last
    )
    assert cpu.joint_bilateral_upsample(last, weights, channels_last=False).is_contiguous()


def every_operator():
    features, weights, grad = problem(((2, 40, 24, 20), (48, 41), 3))
    keys, guidance, coarse = randn(2, 32, 48, 41), randn(2, 3, 48, 41), randn(2, 32, 24, 20)
    parameters = stage_parameters()
    whole = (48, 41), (0, 0), (24, 20), (0, 0)
    return [
        cpu.joint_bilateral_upsample(features, weights),
        *cpu.joint_bilateral_upsample_backward(grad, features, weights, True, True),
        cpu.bilateral_weights(keys, 1.0, 1.0, 3),
        *cpu.bilateral_weights_backward(weights, keys, 1.0, 1.0, 3),
        cpu.jbu_stage_weights(guidance, *parameters),
        cpu.jbu_stage(features, guidance, *parameters),
        cpu.neighbourhood_upsample(features, weights, *whole),
        *cpu.neighbourhood_upsample_backward(grad, features, weights, True, True, *whole),
        cpu.neighbourhood_weights(keys, coarse, 1.0, 1.0, 3, *whole),
        *cpu.neighbourhood_weights_backward(weights, keys, coarse, 1.0, 1.0, 3, *whole),
    ]


def same(results, expected):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b))
               for a, b in zip(results, expected, strict=True))  # fmt: skip


def test_results_do_not_depend_on_the_thread_count(isa, threads):
    threads(1)
    expected = every_operator()
    for count in (2, 3, 9):
        threads(count)
        assert same(every_operator(), expected)


def test_many_callers_at_once():
    expected = every_operator()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: every_operator(), range(16)))
    assert all(same(result, expected) for result in results)


def test_forked_and_spawned_workers():
    """Fork after the kernels used their threads; the fresh process is itself a spawned one."""
    script = """
    import os, torch
    from upfeat.backends.cpu import operators as cpu
    torch.manual_seed(0)
    features, weights = torch.randn(1, 64, 20, 20), torch.randn(1, 49, 40, 40)
    expected = cpu.joint_bilateral_upsample(features, weights)
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            same = torch.equal(cpu.joint_bilateral_upsample(features, weights), expected)
            os._exit(0 if same else 3)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, timeout=60, env=os.environ)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3)])
def test_empty_batches_and_no_channels(shape):
    features, weights = torch.randn(shape), randn(shape[0], 9, 6, 6)
    out = cpu.joint_bilateral_upsample(features, weights)
    assert out.shape == (*shape[:2], 6, 6)
    grads = cpu.joint_bilateral_upsample_backward(out, features, weights, True, True)
    assert [g.shape for g in grads] == [features.shape, weights.shape]
    assert all(not g.any() for g in grads)
    assert cpu.adaptive_conv2d(randn(*shape[:2], 8, 8), weights).shape == out.shape
    keys = torch.zeros(0, 4, 6, 6)
    assert cpu.bilateral_weights(keys, 1.0, 1.0, 1).shape == (0, 9, 6, 6)
    gradients = cpu.bilateral_weights_backward(torch.zeros(0, 9, 6, 6), keys, 1.0, 1.0, 1)
    assert (gradients[0].shape, *gradients[1:]) == (keys.shape, 0, 0)


def test_only_the_gradients_asked_for():
    features, weights, grad = problem(((1, 3, 4, 4), (8, 8), 1))
    backward = cpu.joint_bilateral_upsample_backward
    both = backward(grad, features, weights, True, True)
    assert torch.equal(backward(grad, features, weights, True, False)[0], both[0])
    assert torch.equal(backward(grad, features, weights, False, True)[1], both[1])
    assert backward(grad, features, weights, False, False) == (None, None)


def test_bad_shapes_are_named():
    features, weights = randn(1, 3, 2, 2), randn(1, 9, 4, 4)
    upsample, stage = cpu.joint_bilateral_upsample, stage_parameters()
    with pytest.raises(ValueError, match=r"features.*4 axes"):
        upsample(features[0], weights)
    with pytest.raises(ValueError, match=r"weights.*8 taps"):
        upsample(features, weights[:, :8])
    with pytest.raises(ValueError, match=r"weights.*batch"):
        upsample(features, weights.expand(2, 9, 4, 4))
    with pytest.raises(ValueError, match=r"features.*empty"):
        upsample(features[:, :, :0], weights)
    with pytest.raises(ValueError, match=r"grad.*must be"):
        cpu.joint_bilateral_upsample_backward(features, features, weights, True, True)
    with pytest.raises(ValueError, match=r"padded.*must be"):
        cpu.adaptive_conv2d(features, weights)
    with pytest.raises(ValueError, match=r"radius=-1"):
        cpu.bilateral_weights(features, 1.0, 1.0, -1)
    with pytest.raises(ValueError, match=r"proj_w0.*must be"):
        cpu.jbu_stage_weights(randn(1, 2, 9, 9), *stage)
    with pytest.raises(ValueError, match=r"guidance.*smaller"):
        cpu.jbu_stage(randn(1, 2, 10, 4), randn(1, 3, 9, 9), *stage)


def test_reasons_against_running():
    features, weights, _ = problem(((1, 3, 4, 4), (8, 8), 1))
    can_run = cpu.can_run_joint_bilateral_upsample
    assert can_run(features, weights) is None
    assert "float64" in can_run(features.double(), weights.double())
    assert "bfloat16" in can_run(features, weights.bfloat16())
    assert "meta" in can_run(features.to("meta"), weights)
    with pytest.raises(ValueError, match="float64"):
        cpu.joint_bilateral_upsample(features.double(), weights.double())


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    features, weights, _ = problem(((1, 3, 4, 4), (8, 8), 1))
    monkeypatch.setenv("UPFEAT_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"UPFEAT_CPU_ISA=mmx.*baseline"):
        cpu.joint_bilateral_upsample(features, weights)


def test_a_missing_or_broken_library_gives_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("UPFEAT_LIBRARY", str(tmp_path / "none.so"))
    assert "is not a file" in cpu_library._Library().load().reason
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("UPFEAT_LIBRARY", str(broken))
    assert "cannot be loaded" in cpu_library._Library().load().reason
