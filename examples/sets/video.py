"""A video of features: a photograph slides over another one, and what stands still stays still.

python video.py [OUT.mp4]
"""

from __future__ import annotations

import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

import upfeat
from upfeat.frames import VideoWriter
from upfeat.video import VideoReport, VideoSettings, render_video

PHOTOS = Path(__file__).parents[1] / "photos"


def write_clip(path: Path, frames: int = 6, size: tuple[int, int] = (144, 96)) -> None:
    """Write frames in which only a part moves."""
    ground, thing = (Image.open(PHOTOS / name) for name in ("coffee.jpg", "cat.jpg"))
    ground = ground.convert("RGB").resize(size)
    thing = thing.convert("RGB").resize((size[0] // 4, size[1] // 3))
    with VideoWriter(path, Fraction(12)) as writer:
        for number in range(frames):
            frame = ground.copy()
            frame.paste(thing, (4 + 6 * number, size[1] // 2))
            writer.add(np.asarray(frame), None)


def main(out: Path | None = None, upsampler: str = "detail") -> VideoReport:
    """Render the clip; return how stable it is."""
    folder = Path(tempfile.mkdtemp())
    write_clip(folder / "clip.mp4")
    model = upfeat.load(upsampler=upsampler)
    return render_video(
        model, folder / "clip.mp4", out or folder / "out.mp4", VideoSettings(), overwrite=True
    )


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
