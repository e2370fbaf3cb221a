"""The main job: a photograph in, a file of full-resolution features and a picture out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upfeat import machine
from upfeat._version import __version__
from upfeat.budget import free_bytes
from upfeat.decoding import MAX_PIXELS, image_size
from upfeat.features import UpsampledFeatures
from upfeat.heads import SavedHead
from upfeat.marks import FEATURES, encode_picture
from upfeat.model import FeatUp
from upfeat.mosaic import see_within
from upfeat.outputs import Outputs, check_space, digest, file_digest, plan_outputs, watched
from upfeat.provenance import identify_backbone, identify_upsampler
from upfeat.storage import ArrayFile, create_array, replacing
from upfeat.types import Size
from upfeat.visualize import PCABasis, class_colours, draw_comparison, side_by_side, to_image

__all__ = ["DTYPES", "Outputs", "describe_model", "plan_outputs", "recipe_of", "run_photo"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Storage types of features, by the names that the command line uses."""

# Bytes a pixel of the image, its guidance and what the upsampler keeps of it; measured.
_UPSAMPLING = 70
# The same within a bound of memory, measured at its peak; and of decoding.
_BOUNDED, _DECODING = 33, 30
# Bytes of the strips and of the picture.
_STRIPS = 100 * 10**6
# Rows and columns of the map that exist at once. Always as many: a bound of memory changes no bit.
_STRIP, _COLUMNS = 64, 512
# Part of what is free that activations of the backbone may take; the allocator takes more.
_BACKBONE = 0.65
# Strips after which what the allocator has kept is given back, where memory is bounded.
_RELEASED = 4
_SHOWN = 2048
"""Longest side of a panel of the picture, pixels."""


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

    The map goes to the file in strips and never exists whole. What a head says does: it has few
    outputs.

    Args:
        model: backbone and upsampler.
        photo: an image file.
        outputs: where to write; files appear whole or not at all.
        size: length of the shorter side, pixels; ``None`` keeps the photograph's own size.
        dtype: type of the stored features.
        max_pixels: as :func:`upfeat.images.read_image` takes it.
        reading: further options of it that decide the pixels, as ``bands`` and ``max_value``.
        max_memory: bytes that the process may hold; ``None`` for what the machine has. A tight
            bound makes the backbone work in tiles.
        made_by: what :func:`describe_model` says, where it is known already.
        head: what it says of every pixel is stored in place of the features, and the picture shows
            the classes; made for this backbone (:meth:`upfeat.heads.SavedHead.check_backbone`).

    Returns:
        The shape of what is stored, (C, H, W), or (K, H, W) of a head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is too large for the memory there is, or its features
            overflow ``dtype``.
        OSError: writing failed.
    """
    made_by = describe_model(model, head) if made_by is None else made_by
    with watched(photo) as source:
        a_pixel = 0 if head is None else len(head.weight) * dtype.itemsize
        check_memory(model, photo, size, max_memory, held=a_pixel)
        picture = outputs.picture is not None
        needed = size_on_disk(model, photo, size=size, dtype=dtype, picture=picture, head=head)
        check_space(outputs.features, needed)
        options = {"max_pixels": max_pixels, **(reading or {})}
        x = model.preprocess(photo, size, align=False, **options)
    facts = _facts(model, photo, x, dtype, head)
    recipe = _recipe(source, made_by, size, dtype, reading)
    # Not inference_mode, of whose tensors a map keeps copies to know whether they change.
    with torch.no_grad():
        if max_memory is not None:
            machine.release_memory()  # what decoding has left
        free = _BACKBONE * free_bytes(max_memory)
        coarse, hidden = see_within(model.backbone, x, free, early=model.early, label=str(photo))
        facts |= {"grid_size": _size(coarse), "recipe": digest(recipe), **_texts(recipe)}
        shown = None if outputs.picture is None else _image(model, x)
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
            del lazy  # its memory serves the picture
            shows = head or basis
            if shown is not None and drawn is not None and shows is not None:
                machine.release_memory()
                label, whole = model.upsampler.name.replace("_", " "), (shape[1], shape[2])
                panels = (shown / 255, coarse[0].cpu(), shows, torch.cat(written, dim=1))
                picture = _draw(*panels, label=label, size=whole)
                suffix, recipe = drawn.suffix, facts["recipe"]
                drawn.write_bytes(encode_picture(picture, suffix, recipe=recipe))
    return shape


def _image(model: FeatUp, x: Tensor) -> Tensor:
    """The photograph as the picture shows it, (3, h, w) of bytes; a few rows at a time."""
    longest = max(x.shape[2:])
    strips = [
        _bytes(_reduced(model.backbone.denormalize(part), longest)[0]).cpu()
        for part in x.split(16 * _STRIP, dim=2)
    ]
    return torch.cat(strips, dim=1)


def _bytes(image: Tensor) -> Tensor:
    """An image in [0, 1] as the picture will hold it: a quarter of the memory."""
    return (image.clamp(0, 1) * 255).round().byte()


def _guidance(model: FeatUp, x: Tensor) -> Tensor:
    """The image as the upsampler sees it, over the image itself where that can be."""
    first = model.guidance(x[:, :, :1])
    if first.shape[1] != x.shape[1] or first.dtype != x.dtype:
        return model.guidance(x)
    for part in x.split(16 * _STRIP, dim=2):
        part.copy_(model.guidance(part))
    return x


def _write_strips(
    file: ArrayFile,
    lazy: UpsampledFeatures,
    dtype: torch.dtype,
    basis: PCABasis | None,
    photo: Path,
) -> list[Tensor]:
    """Write the map from top to bottom; return what the picture shows of it, strips (3, h, w)."""
    channels, height, width = lazy.shape[1:]
    projected = []
    room = torch.empty(channels, min(_STRIP, height), width, dtype=dtype)
    for number, top in enumerate(range(0, height, _STRIP)):
        if lazy.max_memory is not None and number % _RELEASED == 0:
            machine.release_memory()
        rows = min(_STRIP, height - top)
        stored = room[:, :rows]
        parts = []
        for left in range(0, width, _COLUMNS):
            columns = min(_COLUMNS, width - left)
            values = lazy.crop(top, left, rows, columns)[0].cpu()
            stored[:, :, left : left + columns] = values
            if basis is not None:
                parts.append(_reduced(basis.project(values)[None], max(height, width))[0])
            del values
        if parts:
            projected.append(torch.cat(parts, dim=2))
        # aminmax spreads NaN and infinity without the mask of the whole that isfinite makes.
        if not torch.isfinite(torch.stack(stored.aminmax())).all():
            raise ValueError(f"{photo}: its features overflow {dtype}; store them as bf16 or fp32")
        bits = stored.view(torch.int16) if dtype is torch.bfloat16 else stored
        file.write_rows(top, bits.numpy())
    return projected


def _write_head(
    file: ArrayFile,
    lazy: UpsampledFeatures,
    dtype: torch.dtype,
    head: SavedHead,
    photo: Path,
) -> Tensor:
    """Write what a head says of every pixel; return it, (K, H, W)."""
    said = torch.empty(1, len(head.weight), *lazy.shape[2:], dtype=dtype)
    lazy.project(head.weight, head.bias, out=said)  # K channels are upsampled, part by part
    for top in range(0, said.shape[2], _STRIP):
        stored = said[0, :, top : top + _STRIP].contiguous()
        if not torch.isfinite(torch.stack(stored.aminmax())).all():
            raise ValueError(f"{photo}: what the head says overflows {dtype}; take bf16 or fp32")
        bits = stored.view(torch.int16) if dtype is torch.bfloat16 else stored
        file.write_rows(top, bits.numpy())
    return said[0]


def _draw(
    image: Tensor, coarse: Tensor, shows: SavedHead | PCABasis, fine: Tensor, **captions: Any
) -> Image.Image:
    draw: Any = _draw_head if isinstance(shows, SavedHead) else draw_comparison
    return draw(image, coarse, shows, fine, **captions)


def _draw_head(
    image: Tensor, coarse: Tensor, head: SavedHead, said: Tensor, *, label: str, size: Size
) -> Image.Image:
    """The photograph, what a head says of the coarse features, and of the upsampled ones."""
    cells = torch.einsum("kc,chw->khw", head.weight, coarse.float()) + head.bias[:, None, None]
    step = -(-max(said.shape[1:]) // _SHOWN)
    low, high = cells[0].min(), cells[0].max().clamp(min=cells[0].min() + 1e-12)

    def colours(values: Tensor) -> Tensor:
        if head.kind == "classes":
            return class_colours(len(values))[values.argmax(0)].permute(2, 0, 1)
        return ((values[:1].float() - low) / (high - low)).expand(3, -1, -1)

    fine = colours(said[:, ::step, ::step])
    panels = [("image", size, image), ("coarse", cells.shape[1:], colours(cells))]
    return side_by_side(
        [
            (f"{name}\n{height} x {width}", to_image(picture))
            for name, (height, width), picture in [*panels, (label, size, fine)]
        ]
    )


def _reduced(x: Tensor, longest: int | None = None) -> Tensor:
    """Average over squares until the longest side, or that of the whole, fits into a panel."""
    longest = longest or max(x.shape[2:])
    factor = 1
    while longest > factor * _SHOWN and factor < _STRIP:
        factor *= 2
    return x if factor == 1 else F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def describe_model(model: FeatUp, head: SavedHead | None = None) -> dict[str, str]:
    """Names for all that decides what is stored of an image: backbone, upsampler, weights, head."""
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
    """Digest of all that the results of a photograph depend on, as its results record it.

    Args:
        photo: the file.
        made_by: what :func:`describe_model` says.
        size: as :func:`run_photo` takes it.
        dtype: likewise.
        reading: likewise.

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
    """Parts of a recipe that people may want to read."""
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


