"""Videos of features: all frames in one basis of colours, with measurements of flicker."""

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
from upfeat.bounds import check_callback, flag, instance, path_of, whole
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
from upfeat.outputs import Inputs, prepare_output
from upfeat.storage import replacing, write_bytes
from upfeat.visualize import PCABasis, class_colours

__all__ = [
    "OnFrame",
    "VideoReport",
    "VideoSettings",
    "render_video",
    "write_report",
]

OnFrame = Callable[[int, int], None]
"""Function that is called with the number of frames done and the total number of frames."""

_UPSAMPLING = 70
"""Measured bytes per pixel of the image, its guidance and the upsampler's kernels."""
_SAMPLED_CELLS = 1 << 16
"""Number of cells from all sampled frames to which the basis is fitted."""
_DIRECTIONS = 8
"""Number of random directions, instead of all channels, in which the drift is measured."""
_STILL = 4 / 255
"""Largest change of a colour in still parts of a video, caused by the noise of encoders."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """Settings of a video of features.

    Attributes:
        size: shorter side in pixels to which frames are resized; ``None`` for no resizing.
        beside: show the frame itself to the left of its features.
        head: a head whose classes are shown instead of the features' principal components; ``None``
            for the components.
        sample: number of frames, spread over the video, to which the basis of colours is fitted.
    """

    size: int | None = None
    beside: bool = True
    head: SavedHead | None = None
    sample: int = 16

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            TypeError: ``head`` is not a :class:`upfeat.heads.SavedHead`.
            ValueError: a setting is out of range.
        """
        whole("size", self.size, optional=True)
        whole("sample", self.sample)
        flag("beside", self.beside)
        if self.head is not None:
            instance(
                "head", self.head, SavedHead, "give a head, as upfeat.heads.load_head reads it"
            )
        if self.head is not None and self.head.kind != "classes":
            raise ValueError(
                f"head: says {self.head.kind}, not classes; a video shows the classes of a head"
            )


