"""Conformance suite of upsamplers."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from upfeat.backends import dispatch
from upfeat.features import UpsampledFeatures
from upfeat.geometry import cell_of_pixels
from upfeat.testing import suite
from upfeat.testing.suite import require
from upfeat.types import Size, Window
from upfeat.upsamplers.base import UPSAMPLERS, Upsampler

Make = Callable[[], Upsampler]

GRID = (3, 4)
SIZE = (48, 64)


def check_upsampler(
    make: Make, *, channels: int | None = None, without: Iterable[str] = ()
) -> list[str]:
    """Check the properties of an upsampler that the library relies on.

    The properties concern output sizes, dtypes, constants, affinity in the features, flips,
    batches, windows, heads, gradients, reach, copies and files, named backends, errors for invalid
    inputs, repeated calls, and side effects on inputs and the random state.

    Args:
        make: function that makes the upsampler, called for every property with the same random
            state.
        channels: number of feature channels; ``None`` for the upsampler's ``embed_dim``, or 4 if
            it has none.
        without: names of properties that the upsampler does not claim: weights that do not sum to
            1, for example, do not keep "constants", and filters without symmetry no "flips".

    Returns:
        Names of the properties that hold. Properties that do not apply, such as "affine" if the
        weights depend on the features, are not among them.

    Raises:
        AssertionError: a property does not hold; the message names it and the measured error.
        TypeError: ``make`` is no function, for example an upsampler.
        ValueError: ``without`` names no property.

    Example:
        >>> import upfeat
        >>> held = check_upsampler(lambda: upfeat.JBUStack(4), without=["constants", "flips"])
        >>> "heads" in held
        True
    """
    if isinstance(make, torch.nn.Module) or not callable(make):
        raise TypeError(f"make is of type {type(make).__name__}; give a function that makes one")
    first = _made(make)
    if channels is None:
        channels = getattr(first, "embed_dim", None) or 4
    return suite.run(type(first).__name__, PROPERTIES, (make, channels), without)


def _made(make: Make) -> Upsampler:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def _inputs(
    up: Upsampler, channels: int, *, batch: int = 1, grid: Size = GRID, size: Size = SIZE
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bands = getattr(up, "guidance_bands", 3) or 3
    features = torch.randn(batch, channels, *grid, generator=generator)
    coarse = torch.randn(batch, bands, *grid, generator=generator)
    guidance = torch.randn(batch, bands, *size, generator=generator)
    # Piecewise constant regions, as in photographs, under some noise.
    return features, 0.3 * guidance + torch.nn.functional.interpolate(coarse, size)


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def output_sizes(make: Make, channels: int) -> None:
    """The output has the requested size, by default the size of the guidance."""
    up = _made(make)
    for size in (None, (48, 64), (45, 61), (20, 33), (2, 5), (1, 1)):
        out = up(*_inputs(up, channels), size)
        expected = (1, channels, *(size or SIZE))
        require(out.shape == expected, f"is {tuple(out.shape)}, not {expected}")
        require(bool(torch.isfinite(out).all()), f"holds NaN or infinity at {size}")
    for grid, size in (((1, 1), (16, 16)), ((1, 3), (17, 50)), ((5, 2), (9, 30))):
        out = up(*_inputs(up, channels, grid=grid, size=size))
        require(out.shape[2:] == size, f"is {tuple(out.shape)} for a grid of {grid} and {size}")


def dtypes(make: Make, channels: int) -> None:
    """Outputs have the dtype of the inputs, and dtypes agree to within their precision."""
    up = _made(make)
    features, guidance = _inputs(up, channels)
    expected = up(features, guidance)
    scale = float(expected.std())
    for dtype, tolerance in ((torch.float64, 1e-3), (torch.bfloat16, 0.2)):
        out = _made(make).to(dtype)(features.to(dtype), guidance.to(dtype))
        require(out.dtype == dtype, f"gives {out.dtype} for {dtype}")
        error = float((out.float() - expected).square().mean().sqrt())
        require(error <= tolerance * scale, f"{dtype} strays by {error:.2g} of {scale:.2g}")


def constants(make: Make, channels: int) -> None:
    """Constant features stay constant."""
    up = _made(make)
    _, guidance = _inputs(up, channels, size=(37, 50))
    values = torch.linspace(-1, 2, channels).view(1, channels, 1, 1)
    _close(up(values.expand(1, channels, 4, 5), guidance), values.expand(1, channels, 37, 50))


def affine(make: Make, channels: int) -> bool | None:
    """The output is affine in the features."""
    up = _made(make)
    if up.needs_features:
        return False
    a, guidance = _inputs(up, channels)
    b = a.flip(2, 3).roll(1, 1) + 0.5
    zero = up(torch.zeros_like(a), guidance)
    expected = zero + 2 * (up(a, guidance) - zero) - 3 * (up(b, guidance) - zero)
    _close(up(2 * a - 3 * b, guidance), expected, 1e-3)
    return None


def flips(make: Make, channels: int) -> None:
    """Flipped inputs give the flipped output."""
    up = _made(make)
    features, guidance = _inputs(up, channels)
    expected = up(features, guidance)
    for axis in (2, 3):
        _close(up(features.flip(axis), guidance.flip(axis)).flip(axis), expected, 1e-3)


def batches(make: Make, channels: int) -> None:
    """A batch gives the outputs of its images one by one, in any memory layout."""
    up = _made(make)
    features, guidance = _inputs(up, channels, batch=3)
    together = up(features, guidance)
    alone = [up(f[None], g[None]) for f, g in zip(features, guidance, strict=True)]
    _close(together, torch.cat(alone))
    last = torch.channels_last
    _close(up(features.to(memory_format=last), guidance.to(memory_format=last)), together)
    wide = torch.stack([guidance, guidance], dim=-1)[..., 0]  # not contiguous: stride 2
    _close(up(features, wide), together)


def windows(make: Make, channels: int) -> None:
    """Windows and points of the lazy map equal those of the whole map."""
    up = _made(make)
    features, guidance = _inputs(up, channels)
    for size in (SIZE, (45, 61), (20, 30)):
        whole = up(features, guidance, size)
        lazy = UpsampledFeatures(features, guidance, up, size)
        _close(lazy.full(), whole)
        for window in (Window(0, 0, 5, 7), Window(9, 13, 8, 11), Window(size[0] - 2, 2, 2, 3)):
            rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
            _close(lazy.crop(*window), whole[:, :, rows, columns], 1e-3)
        points = torch.tensor([[0.0, 0.0], [7.5, 12.5], [size[0] - 1.0, size[1] - 1.0]])
        middle = whole[0, :, 7:9, 12:14].mean((1, 2))
        expected = torch.stack([whole[0, :, 0, 0], middle, whole[0, :, -1, -1]])
        _close(lazy.at(points), expected, 1e-3)


def heads(make: Make, channels: int) -> None:
    """A linear head gives the same result before and after upsampling."""
    up = _made(make)
    features, guidance = _inputs(up, channels)
    lazy = UpsampledFeatures(features, guidance, up)
    weight, bias = torch.linspace(-1, 1, 2 * channels).view(2, channels), torch.tensor([0.5, -2])
    expected = torch.einsum("kc,bchw->bkhw", weight, up(features, guidance))
    _close(lazy.project(weight, bias), expected + bias[:, None, None], 1e-3)


def _hidden(up: Upsampler) -> Tensor:
    """Draw random maps in place of a backbone's early layers, (1, D, h', w')."""
    channels = getattr(up, "hidden_dim", 4)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, channels, 2 * GRID[0], 2 * GRID[1], generator=generator)


