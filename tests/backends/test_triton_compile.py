"""Every kernel, as the operators start it, compiled ahead of time for GPUs that need not be here.

The launches are recorded from real calls with the launcher's own arguments, so that what is
compiled is what would run: same block sizes, same specialisation on strides and sizes.
"""

import importlib
import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from upfeat.backends.triton import launch as triton_launch
from upfeat.backends.triton import operators as kernels

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


class Recorder:
    """Stands in for a module of kernels: notes every launch and starts none."""

    def __init__(self, module, launches):
        self.module = importlib.import_module(f"upfeat.backends.triton.{module}")
        self.launches = launches

    def __getattr__(self, name):
        kernel = getattr(self.module, name)
        launches = self.launches

        class Start:
            def __getitem__(self, grid):
                return lambda *arguments, **meta: launches.append((kernel, arguments, meta))

        return Start()


@contextmanager
def recorded(monkeypatch, capability):
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "_kernels", lambda module: Recorder(module, launches))
        patch.setattr(triton_launch, "_capability", lambda tensor: capability)
        yield launches


def compiled(kernel, arguments, meta, capability):
    """The cubin of one launch, specialised as Triton's launcher would."""
    known = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {name: meta[name] for name in known if name in meta}
    constants = {name: value for name, value in meta.items() if name not in options}
    signature, attributes = {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in kernel.arg_names if name in constants}
    assert set(signature) == set(kernel.arg_names)
    signature = {name: signature[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]


def spilled_bytes(cubin, folder):
    """Bytes of stack a thread spills to, or None without the tool that tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return max(int(size) for size in re.findall(r"STACK:(\d+)", report.stdout))


def upsampling(channels, size, output, dtype, form=torch.contiguous_format, radius=3):
    def run():
        features = torch.zeros(1, channels, *size, dtype=dtype).contiguous(memory_format=form)
        weights = torch.zeros(1, (2 * radius + 1) ** 2, *output, dtype=dtype)
        out = kernels.joint_bilateral_upsample(features, weights)
        kernels.joint_bilateral_upsample_backward(out, features, weights)

    return run


def smoothing(channels, size, dtype, radius=8):
    def run():
        features = torch.zeros(1, channels, *size, dtype=dtype)
        weights = torch.zeros(1, (2 * radius + 1) ** 2, *size, dtype=dtype)
        place = size, (0, 0), size, (0, 0)
        out = kernels.neighbourhood_upsample(features, weights, *place)
        kernels.neighbourhood_upsample_backward(out, features, weights, True, True, *place)

    return run


def convolving(channels, size, dtype):
    def run():
        padded = torch.zeros(1, channels, size[0] + 6, size[1] + 6, dtype=dtype)
        weights = torch.zeros(1, 49, *size, dtype=dtype)
        out = kernels.adaptive_conv2d(padded, weights)
        kernels.adaptive_conv2d_backward(out, padded, weights)

    return run


def weighing(depth, size, dtype, radius=3):
    def run():
        keys = torch.zeros(1, depth, *size, dtype=dtype)
        out = kernels.bilateral_weights(keys, 1.0, 1.0, radius)
        kernels.bilateral_weights_backward(out, keys, 1.0, 1.0, radius)

    return run


def attending(depth, heads, channels, blocks, dtype, form=torch.contiguous_format):
    def run():
        queries = torch.zeros(1, depth, 40, 40, dtype=dtype).contiguous(memory_format=form)
        keys, values = torch.zeros(1, depth, 5, 5), torch.zeros(1, channels, 5, 5, dtype=dtype)
        bounds = [0] * 40 + [5] * 40
        kernels.window_attention(
            queries, keys.to(dtype), values, bounds, bounds, heads, 0.1, blocks or [channels]
        )

    return run


LAST = torch.channels_last
CALLS = {
    "doubling": upsampling(384, (16, 16), (32, 32), torch.float32),
    "doubling_channels_last": upsampling(384, (16, 16), (32, 32), torch.float32, LAST),
    "doubling_half": upsampling(384, (16, 16), (32, 32), torch.float16),
    "doubling_bfloat16_channels_last": upsampling(384, (16, 16), (32, 32), torch.bfloat16, LAST),
    "any_ratio": upsampling(31, (16, 15), (28, 27), torch.float32),
    "any_ratio_half": upsampling(31, (16, 15), (28, 27), torch.bfloat16),
    "shrinking": upsampling(16, (30, 30), (7, 9), torch.float32),
    "one_pixel": upsampling(1, (1, 1), (1, 1), torch.float32),
    "radius_one": upsampling(384, (16, 16), (32, 32), torch.float32, radius=1),
    "smoothing": smoothing(384, (28, 28), torch.float32),
    "smoothing_half": smoothing(112, (28, 42), torch.float16),
    "convolution": convolving(384, (32, 32), torch.float32),
    "convolution_half": convolving(384, (32, 32), torch.float16),
    "range_kernel": weighing(32, (32, 64), torch.float32),
    "range_kernel_half": weighing(32, (32, 64), torch.bfloat16),
    "range_kernel_one_pixel": weighing(1, (1, 1), torch.float32),
    "range_kernel_widest": weighing(32, (32, 64), torch.float32, radius=7),
}
CALLS |= {
    "attention_mean": attending(128, 4, 384, None, torch.float32, LAST),
    "attention_split": attending(256, 4, 384, [96] * 4, torch.float32, LAST),
    "attention_split_half": attending(256, 4, 1024, [256] * 4, torch.float16),
    "attention_odd": attending(30, 3, 7, [2, 0, 5], torch.bfloat16),
}
# Bytes: a few of the first, 16 of the second on sm_80, 8 to 104 of the others on sm_100.
MAY_SPILL = {
    "range_kernel_widest",
    "attention_mean",
    "any_ratio_half",
    "attention_odd",
    "smoothing",
    "smoothing_half",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("call", CALLS)
def test_compiles(call, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with recorded(monkeypatch, capability) as launches:
        CALLS[call]()
    assert launches
    for kernel, arguments, meta in launches:
        cubin = compiled(kernel, arguments, meta, capability)
        assert cubin[:4] == b"\x7fELF"
        if call not in MAY_SPILL:
            assert not spilled_bytes(cubin, tmp_path), f"{kernel.__name__} spills registers"


def test_every_kernel_is_compiled(monkeypatch):
    with recorded(monkeypatch, 80) as launches:
        for call in CALLS.values():
            call()
    started = {kernel.__name__ for kernel, _, _ in launches}
    assert started == {
        "fold", "unfold", "gather_groups", "scatter_groups", "gather_tiles", "scatter_tiles",
        "outer_tiles", "range_forward", "range_backward", "attend_norms", "attend_values",
    }  # fmt: skip


@pytest.mark.slow
def test_wide_offsets_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_launch, "INT32_REACH", 0)
    with recorded(monkeypatch, 90) as launches:
        CALLS["doubling"]()
        CALLS["doubling_half"]()
        CALLS["range_kernel"]()
    for launch in launches:
        assert compiled(*launch, 90)[:4] == b"\x7fELF"
