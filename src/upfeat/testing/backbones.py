"""Conformance suite of backbones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upfeat.backbones import Backbone, WrappedBackbone, load_backbone
from upfeat.testing import suite
from upfeat.testing.suite import require
from upfeat.types import Size

_TOLERANCE = 1e-4
"""Largest difference of features that must agree, relative to the largest feature."""
_LEAST_LIKENESS = 0.9
"""Least cosine between features in half and in single precision."""


def check_backbone(
    make: str | Callable[[], Any], *, without: Iterable[str] = (), **options: Any
) -> list[str]:
    """Check the properties of a backbone that the library relies on.

    The properties concern attributes, image sizes (square, tall, wide and odd), the row-major order
    of cells (a bright patch changes its own cell), equal features alone, in a batch and in repeated
    calls, eval mode, gradients on request only, device and preprocessing, bfloat16 and float16,
    pickling, and errors for invalid images.

    Args:
        make: a name for :func:`upfeat.load_backbone`; or a function without arguments, called once,
            that returns a backbone, or a module or function to make a backbone from.
        without: names of properties that the backbone does not claim: a function defined inside
            another, for example, cannot claim "pickling".
        **options: options of :func:`upfeat.load_backbone`.

    Returns:
        Names of the properties that hold.

    Raises:
        AssertionError: a property does not hold; the message names it and the measured error.
        ValueError: no backbone can be made, or ``without`` names no property.

    Example:
        >>> import torch
        >>> held = check_backbone(lambda: torch.nn.Conv2d(3, 8, 16, stride=16))
        >>> "order" in held
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make if isinstance(make, str) else make()
        backbone = load_backbone(made, **options)
    backbone.eval()
    return suite.run(backbone.name, PROPERTIES, (backbone,), without)


def _noise(backbone: Backbone, count: int = 1, size: Size | None = None) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    height, width = size or (5 * backbone.stride, 4 * backbone.stride)
    noise = torch.randn(count, backbone.in_channels, height, width, generator=draw)
    return noise.to(backbone.mean.device)


@torch.no_grad()
def _run(backbone: Backbone, x: Tensor) -> Tensor:
    return backbone(x)


def _require_close(value: Tensor, expected: Tensor) -> None:
    error = float((value - expected).abs().max())
    scale = float(expected.abs().max()) or 1.0
    require(error <= _TOLERANCE * scale, f"features differ by {error / scale:.1e} of the largest")


def _facts(backbone: Backbone) -> None:
    """A backbone has a name, channels, a stride and a normalisation."""
    for label in ("embed_dim", "stride", "in_channels"):
        value = getattr(backbone, label)
        require(isinstance(value, int) and value >= 1, f"{label}={value!r}")
    require(bool(backbone.name), "name is empty")
    channels = backbone.in_channels
    for label, tensor in (("mean", backbone.mean), ("std", backbone.std)):
        require(tuple(tensor.shape) == (channels, 1, 1), f"{label} is {tuple(tensor.shape)}")


