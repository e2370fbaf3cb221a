"""Files of lazy features: coarse features and image, compressed within a bound on the error.

Features are written as float16, and a photograph with 8 bits per colour. Guidance that would lose
more is written with more bits, and features that would lose more are refused. Readers do not trust
a file: they check all tensors and metadata.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.bounds import flag, number
from upfeat.storage import read_tensors, write_tensors
from upfeat.strict_json import parse_object
from upfeat.tensor_checks import all_finite, check_values, read_layouts
from upfeat.types import Size
from upfeat.upsamplers.base import UPSAMPLERS, Upsampler
from upfeat.upsamplers.blueprint import build
from upfeat.upsamplers.checks import check_output_size
from upfeat.upsamplers.pretrained import require_upsampler

FORMAT = "upfeat-lazy-features-1"
"""Name of the format, in the metadata of every file."""

Colour = tuple[float, ...]
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_HALF_ERROR = 2.0**-10
"""Largest allowed error of float16, as a fraction of the largest feature.

Rounding a number above 6e-5, the least normal number of float16, makes at most half of it."""
_COARSEST = 1e-3
"""Largest error of a stored image, in standard deviations of its channel."""
_LEVELS = (1 << 16) - 1


class Parts(NamedTuple):
    """Inputs of lazy features; see :class:`upfeat.UpsampledFeatures`."""

    features: Tensor
    guidance: Tensor
    upsampler: Upsampler
    output_size: Size
    normalization: tuple[Colour, Colour] | None
    """Mean and standard deviation of the guidance's channels."""
    missing: Tensor | None
    """Mask, (B, 1, *output_size), bool: true for pixels without data."""
    hidden: Tensor | None = None
    """Features of early layers, (B, D, h', w')."""


def write_parts(
    path: str | Path, parts: Parts, *, exact: bool = False, weights: str | None = None
) -> None:
    """Write lazy features.

    Args:
        path: the safetensors file.
        parts: inputs of the lazy features.
        exact: store features and guidance unchanged.
        weights: :func:`digest` of the upsampler; ``None`` to compute it.

    Raises:
        ValueError: features or guidance contain NaN or infinity, or float16 is not precise enough
            for the features.
    """
    features, guidance = parts.features.detach(), parts.guidance.detach()
    hidden = {} if parts.hidden is None else {"hidden": parts.hidden.detach()}
    for name, tensor in (("features", features), ("guidance", guidance), *hidden.items()):
        if not all_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity; nothing is written")
    tensors = {"features": features, "guidance": guidance, **hidden}
    if not flag("exact", exact):
        tensors = {"features": _halved(features), **_quantised(guidance, parts.normalization)}
        tensors |= {name: _halved(one, name) for name, one in hidden.items()}
    if parts.missing is not None:
        tensors["missing"] = parts.missing
    name, config = parts.upsampler.name, parts.upsampler.config()
    facts = {
        "format": FORMAT,
        "upfeat_version": __version__,
        "dtype": str(features.dtype).removeprefix("torch."),
        "output_size": json.dumps(list(parts.output_size)),
        "upsampler": json.dumps({"upsampler": name, **config}),
        "weights": digest(parts.upsampler) if weights is None else weights,
    }
    if parts.normalization is not None:
        mean, std = parts.normalization
        facts["normalization"] = json.dumps({"mean": mean, "std": std})
    write_tensors(path, {name: one.contiguous() for name, one in tensors.items()}, facts)


