"""Compiled kernels as PyTorch operators: autograd, shape rules, compiler, transforms, processes."""

import ctypes
import multiprocessing
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_upsamplers import stack_of

import upfeat
from upfeat import functional
from upfeat.backends import dispatch
from upfeat.backends.cpu import library
from upfeat.backends.torch_operators import WINDOWED

REASON = dispatch.availability()["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def inputs(operator, *, channels=5, grid=(4, 3), size=(9, 7), radius=3, batch=2):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(batch, (2 * radius + 1) ** 2, *size, generator=generator)
    if operator == "adaptive_conv2d":
        grid = (size[0] + 2 * radius, size[1] + 2 * radius)
    return torch.randn(batch, channels, *grid, generator=generator), weights


class Handle:
    """A library of another build, as far as the loader asks it."""

    def __init__(self, abi, identity):
        self.upfeat_abi = lambda: abi
        if identity is not None:
            self.upfeat_identity = lambda: identity


def test_a_library_of_another_build_is_refused():
    handle = library._library.load().handle
    abi, identity = handle.upfeat_abi(), handle.upfeat_identity()
    version, interface = identity.split()
    path = Path("libupfeat.so")
    assert version.decode() == upfeat.__version__
    assert library._mismatch(path, Handle(abi, identity)) is None
    cases = [
        (abi + 1, identity, "another version"),
        (abi, None, "no library of upfeat"),
        (abi, b"0.0.9 " + interface, "is of upfeat 0.0.9"),
    ]
    if Path(__file__).parents[2].joinpath("csrc", "upfeat.h").is_file():
        cases.append((abi, version + b" 0123456789abcdef", "build it again"))
    for abi, identity, message in cases:
        reason = library._mismatch(path, Handle(abi, identity)) or ""
        assert message in reason
        assert "\n" not in reason


def test_the_driver_of_the_sanitizers_fits_the_header():
    """It is compiled by ``make sanitize`` alone."""
    driver = Path(__file__).parents[2] / "csrc" / "sanitize" / "driver.cpp"
    compiler = shutil.which("c++")
    if compiler is None or not driver.is_file():
        pytest.skip("needs a C++ compiler and a checkout")
    command = [compiler, "-std=c++17", "-fsyntax-only", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("platform", "name"),
    [("linux", "libupfeat.so"), ("darwin", "libupfeat.dylib"), ("win32", "libupfeat.dll")],
)
def test_names_of_the_library(monkeypatch, platform, name):
    monkeypatch.delenv("UPFEAT_LIBRARY", raising=False)
    monkeypatch.setattr(library.sys, "platform", platform)
    assert {path.name for path in library._candidates()} == {name}


def test_packed_weights_off_cache_lines_are_refused():
    weight = torch.rand(16, 16)
    description = library.Layer(inputs=16, outputs=16, pitch=16, kernel=1)
    description.weight = weight.data_ptr()
    size = (ctypes.c_int64 * 1)()
    library.call("upfeat_layer_pack", description, None, size)
    packed = torch.empty(size[0] + 16, dtype=torch.uint8)
    assert packed.data_ptr() % 64 == 0
    library.call("upfeat_layer_pack", description, ctypes.c_void_p(packed.data_ptr()), size)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        library.call(
            "upfeat_layer_pack", description, ctypes.c_void_p(packed[16:].data_ptr()), size
        )


def test_less_precision_where_pytorch_is_told_so(monkeypatch):
    """PyTorch's setting: "high" is the sum of two bfloat16, and nobody has it without asking."""
    monkeypatch.delenv("UPFEAT_CPU_ISA", raising=False)
    exact = library.library_info()
    try:
        torch.set_float32_matmul_precision("high")
        told = library.library_info()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact["isa"] != "amx_high"
    assert told["isa"] == exact["available"][-1]


@pytest.mark.parametrize("operator", WINDOWED)
@pytest.mark.parametrize("size", [(8, 6), (9, 7), (4, 3), (3, 11)])
def test_gradients_equal_the_reference(operator, size):
    values, weights = inputs(operator, size=size)
    call = getattr(functional, operator)
    grads = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        pair = [x.to(dtype).requires_grad_() for x in (values, weights)]
        out = call(*pair, backend=backend)
        grads[backend] = torch.autograd.grad(out.square().sum(), pair)
    for found, expected in zip(grads["cpu"], grads["reference"], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_range_kernel_gradients_equal_the_reference():
    keys = torch.randn(2, 6, 7, 5)
    grads = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        found = [x.to(dtype).requires_grad_() for x in (keys, torch.tensor(0.7), torch.tensor(0.6))]
        out = functional.bilateral_weights(*found, backend=backend)
        weighting = torch.linspace(0, 1, 49, dtype=dtype)[:, None, None]
        grads[backend] = torch.autograd.grad((out.square() * weighting).sum(), found)
    for found, expected in zip(grads["cpu"], grads["reference"], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("operator", WINDOWED)
def test_opcheck(operator):
    values, weights = inputs(operator)
    options = ([12, 10], [2, 1], [4, 3], [0, 0]) if WINDOWED[operator] else ()
    op = getattr(torch.ops.upfeat, f"{operator}_cpu").default
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = values.clone(memory_format=layout)
        torch.library.opcheck(op, (laid, weights, *options))
    torch.library.opcheck(op, (values.requires_grad_(), weights.requires_grad_(), *options))


@pytest.mark.slow
def test_opcheck_range_kernel():
    scalars = [torch.tensor(value, requires_grad=True) for value in (0.7, 0.6)]
    keys = torch.randn(1, 4, 6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.upfeat.bilateral_weights_cpu.default, (keys, *scalars, 2))


@pytest.mark.slow
def test_opcheck_neighbourhood_weights():
    scalars = [torch.tensor(value, requires_grad=True) for value in (0.7, 0.6)]
    queries = torch.randn(1, 4, 7, 5, requires_grad=True)
    keys = torch.randn(1, 4, 2, 3, requires_grad=True)
    operator = torch.ops.upfeat.neighbourhood_weights_cpu.default
    torch.library.opcheck(operator, (queries, keys, *scalars, 2, [7, 5], [0, 0], [2, 3], [0, 0]))
    torch.library.opcheck(operator, (queries, keys, *scalars, 1, [9, 8], [2, 1], [3, 3], [1, 0]))


@pytest.mark.slow
def test_compiled_neighbourhood_equals_eager():
    def upsample(features, queries, keys, temperature, sigma):
        weights = functional.neighbourhood_weights(queries, keys, temperature, sigma)
        return functional.neighbourhood_upsample(features, weights)

    shapes = [(1, 6, 3, 4), (1, 4, 12, 20), (1, 4, 3, 4)]
    arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]
    arguments += [torch.tensor(value, requires_grad=True) for value in (4.0, 0.7)]
    compiled = torch.compile(upsample, fullgraph=True, backend="aot_eager")
    outs = [function(*arguments) for function in (compiled, upsample)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), arguments) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_vmap_and_grad_transforms():
    values, weights = inputs("joint_bilateral_upsample")
    stacked = torch.stack([values, 2 * values])
    out = torch.func.vmap(functional.joint_bilateral_upsample, in_dims=(0, None))(stacked, weights)
    expected = 2 * functional.joint_bilateral_upsample(values, weights)
    torch.testing.assert_close(out[1], expected, rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: functional.joint_bilateral_upsample(x, weights).sum())
    expected = values.clone().requires_grad_()
    functional.joint_bilateral_upsample(expected, weights, backend="eager").sum().backward()
    torch.testing.assert_close(gradient(values), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_stack_equals_eager(training):
    torch.manual_seed(0)
    stack = stack_of(6).eval().requires_grad_(training)
    features, guidance = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 48, 64)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(features, guidance), stack(features, guidance), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_exported_stack_equals_eager():
    stack = stack_of(6).eval().requires_grad_(False)
    features, guidance = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 48, 64)
    program = torch.export.export(stack, (features, guidance))
    torch.testing.assert_close(
        program.module()(features, guidance), stack(features, guidance), rtol=1e-4, atol=1e-5
    )


