"""Conversion of any image file, PIL image, array or tensor to bands in [0, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upfeat.bounds import flag, indices, number, shown, whole
from upfeat.decoding import MAX_PIXELS, Decoded, check_pixels, decode_file, decode_pil

if TYPE_CHECKING:
    from numpy.typing import NDArray

    ImageLike = str | Path | bytes | IO[bytes] | Image.Image | NDArray[Any] | Tensor
    """Images that :func:`read_image` accepts."""
    MaskLike = NDArray[Any] | Tensor | Image.Image | str | Path
    """Masks that ``mask=`` accepts."""

_LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (Rec. 601, as in Pillow's mode L)."""

_DARK = 16384
"""Bound for a warning: 16-bit values that are all below it probably have 10 to 14 bits, or are
reflectances."""


def read_image(
    image: ImageLike,
    *,
    channels: int = 3,
    bands: Sequence[int] | None = None,
    alpha: bool | None = None,
    max_value: float | None = None,
    mask: MaskLike | None = None,
    nodata: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode an image.

    Files and PIL images of every mode are rotated upright (EXIF orientation) and converted to RGB:
    embedded colour profiles are converted to sRGB, transparent images are composited on white,
    16-bit files keep their precision, and the first frame of an animation is read. Arrays, masked
    arrays included, are (H, W) or (H, W, bands), of uint8, uint16, bool, or floats in [0, 1];
    tensors are (bands, H, W) or (1, bands, H, W), uint8 or floats in [0, 1]. A single band is
    repeated to make three.

    Args:
        image: a path, the bytes of a file, an open binary file, a PIL image, a NumPy array or a
            tensor.
        channels: number of bands of the result, unless ``bands`` selects them.
        bands: bands to select, counted from 0, such as (3, 2, 1) for the colours of Sentinel-2.
        alpha: whether the last of two or four bands is transparency. ``None`` to rely on the file
            or PIL image. Of four bands in arrays, tensors and TIFF files without that information,
            the first three are used, with a warning.
        max_value: value that becomes 1, for data of other ranges: 4095 for 12 bits, 10000 for many
            reflectances. Larger values are clipped.
        mask: (H, W), true where there is no data: an array, tensor, PIL image or file, in the
            orientation of the upright image. Masked pixels have no influence: they are filled from
            the pixels around them.
        nodata: value that all bands of a pixel without data have; may be NaN.
        max_pixels: largest number of pixels; larger images are refused.

    Returns:
        (channels, H, W), or (number of ``bands``, H, W), float32 in [0, 1].

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image, is truncated or too large, or the image's type, shape
            or values are not accepted.
    """
    label = str(image) if isinstance(image, str | Path) else "image"
    alpha = None if alpha is None else flag("alpha", alpha)
    max_pixels = whole("max_pixels", max_pixels, 1, 1 << 48)
    decoded = _decode(image, label, max_pixels)
    missing = None if nodata is None else _without_data(decoded.values, nodata)
    if nodata is None and mask is None and decoded.nodata is not None:
        _warn_if_without_data(decoded, label)
    if isinstance(image, np.ma.MaskedArray) and mask is None:
        hidden = np.asarray(np.ma.getmaskarray(image))
        mask = hidden if hidden.ndim == 2 else np.logical_and.reduce(hidden, axis=-1)
    values = _to_unit(decoded, label, max_value, missing)  # (bands, H, W)
    values = _choose(values, decoded, label, channels=channels, bands=bands, alpha=alpha)
    if mask is not None:
        given = read_mask(mask, (values.shape[1], values.shape[2]))
        missing = given if missing is None else missing | given
    return values if missing is None else fill_missing(values, missing)


def read_mask(mask: MaskLike, size: tuple[int, int]) -> Tensor:
    """Read a mask of pixels without data.

    Args:
        mask: (H, W), true (not 0) where there is no data: an array, tensor, PIL image or file.
        size: (H, W) of the image, which the mask must have too.

    Returns:
        (H, W) bool.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: ``mask`` has another size, or is not a mask.
    """
    if isinstance(mask, str | Path | Image.Image):
        decoded = _decode(mask, "mask", MAX_PIXELS)
        values = torch.from_numpy(decoded.values[..., 0] != 0)
    elif isinstance(mask, np.ndarray | Tensor):
        values = torch.as_tensor(mask).squeeze() != 0
    else:
        raise ValueError(f"mask is a {type(mask).__name__}; give an array, tensor, image or file")
    if values.shape != size:
        raise ValueError(
            f"mask is {tuple(values.shape)} and the image {size[0]}×{size[1]} (height×width); "
            "give one value for each pixel"
        )
    return values


def resize_mask(mask: Tensor | NDArray[Any], size: tuple[int, int]) -> Tensor:
    """Resize a mask of pixels without data, by nearest neighbour.

    Args:
        mask: (H, W) or (B, 1, H, W), true (not 0) where there is no data.
        size: (height, width) of the result.

    Returns:
        (1 or B, 1, *size) bool.

    Raises:
        TypeError: ``mask`` is neither a tensor nor an array.
        ValueError: ``mask`` has another shape.
    """
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.asarray(mask != 0))
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is of type {type(mask).__name__}; give a tensor or an array")
    batch = mask[None, None] if mask.dim() == 2 else mask
    if batch.dim() != 4 or batch.shape[1] != 1 or not batch.numel():
        raise ValueError(f"mask must be (H, W) or (B, 1, H, W), not {tuple(mask.shape)}")
    missing = batch != 0
    if tuple(missing.shape[2:]) == tuple(size):
        return missing
    return F.interpolate(missing.to(torch.uint8), size=size, mode="nearest-exact") != 0


def fill_missing(values: Tensor, missing: Tensor) -> Tensor:
    """Fill pixels without data smoothly from the pixels around them.

    Args:
        values: (C, H, W) or (B, C, H, W); values of pixels without data may be anything, even NaN.
        missing: (H, W) bool, true where there is no data; or (B, 1, H, W).

    Returns:
        ``values`` with pixels without data replaced by the mean of the data in the smallest square
        of 2, 4, 8, … pixels that contains any, interpolated. Pixels with data are unchanged.

    Raises:
        ValueError: no pixel has data.
    """
    if not bool(missing.any()):
        return values
    missing = missing.to(values.device)
    if bool(missing.flatten(-2).all(-1).any()):
        raise ValueError("mask (or nodata) leaves no pixel of the image; it is true without data")
    batch = values[None] if values.dim() == 3 else values
    weight = (~missing).to(values.dtype).expand(len(batch), 1, *missing.shape[-2:])
    filled = _pull_and_push(torch.where(weight > 0, batch, 0), weight)
    return filled[0] if values.dim() == 3 else filled


def _pull_and_push(values: Tensor, weight: Tensor) -> Tensor:
    """Fill pixels of weight 0 from an image of half the size, which is filled recursively.

    Args:
        values: (B, C, H, W).
        weight: (B, 1, H, W), 1 for pixels with data and 0 for others.
    """
    if bool((weight > 0).all()):
        return values
    size = (values.shape[2], values.shape[3])
    pooled = F.avg_pool2d(values * weight, 2, ceil_mode=True)
    share = F.avg_pool2d(weight, 2, ceil_mode=True)
    mean = pooled / share.clamp(min=torch.finfo(share.dtype).tiny)
    coarse = _pull_and_push(mean, (share > 0).to(weight.dtype))
    above = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return torch.where(weight > 0, values, above)


def _decode(image: ImageLike, label: str, max_pixels: int) -> Decoded:
    if isinstance(image, str) and "://" in image[:12]:
        raise ValueError(f"{image}: an address, not a file; download it and give the path or bytes")
    if isinstance(image, str | Path):
        return decode_file(Path(image), label=label, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        check_pixels(image.size, label=label, max_pixels=max_pixels)
        return decode_pil(image, label)
    if isinstance(image, np.ndarray | Tensor):
        array = np.ma.getdata(image) if isinstance(image, np.ndarray) else image
        decoded = _from_tensor(array) if isinstance(array, Tensor) else _from_array(array)
        height, width = decoded.values.shape[:2]
        check_pixels((width, height), label=label, max_pixels=max_pixels)
        return decoded
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_file(bytes(image), label=label, max_pixels=max_pixels)
    if hasattr(image, "read"):
        return decode_file(image, label=label, max_pixels=max_pixels)
    raise ValueError(
        f"image is a {type(image).__name__}; give a path, a file's bytes, a PIL image, a NumPy "
        "array or a tensor"
    )


def _from_array(array: NDArray[Any]) -> Decoded:
    values = array[:, :, None] if array.ndim == 2 else array
    if values.ndim != 3:
        raise ValueError(
            f"image has shape {array.shape}; an array must be (H, W) or (H, W, bands)"
            + (": one image at a time" if array.ndim == 4 else "")
        )
    if 0 in values.shape:
        raise ValueError(f"image has shape {array.shape}: it is empty")
    if values.shape[0] <= 16 < values.shape[2]:
        raise ValueError(
            f"image has shape {array.shape}; an array must be (H, W, bands), as "
            "transpose(1, 2, 0) makes of (bands, H, W)"
        )
    return Decoded(values, alpha=None if values.shape[2] in (2, 4) else False)


def _from_tensor(image: Tensor) -> Decoded:
    values = image[0] if image.dim() == 4 and image.shape[0] == 1 else image
    if values.dim() == 2:
        values = values[None]
    shape = tuple(image.shape)
    if values.dim() != 3 or 0 in values.shape:
        raise ValueError(
            f"image is a tensor of shape {shape}; it must be (3, H, W) or (1, 3, H, W)"
        )
    channels_last = values.shape[2] == 3 or (values.shape[2] in (1, 4) and values.shape[0] > 16)
    if channels_last and values.shape[0] not in (1, 3):
        raise ValueError(
            f"image is a tensor of shape {shape}; it must be (3, H, W), as permute(2, 0, 1) makes "
            "of (H, W, 3)"
        )
    if values.dtype == torch.bfloat16:
        values = values.float()
    array = values.detach().cpu().permute(1, 2, 0).numpy()
    return Decoded(array, alpha=None if array.shape[2] in (2, 4) else False)


def _to_unit(
    decoded: Decoded, label: str, max_value: float | None, missing: Tensor | None
) -> Tensor:
    """Convert bands (H, W, N) of any type to (N, H, W) float32 in [0, 1]."""
    array = decoded.values
    kind = array.dtype.kind
    if max_value is not None:
        max_value = number("max_value", max_value, 0, above=True)
    whole = {"uint8": 255.0, "uint16": 65535.0, "bool": 1.0}.get(array.dtype.name)
    if max_value is None and whole is None and kind != "f":
        raise ValueError(
            f"{label} has dtype {array.dtype}; use uint8, uint16, or floats in [0, 1], or say by "
            "max_value= what is 1"
        )
    if kind not in "buif":
        raise ValueError(f"{label} has dtype {array.dtype}; use numbers")
    if max_value is None and array.dtype.name == "uint16":
        _warn_if_dark(array, label)
    shape = (array.shape[2], *array.shape[:2])
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    # One pass, by NumPy, which accepts read-only, strided and byte-swapped arrays.
    planes, unit = np.moveaxis(array, 2, 0), np.float32(max_value or whole or 1)
    np.divide(planes, unit, out=values.numpy(), dtype=np.float32, casting="unsafe")
    if max_value is not None:
        values.clamp_(0, 1)
    if kind == "f" or max_value is not None:
        _check_unit_range(values, label, missing)
    return values


def _warn_if_dark(array: NDArray[Any], label: str) -> None:
    highest = int(array.max())
    if 255 < highest < _DARK:
        warnings.warn(
            f"{label}: 16-bit values of at most {highest} of 65535, so nearly black; give "
            "max_value=, as 4095 for 12 bits or 10000 for reflectances",
            stacklevel=2,
        )


def _warn_if_without_data(decoded: Decoded, label: str) -> None:
    assert decoded.nodata is not None
    count = int(_without_data(decoded.values, decoded.nodata).sum())
    if count:
        warnings.warn(
            f"{label}: {count:,} pixels are {decoded.nodata:g}, which the file says is no data; "
            f"give nodata={decoded.nodata:g} to fill them",
            stacklevel=3,
        )


def _check_unit_range(values: Tensor, label: str, missing: Tensor | None) -> None:
    if missing is not None:
        values = values[:, ~missing]
    if not values.numel():
        return
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{label} has values from {low:.4g} to {high:.4g}; floats must lie in [0, 1] "
            "(give max_value=, 255 or the sensor's maximum) and not be NaN (or give nodata=)"
        )


def _without_data(values: NDArray[Any], nodata: float) -> Tensor:
    """Mask (H, W), true for pixels whose bands all have the value ``nodata``."""
    try:
        nodata = float("x" if isinstance(nodata, str | bool) else nodata)
    except (TypeError, ValueError):
        raise ValueError(f"nodata={shown(nodata)} must be a number, or NaN") from None
    same = np.isnan(values) if np.isnan(nodata) else values == nodata
    return torch.from_numpy(same.all(2))


def _choose(
    values: Tensor,
    decoded: Decoded,
    label: str,
    *,
    channels: int,
    bands: Sequence[int] | None,
    alpha: bool | None,
) -> Tensor:
    """Select bands of (N, H, W), and apply transparency; see :func:`read_image`."""
    count = len(values)
    if bands is not None:
        wanted = indices(bands, 0, count - 1)
        if not wanted:
            raise ValueError(
                f"bands={shown(bands)} must be numbers of {label}'s bands, 0 to {count - 1}"
            )
        return values[wanted]
    transparent = decoded.alpha if alpha is None else alpha
    if alpha and count not in (2, 4):
        raise ValueError(f"alpha=True but {label} has {count} bands; it needs 2 or 4")
    if transparent:
        values = _on_white(values, premultiplied=decoded.premultiplied)
        count = len(values)
    if count == channels:
        return values
    if count == 1:
        return values.expand(channels, -1, -1).contiguous()
    if count == 3 and channels == 1:
        weights = values.new_tensor(_LUMINANCE)
        return torch.einsum("chw,c->hw", values, weights)[None]
    if count == 4 and channels == 3:
        warnings.warn(
            f"{label} has a fourth band, which is left out; if it is transparency give alpha=True, "
            "else say bands=(0, 1, 2)",
            stacklevel=2,
        )
        return values[:3]
    raise ValueError(
        f"{label} has {count} bands, not {channels}; choose some, as bands="
        f"{tuple(range(min(channels, count)))}"
        + ("; or, if the last is transparency, give alpha=True" if count == 2 else "")
    )


def _on_white(values: Tensor, *, premultiplied: bool) -> Tensor:
    """Composite colours on white by the last band, transparency: (N, H, W) -> (N − 1, H, W)."""
    colour, alpha = values[:-1], values[-1:]
    if not premultiplied:
        colour = colour * alpha
    return (colour + (1 - alpha)).clamp_(0, 1)
