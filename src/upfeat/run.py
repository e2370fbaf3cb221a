"""The main command: from a photograph to a file of full-resolution features and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat import machine
from upfeat._version import __version__
from upfeat.array_files import ArrayFile, create_array
from upfeat.budget import free_bytes
from upfeat.decoding import MAX_PIXELS, image_size
from upfeat.features import UpsampledFeatures
from upfeat.heads import SavedHead
from upfeat.marks import FEATURES, encode_picture
from upfeat.model import FeatUp
from upfeat.mosaic import see_within
from upfeat.outputs import Outputs, check_space, digest, file_digest, plan_outputs, watched
from upfeat.provenance import identify_backbone, identify_upsampler
from upfeat.run_memory import COLUMNS, check_memory, room_columns
from upfeat.run_picture import STRIP, draw_results, image_panel, reduced
from upfeat.storage import replacing
from upfeat.tensor_checks import all_finite, check_not_too_small, largest_magnitude
from upfeat.visualize import PCABasis, to_bytes

__all__ = [
    "DTYPES",
    "Outputs",
    "check_memory",
    "describe_model",
    "plan_outputs",
    "recipe_of",
    "run_photo",
]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Storage types of features, by the names that the command line uses."""

# Fraction of free memory for the backbone's activations; the allocator needs additional memory.
_BACKBONE = 0.65
# Number of strips after which the allocator's free memory is released.
_RELEASED = 4


def run_photo(
    model: FeatUp,
    photo: Path,
    outputs: Outputs,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float16,
    max_pixels: int = MAX_PIXELS,
    reading: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    made_by: Mapping[str, Any] | None = None,
    head: SavedHead | None = None,
) -> tuple[int, ...]:
    """Upsample one photograph's features and write them, with their provenance, and a picture.

    Features are written to the file strip by strip, so that the whole map is never in memory. The
    output of a head is in memory, since it has few channels.

    Args:
        model: backbone and upsampler.
        photo: an image file.
        outputs: paths to write to; files are written completely or not at all.
        size: shorter side in pixels to which the photograph is resized; ``None`` for no resizing.
        dtype: data type of the stored features.
        max_pixels: see :func:`upfeat.images.read_image`.
        reading: further options of :func:`upfeat.images.read_image` that change the pixels, such as
            ``bands`` and ``max_value``.
        max_memory: most bytes that the process may use; ``None`` for the available memory. With
            little memory the backbone is applied in tiles.
        made_by: result of :func:`describe_model`; ``None`` to compute it.
        head: a linear head made for this backbone (:meth:`upfeat.heads.SavedHead.check_backbone`),
            whose outputs are stored instead of the features and shown in the picture; ``None`` for
            the features.

    Returns:
        The shape of the stored map: (C, H, W), or (K, H, W) with a head.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image, memory is too small for it, or its features overflow
            ``dtype``.
        OSError: writing failed.
    """
    made_by = describe_model(model, head) if made_by is None else made_by
    with watched(photo) as source:
        a_pixel = 0 if head is None else len(head.weight) * dtype.itemsize
        picture = outputs.picture is not None
        stored = {"dtype": dtype, "picture": picture, "held": a_pixel}
        check_memory(model, photo, size, max_memory, **stored)
        needed = size_on_disk(model, photo, size=size, dtype=dtype, picture=picture, head=head)
        check_space(outputs.features, needed)
        options = {"max_pixels": max_pixels, **(reading or {})}
        x = model.preprocess(photo, size, align=False, **options)
    facts = _facts(model, photo, x, dtype, head)
    recipe = _recipe(source, made_by, size, dtype, reading)
    # Not inference_mode: of inference tensors, UpsampledFeatures keeps copies to detect changes.
    with torch.no_grad():
        machine.trim_memory()  # freed by decoding
        free = _BACKBONE * free_bytes(max_memory)
        coarse, hidden = see_within(model.backbone, x, free, early=model.early, label=str(photo))
        if head is None:
            fix = "store them as bf16 or fp32"
            check_not_too_small(f"{photo}: its features", largest_magnitude(coarse), dtype, fix)
        machine.trim_memory()  # freed by the backbone
        facts |= {"grid_size": _size(coarse), "recipe": digest(recipe), **_texts(recipe)}
        shown = None if outputs.picture is None else image_panel(model, x)
        lazy = UpsampledFeatures(
            coarse, _guidance(model, x), model.upsampler, hidden=hidden, max_memory=max_memory
        )
        del x
        shape = tuple(lazy.shape[1:] if head is None else (len(head.weight), *lazy.shape[2:]))
        outputs.features.parent.mkdir(parents=True, exist_ok=True)
        basis = None if outputs.picture is None or head else PCABasis(coarse[0].cpu())
        with (
            nullcontext() if outputs.picture is None else replacing(outputs.picture) as drawn,
            create_array(outputs.features, shape, _name(dtype), facts) as file,
        ):
            if head is None:
                written = _write_strips(file, lazy, dtype, basis, photo)
            else:
                written = [_write_head(file, lazy, dtype, head, photo)]
            del lazy  # frees memory for the picture
            shows = head or basis
            if shown is not None and drawn is not None and shows is not None:
                machine.trim_memory()
                panels = (shown, coarse[0].cpu(), shows, torch.cat(written, dim=1))
                picture = draw_results(model, *panels, (shape[1], shape[2]))
                machine.trim_memory()
                suffix, recipe = drawn.suffix, facts["recipe"]
                drawn.write_bytes(encode_picture(picture, suffix, recipe=recipe))
    return shape


def _guidance(model: FeatUp, x: Tensor) -> Tensor:
    """Guidance of an image; written over the image itself if shape and dtype are the same."""
    first = model.guidance(x[:, :, :1])
    if first.shape[1] != x.shape[1] or first.dtype != x.dtype:
        return model.guidance(x)
    for part in x.split(4 * STRIP, dim=2):
        part.copy_(model.guidance(part))
    return x