def read_parts(path: str | Path, upsampler: Upsampler | None) -> Parts:
    """Read a file that :func:`write_parts` wrote.

    Args:
        path: the safetensors file.
        upsampler: the upsampler of the saved features; ``None`` suffices for one without weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another format or is damaged, or was written with another
            upsampler.
    """
    layouts, facts = read_layouts(path)
    if facts.get("format") != FORMAT:
        found = facts.get("format", "no format")
        raise ValueError(f"{path}: not lazy features of this version ({found!s:.60}, not {FORMAT})")
    for name in ("features", "guidance"):
        if name not in layouts or len(layouts[name].shape) != 4:
            raise ValueError(f"{path}: damaged: lacks {name} (B, channels, height, width)")
    if set(layouts) - {"features", "guidance", "hidden", "scale", "shift", "missing"}:
        raise ValueError(f"{path}: damaged: holds more tensors than lazy features have")
    dtype = _DTYPES.get(facts.get("dtype", ""))
    if dtype is None:
        raise ValueError(f"{path}: damaged: dtype {facts.get('dtype')!r:.40} is none of features")
    upsampler = _upsampler(path, facts, upsampler)
    size = _output_size(path, facts)
    tensors, _ = read_tensors(path)
    any_size = 0.0, torch.inf
    anything = {"features": any_size, "guidance": any_size, "hidden": any_size}
    features = tensors["features"]
    found = {name: one for name, one in tensors.items() if name in ("features", "hidden")}
    check_values(path, found, magnitudes=anything, floating=True)
    guidance = tensors["guidance"]
    if "scale" in tensors or "shift" in tensors:
        guidance = _restored(path, tensors)
    check_values(path, {"guidance": guidance}, magnitudes=anything, floating=True)
    known, missing = _normalization(path, facts, guidance.shape[1]), _missing(path, tensors, size)
    hidden = tensors["hidden"].to(dtype) if "hidden" in tensors else None
    features, guidance = features.to(dtype), guidance.to(dtype)
    return Parts(features, guidance, upsampler, size, known, missing, hidden)


def digest(upsampler: Upsampler) -> str:
    """SHA-256 of an upsampler's weights, in hexadecimal; "none" for one without weights."""
    state = upsampler.state_dict()
    if not state:
        return "none"
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def _halved(features: Tensor, name: str = "features") -> Tensor:
    """Convert features to float16.

    Raises:
        ValueError: the features overflow, or are so small that rounding loses too much.
    """
    half = features.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} overflow float16; save(path, exact=True)")
    error, largest = (half.to(features) - features).abs().max(), features.abs().max()
    if error > _HALF_ERROR * largest:
        raise ValueError(
            f"{name}, at most {float(largest):.2g}, are too small for float16; "
            "save(path, exact=True)"
        )
    return half