def gradients(make: Make, channels: int) -> None:
    """Gradients reach features and parameters, and match finite differences along a direction."""
    up = _made(make).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in up.parameters():
        if not bool(parameter.any()):  # layers initialised with 0 would block gradients before them
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    up.requires_grad_(True)
    features, guidance = (one.double() for one in _inputs(up, channels))
    features.requires_grad_()
    shown = _hidden(up).double() if up.wants_hidden else None
    up(features, guidance, hidden=shown).square().mean().backward()
    slopes = {"features": features.grad, **{n: p.grad for n, p in up.named_parameters()}}
    silent = [name for name, slope in slopes.items() if slope is None or not bool(slope.any())]
    require(not silent, f"nothing reaches {', '.join(silent)}")
    with torch.no_grad():
        direction = torch.randn(features.shape, generator=generator).double()
        step = 1e-4
        ends = [
            up(features + sign * step * direction, guidance, hidden=shown).square().mean()
            for sign in (1, -1)
        ]
        measured, computed = (ends[0] - ends[1]) / (2 * step), (features.grad * direction).sum()  # pyright: ignore[reportOptionalOperand]
    torch.testing.assert_close(computed, measured, rtol=1e-4, atol=1e-8)


def reach(make: Make, channels: int) -> bool | None:
    """No pixel depends on cells, or on the image, farther away than ``reach`` cells."""
    up = _made(make)
    cells = getattr(up, "reach", None)
    if cells is None:
        return False
    grid = (2, 2 * cells + 6)
    size = (16, 8 * grid[1])
    features, guidance = _inputs(up, channels, grid=grid, size=size)
    before = up(features, guidance)
    features[..., -1] += 5
    guidance[..., -8:] = -guidance[..., -8:] + 1
    changed = (up(features, guidance) - before).abs().amax((0, 1, 2))  # (W,)
    cell = cell_of_pixels(grid[1], size[1], 0, size[1], changed.device)
    beyond = changed[cell < grid[1] - 1 - cells]
    most = float(beyond.max())
    require(most <= 1e-5, f"reach={cells}, but farther pixels change by {most:.2g}")
    return None


