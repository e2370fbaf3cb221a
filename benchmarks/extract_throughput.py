"""Measure ``upfeat.batch.extract`` against the backbone alone, and explicit maps against the disk.

    python benchmarks/extract_throughput.py [OUT.json] [--images 128] [--rounds 5] [--size 224]

Each round times the backbone on tensors in memory, in batches of several sizes with all threads,
and with one image on each thread; and the whole of extract on JPEG files of the same size. Results
are medians of wall-clock rates and of processor time per image. The latter is more reliable on a
machine with other load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageEnhance

import upfeat
from upfeat.batch import Extraction, extract

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
SIDE_BY_SIDE = "backbone, an image a thread"
BATCHES = (1, 2, 4, 8, 16)


def write_photos(folder: Path, count: int, size: int) -> int:
    """Write JPEG files, crops of the bundled photographs; return their bytes."""
    folder.mkdir()
    sources = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    for number in range(count):
        source = sources[number % len(sources)]
        image = source.resize((size + 2 * number, size + 2 * number)).crop((0, 0, size, size))
        image = ImageEnhance.Brightness(image).enhance(0.7 + 0.6 * number / count)
        image.save(folder / f"{number:05d}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def timed(work: Callable[[], object], count: int) -> dict[str, float]:
    """Return images per second by the clock, and milliseconds of processor time per image."""
    wall, used = time.perf_counter(), time.process_time()
    work()
    wall, used = time.perf_counter() - wall, time.process_time() - used
    return {"images_per_second": count / wall, "cpu_ms_per_image": 1000 * used / count}


def alone(x: torch.Tensor, backbone: torch.nn.Module, batch: int) -> None:
    """Compute features of all images, batch by batch."""
    with torch.inference_mode():
        for start in range(0, len(x), batch):
            backbone(x[start : start + batch])


def an_image_a_thread(x: torch.Tensor, backbone: torch.nn.Module) -> None:
    """Compute features of all images, one on each thread at a time."""
    threads = torch.get_num_threads()

    def one(index: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            backbone(x[index : index + 1])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(x))))
    torch.set_num_threads(threads)


def write_plainly(folder: Path, count: int, size: int) -> None:
    """Write ``count`` files of ``size`` random bytes, and wait for the disk."""
    folder.mkdir()
    content = os.urandom(size)
    for number in range(count):
        with (folder / f"{number}.bin").open("wb") as file:
            file.write(content)
    os.sync()


def main() -> None:
    """Run the benchmark; print its results, and write them to a file if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--folder", type=Path, help="parent of the temporary work folder")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="extract-", dir=options.folder))
    count, photos = options.images, root / "photos"
    encoded = write_photos(photos, count, options.size)
    model = upfeat.load(upsampler="detail")
    x = torch.cat([model.preprocess(path) for path in sorted(photos.iterdir())])

    runs: dict[str, list[dict[str, float]]] = {}
    sizes: dict[str, int] = {}

    def add(name: str, work: Callable[[], object], images: int) -> None:
        runs.setdefault(name, []).append(timed(work, images))

    def stored(kind: str, sources: list[str], images: int, after: Callable[[], object]) -> None:
        folder = root / kind
        shutil.rmtree(folder, ignore_errors=True)
        add(kind, lambda: (extract(model, sources, folder, Extraction(kind)), after()), images)
        sizes[kind] = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // images

    part = x[: max(count // 2, 16)]
    works: list[Callable[[], None]] = [
        partial(
            add, f"backbone, batch {batch}", partial(alone, part, model.backbone, batch), len(part)
        )
        for batch in BATCHES
    ]
    works.append(
        partial(add, SIDE_BY_SIDE, partial(an_image_a_thread, part, model.backbone), len(part))
    )
    works.append(partial(stored, "lazy", [str(photos)], count, bool))
    # In random order each time, so that other load on the machine does not favour one of them.
    order = random.Random(0)
    for _ in range(options.rounds):
        order.shuffle(works)
        for work in works:
            work()
    # Measured last, because writing to the disk slows down the other measurements.
    for _ in range(min(options.rounds, 3)):
        stored("features", [str(photos)], count, os.sync)
        shutil.rmtree(root / "features")
        os.sync()  # so that the deletion does not burden the next measurement
        writing = partial(write_plainly, root / "plain", count, sizes["features"])
        add("plain writing of as many bytes", writing, count)
        shutil.rmtree(root / "plain")
        os.sync()
    shutil.rmtree(root)
    result = summary(runs, sizes, encoded // count)
    result |= {"size": options.size, "images": count, "rounds": options.rounds}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def summary(
    runs: dict[str, list[dict[str, float]]], sizes: dict[str, int], encoded: int
) -> dict[str, object]:
    """Compute medians of all measurements, and ratios of medians."""
    medians = {
        name: {key: round(statistics.median(run[key] for run in taken), 2) for key in taken[0]}
        for name, taken in runs.items()
    }
    alone = [name for name in medians if name.startswith("backbone, batch")]
    best = max(alone, key=lambda name: medians[name]["images_per_second"])
    thrifty = min(alone, key=lambda name: medians[name]["cpu_ms_per_image"])
    lazy = medians["lazy"]
    written, plain = medians["features"], medians["plain writing of as many bytes"]
    return {
        "rates": medians,
        "best_batch": best,
        "lazy_share_of_backbone_by_clock": round(
            lazy["images_per_second"] / medians[best]["images_per_second"], 3
        ),
        "lazy_share_of_backbone_by_processor_time": round(
            medians[thrifty]["cpu_ms_per_image"] / lazy["cpu_ms_per_image"], 3
        ),
        "lazy_share_of_an_image_a_thread": round(
            lazy["images_per_second"] / medians[SIDE_BY_SIDE]["images_per_second"], 3
        ),
        "lazy_share_of_an_image_a_thread_by_processor_time": round(
            medians[SIDE_BY_SIDE]["cpu_ms_per_image"] / lazy["cpu_ms_per_image"], 3
        ),
        "bytes_per_image": {"jpeg": encoded, **sizes},
        "explicit_megabytes_per_second": round(
            written["images_per_second"] * sizes["features"] / 1e6, 1
        ),
        "disk_megabytes_per_second": round(plain["images_per_second"] * sizes["features"] / 1e6, 1),
    }


if __name__ == "__main__":
    main()