def _quantised(guidance: Tensor, normalization: tuple[Colour, Colour] | None) -> dict[str, Tensor]:
    """Guidance as integer levels: 8 bits for a photograph, 16 for other values.

    The guidance is ``levels * scale + shift``, with one scale and one shift per channel. Where 16
    bits are too coarse, the guidance is returned unchanged, without scale and shift.
    """
    if normalization is not None:
        mean, std = (torch.tensor(one, dtype=torch.float64) for one in normalization)
        # float32 is off by thousandths of a level, so that rounding recovers an 8-bit image.
        kind = torch.promote_types(guidance.dtype, torch.float32)
        slope, middle = (_per_channel(255 * one).to(guidance.device, kind) for one in (std, mean))
        levels = (guidance * slope).add_(middle).round_()
        low, high = levels.aminmax()
        if bool(low >= 0) and bool(high <= 255):
            scale, shift = 1 / (255 * std), -mean / std
            return {"guidance": levels.byte(), "scale": scale.float(), "shift": shift.float()}
    values = guidance.double()
    flat = values.transpose(0, 1).flatten(1)  # (channels, B·H·W)
    low, high = flat.aminmax(dim=1)
    scale = (high - low) / _LEVELS
    # A constant channel has range 0 and needs some positive step.
    scale = torch.where(scale > 0, scale, 1.0)
    if bool((scale / 2 > _COARSEST * flat.std(1, correction=0)).logical_and(high > low).any()):
        return {"guidance": guidance}
    middle = low + (1 << 15) * scale
    levels = ((values - _per_channel(middle)) / _per_channel(scale)).round()
    tensors = {"scale": scale.float(), "shift": middle.float()}
    restored = levels * _per_channel(tensors["scale"]) + _per_channel(tensors["shift"])
    if bool(((restored - values).abs() > _per_channel(scale)).any()):  # values far from 0
        return {"guidance": guidance}
    return {"guidance": levels.to(torch.int16), **tensors}


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _restored(path: str | Path, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of :func:`_quantised`."""
    guidance = tensors["guidance"]
    steps = {name: tensors.get(name, torch.empty(0)) for name in ("scale", "shift")}
    check_values(
        path, steps, magnitudes={"scale": (1e-30, 1e30), "shift": (0, 1e30)}, floating=True
    )
    channels = guidance.shape[1]
    for name, tensor in steps.items():
        if tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"{path}: damaged: {name} is {tuple(tensor.shape)}, not a value for each of "
                f"{channels} channels"
            )
    if guidance.dtype not in (torch.uint8, torch.int16):
        raise ValueError(f"{path}: damaged: guidance holds {guidance.dtype}, not levels")
    return guidance.float() * _per_channel(steps["scale"]) + _per_channel(steps["shift"])


def _upsampler(path: str | Path, facts: dict[str, str], given: Upsampler | None) -> Upsampler:
    """Return the given upsampler, if it is the file's, or build the file's if it has no weights.

    Raises:
        TypeError: ``given`` is not an upsampler.
        ValueError: the file is damaged, needs weights, or was written with another upsampler.
    """
    config = parse_object(facts.get("upsampler", ""), f"{path}: upsampler")
    name, weights = config.pop("upsampler", None), facts.get("weights")
    if not isinstance(name, str) or not isinstance(weights, str):
        raise ValueError(f"{path}: damaged: does not say which upsampler made it")
    if given is None and weights == "none" and name in UPSAMPLERS:
        given = build(UPSAMPLERS[name], config, f"{path}: upsampler").eval()
    if given is None:
        raise ValueError(f"{path}: made by a {name[:60]} with weights; give it as upsampler=")
    require_upsampler(given)
    if given.name != name:
        raise ValueError(
            f"{path}: made by a {name[:60]}, and {given.name} was given; give the one "
            f"that made it, as upfeat.load(backbone, upsampler={name[:60]!r}).upsampler"
        )
    if digest(given) != weights:
        raise ValueError(f"{path}: made by a {name[:60]} with other weights than the one given")
    own: dict[str, Any] = json.loads(json.dumps(given.config()))
    # Later versions have more settings, whose defaults do what earlier versions did.
    defaults = inspect.signature(type(given)).parameters
    config = {key: defaults[key].default for key in own if key in defaults} | config
    other = [key for key in {**own, **config} if own.get(key) != config.get(key)]
    if other:
        listed = ", ".join(f"{key}={config.get(key)!r:.40}" for key in sorted(other))
        raise ValueError(f"{path}: made by a {name[:60]} with {listed}; give that as upsampler=")
    return given


def _output_size(path: str | Path, facts: dict[str, str]) -> Size:
    try:
        height, width = json.loads(facts["output_size"])
        return check_output_size((height, width))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path}: damaged: its output size is not two whole numbers") from None


def _normalization(
    path: str | Path, facts: dict[str, str], channels: int
) -> tuple[Colour, Colour] | None:
    if "normalization" not in facts:
        return None
    found = parse_object(facts["normalization"], f"{path}: normalization")
    values = []
    for name, least in (("mean", -1e9), ("std", 1e-9)):
        one = found.get(name)
        if not isinstance(one, list) or len(one) != channels:
            raise ValueError(f"{path}: normalization: {name} must be {channels} values")
        values.append(tuple(number(f"{path}: {name}", value, least, 1e9) for value in one))
    return values[0], values[1]


def _missing(path: str | Path, tensors: dict[str, Tensor], size: Size) -> Tensor | None:
    missing = tensors.get("missing")
    if missing is None:
        return None
    shape = (len(tensors["features"]), 1, *size)
    if missing.dtype is not torch.bool or tuple(missing.shape) != shape:
        raise ValueError(f"{path}: damaged: missing is no mask of {'×'.join(map(str, shape))}")
    return missing
