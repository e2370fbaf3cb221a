"""The main job: a photograph in, a file of full-resolution features and a picture out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat import machine
from upfeat._version import __version__
from upfeat.decoding import MAX_PIXELS, image_size
from upfeat.images import read_image
from upfeat.marks import FEATURES, encode_picture
from upfeat.model import FeatUp
from upfeat.outputs import Outputs, check_space, digest, file_digest, plan_outputs, watched
from upfeat.provenance import identify_backbone, identify_upsampler
from upfeat.storage import replacing, write_tensors
from upfeat.visualize import comparison

__all__ = ["DTYPES", "Outputs", "describe_model", "plan_outputs", "recipe_of", "run_photo"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Storage types of features, by the names that the command line uses."""

# Bytes a pixel while the network and the upsampler work, beside the map; measured.
_WORKING = 400


def run_photo(
    model: FeatUp,
    photo: Path,
    outputs: Outputs,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float16,
    max_pixels: int = MAX_PIXELS,
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
        picture = outputs.picture is not None
        needed = size_on_disk(model, photo, size=size, dtype=dtype, picture=picture)
        check_space(outputs.features, needed)
        pixels = read_image(photo, channels=model.backbone.in_channels, max_pixels=max_pixels)
    x = model.preprocess(pixels, size, align=False)
    del pixels
    facts = _facts(model, photo, x, dtype)
    recipe = _recipe(source, made_by, size, dtype)
    with torch.inference_mode():
        coarse = model.backbone(x)
        upsampled = model.upsampler(coarse, model.guidance(x))
        stored = upsampled[0].to(dtype).cpu().contiguous()
        # aminmax spreads NaN and infinity without the mask of the whole that isfinite makes.
        if not torch.isfinite(torch.stack(stored.aminmax())).all():
            raise ValueError(f"{photo}: its features overflow {dtype}; store them as bf16 or fp32")
        encoded = None
        if outputs.picture is not None:
            image = model.backbone.denormalize(x)[0].cpu()
            label = model.upsampler.name.replace("_", " ")
            drawn = comparison(image, coarse[0].cpu(), upsampled[0].cpu(), label=label)
            encoded = encode_picture(drawn, outputs.picture.suffix, recipe=digest(recipe))
    facts |= {"grid_size": _size(coarse), "recipe": digest(recipe), **_texts(recipe)}
    _write(outputs, stored, facts, encoded)
    return stored


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
    """Parts of a recipe that people may want to read."""
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
    if own is not None:
        # The map in float32 with what is made of it at times, and the copy that is stored.
        a_pixel = model.embed_dim * (4 * 1.25 + dtype.itemsize) + _WORKING
        machine.check_fits(photo, own, size, a_pixel, device=model.backbone.mean.device)


def size_on_disk(
    model: FeatUp, photo: Path, *, size: int | None, dtype: torch.dtype, picture: bool
) -> int | None:
    """About how many bytes the results of a photograph take.

    Args:
        model: backbone and upsampler.
        photo: the file.
        size: as :func:`run_photo` takes it.
        dtype: likewise.
        picture: whether there is a picture too.

    Returns:
        ``None`` where the photograph does not tell its size.
    """
    own = image_size(photo)
    if own is None:
        return None
    height, width = machine.resized(own, size)
    # Four panels of some three bytes a pixel, compressed to half.
    return height * width * (model.embed_dim * dtype.itemsize + (6 if picture else 0))
