"""Conformance suites: whether what you made keeps the promises that the library relies on.

Each raises ``AssertionError`` naming the first promise that is broken; put them in your own tests.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.backbones import Backbone, WrappedBackbone, load_backbone
from upfeat.types import Size

_LEAST_LIKENESS = 0.9
"""Cosine of features in half precision to those in single."""


def check_backbone(
    make: str | Callable[[], Any],
    *,
    gradients: bool = True,
    half: bool = True,
    pickling: bool = True,
    locality: bool = True,
    **options: Any,
) -> Backbone:
    """Check that a backbone keeps its contract.

    Shapes at square, tall and odd sizes; the order of cells (a bright patch lights its own cell);
    that an image's features are the same alone, in a batch and twice over; eval mode; gradients
    where they are asked for and no graph where not; device and dtype; half precision; pickling.

    Args:
        make: a name for :func:`upfeat.load_backbone`, or a function of no arguments that returns a
            backbone, or a module or function to make one of.
        gradients: whether it passes gradients on to the image.
        half: whether it runs in bfloat16 and float16.
        pickling: whether it can be pickled; functions defined in other functions cannot.
        locality: whether a cell's features follow the pixels of the cell, as they do unless the
            weights are degenerate.
        **options: of :func:`upfeat.load_backbone`.

    Returns:
        The backbone.

    Raises:
        AssertionError: a promise is broken.
        ValueError: no backbone can be made.

    Example:
        >>> check_backbone(lambda: nn.Conv2d(3, 8, 16, stride=16)).embed_dim
        8
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make if isinstance(make, str) else make()
        backbone = load_backbone(made, **options)
    _check_facts(backbone)
    for size in _sizes(backbone):
        _check_shape(backbone, size)
    if locality:
        _check_order(backbone)
    _check_independence(backbone)
    if gradients:
        _check_gradients(backbone)
    if pickling:
        x = _noise(backbone, 1)
        _close(_run(pickle.loads(pickle.dumps(backbone)), x), _run(backbone, x), "pickling")
    if half:
        _check_half(backbone)
    return backbone


def _sizes(backbone: Backbone) -> list[Size]:
    """Square, tall, wide and odd."""
    stride = backbone.stride
    return [
        (4 * stride, 4 * stride),
        (6 * stride, 3 * stride),
        (3 * stride, 5 * stride),
        (5 * stride + stride // 3, 4 * stride - stride // 4),
    ]


def _noise(backbone: Backbone, count: int, size: Size | None = None) -> Tensor:
    stride = backbone.stride
    draw = torch.Generator().manual_seed(1)
    height, width = size or (5 * stride, 4 * stride)
    return torch.randn(count, backbone.in_channels, height, width, generator=draw).to(
        backbone.mean.device
    )


@torch.no_grad()
def _run(backbone: Backbone, x: Tensor) -> Tensor:
    return backbone(x)


def _check_facts(backbone: Backbone) -> None:
    for label in ("embed_dim", "stride"):
        value = getattr(backbone, label)
        _assert(isinstance(value, int) and value >= 1, f"{label}={value!r} must be 1 or more")
    _assert(bool(backbone.name), "name must not be empty")
    backbone.eval()
    if isinstance(backbone, WrappedBackbone):
        backbone.train()
        inside = backbone.module
        training = isinstance(inside, nn.Module) and any(one.training for one in inside.modules())
        _assert(not training, "the wrapped module must stay in eval mode")
        backbone.eval()


def _check_shape(backbone: Backbone, size: Size) -> None:
    features = _run(backbone, _noise(backbone, 1, size))
    expected = (1, backbone.embed_dim, *backbone.grid_size(size))
    _assert(
        tuple(features.shape) == expected,
        f"an image of {size[0]}×{size[1]} gives {tuple(features.shape)}, not {expected}",
    )
    _assert(features.dtype == torch.float32, f"float32 images give {features.dtype}")
    _assert(features.device == backbone.mean.device, f"features are on {features.device}")
    _assert(bool(torch.isfinite(features).all()), "features hold NaN or infinity")


def _check_order(backbone: Backbone) -> None:
    """A bright patch changes the features of its own cell most, or of one beside it."""
    stride, size = backbone.stride, (6 * backbone.stride, 4 * backbone.stride)
    grid = backbone.grid_size(size)
    dark = 0.1 * _noise(backbone, 1, size)
    for row, column in ((1, 2), (4, 1)):
        bright = dark.clone()
        bright[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] += 2
        change = (_run(backbone, bright) - _run(backbone, dark)).square().sum(1)[0]
        brightest = int(change.argmax())
        found = (brightest // grid[1], brightest % grid[1])
        wanted = ((row + 0.5) * grid[0] / 6 - 0.5, (column + 0.5) * grid[1] / 4 - 0.5)
        reach = [1 + 0.5 * cells / count for cells, count in zip(grid, (6, 4), strict=True)]
        near = all(abs(a - b) <= far for a, b, far in zip(found, wanted, reach, strict=True))
        _assert(
            near,
            f"a bright patch at cell ({row}, {column}) of (6, 4) changes the features most at "
            f"{found} of {grid}: cells are not in row-major order",
        )


def _check_independence(backbone: Backbone) -> None:
    pair = _noise(backbone, 2)
    pair[1] *= 3
    alone = _run(backbone, pair[:1])
    _close(_run(backbone, pair[:1]), alone, "two calls with one image")
    _close(_run(backbone, pair)[:1], alone, "an image alone and in a batch")


def _check_gradients(backbone: Backbone) -> None:
    x = _noise(backbone, 1)
    _assert(not _run(backbone, x).requires_grad, "features under no_grad record a graph")
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(backbone(x).square().sum(), x)
    fine = bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0
    _assert(fine, "the image's gradient is 0, NaN or infinity")


def _check_half(backbone: Backbone) -> None:
    x = _noise(backbone, 1)
    exact = _run(backbone, x).flatten()
    saved = pickle.dumps([one.detach().clone() for one in backbone.parameters()])
    for dtype in (torch.bfloat16, torch.float16):
        cast = backbone.to(dtype)
        features = _run(cast, x)
        _assert(features.dtype == torch.float32, f"in {dtype} float32 images give {features.dtype}")
        likeness = float(torch.cosine_similarity(features.flatten(), exact, dim=0))
        _assert(likeness >= _LEAST_LIKENESS, f"in {dtype} the cosine to float32 is {likeness:.3f}")
        same = _run(cast, x.to(dtype))
        _assert(same.dtype == dtype, f"in {dtype}, images of that type give {same.dtype}")
    backbone.to(torch.float32)
    with torch.no_grad():
        for parameter, value in zip(backbone.parameters(), pickle.loads(saved), strict=True):
            parameter.copy_(value)


def _close(value: Tensor, expected: Tensor, what: str) -> None:
    error = float((value - expected).abs().max())
    scale = float(expected.abs().max()) + 1e-12
    _assert(error <= 1e-4 * scale, f"{what}: features differ by {error / scale:.1e} of the largest")


def _assert(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
