"""Conversion from embedded colour profiles to sRGB, by Pillow's LittleCMS."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_CHANNELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour spaces of ICC profiles, and Pillow's mode of images in each of them."""

_ALIKE = 2
"""Largest change of a colour, in levels of 255, by a profile that counts as sRGB."""


def to_srgb(image: Image.Image, profile: bytes | None, label: str) -> Image.Image:
    """Convert an image from its embedded profile to sRGB, with perceptual intent.

    A profile that is damaged, or made for another mode of image, is ignored with a warning. With a
    profile that is sRGB itself, the pixels are unchanged.

    Args:
        image: image of mode L, RGB, CMYK or LAB.
        profile: the ICC profile; ``None`` for grey and RGB images in sRGB, and for the default
            conversion of CMYK and LAB.
        label: name of the image, for warnings.

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
    """Image mode of a profile, and its transform to sRGB; ``None`` if no colour would change."""
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
    """Return whether a transform leaves a lattice of colours unchanged, to :data:`_ALIKE`."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    axes = (levels, levels, levels) if mode == "RGB" else (levels,)
    lattice = np.stack(np.meshgrid(*axes), axis=-1).reshape(1, -1, len(axes))
    before = Image.fromarray(lattice if mode == "RGB" else lattice[..., 0])
    after = np.asarray(transform.apply(before)).astype(np.int16)
    return bool(np.abs(after - lattice).max() <= _ALIKE)