def copies(make: Make, channels: int) -> None:
    """Copies, pickles and saved files give the same output; the configuration is plain JSON."""
    up = _made(make)
    inputs = _inputs(up, channels)
    expected = up(*inputs)
    json.dumps(up.config())
    made = [copy.deepcopy(up), pickle.loads(pickle.dumps(up))]
    if UPSAMPLERS.get(getattr(up, "name", "")) is type(up):
        with tempfile.TemporaryDirectory() as folder:
            up.save_pretrained(Path(folder) / "weights")
            made.append(Upsampler.from_pretrained(Path(folder) / "weights"))
    for other in made:
        state = other.state_dict()
        same = all(torch.equal(state[name], value) for name, value in up.state_dict().items())
        require(same, "weights differ")
        _close(other(*inputs), expected)  # the alignment of tensors may change the last bits


def named_backends(make: Make, channels: int) -> bool | None:
    """A backend selected by name gives the same output or raises; an unknown name raises."""
    up = _made(make)
    inputs = _inputs(up, channels)
    expected, ran = up(*inputs), 0
    for backend in dispatch.BACKENDS:
        try:
            up.set_backend(backend)
            out = up(*inputs)
        except ValueError:
            continue
        _close(out, expected, 1e-3)
        ran += 1
    try:
        up.set_backend("none such")
    except ValueError:
        return None
    raise AssertionError('set_backend("none such") is accepted')


def refusals(make: Make, channels: int) -> None:
    """Invalid inputs raise ValueError."""
    up = _made(make)
    features, guidance = _inputs(up, channels)
    wrong = {
        "features with NaN": (features * torch.nan, guidance, None),
        "guidance with infinity": (features, guidance * torch.inf, None),
        "two images for one map": (features, torch.cat([guidance, guidance]), None),
        "features without a batch": (features[0], guidance, None),
        "an output size of 0": (features, guidance, (0, 5)),
    }
    for label, arguments in wrong.items():
        try:
            up(*arguments)
        except ValueError:
            continue
        raise AssertionError(f"{label} is accepted")


def side_effects(make: Make, channels: int) -> None:
    """A repeated call gives the same output; inputs and the random state do not change."""
    up = _made(make)
    features, guidance = _inputs(up, channels)
    kept = features.clone(), guidance.clone()
    state = torch.get_rng_state()
    out = up(features, guidance)
    require(torch.equal(torch.get_rng_state(), state), "draws random numbers in eval mode")
    require(torch.equal(up(features, guidance), out), "differs from call to call")
    same = torch.equal(features, kept[0]) and torch.equal(guidance, kept[1])
    require(same, "changes its inputs")


PROPERTIES: dict[str, Callable[[Make, int], bool | None]] = {
    check.__name__: check
    for check in (
        output_sizes,
        dtypes,
        constants,
        affine,
        flips,
        batches,
        windows,
        heads,
        gradients,
        reach,
        copies,
        named_backends,
        refusals,
        side_effects,
    )
}
"""All properties, by name."""
