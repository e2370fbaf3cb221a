"""Frames of videos, read and written one by one with PyAV (``pip install 'upfeat[video]'``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from upfeat._version import __version__
from upfeat.marks import VIDEO

if TYPE_CHECKING:
    from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
WRITTEN_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")

# Ticks in a second: MPEG-4 allows 65,535 at most, and most common frame rates divide this.
_CLOCK = 60000
_ENCODERS = {".webm": ("libvpx-vp9",)}
_USUAL = ("libx264", "mpeg4")
_OPTIONS = {"libx264": {"crf": "18", "preset": "fast"}, "libvpx-vp9": {"crf": "24", "b": "0"}}


class Frame(NamedTuple):
    """One frame."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), upright."""
    time: Fraction | None
    """Seconds from the beginning; ``None`` where the file does not say."""


class DamagedVideo(ValueError):
    """A video that cannot be read, or not to its end."""


def import_av(path: Path) -> Any:
    """The package that reads and writes videos.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("av")
    except ImportError:
        raise ValueError(
            f"{path}: videos need the package av: pip install 'upfeat[video]'"
        ) from None


def count_frames(path: Path) -> int:
    """Count the frames of a video's first stream undecoded; approximately, if it is damaged.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedVideo: it is no video.
    """
    av = import_av(path)
    count = 0
    with _opened(av, path) as container:
        try:
            for packet in container.demux(container.streams.video[0]):
                count += packet.size > 0
        except av.FFmpegError:
            pass  # read_frames reports the damage
    return count


def frame_rate(path: Path) -> Fraction:
    """Frames per second, on average; 25 where the file does not say."""
    with _opened(import_av(path), path) as container:
        stream = container.streams.video[0]
        return stream.average_rate or stream.guessed_rate or Fraction(25)


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode the frames of a video's first stream.

    Frames are turned upright as the file says, and all have the size of the first.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedVideo: it is no video, or damaged; raised after the frames before the damage.
        ValueError: PyAV is not installed.
    """
    av = import_av(path)
    with _opened(av, path) as container:
        size, number = None, 0
        try:
            for frame in container.decode(video=0):
                number += 1
                size = size or (frame.width, frame.height)
                shown = frame.reformat(width=size[0], height=size[1], format="rgb24")
                pixels = shown.to_ndarray()
                turns = round(getattr(frame, "rotation", 0) / 90)
                clock = frame.time_base or 0
                time = None if frame.pts is None or not clock else frame.pts * clock
                yield Frame(np.ascontiguousarray(np.rot90(pixels, turns)), time)
        except av.FFmpegError as error:
            where = f"after frame {number}" if number else "from its first frame on"
            raise DamagedVideo(f"{path}: damaged {where} ({_reason(error)})") from None
        if not number:
            raise DamagedVideo(f"{path}: holds no frame")


def _opened(av: Any, path: Path) -> Any:
    if not path.is_file():
        what = "is a folder, not a video" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        # Absolute: FFmpeg takes what stands before a colon for the name of a protocol.
        container = av.open(str(path.absolute()))
    except av.FFmpegError as error:
        raise DamagedVideo(f"{path}: not a video, or a truncated one ({_reason(error)})") from None
    if not container.streams.video:
        container.close()
        raise DamagedVideo(f"{path}: has no video stream")
    return container


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class VideoWriter:
    """Encodes frames into a file that says it is ours; a context manager.

    Sides of an odd length get one more row or column, a copy of the last: encoders take even ones.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        """Open the file.

        Args:
            path: with one of :data:`WRITTEN_SUFFIXES`.
            rate: frames per second, for those that come without a time.

        Raises:
            ValueError: PyAV is not installed, or has no encoder for such files.
        """
        self._av = import_av(path)
        self._rate, self._last = Fraction(rate), -1
        names = _ENCODERS.get(path.suffix.lower(), _USUAL)
        name = next((one for one in names if one in self._av.codecs_available), None)
        if name is None:
            raise ValueError(f"{path}: this PyAV has no encoder for {path.suffix}; give .mp4")
        self._codec = name
        self._container = self._av.open(str(path.absolute()), "w")
        self._container.metadata["comment"] = f"{VIDEO} {__version__}"
        self._stream: Any = None

    def add(self, pixels: NDArray[np.uint8], time: Fraction | None) -> None:
        """Encode a frame.

        Args:
            pixels: (H, W, 3), all of one size.
            time: seconds. If it is ``None`` or not later than the last frame's, the frame comes
                one interval of the video's rate after that one, or first at 0.
        """
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._open_stream(pixels.shape[1], pixels.shape[0])
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        tick = -1 if time is None else round(time * _CLOCK)
        if tick <= self._last:
            tick = 0 if self._last < 0 else self._last + max(round(_CLOCK / self._rate), 1)
        self._last = frame.pts = tick
        frame.time_base = Fraction(1, _CLOCK)
        self._container.mux(self._stream.encode(frame))

    def _open_stream(self, width: int, height: int) -> Any:
        options = dict(_OPTIONS.get(self._codec, {}))
        stream = self._container.add_stream(self._codec, rate=self._rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if self._codec == "mpeg4":
            stream.bit_rate = 4 * width * height
        stream.codec_context.time_base = Fraction(1, _CLOCK)
        return stream

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what the encoder still holds, and the end of the file."""
        try:
            if error is None and self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
