"""A video of features: every frame's, in one basis of colours, and how much they flicker."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import machine
from upfeat.activations import activation_bytes
from upfeat.bounds import whole
from upfeat.frames import (
    WRITTEN_SUFFIXES,
    DamagedVideo,
    Frame,
    VideoWriter,
    count_frames,
    frame_rate,
    read_frames,
)
from upfeat.heads import SavedHead
from upfeat.marks import VIDEO
from upfeat.model import FeatUp
from upfeat.outputs import Inputs, check_output
from upfeat.storage import replacing, sweep, write_bytes
from upfeat.visualize import PCABasis, class_colours

OnFrame = Callable[[int, int], None]
"""Is told how many frames are done, and of how many."""

_UPSAMPLING = 70
"""Bytes a pixel of the image, its guidance and what the upsampler keeps of it; measured."""
_SAMPLED_CELLS = 1 << 16
"""Cells of all sampled frames that the basis is fitted on."""
_DIRECTIONS = 8
"""Random directions on which the drift of features is measured in place of all channels."""
_STILL = 4 / 255
"""Largest change of a colour in what does not move: what encoders leave of a still picture."""


@dataclass(frozen=True)
class VideoSettings:
    """Settings of a video of features.

    Attributes:
        size: shorter side that frames are brought to, pixels; ``None`` for their own.
        beside: show the frame itself to the left of its features.
        head: a head whose classes are shown in place of the features' principal components.
        sample: frames, spread over the video, that the basis of colours is fitted on.
    """

    size: int | None = None
    beside: bool = True
    head: SavedHead | None = None
    sample: int = 16

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: one is out of range.
        """
        whole("size", self.size, optional=True)
        whole("sample", self.sample)
        if self.head is not None and self.head.kind != "classes":
            raise ValueError(
                f"head: says {self.head.kind}, not classes; a video shows the classes of a head"
            )


@dataclass(frozen=True)
class VideoReport:
    """Stability over time, measured where nothing moves.

    Attributes:
        frames: that were written.
        size: (height, width) of a frame's features, pixels.
        still: fraction of the pixels whose surroundings do not change from one frame to the next.
        image: mean change of their colours, in levels of 255.
        drift_coarse: change of the backbone's features in such cells from one frame to the next,
            root mean square, relative to the features' deviation over the video.
        drift: the same of upsampled features in such pixels.
        flicker: mean change of the colours shown in such pixels, in levels of 255; of a head,
            fraction of such pixels whose class changes.
        damage: reason why the video could not be read to its end.

    Where nothing is still, all but the first three are ``None``.
    """

    frames: int
    size: tuple[int, int]
    still: float
    image: float | None
    drift_coarse: float | None
    drift: float | None
    flicker: float | None
    damage: str | None = None


class _Painter(Protocol):
    """A linear map of features, and the colours of what it gives."""

    weight: Tensor
    bias: Tensor

    def colours(self, maps: Tensor) -> Tensor: ...

    def changes(self, before: Tensor, now: Tensor) -> Tensor: ...


class _Components:
    """Principal components as red, green and blue."""

    def __init__(self, basis: PCABasis) -> None:
        self._basis = basis
        self.weight = basis.basis.T.contiguous()
        self.bias = -self.weight @ basis.mean

    def colours(self, maps: Tensor) -> Tensor:
        return self._basis.colours(maps)

    def changes(self, before: Tensor, now: Tensor) -> Tensor:
        return 255 * (now - before).abs().mean(0)


class _Classes:
    """The class that a head finds most likely, each in a colour of its own."""

    def __init__(self, head: SavedHead) -> None:
        self.weight, self.bias = head.weight, head.bias
        self._palette = class_colours(len(head.names))

    def colours(self, maps: Tensor) -> Tensor:
        return self._palette[maps.argmax(0)].permute(2, 0, 1)

    def changes(self, before: Tensor, now: Tensor) -> Tensor:
        return (now != before).any(0).float()


def render_video(
    model: FeatUp,
    source: str | Path,
    output: str | Path,
    settings: VideoSettings | None = None,
    *,
    overwrite: bool = False,
    on_frame: OnFrame | None = None,
) -> VideoReport:
    """Write a video of a video's features.

    All frames share one basis of colours, fitted on a sample of them first. Frames stream: memory
    does not grow with the length.

    Args:
        model: backbone and upsampler.
        source: a video.
        output: ``.mp4``, ``.mov``, ``.mkv`` or ``.webm``; without sound.
        settings: what is shown; ``None`` for the defaults.
        overwrite: replace a file that upfeat did not make.
        on_frame: is told of progress.

    Returns:
        How stable features and colours are.

    Raises:
        FileNotFoundError: there is no such file, or no folder for the output.
        ValueError: PyAV is not installed; it is not a video; the output is the input, somebody
            else's, or of another kind; the frames are too large for the memory there is.
    """
    settings = settings or VideoSettings()
    source, output = Path(source), Path(output)
    if output.suffix.lower() not in WRITTEN_SUFFIXES:
        raise ValueError(f"{output}: must end in one of {', '.join(WRITTEN_SUFFIXES)}")
    check_output(output, Inputs([source]), VIDEO, overwrite=overwrite)
    total, rate = count_frames(source), frame_rate(source)
    with torch.inference_mode():
        sample, spread, damage = _sample(model, source, settings, total)
        painter = (
            _Components(PCABasis(sample)) if settings.head is None else _Classes(settings.head)
        )
        sweep(output.parent)
        stability = Stability(painter, spread, model.backbone.stride)
        with replacing(output) as temporary, VideoWriter(temporary, rate) as writer:
            for number, frame in enumerate(_readable(source), start=1):
                shown = stability.add(model, frame, settings)
                writer.add(shown, frame.time)
                if on_frame is not None:
                    on_frame(number, max(total, number))
    return stability.report(damage)