def _sizes(backbone: Backbone) -> None:
    """Images of any size of at least the stride give the grid that grid_size returns."""
    stride = backbone.stride
    for size in (
        (4 * stride, 4 * stride),
        (6 * stride, 3 * stride),
        (3 * stride, 5 * stride),
        (5 * stride + stride // 3, 4 * stride - stride // 4),
    ):
        features = _run(backbone, _noise(backbone, 1, size))
        expected = (1, backbone.embed_dim, *backbone.grid_size(size))
        found = tuple(features.shape)
        require(found == expected, f"{size[0]}×{size[1]} give {found}, not {expected}")
        require(bool(torch.isfinite(features).all()), "features hold NaN or infinity")
        require(features.dtype == torch.float32, f"float32 images give {features.dtype}")


def _order(backbone: Backbone) -> None:
    """A bright patch changes the features of its own cell, or of a neighbouring cell, most."""
    stride, cells = backbone.stride, (6, 4)
    size = (cells[0] * stride, cells[1] * stride)
    grid = backbone.grid_size(size)
    dark = 0.1 * _noise(backbone, 1, size)
    for place in ((1, 2), (4, 1)):
        bright = dark.clone()
        top, left = place[0] * stride, place[1] * stride
        bright[..., top : top + stride, left : left + stride] += 2
        change = (_run(backbone, bright) - _run(backbone, dark)).square().sum(1)[0]
        found = divmod(int(change.argmax()), grid[1])
        for cell, brightest, count, length in zip(place, found, grid, cells, strict=True):
            # A model of one image size may have another grid.
            wanted, reach = (cell + 0.5) * count / length - 0.5, 1 + 0.5 * count / length
            require(abs(brightest - wanted) <= reach, f"at {place} of {cells}, {found} of {grid}")


def _batches(backbone: Backbone) -> None:
    """An image's features are the same alone and in a batch with another image."""
    pair = _noise(backbone, 2)
    pair[1] *= 3
    _require_close(_run(backbone, pair)[:1], _run(backbone, pair[:1]))


def _repeats(backbone: Backbone) -> None:
    """Two calls with one image give the same features and do not change the image."""
    x = _noise(backbone)
    before = x.clone()
    features = _run(backbone, x)
    require(torch.equal(x, before), "the image is changed")
    _require_close(_run(backbone, x), features)


def _mode(backbone: Backbone) -> bool:
    """A wrapped module stays in eval mode when the wrapper is trained."""
    if not isinstance(backbone, WrappedBackbone) or not isinstance(backbone.module, nn.Module):
        return False
    backbone.train()
    training = [type(one).__name__ for one in backbone.module.modules() if one.training]
    backbone.eval()
    require(not training, f"in train mode: {', '.join(training)}")
    return True


def _gradients(backbone: Backbone) -> None:
    """Gradients reach an image that requires them; under no_grad no graph is recorded."""
    x = _noise(backbone)
    require(not _run(backbone, x).requires_grad, "a graph is recorded under no_grad")
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(backbone(x).square().sum(), x)
    require(bool(torch.isfinite(gradient).all()), "the gradient holds NaN or infinity")
    require(float(gradient.abs().max()) > 0, "the gradient is 0")


def _device(backbone: Backbone) -> None:
    """Preprocessed images and features are on the backbone's device."""
    pixels = np.zeros((3 * backbone.stride + 1, 4 * backbone.stride, 3), np.uint8)
    if backbone.in_channels == 3:
        x = backbone.preprocess(pixels)
        require(x.device == backbone.mean.device, f"images are on {x.device}")
        require(x.dtype == torch.float32, f"images are {x.dtype}")
        require(tuple(x.shape[2:]) == pixels.shape[:2], f"images are {tuple(x.shape)}")
    require(_run(backbone, _noise(backbone)).device == backbone.mean.device, "features are not")


def _cast(backbone: Backbone, dtype: torch.dtype) -> None:
    exact = _run(backbone, _noise(backbone)).flatten()
    cast = copy.deepcopy(backbone).to(dtype)
    features = _run(cast, _noise(backbone))
    require(features.dtype == torch.float32, f"float32 images give {features.dtype}")
    likeness = float(torch.cosine_similarity(features.flatten(), exact, dim=0))
    require(likeness >= _LEAST_LIKENESS, f"the cosine to float32 is {likeness:.3f}")
    same = _run(cast, _noise(backbone).to(dtype)).dtype
    require(same == dtype, f"images of that type give {same}")
    require(cast.mean.dtype == torch.float32, "mean and std are rounded")


def _bfloat16(backbone: Backbone) -> None:
    """In bfloat16, float32 images give float32 features close to the float32 model's."""
    _cast(backbone, torch.bfloat16)


def _float16(backbone: Backbone) -> None:
    """In float16, float32 images give float32 features close to the float32 model's."""
    _cast(backbone, torch.float16)


def _pickling(backbone: Backbone) -> None:
    """A pickled backbone gives the same features."""
    x = _noise(backbone)
    _require_close(_run(pickle.loads(pickle.dumps(backbone)), x), _run(backbone, x))


def _refusals(backbone: Backbone) -> None:
    """Images of another shape raise ValueError."""
    for x in (_noise(backbone)[0], _noise(backbone)[:, :1].repeat(1, 2, 1, 1)):
        if x.dim() == 4 and backbone.in_channels == 2:
            continue
        try:
            _run(backbone, x)
        except ValueError:
            continue
        require(False, f"{tuple(x.shape)} is taken")


PROPERTIES: dict[str, Callable[[Backbone], Any]] = {
    "facts": _facts,
    "sizes": _sizes,
    "order": _order,
    "batches": _batches,
    "repeats": _repeats,
    "mode": _mode,
    "gradients": _gradients,
    "device": _device,
    "bfloat16": _bfloat16,
    "float16": _float16,
    "pickling": _pickling,
    "refusals": _refusals,
}
"""All properties, by the names that ``check_backbone(…, without=…)`` takes."""
