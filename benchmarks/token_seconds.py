"""Processor time of every upsampler on the tokens of a trained transformer, on one thread.

    python benchmarks/token_seconds.py DATA hf:FOLDER@8

The upsamplers take turns on one image of 224×224 pixels; medians are written to
benchmarks/token_seconds.json. Upsamplers that start from coarse features are timed without the
backbone, but with the guide; several passes are timed with all passes of the backbone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from token_probes import GUIDED, PASSES, RIVALS, SHIPPED, TRAINED

import upfeat
from upfeat.guided import Guided

SIDE, ROUNDS = 224, 5
TARGET = Path(__file__).with_name("token_seconds.json")


def runs(backbone: str, rivals: list[str]) -> dict[str, Callable[[], object]]:
    """Return the functions to time, by name."""
    network = upfeat.load_backbone(backbone).requires_grad_(False)
    image = torch.randn(1, 3, SIDE, SIDE)
    image = torch.nn.functional.interpolate(image[:, :, :28, :28], (SIDE, SIDE), mode="bicubic")
    features = network(image)
    found: dict[str, Callable[[], object]] = {"backbone": lambda: network(image)}
    guided, up = Guided(network).eval(), upfeat.load_upsampler(TRAINED[-1])
    for name in (*SHIPPED, *TRAINED, GUIDED, *rivals):
        if name == GUIDED:
            found[name] = lambda: up(features, image, hidden=guided.hidden(image))
            continue
        upsampler = upfeat.load_upsampler(name)
        found[Path(name).name] = lambda one=upsampler: one(features, image)
    for name in PASSES:
        upsampler, passes, *early = name.split("@")
        chosen = {"upsampler": upsampler, "passes": int(passes), "early": bool(early)}
        several = upfeat.load(network, **chosen)
        found[name] = lambda one=several: one(image)
    return found


def main() -> None:
    """Time all functions, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("backbone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        timed = runs(
            options.backbone, [str(options.data / "checkpoints" / name) for name in RIVALS]
        )
        for turn in range(ROUNDS + 1):
            for name, run in timed.items():
                start = time.process_time()
                run()
                if turn:  # the first turn fills caches, and does not count
                    times.setdefault(name, []).append(time.process_time() - start)
    seconds = {name: round(statistics.median(values), 4) for name, values in times.items()}
    content = {"side": SIDE, "threads": 1, "torch": torch.__version__, "seconds": seconds}
    TARGET.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