def write_report(path: str | Path, report: VideoReport) -> None:
    """Write a report as JSON."""
    content = {"format": f"{VIDEO}-report", **asdict(report)}
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _readable(source: Path) -> Iterator[Frame]:
    """Frames up to the damage, if there is any."""
    with suppress(DamagedVideo):
        yield from read_frames(source)


def _sample(
    model: FeatUp, source: Path, settings: VideoSettings, total: int
) -> tuple[Tensor, float, str | None]:
    """Features of some cells of some frames, (C, n, 1); their deviation; the video's damage.

    Raises:
        DamagedVideo: there is no frame before the damage.
        ValueError: frames are too large.
    """
    count = min(settings.sample, max(total, 1))
    wanted = {round((place + 0.5) * total / count - 0.5) for place in range(count)} | {0}
    kept: list[Tensor] = []
    damage = None
    try:
        for number, frame in enumerate(read_frames(source)):
            if number == 0:
                _check_memory(model, source, frame, settings.size)
            if number in wanted:
                x = model.preprocess(frame.pixels, settings.size)
                cells = model.backbone(x)[0].flatten(1).float().cpu()  # (C, h·w)
                step = -(-cells.shape[1] * len(wanted) // _SAMPLED_CELLS)
                kept.append(cells[:, ::step])
    except DamagedVideo as error:
        if not kept:
            raise
        damage = str(error)
    sample = torch.cat(kept, dim=1)
    return sample[:, :, None], float(sample.var(1, correction=0).sum().sqrt()), damage


def _check_memory(model: FeatUp, source: Path, frame: Frame, size: int | None) -> None:
    height, width = frame.pixels.shape[:2]
    a_pixel = _UPSAMPLING + activation_bytes(model.backbone)
    machine.check_fits(source, (height, width), size, a_pixel, device=model.backbone.mean.device)


class Stability:
    """Frames one after the other, and what changes between them where nothing moves."""

    def __init__(self, painter: _Painter, spread: float, stride: int) -> None:
        """Begin.

        Args:
            painter: of the frames.
            spread: deviation of the features over the video, root of the summed variances.
            stride: pixels per cell.
        """
        self._painter, self._spread, self._stride = painter, max(spread, 1e-12), stride
        channels = painter.weight.shape[1]
        generator = torch.Generator().manual_seed(0)
        # Squared lengths are kept on average, so that their mean over many pixels is right.
        self._directions = torch.randn(_DIRECTIONS, channels, generator=generator)
        self._directions /= _DIRECTIONS**0.5
        self._before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._frames, self._compared, self._size = 0, 0, (0, 0)

    def add(self, model: FeatUp, frame: Frame, settings: VideoSettings) -> np.ndarray:
        """Compute a frame's features; return the picture of them, (H, W, 3) uint8."""
        x = model.preprocess(frame.pixels, settings.size)
        lazy = model.lazy(x)
        painter = self._painter
        weight = torch.cat([painter.weight, self._directions]).to(lazy.features)
        bias = F.pad(painter.bias, (0, _DIRECTIONS)).to(lazy.features)
        maps = lazy.project(weight, bias)[0].float().cpu()  # (3 or K + directions, H, W)
        image = model.backbone.denormalize(x)[0].float().cpu()
        colours = painter.colours(maps[:-_DIRECTIONS])
        now = image, lazy.features[0].float().cpu(), maps[-_DIRECTIONS:], colours
        if self._before is not None:
            self._compare(self._before, now)
        self._before = now
        self._frames, self._size = self._frames + 1, (image.shape[1], image.shape[2])
        panels = [image, colours] if settings.beside else [colours]
        picture = torch.cat(panels, dim=2).clamp(0, 1).mul(255).round().byte()
        return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())

    def _compare(self, before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> None:
        """Add what has changed between two frames."""
        change = (now[0] - before[0]).abs().amax(0, keepdim=True)
        # With a cell's width around: a pixel whose surroundings move has reason to change.
        width = 2 * self._stride + 1
        around = F.max_pool2d(change[None], width, stride=1, padding=self._stride)[0, 0]
        pixels = around <= _STILL
        cells = F.adaptive_max_pool2d(around[None], now[1].shape[-2:])[0] <= _STILL
        drifts = [(now[part] - before[part]).square().sum(0) for part in (1, 2)]
        added = {
            "pixels": pixels.sum(),
            "cells": cells.sum(),
            "image": 255 * (now[0] - before[0]).abs().mean(0)[pixels].sum(),
            "coarse": drifts[0][cells].sum(),
            "fine": drifts[1][pixels].sum(),
            "colours": self._painter.changes(before[3], now[3])[pixels].sum(),
        }
        for name, value in added.items():
            self._sums[name] += float(value)
        self._compared += pixels.numel()

    def report(self, damage: str | None = None) -> VideoReport:
        """The measurements so far."""
        sums, pixels, cells = self._sums, self._sums["pixels"], self._sums["cells"]
        return VideoReport(
            frames=self._frames,
            size=self._size,
            still=pixels / max(self._compared, 1),
            image=sums["image"] / pixels if pixels else None,
            drift_coarse=(sums["coarse"] / cells) ** 0.5 / self._spread if cells else None,
            drift=(sums["fine"] / pixels) ** 0.5 / self._spread if pixels else None,
            flicker=sums["colours"] / pixels if pixels else None,
            damage=damage,
        )
