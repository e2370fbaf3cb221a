"""Stability of a video's features where the image is static, upsampled and coarse.

    python benchmarks/video.py --json video.json

The clip has 40 frames, in which a small photograph slides over a static larger photograph.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

import upfeat
from upfeat.frames import VideoWriter
from upfeat.video import VideoSettings, render_video

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
FRAMES, SIZE = 40, (320, 224)


def write_clip(path: Path) -> None:
    """Write the clip to a video file."""
    ground, thing = (Image.open(PHOTOS / name) for name in ("coffee.jpg", "cat.jpg"))
    ground = ground.convert("RGB").resize(SIZE)
    thing = thing.convert("RGB").resize((SIZE[0] // 4, SIZE[1] // 3))
    with VideoWriter(path, Fraction(25)) as writer:
        for number in range(FRAMES):
            frame = ground.copy()
            frame.paste(thing, (4 + 5 * number, SIZE[1] // 2))
            writer.add(np.asarray(frame), None)


def main() -> None:
    """Render the clip with both upsamplers, and write the stability of each."""
    parser = argparse.ArgumentParser(description="Measure the stability of a video's features.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file of the results")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip)
        for upsampler in ("detail", "bilinear"):
            model = upfeat.load(upsampler=upsampler)
            out = Path(folder) / f"{upsampler}.mp4"
            report = render_video(model, clip, out, VideoSettings())
            names = ("frames", "still", "image", "drift", "drift_coarse", "flicker")
            results[upsampler] = {name: round(getattr(report, name), 4) for name in names}
    text = json.dumps({"size": SIZE, "results": results}, indent=1) + "\n"
    print(text)
    if options.json is not None:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
