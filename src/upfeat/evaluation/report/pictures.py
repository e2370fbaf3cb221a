"""Encoding of small pictures as text, for reports and for stored rows."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.visualize import class_colours


def encode_indices(indices: Tensor) -> str:
    """Encode class indices (H, W) as a base64 PNG of grey values."""
    return _encode(Image.fromarray(indices.to("cpu", torch.uint8).numpy()), "PNG")


def encode_photo(image: Tensor) -> str:
    """Encode an image (3, H, W) uint8 as a base64 JPEG."""
    return _encode(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()), "JPEG")


def encode_values(values: Tensor, low: float, high: float) -> str:
    """Encode depths as a base64 PNG: near is light, far is dark, unknown is black.

    Args:
        values: (H, W), of any range; NaN where unknown.
        low: value of the lightest shade.
        high: value of the darkest shade.
    """
    level = 1 - (values.cpu().double() - low) / max(high - low, 1e-12)
    shade = (40 + 215 * level.clamp(0, 1)).nan_to_num(0)
    return encode_indices(shade.round())


def encode_normals(vectors: Tensor) -> str:
    """Encode vectors (3, H, W) of any length as a base64 PNG of colours; unknown is black.

    Right, up and towards the camera are red, green and blue, as usual for normal maps.
    """
    unit = F.normalize(vectors.cpu().double(), dim=0) * torch.tensor([1.0, -1, -1])[:, None, None]
    levels = (127.5 * (unit + 1)).round().nan_to_num(0).to(torch.uint8)
    return _encode(Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()), "PNG")


def encode_heat(image: Tensor, heat: Tensor) -> str:
    """Encode a photograph (3, H, W) uint8, tinted where ``heat`` (H, W) is high, as base64 JPEG."""
    image, heat = image.cpu().float(), heat.cpu()
    colour = torch.tensor([255.0, 64, 0])[:, None, None]
    shown = image * (0.3 + 0.35 * heat) + colour * 0.45 * heat
    return encode_photo(shown.clamp(0, 255).to(torch.uint8))


def encode_masks(image: Tensor, objects: Tensor) -> str:
    """Encode a photograph (3, H, W) uint8, tinted by the object of each pixel, as base64 JPEG.

    Args:
        image: the photograph.
        objects: (H, W) uint8, numbers of objects; 0 and 255 are not tinted.
    """
    image, objects = image.cpu().float(), objects.cpu().long()
    colours = 255 * class_colours(256).T[:, objects]  # (3, H, W)
    tinted = (objects > 0) & (objects < IGNORE_INDEX)
    shown = torch.where(tinted, 0.4 * image + 0.6 * colours, image)
    return encode_photo(shown.to(torch.uint8))


def _encode(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    if kind == "PNG":
        picture.save(file, kind, optimize=True)
    else:
        picture.save(file, kind, quality=88)
    return base64.b64encode(file.getvalue()).decode()
