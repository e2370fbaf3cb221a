"""Visitors' photographs with their features, and the results computed from them.

Only files made for a download are written to disk; they are read back and removed. Little memory is
kept for a photograph: coarse features, guidance, lengths of the upsampled features, results. The
upsampling weights, which are large, are kept for the last few photographs only.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.bounds import number
from upfeat.features import UpsampledFeatures
from upfeat.heads import SavedHead, describe_backbone, save_head
from upfeat.images import read_image
from upfeat.linear import unit_vectors
from upfeat.machine import resized
from upfeat.probes import LinearProbe, Pixels, fit_classifier
from upfeat.text import TextBackbone
from upfeat.visualize import PCABasis

if TYPE_CHECKING:
    from upfeat.model import FeatUp

MAX_BYTES = 16 << 20
"""Bytes of the largest file that may be uploaded."""

MAX_PIXELS = 32_000_000
"""Pixels of the largest photograph that may be uploaded; it is resized afterwards."""

MAX_SCANS = 1000
"""Scans of the largest progressive JPEG that may be uploaded, a hundred times those of usual ones.

Each takes the time of the whole picture, and needs 50 bytes of the file."""

MAX_STROKE_POINTS = 4000
"""Largest number of painted pixels that a probe is fitted on; a larger number is thinned evenly."""

MAX_PROMPT = 200
"""Largest number of characters of a text."""

SIZES = (224, 336, 448, 672)
"""Offered sizes of the result: its shorter side, pixels."""

_BLOCK = 32
"""Channels upsampled at once to compute the lengths of the features."""


class Pair(NamedTuple):
    """The same kind of result from the coarse and from the upsampled features."""

    coarse: Tensor
    """(..., h, w), computed from the coarse features."""
    fine: Tensor
    """(..., H, W), computed from the upsampled features."""


def read_upload(content: bytes, label: str = "the file") -> Tensor:
    """Decode an uploaded photograph and reduce it to the area of the largest offered size.

    Args:
        content: bytes of the file.
        label: name of the file in error messages.

    Returns:
        (3, H, W) uint8. Photographs longer than 2:1 become smaller, since their area is bounded.

    Raises:
        ValueError: the file is empty, too large, takes too long to decode, or is no photograph.
    """
    if not content:
        raise ValueError(f"{label} is empty; choose a photograph")
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{label} has {len(content) / (1 << 20):.0f} MiB; at most {MAX_BYTES >> 20} MiB are "
            "taken, so save it smaller first"
        )
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"{label} is a JPEG of more than {MAX_SCANS} scans; save it anew first")
    try:
        image = read_image(content, max_pixels=MAX_PIXELS)
    except ValueError as error:
        if "max_pixels" in str(error):
            raise ValueError(
                f"{label} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first"
            ) from None
        reason = str(error).removeprefix("image: ")
        if re.search(r"\w=", reason):  # options of read_image, which the page does not have
            reason = "no photograph of 8 or 16 bits and three colours; save it as PNG or JPEG first"
        raise ValueError(f"{label}: {reason}") from None
    if image[0].numel() > 2 * SIZES[-1] ** 2:  # smaller ones stay as they are, as for preprocess
        image = _within(image, SIZES[-1])
    return (image * 255).round().byte()


class Visit:
    """A photograph with its features.

    Attributes:
        photo: (3, H, W) uint8, at the size of the result.
        seconds: duration of each part of the computation, by name.
        last: the last result of each kind: "similarity", "text" and "segment".
        head: the last probe; ``None`` before the first.
    """

    def __init__(self, model: FeatUp, original: Tensor, size: int, name: str = "photo") -> None:
        """Compute the features.

        Args:
            model: backbone and upsampler.
            original: (3, H, W) uint8, the photograph from :func:`read_upload`.
            size: shorter side of the result, pixels, one of :data:`SIZES`.
            name: name of the photograph, for files to download.

        Raises:
            ValueError: the size is not offered.
        """
        if size not in SIZES:
            raise ValueError(f"size={size} is not offered; choose one of {SIZES}")
        self.model, self.original, self.size, self.name = model, original, size, name
        image = _within(original.float() / 255, size)
        self.photo = (image * 255).round().byte()
        x = model.preprocess(image)
        device = next(iter(model.upsampler.buffers()), x).device
        with torch.inference_mode(False), torch.no_grad():
            started = time.perf_counter()
            self.lazy = model.lazy(x.to(device))
            extracted = time.perf_counter()
            self._colours = _principal_colours(self.lazy)
            upsampled = time.perf_counter()
            self._lengths = _lengths(self.lazy)
        self.seconds = {"backbone": extracted - started, "upsampler": upsampled - extracted}
        self.head: SavedHead | None = None
        self.last: dict[str, Pair] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the result."""
        return self.lazy.shape[2], self.lazy.shape[3]

    @property
    def has_texts(self) -> bool:
        """True if the backbone can compare its features with texts."""
        return isinstance(self.model.backbone.origin, TextBackbone)

    @property
    def kept(self) -> int:
        """Bytes kept between requests, without the upsampling weights."""
        tensors = [self.lazy.features, self.lazy.guidance, self.original, self.photo]
        tensors += [*self._colours, self._lengths, *chain(*self.last.values())]
        tensors += [] if self.lazy.hidden is None else [self.lazy.hidden]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def cool(self) -> None:
        """Drop the upsampling weights; the next request computes them again."""
        self.lazy = copy.copy(self.lazy)

    def colours(self) -> Pair:
        """Return principal components as colours (3, ·, ·), uint8, in one basis for both maps."""
        return self._colours

    @torch.no_grad()
    def similarity(self, y: float, x: float) -> Pair:
        """Compute cosines of all pixels with the pixel at (y, x), and of all cells with its cell.

        Args:
            y: row of the pixel in the result, from 0.
            x: column of the pixel in the result, from 0.

        Raises:
            ValueError: the pixel lies outside the result.
        """
        height, width = self.shape
        y, x = number("y", y), number("x", x)
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"the pixel ({y:g}, {x:g}) lies outside of {height}×{width}")
        point = torch.tensor([[float(int(y)), float(int(x))]], device=self.lazy.features.device)
        target = self.lazy.at(point)
        rows, columns = self._cells(torch.tensor([[int(y), int(x)]]))
        coarse = self.lazy.features[0]  # (C, h, w)
        cell = coarse[:, rows, columns].T
        return self._keep("similarity", _cosines(coarse, cell)[0], self._pixel_cosines(target)[0])

    @torch.no_grad()
    def text(self, prompt: str) -> Pair:
        """Compute cosines of every pixel's and of every cell's features with a text.

        Raises:
            ValueError: the text is empty or too long, or the backbone has no text tower.
        """
        backbone = self.model.backbone.origin
        if not isinstance(backbone, TextBackbone):
            raise ValueError(f"{backbone.name} has no text tower; choose another backbone")
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise ValueError(f"a text of 1 to {MAX_PROMPT} characters is needed")
        vector = backbone.encode_text([prompt.strip()]).to(self.lazy.features)
        coarse = _cosines(self.lazy.features[0], vector)[0]
        return self._keep("text", coarse, self._pixel_cosines(vector)[0])

    @torch.no_grad()
    def segment(self, strokes: Sequence[Sequence[float]]) -> Pair:
        """Fit linear probes on painted pixels; label every cell and every pixel.

        Args:
            strokes: (class, y, x) of painted pixels, classes from 0 to 2.

        Returns:
            Class indices, uint8: coarse, by a probe fitted on the cells under the painted pixels;
            fine, by a probe fitted on the upsampled features of these pixels, kept as ``head``.

        Raises:
            ValueError: fewer than two classes were painted, or a pixel lies outside the result.
        """
        table = self._strokes(strokes)
        classes, targets = table[:, 0].unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError("paint at least two classes: a stroke of each is enough")
        points = table[:, 1:]
        rows, columns = self._cells(points)
        coarse = self.lazy.features[0].float()
        on_cells = _fit(coarse[:, rows, columns].T, targets, len(classes))
        features = self.lazy.at(points.to(coarse.device, torch.float32)).float()
        head = _fit(features, targets, len(classes))
        labels = classes.byte()
        cells = labels[on_cells(coarse.flatten(1).T).argmax(1).cpu()].view(coarse.shape[1:])
        fine = self.lazy.project(head.weight, head.bias)[0].argmax(0).cpu()
        names = [f"class {int(one) + 1}" for one in classes]
        backbone = self.model.backbone
        made_by, upsampler = describe_backbone(backbone.origin), self.model.upsampler.name
        self.head = SavedHead(head.weight, head.bias, names, "classes", made_by, upsampler)
        return self._keep("segment", cells, labels[fine])

    def features_file(self) -> bytes:
        """Return the bytes of a file of lazy features; see ``UpsampledFeatures.save``."""
        return _written(self.lazy.save)

    def head_file(self) -> bytes:
        """Return the bytes of a file with the last probe, a head for ``upfeat run --head``.

        Raises:
            ValueError: no probe has been fitted yet.
        """
        head = self.head
        if head is None:
            raise ValueError("there is no head yet; paint two classes first")
        return _written(lambda path: save_head(path, head))

    def _keep(self, name: str, coarse: Tensor, fine: Tensor) -> Pair:
        self.last[name] = Pair(coarse, fine)
        return self.last[name]

    def _pixel_cosines(self, vectors: Tensor) -> Tensor:
        """Compute cosines (K, H, W) of the upsampled features with vectors (K, C)."""
        lengths = self._lengths.clamp(min=torch.finfo(self._lengths.dtype).tiny)
        return self.lazy.project(unit_vectors(vectors))[0].cpu() / lengths

    def _cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and the columns of the cells that contain pixels (N, 2), each (N,)."""
        grid, size = self.lazy.features.shape[2:], self.shape
        rows, columns = ((2 * points[:, i] + 1) * grid[i] // (2 * size[i]) for i in (0, 1))
        return rows.long(), columns.long()

    def _strokes(self, strokes: Sequence[Sequence[float]]) -> Tensor:
        """Check painted pixels; return the distinct ones, (N, 3), at most MAX_STROKE_POINTS."""
        try:
            table = torch.tensor(strokes, dtype=torch.float64).reshape(-1, 3)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError("strokes must be rows of (class, y, x)") from None
        limits = torch.tensor([3, *self.shape])
        if not bool(((table >= 0) & (table < limits)).all()):
            raise ValueError("a stroke leaves the photograph, or has an unknown class")
        table = table.long().unique(dim=0)
        parts = [table[table[:, 0] == one] for one in table[:, 0].unique()]
        most = MAX_STROKE_POINTS // max(len(parts), 1)
        # Each class is thinned by itself, so that none of few points is lost.
        return torch.cat([table[:0], *(part[:: -(-len(part) // most)] for part in parts)])


def _within(image: Tensor, size: int) -> Tensor:
    """Resize the shorter side to ``size`` pixels, or fewer if the area would exceed 2·size²."""
    height, width = image.shape[1:]
    aspect = max(height, width) / min(height, width)
    side = max(round(size * min(1.0, (2 / aspect) ** 0.5)), 1)
    target = resized((height, width), side)
    if target == (height, width):
        return image
    resampled = F.interpolate(image[None], size=target, mode="bicubic", antialias=True)
    return resampled[0].clamp(0, 1)


def _principal_colours(lazy: UpsampledFeatures) -> Pair:
    coarse = lazy.features[0].cpu()
    basis = PCABasis(coarse)
    centre, axes = basis.basis.T @ basis.mean, basis.basis.T.to(lazy.features)
    fine = lazy.project(axes, -centre.to(axes))[0].float().cpu()
    shown = (basis.colours(basis.project(coarse)), basis.colours(fine))
    return Pair(*((one * 255).round().byte() for one in shown))


def _lengths(lazy: UpsampledFeatures) -> Tensor:
    """Compute the length of every pixel's features, (H, W), a few channels at a time."""
    channels = torch.eye(lazy.shape[1], dtype=lazy.features.dtype, device=lazy.features.device)
    squares = [
        lazy.project(block.contiguous())[0].float().square().sum(0)
        for block in channels.split(_BLOCK)
    ]
    return torch.stack(squares).sum(0).sqrt().cpu()


def _cosines(features: Tensor, vectors: Tensor) -> Tensor:
    """Compute cosines (K, h, w) of features (C, h, w) with vectors (K, C)."""
    return torch.einsum("kc,chw->khw", unit_vectors(vectors), unit_vectors(features, 0)).cpu()


def _fit(features: Tensor, targets: Tensor, count: int) -> LinearProbe:
    """Fit a classifier of features (P, C), in which all classes have equal weight."""
    largest = int(targets.bincount().max())
    balanced = torch.cat(
        [
            members.repeat(-(-largest // len(members)))[:largest]
            for members in ((targets == one).nonzero()[:, 0] for one in range(count))
        ]
    )
    pixels = Pixels(features[balanced][None], targets[balanced][None].to(features.device))
    return fit_classifier(pixels, count, torch.Generator().manual_seed(0))


def _written(write: Callable[[Path], None]) -> bytes:
    """Return the bytes that a function writes to a file, through a temporary file."""
    with tempfile.TemporaryDirectory(prefix="upfeat-") as folder:
        path = Path(folder) / "download.safetensors"
        write(path)
        return path.read_bytes()
