"""One photograph of one visitor, what can be asked of it, and how many are kept at a time.

Nothing is written to disk but the files made for a download, which are read back and removed. What
is kept of a photograph is small: the coarse features, the guidance and the lengths of the features;
upsampling weights, which are large, only for the last few.
"""

from __future__ import annotations

import copy
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.bounds import number
from upfeat.features import UpsampledFeatures
from upfeat.heads import SavedHead, describe_backbone, save_head
from upfeat.images import read_image
from upfeat.machine import release_memory, resized
from upfeat.probes import LinearProbe, Pixels, fit_classifier
from upfeat.text import TextBackbone
from upfeat.visualize import PCABasis

if TYPE_CHECKING:
    from upfeat.model import FeatUp

MAX_BYTES = 16 << 20
"""Size of the largest file that may be uploaded."""

MAX_PIXELS = 32_000_000
"""Pixels of the largest photograph that may be uploaded; it is made smaller afterwards."""

MAX_STROKE_POINTS = 4000
"""Painted pixels that a probe is fitted on; of more, evenly spaced ones are taken."""

MAX_PROMPT = 200
"""Characters of a text."""

SIZES = (224, 336, 448, 672)
"""Shorter sides offered, pixels."""

_BLOCK = 32
"""Channels upsampled at once for the lengths of the features."""


class Pair(NamedTuple):
    """One result twice: from the coarse features and from the upsampled ones."""

    coarse: Tensor
    """(..., h, w)."""
    fine: Tensor
    """(..., H, W)."""


def read_upload(content: bytes, label: str = "the file") -> Tensor:
    """Decode an uploaded photograph, within bounds, to the largest size that is offered.

    Args:
        content: the file's bytes.
        label: what errors call it.

    Returns:
        (3, H, W) uint8. Photographs longer than 2:1 come out smaller: their area is bounded.

    Raises:
        ValueError: it is empty, too large, or no photograph.
    """
    if not content:
        raise ValueError(f"{label} is empty; choose a photograph")
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{label} has {len(content) / (1 << 20):.0f} MiB; at most {MAX_BYTES >> 20} MiB are "
            "taken, so save it smaller first"
        )
    try:
        image = read_image(content, max_pixels=MAX_PIXELS)
    except ValueError as error:
        if "max_pixels" in str(error):
            raise ValueError(
                f"{label} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first"
            ) from None
        raise ValueError(f"{label}: {str(error).removeprefix('image: ')}") from None
    image = _within(image, SIZES[-1])
    return (image * 255).round().byte()


