"""The main job: a photograph in, a file of full-resolution features and a picture out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from upfeat import machine
from upfeat._version import __version__
from upfeat.evaluation.provenance import identify_backbone, identify_upsampler
from upfeat.images import read_image
from upfeat.model import FeatUp
from upfeat.outputs import (
    FEATURES,
    Outputs,
    digest,
    encode_picture,
    file_digest,
    plan_outputs,
    watched,
)
from upfeat.storage import replacing, write_tensors
from upfeat.visualize import comparison

__all__ = ["DTYPES", "Outputs", "describe_model", "plan_outputs", "recipe_of", "run_photo"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Storage types of features, by the names that the command line uses."""

# Bytes a pixel, measured: of the file while it is decoded; of the image while the network and the
# upsampler work, beside the map.
_DECODING = 40
_WORKING = 400


def run_photo(
    model: FeatUp,
    photo: Path,
    outputs: Outputs,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float16,
    max_pixels: int | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> Tensor:
    """Upsample one photograph's features and write them, with their provenance, and a picture.

    Args:
        model: backbone and upsampler.
        photo: an image file.
        outputs: where to write; files appear whole or not at all.
        size: length of the shorter side, pixels; ``None`` keeps the photograph's own size.
        dtype: type of the stored features.
        max_pixels: as :func:`upfeat.images.read_image` takes it.
        made_by: what :func:`describe_model` says, where it is known already.

    Returns:
        The stored features, (C, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is too large for the memory there is, or its features
            overflow ``dtype``.
        OSError: writing failed.
    """
    made_by = describe_model(model) if made_by is None else made_by
    with watched(photo) as source:
        check_memory(model, photo, size, dtype)
        pixels = read_image(photo) if max_pixels is None else _read(photo, max_pixels)
    x = model.preprocess(pixels, size, align=False)
    del pixels
    facts = _facts(model, photo, x, dtype)
    recipe = _recipe(source, made_by, size, dtype)
    with torch.inference_mode():
        coarse = model.backbone(x)
        upsampled = model.upsampler(coarse, x)
        stored = upsampled[0].to(dtype).cpu().contiguous()
        # aminmax spreads NaN and infinity without the mask of the whole that isfinite makes.
        if not torch.isfinite(torch.stack(stored.aminmax())).all():
            raise ValueError(f"{photo}: its features overflow {dtype}; store them as bf16 or fp32")
        picture = None
        if outputs.picture is not None:
            image = model.backbone.denormalize(x)[0].cpu()
            label = model.upsampler.name.replace("_", " ")
            drawn = comparison(image, coarse[0].cpu(), upsampled[0].cpu(), label=label)
            picture = encode_picture(drawn, outputs.picture.suffix, recipe=digest(recipe))
    facts |= {"grid_size": _size(coarse), "recipe": digest(recipe), **_texts(recipe)}
    _write(outputs, stored, facts, picture)
    return stored


def _read(photo: Path, max_pixels: int) -> Tensor:
    return read_image(photo, max_pixels=max_pixels)


def _write(outputs: Outputs, stored: Tensor, facts: dict[str, str], picture: bytes | None) -> None:
    """Write both files, or neither."""
    outputs.features.parent.mkdir(parents=True, exist_ok=True)
    if outputs.picture is None or picture is None:
        write_tensors(outputs.features, {"features": stored}, facts)
        return
    with replacing(outputs.picture) as temporary:
        temporary.write_bytes(picture)
        write_tensors(outputs.features, {"features": stored}, facts)


def describe_model(model: FeatUp) -> dict[str, str]:
    """Names for all that decides the features of an image: backbone, upsampler, their weights."""
    return {
        "backbone_identity": identify_backbone(model.backbone),
        "upsampler_identity": identify_upsampler(model.upsampler),
    }


def recipe_of(
    photo: Path, made_by: Mapping[str, Any], *, size: int | None, dtype: torch.dtype
) -> str:
    """Digest of all that the results of a photograph depend on, as its results record it.

    Args:
        photo: the file.
        made_by: what :func:`describe_model` says.
        size: as :func:`run_photo` takes it.
        dtype: likewise.

    Raises:
        OSError: the photograph cannot be read.
    """
    return digest(_recipe(file_digest(photo), made_by, size, dtype))


def _recipe(
    source: str, made_by: Mapping[str, Any], size: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    return {"image_sha256": source, "size": size, "dtype": str(dtype), **made_by}


def _texts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What of a recipe people may want to read."""
    return {"image_sha256": recipe["image_sha256"], "size": str(recipe["size"])}


def _facts(model: FeatUp, photo: Path, x: Tensor, dtype: torch.dtype) -> dict[str, str]:
    return {
        "format": FEATURES,
        "upfeat_version": __version__,
        "image": photo.name,
        "backbone": model.backbone.name,
        "upsampler": model.upsampler.name,
        "embed_dim": str(model.embed_dim),
        "stride": str(model.backbone.stride),
        "image_size": _size(x),
        "output_size": _size(x),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-2]}x{tensor.shape[-1]}"


def check_memory(model: FeatUp, photo: Path, size: int | None, dtype: torch.dtype) -> None:
    """Refuse a photograph that would not fit into memory, before it is decoded or resized.

    Raises:
        ValueError: it would not; the message says which size would.
    """
    own = image_size(photo)
    device = model.backbone.mean.device
    available = machine.available_memory(device)
    if own is None or available is None:
        return
    height, width = resized(own, size)
    a_pixel = model.embed_dim * (4 * 1.25 + dtype.itemsize) + _WORKING
    decoding = own[0] * own[1] * _DECODING if device.type == "cpu" else 0
    needed = decoding + int(height * width * a_pixel)
    if needed <= available:
        return
    have = f"{machine.readable(available)} of memory are free"
    if decoding > 0.9 * available:
        raise ValueError(
            f"{photo}: is {own[0]}×{own[1]} pixels, which take {machine.readable(decoding)} to "
            f"decode, and {have}; make a smaller copy"
        )
    fitting = int(((0.9 * available - decoding) / (height * width * a_pixel)) ** 0.5 * min(height, width))
    raise ValueError(
        f"{photo}: at {height}×{width} pixels its features need about {machine.readable(needed)} "
        f"and {have}; give a smaller size, at most about {fitting}"
    )


def image_size(photo: Path) -> tuple[int, int] | None:
    """(height, width) of an upright image by its header; ``None`` where that does not say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(photo) as opened:
                width, height = opened.size
                turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # Pillow raises what it likes; decoding proper will say what is wrong
        return None
    return (width, height) if turned else (height, width)


def resized(own: tuple[int, int], size: int | None) -> tuple[int, int]:
    """(height, width) of an image whose shorter side is brought to ``size`` pixels."""
    if size is None:
        return own
    scale = size / min(own)
    return max(round(own[0] * scale), 1), max(round(own[1] * scale), 1)


def size_on_disk(
    photo: Path, embed_dim: int, size: int | None, dtype: torch.dtype, *, picture: bool
) -> int | None:
    """About how many bytes the results of a photograph take; ``None`` where it cannot be told."""
    own = image_size(photo)
    if own is None:
        return None
    height, width = resized(own, size)
    # Four panels of about a byte a pixel, once they are compressed.
    return height * width * (embed_dim * dtype.itemsize + (6 if picture else 0))


def total_size(sizes: Sequence[int | None]) -> int:
    """Of all results whose size is known."""
    return sum(size for size in sizes if size is not None)
