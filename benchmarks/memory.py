"""Largest resident memory with and without a bound, and a check that the results are equal.

    python benchmarks/memory.py --max-memory 1.5GB --json memory.json

There are two jobs. map: ``detail_universal`` upsamples features of 384 channels from 64×64 cells to
1024×1024 pixels, to a file of float32; without the bound, ``lazy.full()`` computes the whole map
before it is written. run: ``upfeat run`` on a generated photograph of 4096×4096 pixels. Every run
is a separate process with one thread, whose largest resident memory the system reports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHANNELS, CELLS, STRIDE, PHOTO = 384, 64, 16, 4096


def make_map(path: Path, max_memory: str | None) -> None:
    """Upsample random features with a smooth random image as guidance, and write the map."""
    import numpy as np
    import torch

    import upfeat

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, CHANNELS, CELLS, CELLS, generator=generator)
    guidance = torch.randn(1, 3, CELLS, CELLS, generator=generator)
    size = (STRIDE * CELLS, STRIDE * CELLS)
    guidance = torch.nn.functional.interpolate(guidance, size, mode="bicubic")
    upsampler = upfeat.load_upsampler("detail_universal").requires_grad_(False)
    lazy = upfeat.UpsampledFeatures(features, guidance, upsampler)
    if max_memory is None:
        lazy.full().numpy().tofile(path)
    else:
        file = np.memmap(path, np.float32, "w+", shape=tuple(lazy.shape))
        lazy.full(out=file, max_memory=max_memory)


def make_photo(path: Path, _: str | None) -> None:
    """Write a photograph of waves, fields and noise."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:PHOTO, :PHOTO].astype(np.float32)
    noise = np.random.default_rng(0).integers(0, 40, (PHOTO, PHOTO, 3), dtype=np.uint8)
    waves = (60 * np.sin(x / 97) * np.cos(y / 61) + 100).astype(np.uint8)
    Image.fromarray(noise + waves[..., None]).save(path, quality=90)


def child(arguments: list[str]) -> dict[str, float]:
    """Run Python with the given arguments in a process, and report time and memory."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)}: status {status}")
    return {
        "peak_bytes": used.ru_maxrss * 1024,
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def compare(job: str, folder: Path, max_memory: str) -> dict[str, object]:
    """Run a job without and with the bound, and compare the results."""
    me, results, digests = str(Path(__file__)), {}, []
    if job == "run":
        child([me, "--child", "photo", "--output", str(folder / "photo.jpg")])
    for name, bound in (("unbounded", None), ("bounded", max_memory)):
        if job == "map":
            made = [folder / "map.bin"]
            words = [me, "--child", "map", "--output", str(made[0])]
        else:
            made = [folder / name / "photo.safetensors", folder / name / "photo.features.png"]
            words = ["-m", "upfeat", "run", str(folder / "photo.jpg"), "-o", str(folder / name)]
        results[name] = child(words + ([] if bound is None else ["--max-memory", bound]))
        digests.append([file_digest(path) for path in made])
        results[name]["output_bytes"] = sum(path.stat().st_size for path in made)
        for path in made:
            path.unlink()
    same = digests[0] == digests[1]
    print(f"{job}: {results} {'same bits' if same else 'DIFFERENT'}", file=sys.stderr, flush=True)
    return {"job": job, "same_bits": same, **results}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    """Compare both jobs."""
    parser = argparse.ArgumentParser(description="Measure memory with and without a bound.")
    parser.add_argument("--jobs", nargs="+", default=["map", "run"], choices=["map", "run"])
    parser.add_argument("--max-memory", help="memory bound, such as 1GB")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file of the results")
    parser.add_argument("--child", choices=["map", "photo"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        {"map": make_map, "photo": make_photo}[options.child](options.output, options.max_memory)
        return
    with tempfile.TemporaryDirectory() as folder:
        bound = options.max_memory or "1.5GB"
        rows = [compare(job, Path(folder), bound) for job in options.jobs]
    text = json.dumps({"max_memory": bound, "threads": 1, "results": rows}, indent=1) + "\n"
    print(text)
    if options.json is not None:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
