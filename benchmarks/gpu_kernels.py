"""Correctness of the Triton kernels on a GPU, and their time relative to its floor.

    python benchmarks/gpu_kernels.py [--json out.json] [--sweep] [--quick]

Every case is compared with float64 on fresh random numbers. The error is relative, of the whole
tensor, and the memory of the output is filled with NaN before. Then the case is timed with CUDA
events: the median of many runs, over several sets of inputs, so that no inputs are in the cache.
The floor is the time to read each input once and write each output once at the bandwidth of a
device copy, measured in the same run. ``fma floor`` is the time of the operator's multiply-adds at
a float32 rate, also measured in the same run (irrelevant in half precision, which has tensor
cores). ``--sweep`` times other block sizes.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from upfeat.backends import eager
from upfeat.backends.triton import launch as triton_launch
from upfeat.backends.triton import operators as kernels
from upfeat.backends.triton import tables as triton_tables

CACHE = 256 * 2**20  # input sets together exceed this many bytes
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass
class Row:
    case: str
    dtype: str
    layout: str
    error: float
    right: bool
    milliseconds: float
    spread: float
    floor: float
    fma_floor: float
    ratio: float
    peak_mib: float
    result_mib: float


@dataclass
class Case:
    """A case to time: ``run`` on the tensors of ``make``, ``exact`` to check it, and its cost."""

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., object]
    exact: Callable[..., object]
    operations: float
    dtype: torch.dtype
    layout: str


def milliseconds(run: Callable[[int], object], repeats: int) -> tuple[float, float]:
    """Return median and interquartile range of single runs, by CUDA events, after a warm-up."""
    for i in range(5):
        run(i)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for i in range(repeats):
        run(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def graphed(run: Callable[..., object], sets: list[tuple[Tensor, ...]]) -> Callable[[int], object]:
    """Capture runs as CUDA graphs, to time kernels without the host's time to start them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tensors in sets:
            run(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for tensors in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(*tensors)
        graphs.append(graph)
    return lambda i: graphs[i % len(graphs)].replay()


def copy_bandwidth() -> float:
    """Measure bytes per second, read plus written, of a copy far larger than the cache."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    middle, _ = milliseconds(lambda _: target.copy_(source), 20)
    return 2 * source.numel() * 4 / middle * 1e3


def float32_rate() -> float:
    """Measure operations per second of a large float32 matrix product without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(4096, 4096, device="cuda"), torch.randn(4096, 4096, device="cuda")
    middle, _ = milliseconds(lambda _: a @ b, 20)
    return 2 * 4096**3 / middle * 1e3


def tensors_of(result: object) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in results if isinstance(x, Tensor)]


