"""Pictures of features, in colours of a PCA shared between maps, side by side with captions."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from upfeat.linear import principal_components
from upfeat.types import Size

_MARGIN = 12
_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)
_MIN_PANEL_SIDE = 320
_BEHIND = (0.2, 0.2, 0.2)
_LARGEST = 1e15
_MOST_SAMPLES = 1 << 20
# Rows of a picture that are converted at once.
_ROWS = 64
# Characters of a name in a legend, of which longer names lose their ends.
_LONGEST_NAME = 32


class PCABasis:
    """Three principal components of features, and the range of values along each.

    The basis is fitted once and applied to several maps, so that a colour has the same meaning in
    all of them.
    """

    def __init__(self, features: Tensor) -> None:
        """Fit the basis.

        Args:
            features: (C, h, w), the coarse map, or any other sample of the features.

        Raises:
            TypeError: ``features`` is not a tensor.
            ValueError: it is not floating-point (C, h, w), or contains NaN, infinity, or values
                whose squares overflow.
        """
        _check("features", features)
        samples = features.detach().flatten(1).T.float()  # (h·w, C)
        samples = samples[:: -(-len(samples) // _MOST_SAMPLES)]
        if not bool((samples.abs() < _LARGEST).all()):
            raise ValueError(
                "features holds NaN, infinity or values too large for a PCA; check the backbone's "
                "input and its precision"
            )
        self.mean, axes, variances = principal_components(samples, 3)
        count = len(axes)
        basis = axes.T * (variances > 0)
        # The sign of a component is arbitrary; fix it, so that equal features get equal colours.
        heaviest = basis.abs().argmax(0)
        basis = basis * torch.sign(basis[heaviest, torch.arange(count)]).where(
            basis.abs().sum(0) > 0, torch.ones(())
        )
        self.basis = F.pad(basis, (0, 3 - count))  # (C, 3)
        projected = (samples - self.mean) @ self.basis
        self.low = projected.quantile(0.01, dim=0) if len(projected) > 1 else projected[0] - 1
        self.high = projected.quantile(0.99, dim=0) if len(projected) > 1 else projected[0] + 1

    def project(self, features: Tensor) -> Tensor:
        """Compute coordinates in the basis: (C, H, W) -> (3, H, W), an affine map.

        Raises:
            TypeError: ``features`` is not a tensor.
            ValueError: it is not (C, H, W) with the C of the fitted map.
        """
        _check("features", features, len(self.basis))
        flat = features.detach().flatten(1)
        centre = self.basis.T @ self.mean
        projected = self.basis.T.to(flat.dtype) @ flat - centre.to(flat.dtype)[:, None]
        return projected.float().view(3, *features.shape[1:])

    def colours(self, projected: Tensor) -> Tensor:
        """Convert coordinates of :meth:`project` to colours: (3, H, W) -> (3, H, W) in [0, 1].

        The 1st percentile of the fitted map becomes 0 and the 99th becomes 1.
        """
        span = (self.high - self.low).clamp(min=torch.finfo(self.low.dtype).tiny)
        return ((projected - self.low[:, None, None]) / span[:, None, None]).clamp(0, 1)


def _check(name: str, maps: Tensor, channels: int | None = None) -> None:
    """Check that maps are a floating-point tensor (C, h, w), none of these 0."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} is of type {type(maps).__name__}; give a tensor")
    fits = maps.dim() == 3 and maps.numel() > 0 and channels in (None, len(maps))
    if not fits or not maps.is_floating_point():
        raise ValueError(
            f"{name} is {maps.dtype} {tuple(maps.shape)}; give floating numbers "
            f"({channels or 'C'}, h, w), of one image"
        )


def class_colours(count: int, names: Sequence[str] = ()) -> Tensor:
    """Distinct colours for ``count`` classes, (count, 3) in [0, 1].

    The hue advances by the golden ratio from class to class, so that consecutive classes differ for
    any number of classes. A class named "background" is dark grey, so that the others stand out.

    Args:
        count: number of classes.
        names: names of the classes; may be empty.
    """
    rows = [
        colorsys.hsv_to_rgb(0.61803399 * index % 1, 0.75 - 0.2 * (index % 2), 0.95)
        for index in range(count)
    ]
    for index, name in enumerate(names[:count]):
        if name.strip().lower() == "background":
            rows[index] = _BEHIND
    return torch.tensor(rows).view(count, 3)


def as_rgb(bands: Tensor) -> Tensor:
    """Show an image of any bands: (N, H, W) -> (3, H, W), its first three, or its first as grey."""
    return bands[:3] if len(bands) >= 3 else bands[:1].expand(3, -1, -1)


def to_bytes(colours: Tensor) -> Tensor:
    """Convert colours in [0, 1] to uint8."""
    return (colours.clamp(0, 1) * 255).round().byte()


def to_image(colours: Tensor) -> Image.Image:
    """Convert colours (3, H, W) in [0, 1] to a PIL image.

    Raises:
        TypeError: ``colours`` is not a tensor.
        ValueError: it is not (3, H, W), or not floating point.
    """
    _check("colours", colours, 3)
    return from_bytes(_painted(colours, lambda part: part))


def from_bytes(colours: Tensor) -> Image.Image:
    """Convert colours (3, H, W) uint8 to a PIL image."""
    return Image.fromarray(np.ascontiguousarray(colours.permute(1, 2, 0).cpu().numpy()))


def _painted(values: Tensor, colours: Callable[[Tensor], Tensor]) -> Tensor:
    """Colours of values (3, H, W), as uint8; a few rows at a time, to need little memory."""
    return torch.cat([to_bytes(colours(part)) for part in values.split(_ROWS, dim=1)], dim=1)