@dataclass(frozen=True)
class VideoReport:
    """Stability of features over time, measured in still parts of the video.

    A pixel is still from one frame to the next if no colour within a cell's width changes.

    Attributes:
        frames: number of frames that were written.
        size: (height, width) of a frame's features, in pixels.
        still: fraction of pixels that are still.
        image: mean change of the image's colours in still pixels, in levels of 255.
        drift_coarse: root mean square change of the backbone's features in still cells, relative to
            the features' standard deviation over the video.
        drift: root mean square change of the upsampled features in still pixels, relative to the
            standard deviation of the backbone's features over the video.
        flicker: mean change of the displayed colours in still pixels, in levels of 255; with a
            head, the fraction of still pixels whose class changes.
        damage: reason for which the video could not be read to its end; ``None`` if it was.

    If no pixel is still, ``image``, ``drift_coarse``, ``drift`` and ``flicker`` are ``None``.
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
    """Linear map of features, with colours for its outputs and a measure of their changes."""

    weight: Tensor
    bias: Tensor

    def colours(self, maps: Tensor) -> Tensor: ...

    def changes(self, before: Tensor, now: Tensor) -> Tensor: ...


class _Components:
    """Painter of three principal components as red, green and blue."""

    def __init__(self, basis: PCABasis) -> None:
        self._basis = basis
        self.weight = basis.basis.T.contiguous()
        self.bias = -self.weight @ basis.mean

    def colours(self, maps: Tensor) -> Tensor:
        return self._basis.colours(maps)

    def changes(self, before: Tensor, now: Tensor) -> Tensor:
        return 255 * (now - before).abs().mean(0)


class _Classes:
    """Painter of the most likely class of a head, with one colour for each class."""

    def __init__(self, head: SavedHead) -> None:
        self.weight, self.bias = head.weight, head.bias
        self._palette = class_colours(len(head.names), head.names)

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
    """Write a video of the features of a video's frames.

    All frames are shown in one basis of colours, which is first fitted to a sample of them. Frames
    are then processed one by one: memory does not grow with the video's length.

    Args:
        model: backbone and upsampler.
        source: path of the video.
        output: path of the result, ``.mp4``, ``.mov``, ``.mkv`` or ``.webm``; it has no sound.
        settings: content of the result; ``None`` for the defaults.
        overwrite: also replace a file that upfeat did not write.
        on_frame: function that is called after each frame; ``None`` for none.

    Returns:
        Measurements of the stability of features and colours.

    Raises:
        FileNotFoundError: the video, or the folder of ``output``, does not exist.
        TypeError: an argument has another type.
        ValueError: PyAV is not installed; ``source`` is not a video; ``output`` is the input, or a
            file that may not be replaced; or memory is too small for the frames.
    """
    settings = VideoSettings() if settings is None else settings
    instance("model", model, FeatUp, "give a model, as upfeat.load() makes one")
    instance("settings", settings, VideoSettings, "give VideoSettings(size=…, …)")
    check_callback("on_frame", on_frame)
    overwrite = flag("overwrite", overwrite)
    source, output = path_of("source", source), path_of("output", output)
    if output.suffix.lower() not in WRITTEN_SUFFIXES:
        raise ValueError(f"{output}: must end in one of {', '.join(WRITTEN_SUFFIXES)}")
    prepare_output(output, Inputs([source]), VIDEO, overwrite=overwrite)
    total, rate = count_frames(source), frame_rate(source)
    with torch.inference_mode():
        sample, spread, damage = _sample(model, source, settings, total)
        painter = (
            _Components(PCABasis(sample)) if settings.head is None else _Classes(settings.head)
        )
        stability = _Stability(painter, spread, model.backbone.stride)
        with replacing(output) as temporary, VideoWriter(temporary, rate) as writer:
            for number, frame in enumerate(_readable(source), start=1):
                shown = stability.add(model, frame, settings)
                writer.add(shown, frame.time, frame.aspect)
                if on_frame is not None:
                    on_frame(number, max(total, number))
    return stability.report(damage)


def write_report(path: str | Path, report: VideoReport) -> None:
    """Write a report as a JSON file."""
    content = {"format": f"{VIDEO}-report", **asdict(report)}
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _readable(source: Path) -> Iterator[Frame]:
    """Yield the frames of a video, up to the damage if the file is damaged."""
    with suppress(DamagedVideo):
        yield from read_frames(source)


def _sample(
    model: FeatUp, source: Path, settings: VideoSettings, total: int
) -> tuple[Tensor, float, str | None]:
    """Sample coarse features from frames spread over a video.

    Returns:
        Features of n cells, (C, n, 1); their standard deviation (root of the summed variances of
        all channels); and the reason why the video cannot be read to its end, or ``None``.

    Raises:
        DamagedVideo: no frame can be read before the damage.
        ValueError: memory is too small for the frames.
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


class _Stability:
    """Measure changes between consecutive frames in still pixels; see :class:`VideoReport`."""

    def __init__(self, painter: _Painter, spread: float, stride: int) -> None:
        """Start without frames.

        Args:
            painter: painter of the features.
            spread: standard deviation of the features over the video: root of the summed variances
                of all channels.
            stride: pixels per cell.
        """
        self._painter, self._spread, self._stride = painter, spread or 1.0, stride
        channels = painter.weight.shape[1]
        generator = torch.Generator().manual_seed(0)
        # Scaled so that projections preserve the expectation of squared lengths.
        self._directions = torch.randn(_DIRECTIONS, channels, generator=generator, device="cpu")
        self._directions /= _DIRECTIONS**0.5
        self._before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._frames, self._compared, self._size = 0, 0, (0, 0)

    def add(self, model: FeatUp, frame: Frame, settings: VideoSettings) -> np.ndarray:
        """Compute a frame's features and compare them with the frame before.

        Returns:
            Picture of the features, (H, W, 3), uint8; twice as wide if the frame is beside it.
        """
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
        """Add the changes between two frames to the sums."""
        change = (now[0] - before[0]).abs().amax(0, keepdim=True)
        # Still pixels have no change within a cell's width, since features depend on surroundings.
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
        """Report the measurements of all frames so far."""
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
