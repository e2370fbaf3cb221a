"""Readers of labels and depth maps, checked before anything is computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from upfeat.readers import naming_damage, one_line
from upfeat.strict_json import read_value

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORE_INDEX = 255
"""Label of pixels that are ignored in training and in scores."""

MAX_CLASSES = 255
"""Largest number of classes: labels are 8-bit indices, and one index means "ignored"."""


def read_indices(path: Path) -> NDArray[np.int64]:
    """Read a label picture whose pixels are class indices, palette pictures included.

    Returns:
        (H, W) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or contains colours.
    """
    image = _open(path)
    if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"is a picture of mode {image.mode}; labels must hold one index per pixel")
    return np.asarray(image).astype(np.int64) // _stretch(path)


def checked_label(
    indices: NDArray[np.int64], n_classes: int, ignore_index: int = IGNORE_INDEX
) -> NDArray[np.uint8]:
    """Check class indices, and mark ignored pixels as 255.

    Args:
        indices: (H, W), values of the label file.
        n_classes: number of classes.
        ignore_index: value of ignored pixels in the label file.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: an index is outside the list, or every pixel is ignored.
    """
    ignored = indices == ignore_index
    outside = np.unique(indices[~ignored & ((indices < 0) | (indices >= n_classes))])
    if len(outside):
        shown = ", ".join(map(str, outside[:5].tolist()))
        raise ValueError(
            f"class indices {shown} are outside the list of {n_classes} classes "
            f"(0 to {n_classes - 1}, or {ignore_index} for ignored)"
        )
    if bool(ignored.all()):
        raise ValueError("no pixel has a label: all are ignored")
    return np.where(ignored, IGNORE_INDEX, indices).astype(np.uint8)


def read_depth(path: Path, scale: float = 1.0) -> NDArray[np.float32]:
    """Read a depth map.

    Args:
        path: a 16-bit or 8-bit PNG file, or an ``.npy`` file of numbers, (H, W).
        scale: depth of one unit of the file.

    Returns:
        (H, W) float32, NaN where the depth is unknown (not finite, or not above 0).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or fewer than two pixels have a known depth.
    """
    if path.suffix.lower() == ".npy":
        try:
            # np.load would also accept archives of arrays. A map allocates nothing, so that a
            # header that claims more values than the file has is an error, too.
            values: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy parses the header as Python
            if isinstance(error, OSError):
                raise
            raise ValueError(f"not a readable npy file ({one_line(error)})") from None
    else:
        values = read_indices(path)
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise ValueError(f"holds {values.dtype} of shape {values.shape}; depth must be (H, W)")
    return checked_depth(values, scale)


def checked_depth(values: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """Scale depths to float32 and mark unknown ones (not finite or not above 0) as NaN.

    Raises:
        ValueError: fewer than two pixels are known.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        depth = values.astype(np.float32) * np.float32(scale)
    known = np.isfinite(depth) & (depth > 0)
    if int(known.sum()) < 2:
        raise ValueError("no depth is known: no pixel is finite and above 0")
    return np.where(known, depth, np.float32("nan"))


def read_classes(path: Path) -> tuple[list[str], int]:
    """Read ``classes.json``: the names of classes, and the index of ignored pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has other content, too few or too many names, or a name twice.
    """
    content = read_value(path)
    names = content.get("classes") if isinstance(content, dict) else content
    ignore = content.get("ignore_index", IGNORE_INDEX) if isinstance(content, dict) else 255
    names = names if isinstance(names, list) else []
    count = sum(isinstance(name, str) for name in names)
    if count < len(names) or type(ignore) is not int or not 2 <= count <= MAX_CLASSES:
        raise ValueError(
            f'{path}: must hold {{"classes": [2 to {MAX_CLASSES} names], "ignore_index": 255}}'
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f'{path}: names the class "{twice}" twice; give each a name of its own')
    return names, ignore


def _stretch(path: Path) -> int:
    """Factor by which Pillow multiplies the greys of a PNG file of 2 or 4 bits, else 1."""
    with path.open("rb") as file:
        head = file.read(26)
    if not head.startswith(b"\x89PNG") or head[12:16] != b"IHDR":
        return 1
    bits, colour_type = head[24:26]
    return 255 // (2**bits - 1) if colour_type == 0 and bits in (2, 4) else 1


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with naming_damage(str(path), "not a readable picture"), Image.open(path) as image:
            image.load()
            return image.copy()
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a readable picture") from None
