"""Pictures in: any file, PIL image or array to RGB in [0, 1], or one clear error."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    ImageLike = str | Path | Image.Image | NDArray[Any] | Tensor
    """What :func:`read_image` takes."""


def read_image(image: ImageLike) -> Tensor:
    """Decode an image.

    Files and PIL images of every mode are turned upright (EXIF orientation) and to RGB;
    transparent ones are laid on white; 16-bit ones keep their precision. Arrays are (H, W),
    (H, W, 1), (H, W, 3) or (H, W, 4), of uint8, uint16, bool, or floats in [0, 1]; tensors
    (3, H, W) or (1, 3, H, W), uint8 or floats in [0, 1].

    Args:
        image: a path, PIL image, NumPy array or tensor.

    Returns:
        (3, H, W) float32 in [0, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, a truncated one, too large, or of a kind not listed.
    """
    if isinstance(image, str | Path):
        return _read_file(Path(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, "image")
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, "image")
    raise ValueError(
        f"image is a {type(image).__name__}; give a path, a PIL image, a NumPy array or a tensor"
    )


def _read_file(path: Path) -> Tensor:
    if not path.is_file():
        what = "is a folder, not an image" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels and refuses from twice that: refuse at both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return _from_pil(opened, str(path))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"{path}: has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels, perhaps an attack; "
            "if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read") from None
    except (OSError, SyntaxError, EOFError, IndexError) as error:
        raise ValueError(f"{path}: a truncated or damaged image ({error})") from None


def _from_pil(image: Image.Image, label: str) -> Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"{label}: 32-bit integers beyond 0 to 65535; scale them to [0, 1]")
        return _from_array(values.astype(np.uint16), label)
    if image.mode == "F":
        return _from_array(np.asarray(image), label)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return _from_array(np.asarray(image.convert("RGB")), label)


def _from_array(array: NDArray[Any], label: str) -> Tensor:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"{label} has shape {array.shape}; an array must be (H, W), (H, W, 1), (H, W, 3) or "
            "(H, W, 4)"
        )
    if 0 in array.shape:
        raise ValueError(f"{label} has shape {array.shape}: it is empty")
    scale = {"uint8": 255.0, "uint16": 65535.0, "bool": 1.0}.get(array.dtype.name)
    if scale is None and array.dtype.kind != "f":
        raise ValueError(f"{label} has dtype {array.dtype}; use uint8, uint16, or floats in [0, 1]")
    # Copied, so that negative strides and read-only buffers are as good as any.
    values = torch.from_numpy(np.array(array, dtype=np.float32, order="C")).permute(2, 0, 1)
    values = values / scale if scale is not None else _check_unit_range(values, label)
    if values.shape[0] == 4:
        colour, alpha = values[:3], values[3:]
        values = colour * alpha + (1 - alpha)
    return values.expand(3, -1, -1).contiguous()  # (3, H, W)


def _from_tensor(image: Tensor) -> Tensor:
    values = image[0] if image.dim() == 4 and image.shape[0] == 1 else image
    if values.dim() != 3 or values.shape[0] != 3 or 0 in values.shape:
        raise ValueError(
            f"image is a tensor of shape {tuple(image.shape)}; it must be (3, H, W) or (1, 3, H, W)"
        )
    if values.dtype == torch.uint8:
        return values.float() / 255
    if not values.is_floating_point():
        raise ValueError(f"image has dtype {values.dtype}; use torch.uint8, or floats in [0, 1]")
    return _check_unit_range(values.float(), "image")


def _check_unit_range(values: Tensor, label: str) -> Tensor:
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{label} has values from {low:.4g} to {high:.4g}; floats must lie in [0, 1] "
            "(divide by 255, or by the sensor's maximum) and not be NaN"
        )
    return values