def check_memory(
    model: FeatUp,
    photo: Path,
    size: int | None,
    max_memory: int | None = None,
    *,
    held: int = 0,
) -> None:
    """Refuse a photograph that would not fit into memory, before it is decoded or resized.

    Args:
        model: backbone and upsampler.
        photo: an image file.
        size: as :func:`run_photo` takes it.
        max_memory: likewise.
        held: bytes for each pixel of what exists whole.

    Raises:
        ValueError: it would not; the message says which size would.
    """
    own = image_size(photo)
    if own is None:
        return
    if max_memory is None:
        # Beside the strips: the image, its guidance, what the upsampler keeps.
        machine.check_fits(photo, own, size, _UPSAMPLING + held, device=model.backbone.mean.device)
        return
    height, width = machine.resized(own, size)
    needed = _STRIPS + max(own[0] * own[1] * _DECODING, height * width * (_BOUNDED + held))
    free = free_bytes(max_memory)
    if needed > free:
        least = needed + (machine.resident_memory() or 0)
        raise ValueError(
            f"{photo}: {height}×{width} pixels need about {machine.readable(needed)} and "
            f"{machine.readable(max(free, 0))} of memory are free; give a smaller size, or "
            f"max_memory of {machine.readable(1.02 * least)}"
        )


def size_on_disk(
    model: FeatUp,
    photo: Path,
    *,
    size: int | None,
    dtype: torch.dtype,
    picture: bool,
    head: SavedHead | None = None,
) -> int | None:
    """About how many bytes the results of a photograph take.

    Args:
        model: backbone and upsampler.
        photo: the file.
        size: as :func:`run_photo` takes it.
        dtype: likewise.
        picture: whether there is a picture too.
        head: as :func:`run_photo` takes it.

    Returns:
        ``None`` where the photograph does not tell its size.
    """
    own = image_size(photo)
    if own is None:
        return None
    height, width = machine.resized(own, size)
    # Four panels of some three bytes a pixel, compressed to half.
    channels = model.embed_dim if head is None else len(head.weight)
    return height * width * (channels * dtype.itemsize + (6 if picture else 0))