def side_by_side(
    panels: Sequence[tuple[str, Image.Image]], legend: Sequence[tuple[str, Sequence[float]]] = ()
) -> Image.Image:
    """Arrange captioned pictures in a row, on white.

    Args:
        panels: captions and pictures. All pictures are resized to the size of the first one,
            without smoothing, so that coarse cells appear as blocks. If the first picture is small,
            all are enlarged by an integer factor.
        legend: names and colours, in [0, 1], that are explained below the captions.

    Returns:
        One picture with all panels.

    Raises:
        ValueError: there are no panels.
    """
    if not panels:
        raise ValueError("panels is empty; give at least one")
    width, height = panels[0][1].size
    factor = max(1, -(-_MIN_PANEL_SIDE // max(width, height)))
    size = (width * factor, height * factor)
    font = ImageFont.load_default(size=max(14, min(size[0] // 14, 28)))
    lines = [caption.split("\n") for caption, _ in panels]
    line_height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 14
    caption_height = line_height * max(map(len, lines)) + _MARGIN // 2
    columns = [max(size[0], *(round(font.getlength(line)) for line in text)) for text in lines]
    total = sum(columns) + _MARGIN * (len(panels) + 1)
    bottom = size[1] + caption_height + 2 * _MARGIN
    entries, below = _placed(legend, font, line_height, total)
    picture = Image.new("RGB", (total, bottom + below), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    left = _MARGIN
    for (_, panel), text, column in zip(panels, lines, columns, strict=True):
        shown = panel.convert("RGB").resize(size, Image.Resampling.NEAREST)
        picture.paste(shown, (left + (column - size[0]) // 2, _MARGIN))
        for index, line in enumerate(text):
            place = (left + column // 2, _MARGIN + size[1] + _MARGIN // 2 + index * line_height)
            draw.text(place, line, fill=_INK, font=font, anchor="ma")
        left += column + _MARGIN
    for x, y, name, colour in entries:
        y += bottom
        inside = tuple(round(255 * value) for value in colour)
        box = (x, y + line_height // 8, x + line_height, y + line_height)
        draw.rectangle(box, fill=inside, outline=_INK)
        draw.text((x + line_height + _MARGIN // 2, y), name, fill=_INK, font=font)
    return picture


def _placed(
    legend: Sequence[tuple[str, Sequence[float]]], font: Any, line_height: int, width: int
) -> tuple[list[tuple[int, int, str, Sequence[float]]], int]:
    """Place a legend's entries in rows of ``width`` pixels.

    Returns:
        Left, top, name and colour of each entry, and the height of all rows.
    """
    entries: list[tuple[int, int, str, Sequence[float]]] = []
    left, top, row = _MARGIN, 0, line_height + _MARGIN
    for name, colour in legend:
        name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        needed = line_height + _MARGIN // 2 + round(font.getlength(name))
        if left > _MARGIN and left + needed > width - _MARGIN:
            left, top = _MARGIN, top + row
        entries.append((left, top, name, colour))
        left += needed + 2 * _MARGIN
    return entries, top + row if entries else 0


def comparison(
    image: Tensor, coarse: Tensor, upsampled: Tensor, *, label: str = "upsampled"
) -> Image.Image:
    """Draw an image next to its coarse features, bilinear features and upsampled features.

    Args:
        image: (3, H, W) in [0, 1].
        coarse: (C, h, w), features of the backbone.
        upsampled: (C, H', W'), upsampled features.
        label: caption of the last panel.

    Returns:
        Picture of four captioned panels. The three panels of features have one PCA basis, fitted to
        the coarse features.

    Raises:
        ValueError: an argument has another shape or type, or features are not finite.
    """
    basis = PCABasis(coarse)
    _check("image", image, 3)
    sharp = _painted(basis.project(upsampled), basis.colours)
    return draw_comparison(to_bytes(image), coarse, basis, sharp, label=label)


def draw_comparison(
    image: Tensor,
    coarse: Tensor,
    basis: PCABasis,
    sharp: Tensor,
    *,
    label: str = "upsampled",
    size: Size | None = None,
    before: str = "coarse features",
) -> Image.Image:
    """Draw the picture of :func:`comparison` from the colours of upsampled features.

    Args:
        image: (3, H, W) uint8.
        coarse: (C, h, w), features of the backbone.
        basis: PCA basis of all panels.
        sharp: (3, H', W') uint8, colours of the upsampled features in the basis.
        label: caption of the last panel.
        size: (height, width) for the captions, if image and features are drawn smaller; ``None``
            for the sizes of ``image`` and ``sharp``.
        before: caption of the coarse features.
    """
    shown = (image.shape[1], image.shape[2])
    # The projection is affine and commutes with interpolation, so interpolate 3 channels, not C.
    grid = basis.project(coarse)[None]
    whole = _size(size or shown)
    after = _size(size or (sharp.shape[1], sharp.shape[2]))

    def coloured(mode: str, **options: Any) -> Image.Image:
        panel = F.interpolate(grid, shown, mode=mode, **options)[0]
        return from_bytes(_painted(panel, basis.colours))

    return side_by_side(
        [
            (f"image\n{whole}", from_bytes(image)),
            (f"{before}\n{_size((coarse.shape[1], coarse.shape[2]))}", coloured("nearest-exact")),
            (f"bilinear\n{whole}", coloured("bilinear", align_corners=False)),
            (f"{label}\n{after}", from_bytes(sharp)),
        ]
    )


def _size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
