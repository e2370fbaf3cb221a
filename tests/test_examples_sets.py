"""Examples of large inputs run on what they generate, and show what they say they show."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "sets"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # a head is trained on a raster, and another raster mapped
def test_land_cover(tmp_path):
    pytest.importorskip("rasterio")
    # In a process of its own, as users start it: its bound on memory counts the whole process.
    command = [sys.executable, FOLDER / "land_cover.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores = dict(line.split(": ") for line in done.stdout.splitlines())
    assert float(scores["placed"]) == 1
    assert float(scores["right"]) > 0.9


def test_threads_are_counted():
    found = load("thin_structures").main()
    assert abs(found["detail"][0] - 8) <= 1
    assert found["detail"][1] > found["bilinear"][1] + 0.15


def test_a_video_of_features(tmp_path):
    pytest.importorskip("av")
    report = load("video").main(tmp_path / "out.mp4", "bilinear")
    assert report.frames == 6
    assert report.still > 0.4
    assert report.drift < 0.3
    assert report.flicker < 10