def _write_strips(
    file: ArrayFile,
    lazy: UpsampledFeatures,
    dtype: torch.dtype,
    basis: PCABasis | None,
    photo: Path,
) -> list[Tensor]:
    """Write the map from top to bottom.

    Returns:
        Strips (3, h, w) uint8 of the map's colours in ``basis``, reduced for the picture; none
        without ``basis``.
    """
    channels, height, width = lazy.shape[1:]
    coloured = []
    wide = min(width, room_columns(channels, dtype.itemsize))
    room = torch.empty(channels, min(STRIP, height), wide, dtype=dtype)
    for number, top in enumerate(range(0, height, STRIP)):
        if number % _RELEASED == 0:
            machine.trim_memory()
        rows = min(STRIP, height - top)
        parts = []
        for left in range(0, width, COLUMNS):
            columns, start = min(COLUMNS, width - left), left % wide
            values = lazy.crop(top, left, rows, columns)[0].cpu()
            room[:, :rows, start : start + columns] = values
            if basis is not None:
                shown = reduced(basis.project(values)[None], max(height, width))[0]
                parts.append(to_bytes(basis.colours(shown)))
            del values
            if start + columns == wide or left + columns == width:
                stored = room[:, :rows, : start + columns]
                fault = f"{photo}: its features overflow"
                _write_rows(file, top, stored, fault, left=left - start)
        if parts:
            coloured.append(torch.cat(parts, dim=2))
    return coloured


def _write_head(
    file: ArrayFile,
    lazy: UpsampledFeatures,
    dtype: torch.dtype,
    head: SavedHead,
    photo: Path,
) -> Tensor:
    """Write the outputs of a head at every pixel, and return them, (K, H, W)."""
    said = torch.empty(1, len(head.weight), *lazy.shape[2:], dtype=dtype)
    lazy.project(head.weight, head.bias, out=said)  # K channels are upsampled, part by part
    for top in range(0, said.shape[2], STRIP):
        stored = said[0, :, top : top + STRIP].contiguous()
        _write_rows(file, top, stored, f"{photo}: the head's outputs overflow")
    return said[0]


def _write_rows(file: ArrayFile, top: int, rows: Tensor, fault: str, *, left: int = 0) -> None:
    """Write rows (C, n, w) of a map from a pixel on, unless a value overflows the type."""
    if not all(all_finite(channel) for channel in rows):
        raise ValueError(f"{fault} {rows.dtype}; store them as bf16 or fp32")
    bits = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
    file.write_rows(top, bits.numpy(), left)


def describe_model(model: FeatUp, head: SavedHead | None = None) -> dict[str, str]:
    """Identities of backbone, upsampler and head, on which stored results depend, by name."""
    described = {
        "backbone_identity": identify_backbone(model.backbone),
        "upsampler_identity": identify_upsampler(model.upsampler),
    }
    if head is not None:
        described["head_identity"] = head.identity()
    return described | ({"early": "True"} if model.early else {})


def recipe_of(
    photo: Path,
    made_by: Mapping[str, Any],
    *,
    size: int | None,
    dtype: torch.dtype,
    reading: Mapping[str, Any] | None = None,
) -> str:
    """Digest of everything that a photograph's results depend on, which the results contain.

    Args:
        photo: the image file.
        made_by: result of :func:`describe_model`.
        size: see :func:`run_photo`.
        dtype: see :func:`run_photo`.
        reading: see :func:`run_photo`.

    Raises:
        OSError: the photograph cannot be read.
    """
    return digest(_recipe(file_digest(photo), made_by, size, dtype, reading))


def _recipe(
    source: str,
    made_by: Mapping[str, Any],
    size: int | None,
    dtype: torch.dtype,
    reading: Mapping[str, Any] | None,
) -> dict[str, Any]:
    recipe = {"image_sha256": source, "size": size, "dtype": str(dtype), **made_by}
    return recipe | ({"reading": dict(reading)} if reading else {})


def _texts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Entries of a recipe that are also stored as readable metadata."""
    return {"image_sha256": recipe["image_sha256"], "size": str(recipe["size"])}


def _facts(
    model: FeatUp, photo: Path, x: Tensor, dtype: torch.dtype, head: SavedHead | None
) -> dict[str, str]:
    said = {} if head is None else {"head": head.kind, "names": json.dumps(head.names)}
    return said | {
        "format": FEATURES,
        "upfeat_version": __version__,
        "image": photo.name,
        "backbone": model.backbone.name,
        "upsampler": model.upsampler.name,
        "embed_dim": str(model.embed_dim),
        "stride": str(model.backbone.stride),
        "image_size": _size(x),
        "output_size": _size(x),
        "dtype": _name(dtype),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-2]}x{tensor.shape[-1]}"


def size_on_disk(
    model: FeatUp,
    photo: Path,
    *,
    size: int | None,
    dtype: torch.dtype,
    picture: bool,
    head: SavedHead | None = None,
) -> int | None:
    """Estimate the size of a photograph's results on disk, in bytes.

    Args:
        model: backbone and upsampler.
        photo: the image file.
        size: see :func:`run_photo`.
        dtype: see :func:`run_photo`.
        picture: whether the results include a picture.
        head: see :func:`run_photo`.

    Returns:
        The estimate; ``None`` if the photograph's header does not contain its size.
    """
    own = image_size(photo)
    if own is None:
        return None
    height, width = machine.resized(own, size)
    # A picture has four panels of three bytes per pixel, which compression halves.
    channels = model.embed_dim if head is None else len(head.weight)
    return height * width * (channels * dtype.itemsize + (6 if picture else 0))
