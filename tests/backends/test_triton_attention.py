"""Window attention in Triton against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from backends.interpreter import DEVICE, RUNS, TOLERANCE, interpret

from upfeat.backends import reference
from upfeat.backends.triton import operators as kernels
from upfeat.upsamplers.attention import relative_window, shifted_window, whole_window

CASES = [
    ((3, 5), (3, 70), 16, 2, 8, [8], lambda a, b: relative_window(a, b, 0.2)),
    ((4, 20), (2, 61), 24, 2, 70, [66, 4], lambda a, b: shifted_window(a, b, 3)),
    ((2, 10), (2, 23), 20, 4, 19, [4, 2, 0, 13], lambda a, b: shifted_window(a, b, 9)),
    ((1, 2), (2, 3), 2, 2, 3, [3], whole_window),
]


@pytest.mark.skipif(not RUNS, reason="runs in test_in_the_interpreter")
class TestOnDevice:
    @pytest.mark.parametrize(
        ("case", "dtype"),
        [(case, torch.float32) for case in CASES]
        + [(CASES[1], torch.float16), (CASES[2], torch.bfloat16)],
    )
    def test_equals_the_reference(self, case, dtype):
        grid, size, depth, heads, channels, blocks, window = case
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, depth, *size), (1, depth, *grid), (1, channels, *grid))
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        options = (*(window(*pair) for pair in zip(grid, size, strict=True)), heads, 0.4, blocks)
        exact = [each.double().requires_grad_() for each in tensors]
        expected = reference.window_attention(*exact, *options)
        gradients = torch.autograd.grad(expected.square().sum(), exact)
        for form in (torch.contiguous_format, torch.channels_last):
            laid = [each.to(DEVICE).contiguous(memory_format=form) for each in tensors]
            assert kernels.can_run_window_attention(*laid) is None
            out = kernels.window_attention(*laid, *options)
            assert error(out, expected.detach()) < TOLERANCE[dtype]
            assert torch.equal(out, kernels.window_attention(*laid, *options))
        grad = (2 * expected).detach().to(dtype).to(DEVICE)
        found = kernels.window_attention_backward(grad, *laid, *options, [True, False, True])
        assert found[1] is None
        for one, index in ((found[0], 0), (found[2], 2)):
            assert error(one, gradients[index]) < 3 * TOLERANCE[dtype]


def error(found, expected):
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


@pytest.mark.slow
def test_in_the_interpreter():
    interpret(__file__)
