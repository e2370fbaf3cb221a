"""Pictures for the page: tensors as ``data:`` addresses, so that no file is stored."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upfeat.demo.session import Pair, Visit
from upfeat.visualize import side_by_side, to_image

CLASS_COLOURS = ((230, 97, 1), (30, 120, 220), (0, 158, 96))
"""Colours of the classes: orange, blue and green, which the colour-blind can distinguish too."""

_HEAT = ((13, 8, 60), (84, 20, 120), (165, 44, 96), (225, 85, 60), (250, 160, 40), (252, 250, 180))
"""Colours of heat maps, of increasing lightness."""


def png_address(image: Image.Image) -> str:
    """Encode a picture as PNG in a ``data:`` address; fast rather than small."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def jpeg_address(image: Image.Image) -> str:
    """Encode a picture with smooth colours as JPEG in a ``data:`` address.

    JPEG takes half the time of PNG and a third of its size. Maps of cells and labels, whose pixels
    are shown as blocks, are encoded as PNG.
    """
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def png(image: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def heat_range(pair: Pair) -> tuple[float, float]:
    """Return the least and the largest value of both maps, to draw them in one range of colours."""
    low, high = torch.cat([part.flatten() for part in pair]).aminmax()
    return float(low), max(float(high), float(low) + 1e-6)


def heat_image(values: Tensor, low: float, high: float) -> Image.Image:
    """Draw values (H, W) from ``low`` to ``high`` as a picture of 256 colours."""
    scaled = ((values - low) / (high - low)).clamp(0, 1)
    image = Image.fromarray((scaled * 255).round().byte().numpy())
    image.putpalette(_gradient(_HEAT))
    return image


def label_image(labels: Tensor) -> Image.Image:
    """Draw class indices (H, W), uint8, in :data:`CLASS_COLOURS`."""
    image = Image.fromarray(labels.contiguous().numpy())
    image.putpalette([value for colour in CLASS_COLOURS for value in colour])
    return image


def photo_image(visit: Visit) -> Image.Image:
    """Return the photograph at the size of the result."""
    return to_image(visit.photo / 255)


def colour_images(visit: Visit) -> tuple[Image.Image, Image.Image]:
    """Draw principal components: of the coarse features, a pixel per cell, and of the upsampled."""
    coarse, fine = visit.colours()
    return to_image(coarse / 255), to_image(fine / 255)


def sheet(visit: Visit, panels: Sequence[Image.Image], caption: str) -> Image.Image:
    """Put the photograph, the coarse picture and the upsampled picture in a row, with captions."""
    photo = photo_image(visit)
    coarse, fine = (panel.convert("RGB") for panel in panels)
    grid = f"{coarse.height} x {coarse.width}"
    size = f"{fine.height} x {fine.width}"
    return side_by_side(
        [
            (f"photograph\n{size}", photo),
            (f"coarse {caption}\n{grid}", coarse),
            (f"{visit.model.upsampler.name} {caption}\n{size}", fine),
        ]
    )


def _gradient(colours: Sequence[tuple[int, int, int]]) -> list[int]:
    table = np.array(colours, dtype=float)
    places = np.linspace(0, len(table) - 1, 256)
    channels = [np.interp(places, np.arange(len(table)), table[:, i]) for i in range(3)]
    return np.stack(channels, 1).round().astype(int).flatten().tolist()