def test_many_threads_at_once():
    values, weights = inputs("joint_bilateral_upsample", channels=33, size=(40, 30))
    expected = functional.joint_bilateral_upsample(values, weights, backend="eager")
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(
            lambda _: functional.joint_bilateral_upsample(values, weights, backend="cpu"), range(32)
        )
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def _in_another_process(_):
    values, weights = inputs("joint_bilateral_upsample")
    out = functional.joint_bilateral_upsample(values, weights, backend="cpu")
    expected = functional.joint_bilateral_upsample(values, weights, backend="eager")
    return bool(torch.allclose(out, expected, atol=1e-4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method, threads):
    assert _in_another_process(0)
    # PyTorch's own thread pool does not survive a fork; ours must not need it to.
    threads(1)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(_in_another_process, range(4)).get(timeout=120) == [True] * 4


def test_views_of_any_strides():
    values, weights = inputs("joint_bilateral_upsample")
    expected = functional.joint_bilateral_upsample(values, weights, backend="eager")
    strided = torch.randn(2, 10, 8, 6)[:, ::2, ::2, ::2].copy_(values)
    expanded = values[:1].expand(2, -1, -1, -1)
    wide = weights.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    out = functional.joint_bilateral_upsample(strided, wide, backend="cpu")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        functional.joint_bilateral_upsample(expanded, weights, backend="cpu"),
        functional.joint_bilateral_upsample(expanded, weights, backend="eager"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    values, weights = (x.to(dtype) for x in inputs("joint_bilateral_upsample", channels=20))
    out = functional.joint_bilateral_upsample(values, weights, backend="cpu")
    expected = functional.joint_bilateral_upsample(
        values.double(), weights.double(), backend="reference"
    )
    assert out.dtype == dtype
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < 2 * torch.finfo(dtype).eps


def test_a_backend_that_cannot_run_says_why():
    values, weights = (x.double() for x in inputs("joint_bilateral_upsample"))
    with pytest.raises(ValueError, match=r'backend="cpu" cannot run .*float64'):
        functional.joint_bilateral_upsample(values, weights, backend="cpu")
    assert functional.joint_bilateral_upsample(values, weights).dtype == torch.float64
    with pytest.raises(ValueError, match='backend="triton" cannot run'):
        functional.joint_bilateral_upsample(values, weights, backend="triton")


def test_stack_backends_agree():
    torch.manual_seed(0)
    stack = stack_of(6).eval().requires_grad_(False)
    features, guidance = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 48, 64)
    outs = {}
    for backend in ("auto", "cpu", "eager", "reference"):
        stack.set_backend(backend)
        outs[backend] = stack(features, guidance)
        torch.testing.assert_close(outs[backend], outs["auto"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='"gpu" is unknown'):
        stack.set_backend("gpu")
