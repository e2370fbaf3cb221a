"""Frames of videos, read and written one by one with PyAV (``pip install 'upfeat[video]'``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from upfeat._version import __version__
from upfeat.marks import VIDEO
from upfeat.optional import import_optional

if TYPE_CHECKING:
    from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
WRITTEN_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")

# FFmpeg's readers of files that contain their own frames. Others, such as those of lists (concat),
# of streams (HLS, DASH) and of sessions (SDP), open files and addresses that the file names.
_SELF_CONTAINED = (
    "mov,matroska,avi,asf,flv,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,ogg,mxf,nut,dv,rm,"
    "gif,apng"
)
# Ticks per second: MPEG-4 allows at most 65,535, and most common frame rates divide 60,000.
_CLOCK = 60000
_ENCODERS = {".webm": ("libvpx-vp9",)}
_USUAL = ("libx264", "mpeg4")
# Without B-frames: with them, an MP4 file of varying frame rate gets too short a duration.
_OPTIONS = {
    "libx264": {"crf": "18", "preset": "fast", "bf": "0"},
    "libvpx-vp9": {"crf": "24", "b": "0"},
}
# FFmpeg's numbers for the colours that are written: BT.709, of limited range. Players take large
# videos without such marks for BT.709, and small ones for BT.601.
_BT709, _LIMITED = 1, 1


class Frame(NamedTuple):
    """One decoded frame of a video."""

    pixels: NDArray[np.uint8]
    """RGB pixels, (H, W, 3), upright."""
    time: Fraction | None
    """Time from the file's beginning, in seconds; ``None`` if the file has none for the frame."""
    aspect: Fraction = Fraction(1)
    """Width of a pixel over its height, as the frame is to be shown."""


class DamagedVideo(ValueError):
    """Error for a video that cannot be read to its end."""


def import_av(path: Path) -> Any:
    """Import PyAV, which reads and writes videos.

    Raises:
        ValueError: PyAV is not installed.
    """
    missing = f"{path}: videos need the package av: pip install 'upfeat[video]'"
    return import_optional("av", missing)


def count_frames(path: Path) -> int:
    """Count the frames of a video's first stream without decoding; a damaged one approximately.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedVideo: the file is not a video.
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
    """Average number of frames per second; 25 if the file does not contain it."""
    with _opened(import_av(path), path) as container:
        stream = container.streams.video[0]
        return stream.average_rate or stream.guessed_rate or Fraction(25)


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode the frames of a video's first stream.

    Frames are turned upright, and flipped if they are mirrored, by the file's metadata, and resized
    to the size of the first.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedVideo: the file is not a video, or is damaged; raised after the frames before the
            damage.
        ValueError: PyAV is not installed.
    """
    av = import_av(path)
    with _opened(av, path) as container:
        size, number = None, 0
        aspect = container.streams.video[0].sample_aspect_ratio or Fraction(1)
        begin = Fraction(container.start_time or 0, av.time_base)
        try:
            for frame in container.decode(video=0):
                number += 1
                size = size or (frame.width, frame.height)
                shown = frame.reformat(width=size[0], height=size[1], format="rgb24")
                pixels = shown.to_ndarray()
                mirrored, turns = _placement(frame)
                clock = frame.time_base or 0
                time = None if frame.pts is None or not clock else frame.pts * clock - begin
                pixels = pixels[::-1] if mirrored else pixels
                upright = np.ascontiguousarray(np.rot90(pixels, turns))
                yield Frame(upright, time, 1 / aspect if turns % 2 else aspect)
        except av.FFmpegError as error:
            where = f"after frame {number}" if number else "from its first frame on"
            raise DamagedVideo(f"{path}: damaged {where} ({_reason(error)})") from None
        if not number:
            raise DamagedVideo(f"{path}: holds no frame")


def _placement(frame: Any) -> tuple[bool, int]:
    """Return how to show a frame: whether to flip it top to bottom, and then quarter turns left."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    # The pixel (x, y) is shown at (a·x + c·y, b·x + d·y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    return bool(a * d < b * c), round(-2 * math.atan2(b, a) / math.pi)


def _opened(av: Any, path: Path) -> Any:
    if not path.is_file():
        what = "is a folder, not a video" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        # An absolute path, since FFmpeg reads the text before a colon as the name of a protocol.
        # Titles and comments need not be UTF-8; PyAV 19 accepts others without this argument.
        texts = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        options = {"format_whitelist": _SELF_CONTAINED}
        container = av.open(str(path.absolute()), options=options, **texts)
    except av.FFmpegError as error:
        raise DamagedVideo(f"{path}: not a video, or a truncated one ({_reason(error)})") from None
    if not container.streams.video:
        container.close()
        raise DamagedVideo(f"{path}: has no video stream")
    return container


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class VideoWriter:
    """Context manager that encodes frames into a video file, with upfeat's mark as its comment.

    Encoders need even sides: frames with an odd side get a copy of their last row or column.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        """Open the file.

        Args:
            path: file to write, with one of :data:`WRITTEN_SUFFIXES`.
            rate: frames per second, for frames without a time.

        Raises:
            ValueError: PyAV is not installed, or has no encoder for the file's format.
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

    def add(
        self, pixels: NDArray[np.uint8], time: Fraction | None, aspect: Fraction = Fraction(1)
    ) -> None:
        """Encode a frame.

        Args:
            pixels: (H, W, 3) of RGB, the same size for all frames.
            time: time of the frame in seconds. If it is ``None``, or not later than the last
                frame's, the frame is placed one interval of the video's rate after the last frame;
                the first frame is then placed at 0.
            aspect: width of a pixel over its height; that of the first frame counts.
        """
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._open_stream(pixels.shape[1], pixels.shape[0], aspect)
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED
        )
        tick = -1 if time is None else round(time * _CLOCK)
        if tick <= self._last:
            tick = 0 if self._last < 0 else self._last + max(round(_CLOCK / self._rate), 1)
        self._last = frame.pts = tick
        frame.time_base = Fraction(1, _CLOCK)
        self._container.mux(self._stream.encode(frame))

    def _open_stream(self, width: int, height: int, aspect: Fraction) -> Any:
        options = dict(_OPTIONS.get(self._codec, {}))
        stream = self._container.add_stream(self._codec, rate=self._rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if self._codec == "mpeg4":
            stream.bit_rate = 4 * width * height
        context = stream.codec_context
        context.time_base, context.sample_aspect_ratio = Fraction(1, _CLOCK), aspect
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        return stream

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the frames that the encoder has buffered, and the end of the file."""
        try:
            if error is None and self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
