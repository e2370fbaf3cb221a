"""Kill commands at random moments, run them again, and compare with what nobody disturbed.

    python tests/killing.py train --times 20 --seed 0 --folder /tmp/killing

A server imports PyTorch once and forks a child for every try: a try costs less than a second. Ends
with code 0 and a line of JSON, or with the first difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import rich.progress  # noqa: F401
import torch
from PIL import Image

SIZE = (48, 40)
QUICK_TRAIN = (
    "--steps 6 --batch-size 1 --views 1 --size 32 --checkpoint-every 2 --validation-images 1 "
    "--validate-every 3 --projection-dim 2 --precision fp32 --device cpu"
)
# What is run, and what is added when it is run again.
RAY = " --engine ray --workers 2 --address {cluster}"
COMMANDS = {
    "run": ("run photos -o out", ""),
    "fit": ("fit photos/0.png photos/1.png -o out --views 2 --size 32", ""),
    "raster": ("raster scene.tif -o out/scene.zarr", "--resume"),
    "raster_ray": ("raster scene.tif -o out/scene.zarr" + RAY, "--resume"),
    "render": ("render fitted.safetensors -o out/features.{suffix} --size 200x150", ""),
    "train": (f"train photos -o out {QUICK_TRAIN}", "--resume"),
    "extract": ("extract photos shard.tar -o out --size 64 --workers 2", ""),
    "extract_ray": ("extract photos shard.tar -o out --size 64" + RAY, ""),
    "eval": (
        "eval seg data -o out --size 32 --seeds 1 --pixels 16 --upsamplers nearest bilinear",
        "",
    ),
}
RASTERS = ("raster", "raster_ray")
# Several tiles of a small raster.
RASTER = (300, 520)
SUFFIXES = ("npy", "safetensors", "png")
# Files that are of one piece: there whole, or not there. Of others a killed process leaves a state
# to go on from.
WHOLE = {
    "run": ("*.safetensors", "*.png"),
    "fit": ("*.safetensors",),
    "render": ("*",),
    "train": ("upsampler/*.safetensors",),
    "eval": (),
    "raster": (),
    "raster_ray": (),
    "extract": ("**/*.safetensors",),
    "extract_ray": ("**/*.safetensors",),
}


def write_inputs(folder: Path, *, scene: bool) -> None:
    """Write photographs, labels of them, and a raster where one is needed."""
    for part in ("photos", "data/train", "data/test"):
        (folder / part).mkdir(parents=True)
    for index in range(3):
        values = np.random.default_rng(index).integers(0, 255, (5, 6, 3)).astype(np.uint8)
        image = Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC)
        label = Image.fromarray((np.asarray(image)[..., 0] > 128).astype(np.uint8))
        image.save(folder / "photos" / f"{index}.png")
        for part in ("train", "test"):
            for kind, picture in (("images", image), ("labels", label)):
                (folder / "data" / part / kind).mkdir(exist_ok=True)
                picture.save(folder / "data" / part / kind / f"{part}{index}.png")
    if scene:
        write_scene(folder)
    (folder / "data" / "classes.json").write_text(json.dumps(["ground", "thing"]))
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for number in range(12):
            archive.add(folder / "photos" / f"{number % 3}.png", f"{number:02d}.png")


def write_scene(folder: Path) -> None:
    """Write a raster."""
    values = np.random.default_rng(9).integers(0, 255, (3, 30, 52)).astype(np.uint8)
    bands = [
        np.asarray(Image.fromarray(band).resize(RASTER[::-1], Image.Resampling.BICUBIC))
        for band in values
    ]
    tifffile = import_module("tifffile")
    tifffile.imwrite(folder / "scene.tif", np.stack(bands, -1), photometric="rgb", tile=(128, 128))


def start(arguments: list[str], log: Path) -> int:
    """Run a command in a child; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from upfeat.cli import main

        code = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], log: Path) -> None:
    """Run a command to its end."""
    _, status = os.waitpid(start(arguments, log), 0)
    if status:
        sys.exit(f"upfeat {' '.join(arguments)}: status {status}\n{log.read_text()}")


def kill(arguments: list[str], log: Path, seconds: float) -> bool:
    """Run a command and kill it after so long; return whether it was still at work."""
    child = start(arguments, log)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its path, hidden ones too; without what was timed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name + "/"] = b""
        elif name == "results.json":
            results = json.loads(path.read_text())
            for row in results["rows"]:
                row.pop("cost", None)
            found[name] = json.dumps(results, sort_keys=True).encode()
        elif path.suffix == ".ckpt":
            found[name] = flat(torch.load(path, weights_only=True))
        elif name == "report.html" or name.startswith("cache/"):
            found[name] = b""  # holds times
        else:
            found[name] = path.read_bytes()
    return found


