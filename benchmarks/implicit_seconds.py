"""Time of a fit, in seconds, for several sizes of the image.

    python benchmarks/implicit_seconds.py examples/photos/cat.jpg --threads 2

The photograph is cropped to a square. Results go to benchmarks/implicit_seconds.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

import upfeat
from upfeat.images import read_image

TARGET = Path(__file__).with_name("implicit_seconds.json")
REPEATS = {224: 3, 448: 1}


def main() -> None:
    """Time fits of all sizes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = upfeat.load_backbone(options.backbone).eval().requires_grad_(False)
    pixels = read_image(options.photo)
    side = min(pixels.shape[1:])
    square = pixels[:, :side, :side]
    upfeat.fit_implicit(square, backbone, size=64, views=4, zoomed_views=2)  # a warm-up
    rows = []
    for size, repeats in REPEATS.items():
        seconds: list[float] = []
        processor: list[float] = []
        facts: dict[str, object] = {}
        for _ in range(repeats):
            start, cpu = time.perf_counter(), time.process_time()
            fitted = upfeat.fit_implicit(square, backbone, size=size)
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - cpu)
            facts = {"shape": list(fitted.shape), "views": fitted.facts["views"]}
        rows.append(
            {
                "size": size,
                **facts,
                "seconds": round(median(seconds), 2),
                "processor_seconds": round(median(processor), 2),
            }
        )
        print(rows[-1], flush=True)
    result = {"backbone": options.backbone, "threads": options.threads, "rows": rows}
    TARGET.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
