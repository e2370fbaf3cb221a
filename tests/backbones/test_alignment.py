"""Displaced features: measured without labels, corrected before the network sees the image."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.backbones import estimate_displacement
from upfeat.backbones.base import _moved
from upfeat.mosaic import see_within
from upfeat.portable.model import PortableModel
from upfeat.provenance import digest, identify_backbone
from upfeat.receptive_field import receptive_halo
from upfeat.scales import SecondScale
from upfeat.upsamplers.head import Head


class Displaced(upfeat.Backbone):
    """Colours of squares that lie below and right of the cells by ``by`` pixels."""

    def __init__(self, by=3):
        super().__init__(name="displaced", embed_dim=3, stride=8)
        self.by = by
        self.scale = torch.nn.Parameter(torch.ones(()))

    def extract(self, x):
        moved = F.pad(x, (0, self.by, 0, self.by), mode="replicate")[..., self.by :, self.by :]
        return self.scale * F.avg_pool2d(moved, 8)


def photo(height=96, width=112, count=1, seed=0):
    """Smooth pictures, as photographs are at the scale of a cell."""
    noise = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    blurred = F.avg_pool2d(F.pad(noise, (12,) * 4, mode="reflect"), 25, 1)
    return blurred / blurred.std()


def test_features_come_to_lie_on_their_cells():
    x = photo()
    aligned = Displaced(3).aligned(3)(x)
    torch.testing.assert_close(aligned[..., 1:-1, 1:-1], F.avg_pool2d(x, 8)[..., 1:-1, 1:-1])


@pytest.mark.parametrize("by", [0, 1, 2])
def test_the_displacement_is_measured(by):
    images = [photo(seed=seed) for seed in range(8)]
    assert estimate_displacement(Displaced(by), images) == pytest.approx((by, by), abs=0.5)
    assert estimate_displacement(Displaced(by).aligned(by), images) == pytest.approx(
        (0, 0), abs=0.5
    )


def test_an_aligned_backbone_shares_weights_and_leaves_the_other_as_it_is():
    backbone, x = Displaced(), photo()
    before = backbone(x)
    aligned = backbone.aligned(-5)
    assert (aligned.displacement, backbone.displacement) == (-5, 0)
    assert aligned.scale is backbone.scale
    assert digest(aligned) == digest(backbone)
    assert identify_backbone(aligned) != identify_backbone(backbone)
    torch.testing.assert_close(backbone(x), before, rtol=0, atol=0)
    torch.testing.assert_close(aligned.aligned(0)(x), before, rtol=0, atol=0)
    for twin in (copy.deepcopy(aligned), pickle.loads(pickle.dumps(aligned))):
        torch.testing.assert_close(twin(x), aligned(x), rtol=0, atol=0)


def test_tiles_of_an_aligned_backbone_agree_with_the_whole():
    backbone, x = Displaced().aligned(3).eval(), photo(8 * 40, 8 * 36)
    assert receptive_halo(backbone) == 1
    parts = see_within(backbone, x, 3e6)
    torch.testing.assert_close(parts[0], backbone(x), rtol=0, atol=0)


def test_early_layers_and_the_second_scale_move_too():
    network, x = upfeat.load_backbone("efficientnet_lite0").eval(), photo(64, 96)
    features, hidden = network.aligned(2).with_hidden(x)
    moved = F.pad(x, (2, 0, 2, 0), mode="reflect")[..., :64, :96]
    expected = network.with_hidden(moved)
    torch.testing.assert_close((features, hidden), expected)
    scales = SecondScale(Displaced(3).aligned(3), share=1, ratio=2)
    torch.testing.assert_close(
        scales(x)[..., 3:-3, 3:-3], F.avg_pool2d(x, 4)[..., 3:-3, 3:-3], rtol=0.1, atol=0.15
    )


def test_models_align_as_the_upsampler_was_trained():
    up = upfeat.EarlyDetailUpsampler(112, hidden_dim=40, displacement=2).eval()
    backbone = upfeat.load_backbone("efficientnet_lite0")
    assert upfeat.load(backbone, upsampler=up).backbone.displacement == 2
    assert upfeat.load(backbone, upsampler=up, passes=5).backbone.backbone.displacement == 2
    assert backbone.displacement == 0
    assert upfeat.load(backbone.aligned(1), upsampler=up).backbone.displacement == 1
    assert upfeat.load(backbone).backbone.displacement == 2
    assert upfeat.load(backbone, early=False).backbone.displacement == 0
    x, model = photo(64, 96), upfeat.load(backbone.aligned(2), upsampler="bilinear")
    expected = F.interpolate(model.backbone(x), size=(64, 96), mode="bilinear")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("displacement", "words"),
    [
        (8, "displacement=8 must be 7 or less"),
        (-8, "displacement=-8 must be -7 or more"),
        (1.5, "displacement=1.5 must be a whole number"),
        (True, "displacement=True must be a whole number"),
    ],
)
def test_impossible_offsets_are_refused(displacement, words):
    with pytest.raises(ValueError, match=words):
        Displaced().aligned(displacement)


def test_nothing_to_measure_is_said():
    for images in ([], [torch.zeros(1, 3, 32, 32)]):
        with pytest.raises(ValueError, match="images have the same features in every cell"):
            estimate_displacement(Displaced(), images)


def test_portable_models_align_too():
    model, x = upfeat.load(Displaced(3).aligned(3)), photo(64, 96)
    portable = PortableModel(model, Head(), 1)
    with torch.no_grad():
        torch.testing.assert_close(portable(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected a call")
@pytest.mark.parametrize("displacement", [2, -3])
def test_alignment_is_the_same_while_a_program_is_compiled(displacement):
    """PyTorch's compiler has no code for reflections of images of unknown sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(_moved, dynamic=True, fullgraph=True, backend="eager")
    for size in ((16, 24), (40, 32)):
        x = torch.randn(2, 3, *size)
        padded, first = F.pad(x, (3, 3, 3, 3), mode="reflect"), 3 - displacement
        expected = padded[..., first : first + size[0], first : first + size[1]]
        assert torch.equal(_moved(x, displacement), expected)
        assert torch.equal(compiled(x, displacement), expected)
