"""Examples of large inputs run on what they generate, and show what they say they show."""

import importlib.util
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
    scores = load("land_cover").main(tmp_path)
    assert scores["placed"]
    assert scores["right"] > 0.9


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
