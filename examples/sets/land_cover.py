"""Land cover: a labelled scene, a linear head on its features, and a map of the scene next to it.

    python land_cover.py [folder]

Two scenes are generated, 60 cm a pixel, with four kinds of ground in curved regions. The first has
a few labelled polygons; of the second a map is made, with the same coordinate system to the pixel.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

import upfeat
from upfeat.heads import save_head
from upfeat.labelled import train_on_raster
from upfeat.raster import HeadOutput, Scene, make_plan, parse_memory, upsample_raster

CLASSES = ("water", "forest", "field", "town")
PIXEL = 0.6
EAST, NORTH = 463_000.0, 5_250_000.0


def ground(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Class of every pixel: curved regions that go on from one scene to the next."""
    along = np.sin(columns / 90) + np.cos(rows / 70) + np.sin((rows + columns) / 130)
    return np.digitize(along, (-1.0, 0.1, 1.0))


def picture(label: np.ndarray, seed: int) -> np.ndarray:
    """(3, H, W) uint8: each kind of ground in colours and a texture of its own."""
    rows, columns = np.indices(label.shape)
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 1, label.shape)
    colours = np.array([(40, 70, 110), (40, 80, 40), (150, 140, 70), (150, 145, 140)])
    texture = np.choose(
        label,
        (
            2 * noise,
            14 * np.repeat(np.repeat(noise[::3, ::3], 3, 0), 3, 1)[: len(rows), : rows.shape[1]],
            12 * np.sin((rows + 2 * columns) / 2) + 3 * noise,
            np.where((rows % 14 < 9) & (columns % 12 < 8), 35, -35) + 5 * noise,
        ),
    )
    return (colours[label] + texture[..., None]).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def write_scene(path: Path, size: tuple[int, int], left: int, seed: int) -> np.ndarray:
    """Write a GeoTIFF whose first column is that many pixels east; return its classes."""
    rows, columns = np.indices(size)
    label = ground(rows, columns + left)
    transform = from_origin(EAST + PIXEL * left, NORTH, PIXEL, PIXEL)
    shape = {"height": size[0], "width": size[1], "count": 3, "dtype": "uint8"}
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:32632", transform=transform, **shape
    ) as file:
        file.write(picture(label, seed))
    return label


def write_labels(path: Path, label: np.ndarray, count: int = 60) -> None:
    """Label squares of 12 pixels, wherever one lies in a single class."""
    generator = np.random.default_rng(0)
    features = []
    while len(features) < count:
        top, left = (int(generator.integers(0, side - 12)) for side in label.shape)
        inside = label[top : top + 12, left : left + 12]
        if inside.min() < inside.max():
            continue
        west, north = EAST + PIXEL * left, NORTH - PIXEL * top
        east, south = west + 12 * PIXEL, north - 12 * PIXEL
        ring = [(west, north), (east, north), (east, south), (west, south), (west, north)]
        properties = {"class": CLASSES[inside[0, 0]]}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def main(folder: Path | None = None) -> dict[str, float]:
    """Train on the west, map the east; return how much of the map is right."""
    folder = Path(tempfile.mkdtemp()) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    west, east = folder / "west.tif", folder / "east.tif"
    write_labels(folder / "labels.geojson", write_scene(west, (288, 640), 0, seed=0))
    truth = write_scene(east, (208, 256), 640, seed=1)

    model, memory = upfeat.load(), parse_memory("2GB")
    with Scene(west) as scene:
        head, _ = train_on_raster(
            model, scene, folder / "labels.geojson", list(CLASSES), max_memory=memory, folds=2
        )
    save_head(folder / "head.safetensors", head)  # for upfeat raster --head
    with Scene(east) as scene:
        facts = {"head": "head.safetensors", "backbone": head.backbone}
        what = HeadOutput(head.weight, head.bias, head.names, facts, form="classes")
        plan = make_plan(scene.size, model, what, max_memory=memory)
        upsample_raster(scene, folder / "landcover.tif", model, what, plan)

    with rasterio.open(folder / "landcover.tif") as found, rasterio.open(east) as source:
        same_place = found.transform == source.transform and found.crs == source.crs
        classes = found.read(1)
    names = [head.names.index(name) for name in CLASSES]
    right = float((classes == np.array(names)[truth]).mean())
    return {"right": right, "placed": same_place}


if __name__ == "__main__":
    for name, value in main(*map(Path, sys.argv[1:])).items():
        print(f"{name}: {value:.3f}")
