"""Draw labelled images of thin and flat things, in the layout of ``upfeat eval``.

    python benchmarks/drawn_sets.py out/

Writes out/vessels, out/membranes and out/crops, each with 24 images to train and 16 to test, of
288 pixels. They show whether choices that were made on photographs hold for other images: vessels
are dark branching lines on a smooth ground, membranes are grey borders of cells with noise, and
crops are fields of striped textures. Labels follow from colours more closely than in photographs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

SIDE = 288
COUNTS = {"train": 24, "test": 16}
Drawn = tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]
"""An image (height, width, 3) from 0 to 1, and the class of each pixel (height, width)."""


def _grid() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return rows, columns


def _clouds(random: np.random.Generator, size: float) -> npt.NDArray[np.float64]:
    """Smooth noise of variance about 1, of structures of ``size`` pixels."""
    noise = gaussian_filter(random.normal(size=(SIDE, SIDE)), size)
    return noise / noise.std()


def vessels(random: np.random.Generator) -> Drawn:
    """Branching lines, 1 to 5 pixels wide, from a bright disc."""
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    draw = ImageDraw.Draw(canvas)

    def grow(x: float, y: float, angle: float, width: float, steps: int) -> None:
        while width > 1 and steps > 0:
            angle += random.normal(0, 0.15)
            ahead = x + 10 * np.cos(angle), y + 10 * np.sin(angle)
            draw.line((x, y, *ahead), fill=255, width=round(width))
            x, y = ahead
            width, steps = 0.985 * width, steps - 1
            if random.random() < 0.12:
                turn = random.choice([-1, 1]) * random.uniform(0.4, 1.0)
                grow(x, y, angle + turn, 0.7 * width, steps)

    disc = random.uniform(0.2, 0.8, 2) * 2 * SIDE
    for _ in range(5):
        grow(*disc, random.uniform(0, 2 * np.pi), random.uniform(7, 11), 70)
    lines = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX)) > 110
    rows, columns = _grid()
    ground = [
        level + spread * _clouds(random, size)
        for level, spread, size in ((0.75, 0.06, 40), (0.38, 0.04, 30), (0.18, 0.02, 30))
    ]
    image = np.stack(ground, axis=-1)
    distance = (columns - disc[0] / 2) ** 2 + (rows - disc[1] / 2) ** 2
    image += np.exp(-distance / (0.063 * SIDE) ** 2)[..., None] * [0.2, 0.3, 0.25]
    image *= 1 - gaussian_filter(lines.astype(float), 0.7)[..., None] * [0.25, 0.45, 0.4]
    radius = ((rows / SIDE - 0.5) ** 2 + (columns / SIDE - 0.5) ** 2)[..., None]
    image *= 0.6 + 0.4 * np.clip(1.2 - 2.2 * radius, 0, 1)
    return image + random.normal(0, 0.02, image.shape), lines.astype(np.uint8)


def membranes(random: np.random.Generator) -> Drawn:
    """Dark borders of grey cells, with noise and dark spots that are no borders."""
    centres = random.uniform(-0.1, 1.1, (int(random.uniform(60, 110)), 2)) * SIDE
    rows, columns = _grid()
    bent = columns + 6 * _clouds(random, 8), rows + 6 * _clouds(random, 8)
    two, _ = cKDTree(centres).query(np.stack(bent, axis=-1).reshape(-1, 2), k=2)
    border = (two[:, 1] - two[:, 0]).reshape(SIDE, SIDE)
    labels = border < 3.5
    grey = 0.62 + 0.08 * _clouds(random, 2) - 0.35 * np.exp(-((border / 3) ** 2))
    for _ in range(25):
        x, y, radius = *random.uniform(0, SIDE, 2), random.uniform(3, 7)
        spot = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        grey[spot & ~labels] -= 0.2
    grey = gaussian_filter(grey, 0.8) + random.normal(0, 0.05, grey.shape)
    return np.repeat(grey[..., None], 3, axis=2), labels.astype(np.uint8)


def crops(random: np.random.Generator) -> Drawn:
    """Fields of four textures, each with stripes of its own width in any direction."""
    colours = np.array([[0.3, 0.45, 0.2], [0.6, 0.55, 0.3], [0.45, 0.35, 0.25], [0.38, 0.5, 0.3]])
    stripes, noises = (0.9, 0.5, 1.6, 0.7), (0.03, 0.05, 0.02, 0.06)
    centres = random.uniform(0, SIDE, (14, 2))
    rows, columns = _grid()
    _, field = cKDTree(centres).query(np.stack([columns, rows], axis=-1).reshape(-1, 2))
    field, kinds = field.reshape(SIDE, SIDE), random.integers(0, 4, len(centres))
    image = np.zeros((SIDE, SIDE, 3))
    for index, kind in enumerate(kinds):
        angle = random.uniform(0, np.pi)
        phase = (columns * np.cos(angle) + rows * np.sin(angle)) * stripes[kind]
        texture = 0.06 * np.sin(phase) + random.normal(0, noises[kind], (SIDE, SIDE))
        inside = field == index
        colour = colours[kind] + random.normal(0, 0.03, 3)
        image[inside] = colour + texture[inside][:, None]
    return gaussian_filter(image, (0.6, 0.6, 0)), kinds[field].astype(np.uint8)


SETS: dict[str, tuple[Callable[[np.random.Generator], Drawn], list[str]]] = {
    "vessels": (vessels, ["background", "vessel"]),
    "membranes": (membranes, ["cell", "membrane"]),
    "crops": (crops, ["wheat", "maize", "soil", "meadow"]),
}


def write(name: str, folder: Path) -> None:
    """Write one set; the same images every time."""
    draw, classes = SETS[name]
    for part, count in COUNTS.items():
        for kind in ("images", "labels"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            seed = index + (1000 if part == "test" else 0)
            image, labels = draw(np.random.default_rng(seed))
            pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / "images" / f"{index:03d}.png")
            Image.fromarray(labels).save(folder / part / "labels" / f"{index:03d}.png")
    content = {"classes": classes, "ignore_index": 255}
    (folder / "classes.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the sets")
    output = parser.parse_args().output
    for name in SETS:
        write(name, output / name)
        print(output / name)


if __name__ == "__main__":
    main()
