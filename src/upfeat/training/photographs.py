"""Folders of photographs for training: listing, order, and windows.

The order and the windows depend on the seed and the number of a sample alone, so the pixels are the
same for any number of workers and processes, and in a resumed run.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from upfeat.decoding import in_srgb, open_upright
from upfeat.images import read_image
from upfeat.photo_search import search
from upfeat.png_colours import embedded_profile
from upfeat.randomness import stream

_NAMES_SHOWN = 3
_LARGE = 1 << 22
"""Number of pixels above which images are converted one at a time, as each takes many bytes."""
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Skipped:
    """A file that cannot be used for training, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The photographs of a folder.

    Attributes:
        folder: the folder.
        files: (name relative to the folder, size in bytes) of all files, skipped files included,
            sorted.
        skipped: files that cannot be used.
        train: names of the photographs to train on.
        validation: names of the held-out photographs.
    """

    folder: Path
    files: list[tuple[str, int]]
    skipped: list[Skipped]
    train: list[str]
    validation: list[str]

    def digest(self) -> str:
        """Return the SHA-256 of all names and sizes."""
        lines = "".join(f"{name}\0{size}\n" for name, size in self.files)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()

    def summary(self) -> str | None:
        """Summarise the skipped files in one line; ``None`` if there are none."""
        if not self.skipped:
            return None
        shown = "; ".join(f"{one.name}: {one.reason}" for one in self.skipped[:_NAMES_SHOWN])
        more = len(self.skipped) - _NAMES_SHOWN
        rest = f"; and {more} more, listed in run.json" if more > 0 else ""
        return f"{len(self.skipped)} of {len(self.files)} photographs skipped: {shown}{rest}"

    def to_json(self) -> dict[str, Any]:
        """Describe the photographs as JSON values, for the provenance of trained weights."""
        return {
            "folder": self.folder.name,
            "images": len(self.train),
            "digest": self.digest(),
            "validation": self.validation,
            "skipped": [{"name": one.name, "reason": one.reason} for one in self.skipped],
        }


def list_photographs(
    folder: str | Path, size: int, *, held_out: int | None = 0, seed: int = 0
) -> Listing:
    """List photographs and decode each once, so that damaged or small files are known in advance.

    Args:
        folder: folder to search recursively.
        size: smallest shorter side of a usable photograph, pixels.
        held_out: number of photographs held out for validation; ``None`` for a twentieth, at most
            32.
        seed: seed of the draw of held-out photographs.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder contains no photograph, or none that can be used.
    """
    folder = Path(folder)
    files = find_photographs(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(lambda file: _reason_against(folder / file[0], size), files))
    skipped = [
        Skipped(name, reason)
        for (name, _), reason in zip(files, reasons, strict=True)
        if reason is not None
    ]
    usable = [name for (name, _), reason in zip(files, reasons, strict=True) if reason is None]
    if not usable:
        _refuse(folder, skipped, size)
    validation = _hold_out(folder, usable, held_out, seed)
    train = [name for name in usable if name not in set(validation)]
    return Listing(folder, files, skipped, train, validation)


def find_photographs(folder: str | Path) -> list[tuple[str, int]]:
    """List name and size in bytes of every photograph in a folder, recursively, sorted by name.

    Hidden files and folders, and pictures that upfeat wrote, are left out. A link to a missing file
    has size 0.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder contains no photograph.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file; give the folder it is in" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}")
    found = [
        (path.relative_to(folder).as_posix(), path.stat().st_size if path.is_file() else 0)
        for path in (photo.path for photo in search(folder))
    ]
    if not found:
        raise ValueError(f"{folder}: holds no photographs (JPEG, PNG, TIFF, WebP, HEIC, …)")
    return sorted(found)


def _reason_against(path: Path, size: int) -> str | None:
    try:
        photo = _decode(path, size)
        if min(_sides(photo)) < size:
            return _too_small(photo, size)
    except (ValueError, OSError) as error:
        return " ".join(str(error).removeprefix(str(path)).lstrip(": ").split())
    return None


def _refuse(folder: Path, skipped: list[Skipped], size: int) -> None:
    small = sum("smaller than" in one.reason for one in skipped)
    if small == 0:
        raise ValueError(
            f"{folder}: none of its {len(skipped)} photographs can be read; "
            f"{skipped[0].name}: {skipped[0].reason}"
        )
    damaged = f", {len(skipped) - small} damaged" if small < len(skipped) else ""
    raise ValueError(
        f"{folder}: none of its {len(skipped)} photographs can be used ({small} smaller than "
        f"{size}×{size} pixels{damaged}); give larger ones, or a smaller size or source_size"
    )