class Visit:
    """A photograph with its features.

    Attributes:
        photo: (3, H, W) uint8, at the size of the result.
        seconds: what the parts of the work took, by name.
        last: maps that were asked for last, by "similarity", "text" and "segment".
        head: the last probe.
    """

    def __init__(self, model: FeatUp, original: Tensor, size: int, name: str = "photo") -> None:
        """Compute the features.

        Args:
            model: backbone and upsampler.
            original: (3, H, W) uint8, of :func:`read_upload`.
            size: the shorter side of the result, one of :data:`SIZES`.
            name: of the photograph, for files.

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
        return isinstance(self.model.backbone, TextBackbone)

    @property
    def kept(self) -> int:
        """Bytes kept between requests: without upsampling weights."""
        tensors = [self.lazy.features, self.lazy.guidance, self.original, self.photo]
        tensors += [*self._colours, self._lengths]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def cool(self) -> None:
        """Drop the upsampling weights; they are made again when something is asked."""
        self.lazy = copy.copy(self.lazy)

    def colours(self) -> Pair:
        """Principal components as colours (3, ·, ·), uint8, one basis for both."""
        return self._colours

    @torch.no_grad()
    def similarity(self, y: float, x: float) -> Pair:
        """Cosines of all pixels with the one at (y, x), and of all cells with the cell it lies in.

        Args:
            y: row, pixels of the result.
            x: column.

        Raises:
            ValueError: the pixel lies outside.
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
        """Cosine of every pixel's features, and of every cell's, with a text.

        Raises:
            ValueError: there is no text, a long one, or the backbone has no text tower.
        """
        backbone = self.model.backbone
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
            Class indices, uint8: of a probe fitted on the cells under the strokes, and of one
            fitted on the upsampled features there, kept as ``head``.

        Raises:
            ValueError: fewer than two classes were painted, or a pixel lies outside.
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
        made_by, upsampler = describe_backbone(backbone), self.model.upsampler.name
        self.head = SavedHead(head.weight, head.bias, names, "classes", made_by, upsampler)
        return self._keep("segment", cells, labels[fine])

    def features_file(self) -> bytes:
        """The features as ``UpsampledFeatures.save`` writes them: their parts."""
        return _written(self.lazy.save)

    def head_file(self) -> bytes:
        """The last probe as a head of ``upfeat run --head``.

        Raises:
            ValueError: nothing has been painted.
        """
        head = self.head
        if head is None:
            raise ValueError("there is no head yet; paint two classes first")
        return _written(lambda path: save_head(path, head))

    def _keep(self, name: str, coarse: Tensor, fine: Tensor) -> Pair:
        self.last = {name: Pair(coarse, fine)}  # one map alone, so that memory stays bounded
        return self.last[name]

    def _pixel_cosines(self, vectors: Tensor) -> Tensor:
        """Cosines (K, H, W) of the upsampled features with vectors (K, C)."""
        scale = torch.linalg.vector_norm(vectors, dim=1)[:, None, None] * self._lengths
        return self.lazy.project(vectors)[0].cpu() / scale.cpu().clamp(min=1e-8)

    def _cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the cells that pixels (N, 2) lie in."""
        grid, size = self.lazy.features.shape[2:], self.shape
        rows, columns = ((2 * points[:, i] + 1) * grid[i] // (2 * size[i]) for i in (0, 1))
        return rows.long(), columns.long()

    def _strokes(self, strokes: Sequence[Sequence[float]]) -> Tensor:
        """Painted pixels as integers (N, 3), checked, without repetitions, not too many."""
        try:
            table = torch.tensor(strokes, dtype=torch.float64).reshape(-1, 3)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError("strokes must be rows of (class, y, x)") from None
        limits = torch.tensor([3, *self.shape])
        if not bool(((table >= 0) & (table < limits)).all()):
            raise ValueError("a stroke leaves the photograph, or has an unknown class")
        table = table.long().unique(dim=0)
        step = -(-len(table) // MAX_STROKE_POINTS) or 1
        return table[::step]


class Visits:
    """The visitors' photographs: few enough, and none for long.

    A visitor's token is known to the server alone, so that nobody can ask for another's.
    """

    def __init__(
        self,
        most: int = 32,
        *,
        warm: int = 3,
        seconds: float = 1200,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            most: photographs kept; the one unused for longest goes first.
            warm: of them, those whose upsampling weights are kept too.
            seconds: after which an unused one goes.
            clock: seconds, for tests.
        """
        self.most, self.warm, self.seconds = most, warm, seconds
        self._clock, self._lock = clock, threading.Lock()
        self._visits: OrderedDict[str, tuple[float, Visit]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._visits)

    def put(self, token: str, visit: Visit) -> None:
        """Keep a visitor's photograph in the place of the one before."""
        with self._lock:
            self._visits.pop(token, None)
            self._visits[token] = self._clock(), visit
            self._tidy()
        release_memory()  # weights lie in reference cycles, and allocators keep what is freed

    def get(self, token: str | None) -> Visit:
        """Return a visitor's photograph.

        Raises:
            ValueError: there is none, or it has gone.
        """
        with self._lock:
            self._tidy()
            if token is None or token not in self._visits:
                raise ValueError("no photograph is loaded any more; choose one again")
            _, visit = self._visits.pop(token)
            self._visits[token] = self._clock(), visit
            self._tidy()
            return visit

    def drop(self, token: str | None) -> None:
        """Forget a visitor's photograph."""
        with self._lock:
            self._visits.pop(token or "", None)

    def _tidy(self) -> None:
        oldest = self._clock() - self.seconds
        for token in [token for token, (used, _) in self._visits.items() if used < oldest]:
            del self._visits[token]
        while len(self._visits) > self.most:
            self._visits.popitem(last=False)
        for _, visit in list(self._visits.values())[: -self.warm]:
            visit.cool()


def _within(image: Tensor, size: int) -> Tensor:
    """Bring the shorter side to ``size``, or less where the area would exceed 2·size²."""
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
    """Length of every pixel's features, (H, W), a few channels at a time."""
    channels = torch.eye(lazy.shape[1], dtype=lazy.features.dtype, device=lazy.features.device)
    squares = [
        lazy.project(block.contiguous())[0].float().square().sum(0)
        for block in channels.split(_BLOCK)
    ]
    return torch.stack(squares).sum(0).sqrt().cpu()


def _cosines(features: Tensor, vectors: Tensor) -> Tensor:
    """Cosines (K, h, w) of features (C, h, w) with vectors (K, C)."""
    unit = F.normalize(features.float(), dim=0)
    return torch.einsum("kc,chw->khw", F.normalize(vectors.float(), dim=1), unit).cpu()


def _fit(features: Tensor, targets: Tensor, count: int) -> LinearProbe:
    """A classifier of features (P, C); every class weighs the same, however much was painted."""
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
    """The bytes that a function writes to a file, which is removed."""
    with tempfile.TemporaryDirectory(prefix="upfeat-") as folder:
        path = Path(folder) / "download.safetensors"
        write(path)
        return path.read_bytes()
