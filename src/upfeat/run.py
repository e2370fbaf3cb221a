"""The main job: a photograph in, a file of full-resolution features and a picture out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.model import FeatUp
from upfeat.storage import replacing, write_tensors
from upfeat.visualize import comparison

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Storage types of features, by the names that the command line uses."""


@dataclass(frozen=True)
class Outputs:
    """Where one photograph's results go."""

    features: Path
    picture: Path | None


def plan_outputs(
    photos: Sequence[Path], folder: Path, *, picture: bool = True
) -> list[tuple[Path, Outputs]]:
    """Name the results of every photograph: its own name, numbered where two are alike.

    Args:
        photos: the photographs; one named twice is done once.
        folder: where results go; made if need be.
        picture: whether a picture is wanted.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "upfeat"):
            raise _Writable
    except _Writable:
        pass
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    planned = []
    taken: set[str] = set()
    for photo in dict.fromkeys(photos):
        stem = photo.stem
        number = 2
        while stem.casefold() in taken:
            stem = f"{photo.stem}-{number}"
            number += 1
        taken.add(stem.casefold())
        image = folder / f"{stem}.png" if picture else None
        planned.append((photo, Outputs(folder / f"{stem}.safetensors", image)))
    return planned


def run_photo(
    model: FeatUp,
    photo: Path,
    outputs: Outputs,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Upsample one photograph's features and write them, with their provenance, and a picture.

    Args:
        model: backbone and upsampler.
        photo: an image file.
        outputs: where to write; files appear whole or not at all.
        size: length of the shorter side, pixels; ``None`` keeps the photograph's own size.
        dtype: type of the stored features.

    Returns:
        The stored features, (C, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is too large for the memory there is, or its features
            overflow ``dtype``.
        OSError: writing failed.
    """
    x = model.preprocess(photo, size)
    _check_memory(model.embed_dim, x, dtype)
    with torch.inference_mode():
        coarse = model.backbone(x)
        upsampled = model.upsampler(coarse, model.guidance(x))
        stored = upsampled[0].to(dtype).cpu().contiguous()
        # aminmax spreads NaN and infinity without the mask of the whole that isfinite makes.
        if not torch.isfinite(torch.stack(stored.aminmax())).all():
            raise ValueError(f"{photo}: its features overflow {dtype}; store them as bf16 or fp32")
        picture = None
        if outputs.picture is not None:
            image = model.backbone.denormalize(x)[0].cpu()
            label = model.upsampler.name.replace("_", " ")
            picture = comparison(image, coarse[0].cpu(), upsampled[0].cpu(), label=label)
    provenance = _provenance(model, photo, x, coarse)
    write_tensors(outputs.features, {"features": stored}, provenance)
    if picture is not None and outputs.picture is not None:
        with replacing(outputs.picture) as temporary:
            picture.save(temporary)
    return stored


def _provenance(model: FeatUp, photo: Path, x: Tensor, coarse: Tensor) -> dict[str, str]:
    def size(tensor: Tensor) -> str:
        return f"{tensor.shape[-2]}x{tensor.shape[-1]}"

    return {
        "format": "upfeat-features",
        "upfeat_version": __version__,
        "image": photo.name,
        "backbone": model.backbone.name,
        "upsampler": model.upsampler.name,
        "embed_dim": str(model.embed_dim),
        "stride": str(model.backbone.stride),
        "image_size": size(x),
        "grid_size": size(coarse),
        "output_size": size(x),
    }


def _check_memory(embed_dim: int, x: Tensor, dtype: torch.dtype) -> None:
    """Refuse a photograph whose features would not fit, before the machine starts to swap."""
    available = _available_memory()
    pixels = x.shape[-2] * x.shape[-1]
    # The map in float32, what the upsampler holds beside it, and the copy that is stored.
    needed = int(pixels * embed_dim * (4 * 1.5 + dtype.itemsize))
    if available is not None and x.device.type == "cpu" and needed > available:
        fitting = int((available / needed) ** 0.5 * 0.9 * min(x.shape[-2:]))
        raise ValueError(
            f"the image is {x.shape[-2]}×{x.shape[-1]} pixels: its features need about "
            f"{needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are free; "
            f"give a smaller size, at most about {fitting}"
        )


def _available_memory() -> int | None:
    """Bytes of memory that new data may take; ``None`` where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


class _Writable(Exception):
    """Raised inside :func:`replacing` to undo a trial file."""
