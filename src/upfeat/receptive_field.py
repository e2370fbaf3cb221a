"""Cells on which a backbone's features depend: what tiles of a large image need around them.

The receptive field of a convolutional backbone is limited: tiles with a halo that covers the
receptive field give exactly the features of the whole image. With global attention, features depend
on the whole input, and there is no halo.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.resampling import on_grid
from upfeat.upsamplers.detail import FINER

# Length of the image in which a pixel's effect is measured: cells, and pixels, at least.
_PROBE_CELLS, _PROBE_PIXELS = 64, 1024
_TOLERANCE = 1e-4
# Halos of backbones, without and with early layers, measured once for each.
_HALOS: WeakKeyDictionary[Backbone, dict[bool, int | None]] = WeakKeyDictionary()
# Channels of maps with early layers.
_STACKED: WeakKeyDictionary[Backbone, int] = WeakKeyDictionary()


def see(backbone: Backbone, x: Tensor, *, early: bool) -> Tensor:
    """Compute an image's features, with ``early`` stacked on those of early layers.

    Each cell is stacked on the :data:`FINER` × :data:`FINER` cells of early layers in it, so that
    both are cut, blended and stored as one map.

    Args:
        backbone: backbone in eval mode.
        x: (B, 3, H, W), normalised image.
        early: whether to stack early layers, of D channels.

    Returns:
        (B, C, h, w), or (B, C + 4·D, h, w), from which :func:`unstacked` separates the two.

    Raises:
        ValueError: the backbone returns no early layers for an image of this size.
    """
    if not early:
        return backbone(x)
    features, hidden = backbone.with_hidden(x)
    if hidden is None:
        raise ValueError(
            f"{backbone.name} returns no early layers for {x.shape[2]}×{x.shape[3]} pixels; "
            "load it with early=False"
        )
    hidden = on_grid(hidden, (FINER * features.shape[2], FINER * features.shape[3]))
    return torch.cat([features, F.pixel_unshuffle(hidden, FINER).to(features)], dim=1)


def stacked_channels(backbone: Backbone, *, early: bool) -> int:
    """Number of channels of the maps of :func:`see`, found once for each backbone."""
    if not early:
        return backbone.embed_dim
    if backbone not in _STACKED:
        side = 4 * backbone.step * backbone.stride
        blank = torch.zeros(1, backbone.in_channels, side, side, device=backbone.mean.device)
        with torch.no_grad():
            _STACKED[backbone] = see(backbone, blank, early=True).shape[1]
    return _STACKED[backbone]


def unstacked(maps: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Separate maps of :func:`see` into features and early layers, or ``None`` without any.

    Args:
        maps: (B, C + 4·D, h, w).
        channels: number C of the features' channels.
    """
    if maps.shape[1] == channels:
        return maps, None
    return maps[:, :channels], F.pixel_shuffle(maps[:, channels:], FINER)


def receptive_halo(backbone: Backbone, *, early: bool = False) -> int | None:
    """Measure the number of cells around a cell of the features on which it depends.

    A NaN in one pixel spreads to exactly the cells that depend on the pixel, whatever the weights.
    The halo is checked on noise: a tile with the halo must give the features of the whole image.
    Both are done in a wide image and in a tall one.

    Args:
        backbone: backbone in eval mode.
        early: whether early layers count too; see :meth:`Backbone.with_hidden`.

    Returns:
        Number of cells to each side; ``None`` if a cell depends on more than a quarter of a long
        image, as with global attention, or if features of a tile differ from those of the whole.
    """
    known = _HALOS.setdefault(backbone, {})
    if early not in known:
        known[early] = _measure_halo(backbone, early)
    return known[early]


@torch.no_grad()
def _measure_halo(backbone: Backbone, early: bool) -> int | None:
    try:
        halos = [_halo_along(_Long(backbone, early, down)) for down in (False, True)]
    except (RuntimeError, ValueError):  # the backbone takes one size only
        return None
    return None if None in halos else max(halo for halo in halos if halo is not None)


class _Long(NamedTuple):
    """A backbone that is given long images, (1, bands, short side, long side)."""

    backbone: Backbone
    early: bool
    down: bool
    """True if the backbone sees the long side as height."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the maps of :func:`see`, whose long side is the last one too."""
        if not self.down:
            return see(self.backbone, x, early=self.early)
        return see(self.backbone, x.mT.contiguous(), early=self.early).mT


def _halo_along(seen: _Long) -> int | None:
    """Return :func:`receptive_halo` along the long side."""
    reaches = [_spread(seen, offset) for offset in (0, seen.backbone.stride - 1)]
    if None in reaches:
        return None
    reach = max(reach for reach in reaches if reach is not None)
    # The border of a tile may disturb a cell that depends on nothing beyond it: an image that is
    # moved for an aligned backbone loses pixels at one border.
    return next((halo for halo in (reach, reach + 1) if _tiles_agree(seen, halo)), None)


def _blank(backbone: Backbone, height: int, width: int) -> Tensor:
    return torch.zeros(1, backbone.in_channels, height, width, device=backbone.mean.device)


def _noise(backbone: Backbone, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (1, backbone.in_channels, height, width)
    x = torch.randn(size, generator=generator, device="cpu")
    return x.to(backbone.mean.device)


def _spread(seen: _Long, offset: int) -> int | None:
    """Number of cells to each side that depend on the pixel at ``offset`` of a cell.

    Returns:
        The number; ``None`` if no cell depends on the pixel, or cells too far away.
    """
    backbone = seen.backbone
    stride, step = backbone.stride, backbone.step
    cells = step * -(-max(_PROBE_CELLS, _PROBE_PIXELS // stride) // step)
    middle = cells // 2
    x = _blank(backbone, 2 * step * stride, cells * stride)
    x[..., middle * stride + offset] = torch.nan
    reached = seen(x).isnan().any(1)[0].any(0).nonzero()[:, 0]
    if not len(reached):
        return None
    reach = int(max(middle - reached.min(), reached.max() - middle))
    return None if reach >= cells // 4 else reach


def _tiles_agree(seen: _Long, halo: int) -> bool:
    backbone = seen.backbone
    stride, step = backbone.stride, backbone.step
    halo = step * -(-halo // step)
    # The tile begins at an odd number of steps, lest a coarser grid inside go unnoticed.
    start, cells = 3 * step, 2 * halo + 6 * step
    x = _noise(backbone, 2 * step * stride, 2 * cells * stride)
    whole = seen(x)[..., halo + start : cells]
    part = seen(x[..., start * stride : (cells + halo) * stride])
    return _alike(backbone, whole, part[..., halo : cells - start])


def odd_sides_agree(backbone: Backbone, halo: int, early: bool) -> bool:
    """Return whether tiles equal the whole where a side is no multiple of the backbone's step."""
    stride, step = backbone.stride, backbone.step
    cells = halo + 4 * step
    x = _noise(backbone, 2 * step * stride, (2 * cells + 1) * stride)
    for seen in (_Long(backbone, early, down) for down in (False, True)):
        whole = seen(x)[..., : cells - halo]
        part = seen(x[..., : cells * stride])[..., : cells - halo]
        if not _alike(backbone, whole, part):
            return False
    return True


def _alike(backbone: Backbone, maps: Tensor, others: Tensor) -> bool:
    """Compare maps of :func:`see`; features and early layers each by their own magnitude."""
    channels = backbone.embed_dim
    pairs = zip(unstacked(maps, channels), unstacked(others, channels), strict=True)
    return all(
        bool((whole - tile).abs().max() <= _TOLERANCE * whole.abs().max())
        for whole, tile in pairs
        if whole is not None and tile is not None
    )
