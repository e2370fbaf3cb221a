"""Conformance suite of backends, which compares every operator with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.geometry import reflect_pad
from upfeat.testing import suite
from upfeat.testing.suite import require

_SHAPES = (((1, 1), (4, 4)), ((3, 5), (7, 4)), ((4, 4), (8, 8)), ((7, 5), (9, 13)))
_SHRINKING = ((9, 8), (5, 4))


class Case(NamedTuple):
    """A call of an operator with its input tensors."""

    call: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def __call__(self, backend: str, tensors: Iterable[Tensor] | None = None) -> Tensor:
        """Run the operator on a backend, with other tensors of the same shapes if given."""
        return self.call(*(self.tensors if tensors is None else tensors), backend=backend)


def check_backend(
    name: str, *, device: str | torch.device = "cpu", without: Iterable[str] = ()
) -> list[str]:
    """Check a backend's operators: odd, tiny, non-square and non-contiguous input, and gradients.

    Args:
        name: name of the backend, as in the operators' argument ``backend``.
        device: device of the tensors.
        without: names of properties to skip, for example "gradients" of a backend for inference.

    Returns:
        Names of the properties that hold.

    Raises:
        AssertionError: a property does not hold; the message names it and the measured error.
        ValueError: there is no such backend, or it cannot run here, for the reason in the message.

    Example:
        >>> check_backend("eager")
        ['values', 'layouts', 'half_precision', 'gradients', 'repeats', 'refusals']
    """
    dispatch.check_name(name)
    reason = dispatch.availability().get(name)
    if name == "auto" or reason is not None:
        raise ValueError(f'backend="{name}" cannot be checked: {reason or "it is none of its own"}')
    return suite.run(f"backend {name}", PROPERTIES, (name, torch.device(device)), without)


def _cases(device: torch.device) -> Iterator[Case]:
    """Yield calls of every operator with float32 tensors."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for grid, size in (*_SHAPES, _SHRINKING):
        for radius in (0, 1, 3):
            taps = (2 * radius + 1) ** 2
            features, weights = draw(2, 5, *grid), draw(2, taps, *size)
            yield Case(functional.joint_bilateral_upsample, (features, weights))
            yield Case(functional.neighbourhood_upsample, (features, weights))
            padded = reflect_pad(draw(2, 5, *size), radius)
            yield Case(functional.adaptive_conv2d, (padded, weights))
        queries, keys = draw(2, 4, *size), draw(2, 4, *grid)
        scalars = tuple(torch.tensor(value, device=device) for value in (0.8, 0.6))
        yield Case(functional.bilateral_weights, (queries, *scalars))
        yield Case(functional.neighbourhood_weights, (queries, keys, *scalars))
    options = {"output_size": (9, 13), "window": (2, 3, 4, 6)}
    windowed = (draw(1, 3, 3, 4), draw(1, 25, 4, 6))
    yield Case(_with(functional.neighbourhood_upsample, options), windowed)
    queries, keys = draw(1, 4, 4, 6), draw(1, 4, 3, 4)
    scalars = tuple(torch.tensor(value, device=device) for value in (0.8, 0.6))
    yield Case(_with(functional.neighbourhood_weights, options), (queries, keys, *scalars))


def _with(call: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    def run(*tensors: Tensor, backend: str) -> Tensor:
        return call(*tensors, **options, backend=backend)

    run.__name__ = call.__name__
    return run


def _runnable(name: str, device: torch.device) -> Iterator[tuple[Case, Tensor]]:
    """Yield the cases that the backend supports, with its results; there must be at least one."""
    count = 0
    for case in _cases(device):
        try:
            out = case(name)
        except ValueError:  # an unsupported case is no failure, a wrong result is
            continue
        count += 1
        yield case, out
    require(count > 0, "runs none of the operators")


def _expected(case: Case) -> Tensor:
    return case("reference", [one.double() for one in case.tensors])


def _close(case: Case, found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    shapes = ", ".join(str(tuple(one.shape)) for one in case.tensors)
    torch.testing.assert_close(
        found.to(expected.dtype),
        expected,
        rtol=tolerance,
        atol=tolerance,
        msg=lambda text: f"{case.call.__name__} of {shapes}: {text}",
    )


def values(name: str, device: torch.device) -> None:
    """Results equal the float64 reference."""
    for case, out in _runnable(name, device):
        _close(case, out, _expected(case))


def layouts(name: str, device: torch.device) -> None:
    """Channels-last and non-contiguous tensors give the same results."""
    for case, out in _runnable(name, device):
        for rearrange in (_channels_last, _every_other):
            _close(case, case(name, map(rearrange, case.tensors)), out)


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _every_other(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def half_precision(name: str, device: torch.device) -> None:
    """Half precision, if the backend supports it, keeps its type and is close to float32."""
    for case, out in _runnable(name, device):
        for dtype in (torch.bfloat16, torch.float16):
            try:
                found = case(name, [one.to(dtype) for one in case.tensors])
            except (ValueError, RuntimeError):
                continue
            require(found.dtype == dtype, f"{case.call.__name__} gives {found.dtype} for {dtype}")
            scale = float(out.abs().max().clamp(min=1e-3))
            _close(case, found.float() / scale, out / scale, 0.1)


def gradients(name: str, device: torch.device) -> None:
    """Gradients of every tensor equal the gradients of the float64 reference."""
    for case, out in _runnable(name, device):
        weighting = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        found, expected = (
            _slopes(case, backend, [one.to(dtype) for one in case.tensors], weighting.to(dtype))
            for backend, dtype in ((name, torch.float32), ("reference", torch.float64))
        )
        for one, other in zip(found, expected, strict=True):
            scale = float(other.abs().max().clamp(min=1e-3))
            _close(case, one / scale, other / scale, 1e-3)


def _slopes(
    case: Case, backend: str, tensors: list[Tensor], weighting: Tensor
) -> tuple[Tensor, ...]:
    leaves = [one.detach().clone().requires_grad_() for one in tensors]
    return torch.autograd.grad((case(backend, leaves).square() * weighting).sum(), leaves)


def repeats(name: str, device: torch.device) -> None:
    """A repeated call gives the same bits and does not change its inputs."""
    for case, out in _runnable(name, device):
        kept = [one.clone() for one in case.tensors]
        again = case(name)
        same = all(map(torch.equal, case.tensors, kept))
        require(same, f"{case.call.__name__} changes its inputs")
        require(torch.equal(again, out), f"{case.call.__name__} differs from call to call")


def refusals(name: str, device: torch.device) -> None:
    """Shapes that do not match raise ValueError."""
    wrong = (
        (torch.ones(2, 3, 4, 4), torch.ones(1, 49, 8, 8)),
        (torch.ones(1, 3, 4, 4), torch.ones(1, 48, 8, 8)),
        (torch.ones(3, 4, 4), torch.ones(1, 49, 8, 8)),
    )
    for call in (functional.joint_bilateral_upsample, functional.neighbourhood_upsample):
        for features, weights in wrong:
            try:
                call(features.to(device), weights.to(device), backend=name)
            except ValueError:
                continue
            shapes = f"{tuple(features.shape)} and {tuple(weights.shape)}"
            raise AssertionError(f"{call.__name__} accepts {shapes}")


PROPERTIES: dict[str, Callable[[str, torch.device], None]] = {
    check.__name__: check
    for check in (values, layouts, half_precision, gradients, repeats, refusals)
}
"""All properties, by name."""
