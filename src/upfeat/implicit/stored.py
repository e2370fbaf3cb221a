"""File format of implicit features; files are read as untrusted input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upfeat.bounds import whole
from upfeat.implicit.fields import Field, rebuild
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
            f"{path}: not implicit features of this version ({found!s:.60}, not {FORMAT})"
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