def _hold_out(folder: Path, usable: list[str], held_out: int | None, seed: int) -> list[str]:
    count = min(32, len(usable) // 20) if held_out is None else held_out
    if count >= len(usable):
        raise ValueError(
            f"validation_images={count} leaves none of the {len(usable)} photographs of {folder} "
            "to train on; hold out fewer"
        )
    order = torch.randperm(len(usable), generator=stream(seed, "held out")).tolist()
    return sorted(usable[index] for index in order[:count])


class Photographs(Dataset[Tensor]):
    """Square windows of photographs by the number of the sample, which counts on over epochs.

    Args:
        folder: folder of the photographs.
        names: names relative to the folder.
        size: side of the windows as returned, pixels.
        crop: choice of windows, see ``TrainConfig.crop``.
        seed: seed of order and windows; ``None`` for the given order and central windows.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], size: int, crop: str, seed: int | None
    ) -> None:
        """Store the settings."""
        self.folder, self.names, self.size = folder, list(names), size
        self.crop, self.seed = crop, seed

    def __len__(self) -> int:
        """Return the number of photographs in an epoch."""
        return len(self.names)

    def name(self, number: int) -> str:
        """Return the name of a sample's photograph."""
        epoch, place = divmod(number, len(self.names))
        if self.seed is None:
            return self.names[place]
        return self.names[_order(self.seed, epoch, len(self.names))[place]]

    def __getitem__(self, number: int) -> Tensor:
        """Read a sample: (3, size, size) uint8.

        Raises:
            OSError: the photograph has been removed or damaged since it was listed.
        """
        path = self.folder / self.name(number)
        generator = None if self.seed is None else stream(self.seed, "window", number)
        try:
            return read_window(path, self.size, self.crop, generator)
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise OSError(f"{path}: changed since training started ({reason})") from None


def read_window(
    path: Path, size: int, crop: str = "short_side", generator: torch.Generator | None = None
) -> Tensor:
    """Read a square window of a photograph.

    Args:
        path: file of the photograph.
        size: side of the result, pixels.
        crop: side of the window in pixels of the photograph: the shorter side ("short_side"),
            ``size`` ("native"), or a length between these two, drawn uniformly in its logarithm
            ("mixed").
        generator: random generator of side and place; ``None`` for a central window, for "mixed" as
            large as the shorter side.

    Returns:
        (3, size, size) uint8.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or the photograph smaller than ``size``.
    """
    photo = _decode(path, size if crop == "short_side" else None)
    sides = _sides(photo)
    short = min(sides)
    if short < size:
        raise ValueError(f"{path}: {_too_small(photo, size)}")
    uniform = [0.0, 0.5, 0.5]
    if generator is not None:
        uniform = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    # Windows lie on whole pixels, so that a window of native size is copied, not interpolated.
    side = short
    if crop == "native":
        side = size
    elif crop == "mixed":
        side = round(short * math.exp(uniform[0] * math.log(size / short)))
    left, top = (
        round(share * (whole - side)) for share, whole in zip(uniform[1:], sides, strict=True)
    )
    return _resized(photo, (left, top, left + side, top + side), size, str(path))


def _decode(path: Path, short_side: int | None) -> Image.Image | Tensor:
    """Decode a photograph, upright.

    Args:
        path: file of the photograph.
        short_side: see :func:`open_upright`.

    Returns:
        A Pillow image in its own colours if it is RGB, or grey without a profile, of 8 bits;
        else (3, H, W) in [0, 1], as all other commands read the file.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or its values or bands have no meaning as a photograph.
    """
    try:
        image = open_upright(path, short_side=short_side)
    except ValueError:
        return read_image(path)  # which reads more formats, and names the package for others
    plain = image.mode == "RGB" or (image.mode == "L" and not embedded_profile(image.info))
    if plain and "transparency" not in image.info:
        return image
    with _ALONE if image.width * image.height > _LARGE else nullcontext():
        return read_image(path)


def _sides(photo: Image.Image | Tensor) -> tuple[int, int]:
    """Return (width, height)."""
    return photo.size if isinstance(photo, Image.Image) else (photo.shape[2], photo.shape[1])


def _too_small(photo: Image.Image | Tensor, size: int) -> str:
    return "{}×{} pixels, smaller than {}".format(*_sides(photo), size)


def _resized(
    photo: Image.Image | Tensor, box: tuple[int, int, int, int], size: int, label: str
) -> Tensor:
    """Resize a window of a decoded photograph: (3, size, size) uint8, in sRGB."""
    if isinstance(photo, Image.Image):
        profile = embedded_profile(photo.info)
        # Resized in RGB, whatever the mode; the profile is applied last, to fewer pixels.
        pixels = photo.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
        pixels = in_srgb(pixels, profile, label)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
    left, top, right, bottom = box
    values = photo[None, :, top:bottom, left:right]
    values = F.interpolate(
        values, size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )
    return (values[0].clamp(0, 1) * 255).round().to(torch.uint8)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=stream(seed, "order", epoch)).tolist()
