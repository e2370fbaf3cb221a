"""The examples run, and show what they say they show."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import upfeat

FOLDER = Path(__file__).parents[1] / "examples" / "plug_in"
KITCHEN = Path(__file__).parents[1] / ".." / "shared" / "data" / "depth_kitchen"


@pytest.fixture
def example(monkeypatch):
    """Import an example by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("scenes", "segmentation_head"):
        sys.modules.pop(name, None)


def test_a_linear_segmentation_head(example):
    scores = example("segmentation_head").main()
    assert scores["upsampled"] > scores["interpolated"] + 0.02


@pytest.mark.slow
def test_a_small_decoder(example):
    scores = example("decoder").main()
    assert scores["dilated"] > scores["not dilated"]
    assert scores["trained in place"] > scores["dilated"]


def test_a_depth_head(example):
    scores = example("depth_head").main()
    assert scores["upsampled"] < 0.99 * scores["interpolated"]


@pytest.mark.slow
def test_a_depth_head_on_a_kitchen(example):
    if not KITCHEN.is_dir():
        pytest.skip(f"needs the frames of {KITCHEN.name} beside the project")
    scores = example("depth_head").main(KITCHEN)
    assert scores["upsampled"] < 1.01 * scores["interpolated"]


def test_an_activation_map_of_the_embedded_classifier(example):
    found = example("activation_map").main()
    assert found["same class"] == 1
    assert found["logits agree"] > 0.99
    assert (found["height"], found["width"]) == (224, 337)


def test_an_activation_map_of_a_timm_classifier(example, torchvision_operators):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=5).eval()
    x = torch.randn(1, 3, 96, 64)
    plain = network(x)
    heat, logits = example("activation_map").activation_map(
        network, "layer4", x, upfeat.load_upsampler("neighbourhood_universal")
    )
    assert heat.shape == (96, 64)
    assert 0 <= heat.min() <= heat.max() <= 1
    assert torch.nn.functional.cosine_similarity(plain, logits) > 0.95


def test_points_are_found_again(example):
    errors = example("matching").main()
    assert errors["detail"] < 0.9 * errors["bilinear"] < errors["nearest"]
