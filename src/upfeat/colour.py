"""Embedded colour profiles to sRGB, by Pillow's LittleCMS."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_CHANNELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode of the pixels that a profile of each colour space describes."""

_ALIKE = 2
"""Levels of 255: a profile that changes no colour by more is sRGB under some name."""


def to_srgb(image: Image.Image, profile: bytes | None, label: str) -> Image.Image:
    """Convert an image from its embedded profile to sRGB, perceptually.

    A profile that is broken, or of another kind of image, is ignored with a warning; for one that
    is sRGB itself the pixels are left alone.

    Args:
        image: of mode L, RGB, CMYK or LAB.
        profile: the ICC profile; ``None`` for sRGB, and for the usual conversion of CMYK and LAB.
        label: what a warning calls the image.

    Returns:
        An image of mode L or RGB.
    """
    if image.mode == "LAB":
        transform: Any = _transform(None, "LAB")
        return transform.apply(image)
    if profile:
        try:
            mode, transform = _kind(profile)
            if mode == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            if mode != image.mode:
                raise ImageCms.PyCMSError(f"it is for {mode} images, this one is {image.mode}")
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            warnings.warn(f"{label}: its colour profile is ignored ({reason})", stacklevel=2)
        else:
            if transform is not None:
                return transform.apply(image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


@lru_cache(maxsize=16)
def _kind(profile: bytes) -> tuple[str, Any]:
    """The mode a profile is for, and the transform from it; ``None`` where that changes nothing."""
    opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space
    mode = _CHANNELS.get(space)
    if mode is None:
        raise ImageCms.PyCMSError(f"its colour space is {space.strip()}")
    transform = _transform(opened, mode)
    return mode, None if mode != "CMYK" and _is_identity(transform, mode) else transform


def _transform(profile: Any, mode: str) -> Any:
    source = ImageCms.createProfile("LAB") if profile is None else profile
    target = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL)


def _is_identity(transform: Any, mode: str) -> bool:
    """Return whether a transform leaves a lattice of colours as they are."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    axes = (levels, levels, levels) if mode == "RGB" else (levels,)
    lattice = np.stack(np.meshgrid(*axes), axis=-1).reshape(1, -1, len(axes))
    before = Image.fromarray(lattice if mode == "RGB" else lattice[..., 0])
    after = np.asarray(transform.apply(before)).astype(np.int16)
    return bool(np.abs(after - lattice).max() <= _ALIKE)
