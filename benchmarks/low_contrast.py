"""Copy a labelled set of images as if they were seen through fog or in the dark.

    python benchmarks/low_contrast.py data/clothing out/fog --contrast 0.3 --level 0.7
    python benchmarks/low_contrast.py data/clothing out/dark --contrast 0.05 --level 0.1 --noise 0.5

Values are scaled about a level by the contrast, Gaussian noise is added, and the result is rounded
to 8 bits, as a camera would. The layout is that of ``upfeat eval``: {train,test}/{images,labels}.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Read the arguments and copy the set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="labelled set")
    parser.add_argument("output", type=Path, help="folder of the copy")
    parser.add_argument("--contrast", type=float, default=0.3, help="factor of all differences")
    parser.add_argument("--level", type=float, default=0.7, help="value that stays, from 0 to 1")
    parser.add_argument("--noise", type=float, default=0.0, help="deviation, in steps of 8 bits")
    given = parser.parse_args()
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        images = given.output / part / "images"
        images.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            given.source / part / "labels", images.parent / "labels", dirs_exist_ok=True
        )
        for path in sorted((given.source / part / "images").iterdir()):
            values = np.asarray(Image.open(path).convert("RGB"), dtype=float)
            values = given.contrast * values + 255 * given.level * (1 - given.contrast)
            values += given.noise * random.standard_normal(values.shape)
            seen = values.clip(0, 255).round().astype(np.uint8)
            Image.fromarray(seen).save(images / f"{path.stem}.png")
    for path in given.source.glob("*.json"):
        shutil.copy(path, given.output)


if __name__ == "__main__":
    main()
