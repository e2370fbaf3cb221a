"""Generated scenes: coloured shapes with exact labels."""

import json

import numpy as np
from PIL import Image

COLOURS = np.array([[40, 40, 40], [220, 60, 40], [50, 90, 220]], np.uint8)


def scene(seed, size=(48, 64)):
    """A rectangle and a disc on a ground: (H, W) labels."""
    random = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    top, left = random.integers(2, size[0] // 2), random.integers(2, size[1] // 2)
    label[top : top + 18, left : left + 22] = 1
    rows, columns = np.ogrid[: size[0], : size[1]]
    y, x = random.integers(10, size[0] - 10), random.integers(10, size[1] - 10)
    label[(rows - y) ** 2 + (columns - x) ** 2 < 80] = 2
    return label


def write_scene(folder, name, seed):
    label = scene(seed)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed + 1000).integers(0, 12, (*label.shape, 3)).astype(np.uint8)
    Image.fromarray(COLOURS[label] + noise).save(folder / "images" / f"{name}.png")
    Image.fromarray(label).save(folder / "labels" / f"{name}.png")


def write_dataset(root):
    """Six scenes to train on, three to test."""
    for split, seeds in (("train", range(6)), ("test", range(20, 23))):
        for seed in seeds:
            write_scene(root / split, f"s{seed}", seed)
    classes = {"classes": ["ground", "box", "disc"], "ignore_index": 255}
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def write_video(images, labels, *, objects=1, frames=6, size=(48, 64), seed=0):
    """Coloured discs that move over a ground of noise; every frame has its masks."""
    random = np.random.default_rng(seed)
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    rows, columns = np.ogrid[: size[0], : size[1]]
    ground = random.integers(0, 90, (*size, 3))
    for frame in range(frames):
        label = np.zeros(size, np.uint8)
        for number in range(1, objects + 1):
            y, x = 14 + 16 * (number - 1) + frame, 12 + 3 * frame + 6 * number
            label[(rows - y) ** 2 + (columns - x) ** 2 < 64] = number
        picture = np.where(label[..., None] > 0, COLOURS[label], ground)
        Image.fromarray(picture.astype(np.uint8)).save(images / f"{frame:05}.png")
        masks = Image.fromarray(label)
        masks.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        masks.save(labels / f"{frame:05}.png")
