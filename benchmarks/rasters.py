"""Time and memory of ``upfeat raster --head`` over generated rasters, by their area.

    python benchmarks/rasters.py --sides 2000 20000 --threads 2 --max-memory 4GB --json rasters.json

A generated raster shows fields with borders, textures and noise, in three bands of bytes, stored in
deflated blocks of 512 pixels. The head has five classes. Each raster is processed by a separate
process, whose processor time and largest resident memory the system reports. Progress is printed to
standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

import upfeat
from upfeat.heads import SavedHead, describe_backbone, save_head
from upfeat.loading import default_upsampler
from upfeat.machine import readable

BLOCK = 512
PATTERN = 8 * BLOCK
SMALLEST = 64
"""Side, in pixels, of a raster whose time is mostly the start of the program."""
CLASSES = ["water", "field", "forest", "road", "roof"]


def make_raster(path: Path, side: int) -> None:
    """Write a square raster block by block; every block differs from the others."""
    profile = {
        "driver": "GTiff",
        "count": 3,
        "height": side,
        "width": side,
        "dtype": "uint8",
        "crs": "EPSG:32633",
        "transform": from_origin(500000, 5200000, 1, 1),
        "photometric": "rgb",
    }
    blocks = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:PATTERN, :PATTERN]
    fields = ((x // 97 + y // 61) % 5 * 35)[None] + np.array([10, 30, 60])[:, None, None]
    waves = 25 * np.sin(x / 53) * np.cos(y / 71)
    noise = generator.integers(0, 30, (3, PATTERN // 4, PATTERN // 4)).repeat(4, 1).repeat(4, 2)
    pattern = np.clip(fields + waves + noise, 0, 235).astype(np.uint8)
    with rasterio.open(path, "w", **profile, **blocks, compress="deflate", zlevel=1) as file:
        for top in range(0, side, BLOCK):
            for left in range(0, side, BLOCK):
                rows, columns = min(BLOCK, side - top), min(BLOCK, side - left)
                row, column = generator.integers(0, PATTERN - BLOCK, 2)
                part = pattern[:, row : row + rows, column : column + columns]
                shade = generator.integers(0, 20, dtype=np.uint8)
                file.write(part + shade, window=((top, top + rows), (left, left + columns)))


def make_head(path: Path) -> None:
    """Write a head of random weights for the default backbone."""
    backbone = upfeat.load_backbone("efficientnet_lite0")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(CLASSES), backbone.embed_dim, generator=generator)
    bias = torch.zeros(len(CLASSES))
    made_with = default_upsampler(backbone)
    head = SavedHead(weight, bias, CLASSES, "classes", describe_backbone(backbone), made_with)
    save_head(path, head)


def measure(folder: Path, side: int, threads: int, max_memory: str) -> dict[str, Any]:
    """Run the command on one raster and report what it took."""
    raster, output = folder / f"{side}.tif", folder / f"{side}.classes.tif"
    if not raster.exists():
        # In another process, because children inherit the largest memory of this process.
        making = get_context("spawn").Process(target=make_raster, args=(raster, side))
        making.start()
        making.join()
    command = [sys.executable, "-m", "upfeat", "raster", str(raster), "-o", str(output)]
    command += ["--head", str(folder / "head.safetensors"), "--max-memory", max_memory]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    child = subprocess.Popen([*command, "--overwrite"], env=environment)
    progress, used = watch(child.pid, output, side, started)
    seconds, processor = time.perf_counter() - started, used.ru_utime + used.ru_stime
    found = {
        "side": side,
        "megapixels": side * side / 1e6,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "peak_bytes": used.ru_maxrss * 1024,
        "output_bytes": output.stat().st_size,
        "progress": progress,
    }
    text = f"{side}²: {seconds:.0f} s, {processor:.0f} s of processors, "
    print(text + f"peak {readable(found['peak_bytes'])}", file=sys.stderr, flush=True)
    return found


def watch(number: int, output: Path, side: int, started: float) -> tuple[list[str], Any]:
    """Follow a run to its end; return lines of its progress at intervals, and its usage."""
    ledger = output.with_name(output.name + ".partial") / "tiles.txt"
    progress: list[str] = []
    every = 300 if side > 8000 else 5
    while True:
        ended, status, used = os.wait4(number, os.WNOHANG)
        if ended:
            break
        time.sleep(0.2)
        after = time.perf_counter() - started
        if after > every * (len(progress) + 1):
            done = ledger.read_text().count("\n") if ledger.exists() else 0
            resident = resident_of(number)
            progress.append(f"{after:.0f} s: {done} tiles, {readable(resident)}")
            print(f"{side}²: {progress[-1]}", file=sys.stderr, flush=True)
    if status:
        sys.exit(f"upfeat raster: status {status}")
    return progress, used


def resident_of(number: int) -> int:
    """Return the resident memory of a process, bytes; 0 if the system does not report it."""
    try:
        pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure all sides."""
    parser = argparse.ArgumentParser(
        description="Measure time and memory of upfeat raster, by area."
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[2000, 6000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory", default="4GB")
    parser.add_argument(
        "--folder", type=Path, help="folder of rasters and results (default: temporary)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="file of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_head(folder / "head.safetensors")
        shared = (options.threads, options.max_memory)
        # Processor time of the start, to be subtracted from that of each raster.
        start = measure(folder, SMALLEST, *shared)["processor_seconds"]
        rows = [measure(folder, side, *shared) for side in options.sides]
    for row in rows:
        whole, work = row["processor_seconds"], row["processor_seconds"] - start
        row["processor_seconds_a_megapixel"] = round(whole / row["megapixels"], 3)
        row["work_seconds_a_megapixel"] = round(work / row["megapixels"], 3)
    each = [row["work_seconds_a_megapixel"] for row in rows]
    report = {
        "upfeat": upfeat.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": options.threads,
        "max_memory": options.max_memory,
        "start_processor_seconds": start,
        "most_over_least_a_megapixel": round(max(each) / min(each), 3),
        "rasters": rows,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    print(text)
    if options.json is not None:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
