"""File format of implicit features; files are read as untrusted input."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upfeat.bounds import number, whole
from upfeat.implicit.fields import MOST_ANCHORS, MOST_SCALES, Field, KernelField, NetworkField
from upfeat.implicit.grid import GridField
from upfeat.implicit.guides import QueryGuide
from upfeat.storage import read_tensors
from upfeat.strict_json import parse_object
from upfeat.tensor_checks import check_values
from upfeat.types import Size

FORMAT = "upfeat-implicit-2"
"""Value of the metadata key ``format``; it changes whenever the layout of files changes."""
LONGEST_SIDE = 1 << 15
"""Largest height and width of the fitted image that a file may record, pixels."""


class Stored(NamedTuple):
    """Content of a file."""

    field: Field
    components: Tensor
    """(k, C), components of the basis."""
    mean: Tensor
    """(C,), mean of the basis."""
    image_size: Size
    """(height, width) of the fitted image, pixels."""
    image_digest: str
    """Fingerprint of the fitted image."""
    guidance: Tensor | None
    """(3, *image_size) uint8, the fitted image, or ``None`` if the file does not contain it."""
    facts: dict[str, Any]
    """Provenance, as JSON values."""


def read_stored(path: str | Path) -> Stored:
    """Read a file of implicit features.

    Args:
        path: the file to read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or of another kind or version.
    """
    tensors, facts = read_tensors(path)
    if facts.get("format") != FORMAT:
        found = facts.get("format", "no format")
        raise ValueError(
            f"{path}: not implicit features of this version ({found!s:.60}, not {FORMAT}); fit the "
            "photograph by upfeat fit"
        )
    try:
        size = _size(facts["image_size"])
        parts = {k.removeprefix("field."): v for k, v in tensors.items() if k[:6] == "field."}
        field = rebuild(facts["field"], parts, parse_object(facts["field_facts"], "field_facts"))
        components, mean = tensors["components"], tensors["mean"]
        _check_basis(components, mean, field.width)
        png = tensors.get("guidance_png")
        guidance = None if png is None else decode(png, size)
        provenance = parse_object(facts["facts"], "facts")
        digest = facts["image_digest"]
    except KeyError as error:
        raise ValueError(f"{path}: damaged: lacks {error.args[0]}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())[:300]}") from None
    return Stored(field, components.float(), mean.float(), size, digest, guidance, provenance)


def rebuild(kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Field:
    """Build a field from its ``kind``, ``tensors()`` and ``facts()``, which need not be trusted.

    Raises:
        ValueError: the parts do not fit together, or a number is out of bounds or not finite.
    """
    anything = {name.rpartition(".")[2]: (0.0, math.inf) for name in tensors}
    check_values("field", tensors, magnitudes=anything, floating=True)
    try:
        if kind == KernelField.kind:
            return _rebuild_kernel(tensors, facts)
        if kind == NetworkField.kind:
            return _rebuild_network(tensors, facts)
        if kind == GridField.kind:
            return GridField.rebuild(tensors, facts)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"its parts do not fit together ({' '.join(str(error).split())})"
        ) from None
    raise ValueError(f"field {kind[:60]!r} is unknown; known: kernel, network, grid")


def _rebuild_kernel(tensors: dict[str, Tensor], facts: dict[str, Any]) -> KernelField:
    height, width = facts["grid_size"]
    grid_size = whole("grid_size", height, 1, 1 << 20), whole("grid_size", width, 1, 1 << 20)
    places, queries = tensors["anchor_places"], tensors["anchor_queries"]
    scales, coefficients = tensors["scales"], tensors["coefficients"]
    count = len(places)
    if not 1 <= count <= MOST_ANCHORS or len(queries) != count or len(coefficients) != count:
        raise ValueError(f"it has {count} anchors, which do not fit its coefficients")
    if {places.dim(), queries.dim(), coefficients.dim()} != {2} or places.shape[1] != 2:
        raise ValueError("its anchors and coefficients are not tables")
    if scales.dim() != 2 or scales.shape[1] != 3 or not 1 <= len(scales) <= MOST_SCALES:
        raise ValueError(f"scales is {tuple(scales.shape)}, not (up to {MOST_SCALES}, 3)")
    for value in scales.flatten().tolist():
        number("scales", value, 1e-6, 1e6)
    number("sum of scales' weights", float(scales[:, 2].sum()), 0.999, 1.001)
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("guide.")}
    guide = QueryGuide.rebuild(weights, facts["guide"])
    anchors = torch.cat([places.float(), queries.float()], dim=1)
    parts = anchors, scales.float(), coefficients.float(), guide
    return KernelField(
        *parts, grid_size=grid_size, nugget=number("nugget", facts["nugget"], 1e-9, 1)
    )


def _rebuild_network(tensors: dict[str, Tensor], facts: dict[str, Any]) -> NetworkField:
    width, hidden = whole("width", facts["width"]), whole("hidden", facts["hidden"])
    frequencies = whole("frequencies", facts["frequencies"])
    # Shapes are checked first, so that the network is no larger than the file.
    for name, shape in (
        ("phases", (2, 5, frequencies)),
        ("first.weight", (hidden, 10 * frequencies + 3)),
        ("last.weight", (width, hidden)),
    ):
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
    number("dropout", facts["dropout"], 0, 1, below=True)
    with torch.random.fork_rng(devices=[]):
        field = NetworkField(**facts)
    field.load_state_dict(tensors)
    return field.eval().requires_grad_(False)


def encode(guidance: Tensor) -> Tensor:
    """Encode an image (3, H, W) uint8 as the N bytes of a PNG file: lossless, about half as large.

    Returns:
        (N,) uint8.
    """
    buffer = io.BytesIO()
    Image.fromarray(guidance.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def decode(encoded: Tensor, size: Size) -> Tensor:
    """Decode an image that :func:`encode` encoded.

    Args:
        encoded: (N,) uint8, the bytes of a PNG file.
        size: expected (height, width) of the image, pixels.

    Returns:
        (3, *size) uint8.

    Raises:
        ValueError: ``encoded`` is no PNG file of this size.
    """
    if encoded.dtype is not torch.uint8 or encoded.dim() != 1:
        raise ValueError("guidance_png is not the bytes of a file")
    try:
        with Image.open(io.BytesIO(encoded.numpy().tobytes()), formats=["PNG"]) as opened:
            # Checked before decoding: a small file may expand to an image that fills the memory.
            if (opened.height, opened.width) != size:
                raise ValueError(
                    f"its image is {opened.height}×{opened.width}, not {size[0]}×{size[1]}"
                )
            array = np.array(opened.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"guidance_png is no PNG file ({error})") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _size(text: str) -> Size:
    try:
        height, width = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("image_size is not two numbers") from None
    return whole("height", height, 1, LONGEST_SIDE), whole("width", width, 1, LONGEST_SIDE)


def _check_basis(components: Tensor, mean: Tensor, width: int) -> None:
    tensors = {"components": components, "mean": mean}
    any_magnitude = dict.fromkeys(tensors, (0.0, torch.inf))  # features may have any finite scale
    check_values("basis", tensors, magnitudes=any_magnitude, floating=True)
    if components.dim() != 2 or len(components) != width or components.shape[1] < 1:
        raise ValueError(
            f"components is {tuple(components.shape)}, not ({width}, channels) as the field gives"
        )
    if tuple(mean.shape) != (components.shape[1],):
        raise ValueError(f"mean is {tuple(mean.shape)}, not ({components.shape[1]},)")
