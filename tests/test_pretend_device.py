"""What runs on a device without float64: nothing is computed there in it, or left on the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from pretend_device import DEVICE, PretendDevice, There

import upfeat
from upfeat.backbones.alignment import estimate_displacement
from upfeat.evaluation.normals import normals_of
from upfeat.feature_map import interpolate
from upfeat.implicit.observe import Observer
from upfeat.implicit.one_pass import look_closer
from upfeat.mirrored import Mirrored
from upfeat.scales import SecondScale
from upfeat.snapshots import Snapshot
from upfeat.training.objective import measure_unit


@pytest.fixture(autouse=True)
def device():
    with PretendDevice():
        yield


@pytest.fixture
def image():
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 255, (48, 64, 3), dtype=np.uint8))


def test_the_device_is_strict():
    x = torch.rand(3).to(DEVICE)
    assert isinstance(x, There)
    assert torch.equal((x + 1).cpu(), x.cpu() + 1)
    with pytest.raises(RuntimeError, match="both devices"):
        _ = x + torch.rand(3)
    with pytest.raises(TypeError, match="no float64"):
        x.double()


def test_points_may_be_elsewhere():
    found = interpolate(torch.rand(2, 4, 4).to(DEVICE), torch.rand(3, 2))
    assert isinstance(found, There)


@pytest.mark.parametrize("name", ["detail", "detail_universal", "jbu_stack", "joint_bilateral"])
def test_maps_points_and_heads(image, name):
    model = upfeat.load(upsampler=name).to(DEVICE)
    lazy = model.lazy(model.preprocess(image))
    assert isinstance(lazy.full(), There)
    lazy.crop(3, 5, 20, 30)
    lazy.at(torch.tensor([[3.0, 4.5]]))
    lazy.project(torch.rand(3, lazy.shape[1]))


def test_further_passes(image):
    model = upfeat.load(passes=8).to(DEVICE)
    assert isinstance(model(model.preprocess(image)), There)


def test_backbones_made_of_others_are_where_these_are(image):
    backbone = upfeat.load_backbone("efficientnet_lite0").to(DEVICE)
    upsampler = upfeat.load_upsampler("early_detail_efficientnet_lite0")
    for made in (Mirrored(backbone), SecondScale(backbone, upsampler)):
        assert isinstance(made.with_hidden(made.preprocess(image))[0], There)


def test_a_fit_looks_as_often_as_on_the_cpu():
    """Weights left on another device would be an error that counts as that of too small a size."""
    backbone = upfeat.load_backbone("efficientnet_lite0").to(DEVICE)
    guidance = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    observer = Observer(guidance, backbone, held_out=1, max_pad=4, max_zoom=1.5, seed=0)
    look = look_closer(observer, guidance)
    assert look.passes == 8
    assert not isinstance(look.features, There)
    assert {type(one) for one in look.last.parameters()} == {torch.nn.Parameter}


def test_sums_that_are_exact_elsewhere():
    backbone = upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8)).to(DEVICE)
    assert measure_unit(backbone, 32) > 0
    estimate_displacement(backbone, torch.rand(1, 1, 3, 32, 32).to(DEVICE))
    parameters = list(backbone.parameters())
    assert Snapshot(parameters).holds(parameters)
    depth = (torch.rand(20, 30) / 50 + 1).to(DEVICE)
    assert isinstance(normals_of(depth, 60.0), There)