def flat(value: object) -> bytes:
    """The values of a checkpoint; its pickle also tells which equal strings are one object."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes()
    if isinstance(value, dict):
        return b"{" + b",".join(flat(key) + b":" + flat(value[key]) for key in value) + b"}"
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(flat, value)) + b"]"
    return repr(value).encode()


def compare(expected: dict[str, bytes], found: dict[str, bytes], when: str) -> None:
    """End with the first difference."""
    for name in sorted({*expected, *found}):
        if name not in found:
            sys.exit(f"{when}: {name} is missing")
        if name not in expected:
            sys.exit(f"{when}: {name} was left behind")
        if expected[name] != found[name]:
            shown = [side[name][:3000].decode(errors="replace") for side in (expected, found)]
            sys.exit(f"{when}: {name} differs\n" + "\n--- found ---\n".join(shown))


def check_whole(command: str, expected: dict[str, bytes], out: Path, when: str) -> None:
    """No file of one piece is half there."""
    for pattern in WHOLE[command]:
        for path in out.glob(pattern):
            name = str(path.relative_to(out))
            if not path.name.startswith(".") and path.read_bytes() != expected[name]:
                sys.exit(f"{when}: {name} is there in part")


class Trial:
    """One command in its folder, undisturbed and killed."""

    def __init__(self, command: str, folder: Path, cluster: str = "") -> None:
        self.command, self.folder, self.cluster = command, folder, cluster
        self.out, self.log = folder / "out", folder / "log.txt"

    def words(self, suffix: str, *, again: bool) -> list[str]:
        first, more = COMMANDS[self.command]
        first = first.format(suffix=suffix, cluster=self.cluster)
        return [*first.split(), *(more.split() if again else ())]

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.command == "render":
            self.out.mkdir()

    def undisturbed(self, suffix: str) -> tuple[dict[str, bytes], float]:
        """What the command leaves, and the seconds that it takes."""
        seconds = []
        for _ in range(2):
            self.clear()
            before = time.perf_counter()
            run(self.words(suffix, again=False), self.log)
            seconds.append(time.perf_counter() - before)
            found = content(self.out)
        return found, min(seconds)

    def disturbed(self, suffix: str, expected: dict[str, bytes], seconds: float) -> bool:
        """Kill, look, run again, compare; return whether the kill came in time."""
        self.clear()
        in_time = kill(self.words(suffix, again=False), self.log, seconds)
        when = f"{self.command}, killed after {seconds:.3f} s"
        check_whole(self.command, expected, self.out, when)
        run(self.words(suffix, again=True), self.log)
        compare(expected, content(self.out), when)
        return in_time


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray of this machine with two workers, which outlives the commands that use it."""
    # Newer Rays ask for a token; commands are forked and take this over.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    code = (
        "import ray, sys; "
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False); "
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_raylet_start_wait_time_s": "120"},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield child.stdout.readline().strip()
    finally:
        child.stdin.close()
        child.wait()


def main() -> None:
    """Kill one command some times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="killing-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    write_inputs(folder, scene=options.command in RASTERS)

    # All that a command imports, before the first fork; nothing is computed, since threads do not
    # survive it.
    for name in (
        "model",
        "implicit.files",
        "training.loop",
        "evaluation.harness",
        "batch",
        "cli.main",
    ):
        import_module(f"upfeat.{name}")
    torch.set_num_threads(1)
    if options.command in RASTERS:
        plan = import_module("upfeat.raster.plan")
        for name in ("_TILES", "_BACKBONE_TILES"):
            setattr(plan, name, (256,))

    with cluster() if options.command.endswith("_ray") else nullcontext("") as address:
        in_time = trials(Trial(options.command, folder, address), options.times, options.seed)
    if in_time < options.times // 4:
        sys.exit(f"{options.command}: only {in_time} of {options.times} kills came before the end")
    print(json.dumps({"command": options.command, "times": options.times, "in_time": in_time}))


def trials(trial: Trial, times: int, seed: int) -> int:
    """Kill a command some times; return how often it was still at work."""
    folder, command = trial.folder, trial.command
    inputs = content(folder / "photos") | content(folder / "data")
    if command == "render":
        run(
            ["fit", "photos/0.png", "-o", "fitted.safetensors", "--views", "2", "--size", "32"],
            trial.log,
        )
    suffixes = SUFFIXES if command == "render" else ("",)
    known = {suffix: trial.undisturbed(suffix) for suffix in suffixes}
    draw = random.Random(seed)
    in_time = 0
    for number in range(times):
        suffix = suffixes[number % len(suffixes)]
        expected, seconds = known[suffix]
        in_time += trial.disturbed(suffix, expected, draw.uniform(0, seconds))
    compare(inputs, content(folder / "photos") | content(folder / "data"), "inputs")
    return in_time


if __name__ == "__main__":
    main()
