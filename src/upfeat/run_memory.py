"""Memory that one photograph needs, and a check before it is decoded that as much is free."""

from __future__ import annotations

from pathlib import Path

import torch

from upfeat import machine
from upfeat.budget import free_bytes, kept_bytes, kept_whole_bytes
from upfeat.decoding import image_size
from upfeat.model import FeatUp
from upfeat.receptive_field import FINER, stacked_channels
from upfeat.run_picture import STRIP, panel_pixels
from upfeat.types import Size
from upfeat.upsamplers.maps import WHOLE

COLUMNS = 512
"""Columns of the map that are computed at once; fixed, as STRIP is."""

# Bytes of a strip's values to store, unless those of COLUMNS columns are more.
_ROOM = 1 << 27
# Bytes per pixel of the image, which is written over by its guidance; measured, of decoding; and of
# temporary tensors of a window.
_IMAGE, _DECODING, _WINDOW = 12, 30, 300
# Bytes per pixel of the picture's panels that are kept as uint8; measured, while it is drawn.
_PANELS, _DRAWING = 6, 64
# Measured bytes that the libraries take for a pixel, and at most.
_SCRATCH, _MOST_SCRATCH = 60, 60 * 10**6
# Measured bytes per pixel of the image, its guidance and the upsampler's kernels on a GPU.
_ON_DEVICE = 70


def check_memory(
    model: FeatUp,
    photo: Path,
    size: int | None,
    max_memory: int | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    picture: bool = True,
    held: int = 0,
) -> None:
    """Check that memory suffices for a photograph, before it is decoded or resized.

    Args:
        model: backbone and upsampler.
        photo: an image file.
        size: see :func:`upfeat.run.run_photo`.
        max_memory: see :func:`upfeat.run.run_photo`.
        dtype: see :func:`upfeat.run.run_photo`.
        picture: whether the results include a picture.
        held: bytes per pixel of a head's outputs, which are in memory as a whole; 0 for features.

    Raises:
        ValueError: memory does not suffice; the message names a size or a bound for which it does.
    """
    own = image_size(photo)
    if own is None:
        return
    device = model.backbone.mean.device
    if device.type != "cpu":
        machine.check_fits(photo, own, size, _ON_DEVICE + held, device=device)
        return
    bounded, hidden = max_memory is not None, 0
    if model.early:
        stacked = stacked_channels(model.backbone, early=True)
        hidden = (stacked - model.embed_dim) // FINER**2
    strip = 0 if held else dtype.itemsize

    def needed(side: int | None) -> float:
        height, width = machine.resized(own, side)
        upsampling = _upsampling(model, (height, width), hidden, strip, bounded)
        shown = panel_pixels(height, width) if picture else 0
        work = max(upsampling + shown * _PANELS, shown * _DRAWING) + height * width * held
        scratch = min(_SCRATCH * height * width, _MOST_SCRATCH)
        return scratch + max(own[0] * own[1] * _DECODING, work)

    free = free_bytes(max_memory)
    if not bounded:
        machine.check_decoding(photo, own, max(free, 0))
    if needed(size) <= free:
        return
    height, width = machine.resized(own, size)
    fitting = min(height, width)
    while fitting > 1 and needed(fitting) > free:
        fitting = 15 * fitting // 16
    advice = f", at most about {fitting}" if fitting > 1 else ""
    if bounded:
        least = needed(size) + (machine.resident_memory() or 0)
        advice += f", or max_memory of {machine.readable(1.02 * least)}"
    raise ValueError(
        f"{photo}: {height}×{width} pixels need about {machine.readable(needed(size))} and "
        f"{machine.readable(max(free, 0))} of memory are free; give a smaller size{advice}"
    )


def _upsampling(model: FeatUp, size: Size, hidden: int, itemsize: int, bounded: bool) -> float:
    """Estimate the bytes of image, features and upsampler, and of one strip.

    Args:
        model: backbone and upsampler.
        size: (height, width) of the image.
        hidden: number of channels of early layers; 0 for none.
        itemsize: bytes of each stored value; 0 if no strips are stored.
        bounded: whether features on finer grids are computed again rather than kept.
    """
    pixels, channels = size[0] * size[1], model.embed_dim
    down, across = (-(-side // model.backbone.stride) for side in size)
    features = 4 * down * across * (channels + FINER**2 * hidden)
    if pixels <= WHOLE:
        kept = kept_whole_bytes(model.upsampler, pixels, down * across, channels)
    else:
        kept = kept_bytes(model.upsampler, down * across, hidden)
        if not bounded:  # what both steps give on the finer grid
            kept += 2 * 4 * FINER**2 * down * across * channels
    strip = 0.0
    if itemsize:
        columns = min(size[1], room_columns(channels, itemsize))
        window = min(size[1], COLUMNS)
        strip = STRIP * (columns * channels * itemsize + window * (2 * 4 * channels + _WINDOW))
    return pixels * _IMAGE + features + kept + strip


def room_columns(channels: int, itemsize: int) -> int:
    """Columns of a strip that are kept before they are written: a multiple of COLUMNS."""
    return COLUMNS * max(_ROOM // (channels * STRIP * itemsize * COLUMNS), 1)