def size_in_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def poison(sizes: list[int]) -> None:
    """Fill the memory of the next results with NaN, so that unwritten elements are noticed."""
    waste = [torch.full((size // 4 + 1,), math.nan, device="cuda") for size in sizes]
    del waste


def error_of(case: Case) -> float:
    tensors = case.make()
    wanted = tensors_of(case.exact(*(t.double() for t in tensors)))
    poison([t.numel() * 8 for t in wanted])
    found = tensors_of(case.run(*tensors))
    errors = [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(found, wanted, strict=True)
    ]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def measure(case: Case, small: Case, bandwidth: float, rate: float) -> Row:
    """Check ``small``, the operator at a size affordable in float64, then time ``case``."""
    error = error_of(small)
    first = case.make()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = size_in_bytes(tensors_of(case.run(*first)))
    least = size_in_bytes(list(first)) + result
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    count = max(1, min(8, CACHE // least))
    sets = [first, *(case.make() for _ in range(count - 1))]
    middle, spread = milliseconds(graphed(case.run, sets), 50)
    floor = least / bandwidth * 1e3
    return Row(
        case.name, SHORT[case.dtype], case.layout, error, error <= TOLERANCE[case.dtype], middle,
        spread, floor, case.operations / rate * 1e3, middle / floor, peak / 2**20, result / 2**20,
    )  # fmt: skip


def gradients(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the exact backward of ``operator``, a function of grad and the arguments."""

    def run(grad: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in arguments]
        return torch.autograd.grad(operator(*leaves), leaves, grad)

    return run


def random(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.randn(*shape, device="cuda").to(dtype).contiguous(memory_format=form)


def upsampling(channels: int, size: int, out: int, dtype: torch.dtype, last: bool) -> list[Case]:
    """Return cases of upsampling: forward, both gradients together, and each step alone."""

    def make() -> tuple[Tensor, ...]:
        features = random(1, channels, size, size, dtype=dtype, last=last)
        return features, random(1, 49, out, out, dtype=dtype) / 7

    def make_backward() -> tuple[Tensor, ...]:
        return random(1, channels, out, out, dtype=dtype, last=last), *make()

    like = random(1, 1, 2, 2, dtype=dtype, last=last)  # dtype and memory format of the result
    axis = triton_tables.bicubic_axis(size, out, 3)

    def fold_only(weights: Tensor) -> Tensor:
        return triton_launch.fold(weights, like, (axis, axis))

    operations = 2 * 49 * channels * out * out
    layout = "channels last" if last else "planar"
    name = f"C={channels} {size}→{out}"
    exact = eager.joint_bilateral_upsample
    forward = Case(name, make, kernels.joint_bilateral_upsample, exact, operations, dtype, layout)
    backward = Case(
        f"{name} backward", make_backward, kernels.joint_bilateral_upsample_backward,
        gradients(exact), 2 * operations, dtype, layout,
    )  # fmt: skip
    fold = replace(
        forward, name=f"{name} fold only", make=lambda: make()[1:], run=fold_only, operations=0
    )
    return [forward, fold, backward]


def convolution(channels: int, out: int, dtype: torch.dtype) -> list[Case]:
    def make() -> tuple[Tensor, ...]:
        padded = random(1, channels, out + 6, out + 6, dtype=dtype)
        return padded, random(1, 49, out, out, dtype=dtype) / 7

    return [
        Case(
            f"conv C={channels} {out}", make, kernels.adaptive_conv2d, eager.adaptive_conv2d,
            2 * 49 * channels * out * out, dtype, "planar",
        )
    ]  # fmt: skip


def range_kernel(out: int, dtype: torch.dtype) -> list[Case]:
    def make() -> tuple[Tensor, ...]:
        return random(1, 32, out, out, dtype=dtype) / 4, torch.rand((), device="cuda") + 0.5

    def run(keys: Tensor, scalar: Tensor) -> Tensor:
        return kernels.bilateral_weights(keys, scalar, scalar, 3)

    def exact(keys: Tensor, scalar: Tensor) -> Tensor:
        return eager.bilateral_weights(keys, scalar, scalar, 3)

    def make_backward() -> tuple[Tensor, ...]:
        return random(1, 49, out, out, dtype=dtype), *make()

    # The gradients of scalars are not checked here but in the tests: they are sums of terms of both
    # signs, whose relative error may be arbitrarily large.
    def run_backward(*arguments: Tensor) -> object:
        grad, keys, scalar = arguments
        return kernels.bilateral_weights_backward(grad, keys, scalar, scalar, 3)[0]

    def exact_backward(*arguments: Tensor) -> object:
        return gradients(exact)(*arguments)[0]

    operations = 2 * 49 * 32 * out * out
    return [
        Case(f"range kernel {out}", make, run, exact, operations, dtype, "planar"),
        Case(
            f"range kernel {out} backward", make_backward,
            run_backward, exact_backward,
            3 * operations, dtype, "planar",
        ),
    ]  # fmt: skip


def pairs(quick: bool) -> list[tuple[Case, Case]]:
    """Return pairs of cases, one to time and a smaller one to check against float64."""
    chosen: list[tuple[Case, Case]] = []

    def add(large: list[Case], small: list[Case]) -> None:
        for a, b in zip(large, small, strict=True):
            # The result of a single step is internal, so the whole operator is checked instead.
            chosen.append((a, small[0] if "only" in a.name else b))

    dtypes = [torch.float32, torch.bfloat16] + ([] if quick else [torch.float16])
    sizes = [(384, 112, 224)] + ([] if quick else [(384, 512, 1024), (31, 112, 224)])
    for dtype, (channels, size, out), last in itertools.product(dtypes, sizes, (False, True)):
        small = upsampling(min(channels, 72), 56, 112, dtype, last)
        add(upsampling(channels, size, out, dtype, last), small)
    for dtype in dtypes:
        small = upsampling(40, 33, 57, dtype, False)
        add(upsampling(384, 128, 224, dtype, False), small)
        add(convolution(384, 224, dtype), convolution(40, 61, dtype))
        add(range_kernel(224, dtype), range_kernel(61, dtype))
        if not quick:
            add(range_kernel(1024, dtype), range_kernel(61, dtype))
    return chosen


def sweep(bandwidth: float, rate: float) -> None:
    """Time the forward with other block sizes and list them, nearest to the floor first."""
    choices = {
        "gather_groups": ([1, 2, 4], [8, 16, 32], [32, 64, 128], [0], [4, 8]),
        "gather_tiles": ([4, 8], [16], [64, 128, 256], [16, 32, 64], [4, 8]),
    }
    for dtype, last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        single = dtype == torch.float32
        kernel = "gather_groups" if single else "gather_tiles"
        kind = ("channels_last" if last else "planar") if single else "half"
        usual = triton_tables.BLOCKS[kernel, 0, kind]
        found = []
        for rows, columns, channels, inner, warps in itertools.product(*choices[kernel]):
            block = replace(
                usual, rows=rows, columns=columns, channels=channels, inner=inner, warps=warps
            )
            triton_tables.BLOCKS[kernel, 0, kind] = block
            large, small = (
                upsampling(c, n, 2 * n, dtype, last)[0] for c, n in ((384, 112), (72, 56))
            )
            try:
                row = measure(large, small, bandwidth, rate)
            except Exception as error:  # for example, too much shared memory
                print(f"  {block}: {type(error).__name__}")
                continue
            if row.right:
                found.append((row.milliseconds, block))
        triton_tables.BLOCKS[kernel, 0, kind] = usual
        print(f"{kernel} {kind} {SHORT[dtype]} {'channels last' if last else 'planar'}")
        for time, block in sorted(found, key=lambda pair: pair[0])[:5]:
            mark = "  (the table's)" if block == usual else ""
            print(f"  {time * 1e3:8.1f} µs  {block}{mark}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sweep", action="store_true", help="also time other block sizes")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and dtypes")
    options = parser.parse_args()
    reason = kernels.unavailable_reason()
    if reason is not None or not torch.cuda.is_available():
        print(f"nothing to measure: {reason or 'PyTorch sees no CUDA device'}")
        return 0
    torch.manual_seed(0)
    bandwidth, rate = copy_bandwidth(), float32_rate()
    device = torch.cuda.get_device_name()
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s, float32 {rate / 1e12:.1f} TFLOP/s")
    print(f"{'case':28} {'type':5} {'layout':14} {'error':>8} {'ms':>9} {'± ms':>7} "
          f"{'floor':>8} {'fma':>8} {'ratio':>6} {'peak MiB':>9} {'result':>8}")  # fmt: skip
    rows = []
    for large, small in pairs(options.quick):
        row = measure(large, small, bandwidth, rate)
        rows.append(row)
        print(
            f"{row.case:28} {row.dtype:5} {row.layout:14} {row.error:8.1e} {row.milliseconds:9.4f} "
            f"{row.spread:7.4f} {row.floor:8.4f} {row.fma_floor:8.4f} {row.ratio:6.2f} "
            f"{row.peak_mib:9.1f} {row.result_mib:8.1f}{'' if row.right else '  WRONG'}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if options.json:
        import triton

        record = {
            "device": device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "bandwidth": bandwidth,
            "float32_rate": rate,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.sweep:
        sweep(bandwidth, rate)
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
