"""The memory that commands take, as the system measures it, stays within their bounds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import upfeat
from upfeat import machine, run_memory
from upfeat.budget import Buffer
from upfeat.machine import parse_memory, status
from upfeat.raster import make_plan
from upfeat.raster.outputs import Features
from upfeat.upsamplers import saved

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def _photo(path, height, width):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# Not the resource usage of the child, which begins with the memory of the process that forks.
_COMMAND = """
import sys
from upfeat.cli import main
from upfeat.machine import status
code = main(sys.argv[1:])
print(status("VmHWM"))
sys.exit(code)
"""


def _run(photo, folder, bound):
    """Run the command with a bound; return its exit code, its errors and its largest memory."""
    arguments = ["run", str(photo), "-o", str(folder), "--max-memory", str(bound)]
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr, int(done.stdout.split()[-1])


@pytest.mark.parametrize("size", [(40, 20000), (1100, 1000)])
def test_the_bound_that_is_named_suffices_and_holds(tmp_path, size):
    photo = _photo(tmp_path / "photo.png", *size)
    code, errors, _ = _run(photo, tmp_path / "out", "1MB")
    assert code == 2
    bound = parse_memory(re.search(r"max_memory of ([\d.]+ \w+)", errors)[1])
    code, errors, peak = _run(photo, tmp_path / "out", bound)
    assert code == 0, errors
    assert peak <= 1.05 * bound


def test_a_strip_does_not_grow_with_the_width():
    for channels, itemsize in ((112, 2), (768, 4), (2048, 4)):
        columns = run_memory.room_columns(channels, itemsize)
        assert columns % run_memory.COLUMNS == 0
        strip = 64 * columns * channels * itemsize
        assert strip <= max(1 << 27, 64 * run_memory.COLUMNS * channels * itemsize)


def test_a_window_in_a_file_takes_only_its_own_pages(tmp_path):
    shape = (1, 64, 1024, 1024)
    file = np.memmap(tmp_path / "map.bin", np.float16, "w+", shape=shape)
    buffer, before = Buffer(file, shape), status("RssFile")
    file[:, :, :32, :32] = 1
    assert status("RssFile") - before < 32 << 20  # of 128 MiB
    buffer.finish()


def test_a_raster_keeps_to_the_memory_of_its_container(monkeypatch):
    model = upfeat.load()
    what = Features(model.embed_dim, {})
    make_plan((300, 300), model, what)
    monkeypatch.setattr(machine, "available_memory", lambda device=None: 10**8)
    with pytest.raises(ValueError, match=r"the free memory here, .* is too little for a raster"):
        make_plan((300, 300), model, what)


def test_a_package_without_its_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(saved, "_SHIPPED", tmp_path / "upfeat.zip" / "weights")
    with pytest.raises(FileNotFoundError, match="upfeat works only with its weights"):
        upfeat.load()
