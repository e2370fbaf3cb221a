"""One image in, two normalisations inside: the backbone's and the upsampler's."""

import pytest
import torch
from torch.nn import functional as F

import upfeat
from upfeat.normalization import HALF, IMAGENET, Normalization, check_normalization

BYTES = Normalization((128 / 255,) * 3, (1 / 255,) * 3)  # images from −128 to 127


def _photo(height=70, width=52):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 6, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return smooth[0].permute(1, 2, 0).mul(255).byte().numpy()


def _model(normalization, upsampler=None):
    """The same features whatever the normalisation: those of the colours themselves."""
    mean, std = normalization

    def colours(x):
        return F.avg_pool2d(normalization.undo(x), 8)

    backbone = upfeat.load_backbone(colours, mean=mean, std=std)
    return upfeat.load(backbone, upsampler=upsampler)


@pytest.mark.parametrize("other", [HALF, BYTES], ids=["half", "bytes"])
@pytest.mark.parametrize(
    "upsampler", [None, "neighbourhood", "jbu_stack", "joint_bilateral", "bilinear"]
)
def test_upsampling_does_not_depend_on_the_backbones_normalisation(upsampler, other):
    reference, model = _model(IMAGENET, upsampler), _model(other, upsampler)
    x, same = model.preprocess(_photo(), align=False), reference.preprocess(_photo(), align=False)
    expected = reference(same)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(model.lazy(x).full(), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        model.lazy(x).crop(3, 5, 20, 30), expected[:, :, 3:23, 5:35], rtol=0, atol=2e-4
    )


def test_weights_for_any_backbone_see_imagenets_normalisation():
    for name in ("detail_universal", "neighbourhood_universal", "jbu_stack_universal"):
        upsampler = upfeat.load(upsampler=name).upsampler
        assert (upsampler.mean, upsampler.std) == IMAGENET
    assert upfeat.load(upsampler="detail").upsampler.normalization == HALF  # trained for it


def test_nothing_is_copied_where_both_agree():
    model = upfeat.load(upsampler="detail")
    x = torch.randn(1, 3, 32, 32)
    assert model.guidance(x) is x
    universal = upfeat.FeatUp(model.backbone, upfeat.NeighbourhoodUpsampler())
    assert universal.upsampler.mean is None
    assert universal.guidance(x) is x


def test_saved_with_the_weights(tmp_path):
    upsampler = upfeat.NeighbourhoodUpsampler()
    upsampler.save_pretrained(tmp_path / "own")
    assert upfeat.NeighbourhoodUpsampler.from_pretrained(tmp_path / "own").mean is None
    upsampler.mean, upsampler.std = HALF
    upsampler.save_pretrained(tmp_path / "half")
    assert upfeat.NeighbourhoodUpsampler.from_pretrained(tmp_path / "half").normalization == HALF
    config = tmp_path / "half" / "config.json"
    config.write_text(config.read_text().replace("0.5", "-0.5"))
    with pytest.raises(ValueError, match="std above 0"):
        upfeat.NeighbourhoodUpsampler.from_pretrained(tmp_path / "half")


def test_there_and_back():
    pixels = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    for first in (HALF, IMAGENET, BYTES):
        torch.testing.assert_close(first.undo(first.apply(pixels)), pixels)
        for second in (HALF, IMAGENET, BYTES):
            converted = first.convert(first.apply(pixels), second)
            torch.testing.assert_close(converted, second.apply(pixels))
    half = IMAGENET.convert(IMAGENET.apply(pixels).half(), HALF)
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (1, 1, 1)), ((0, 0, 0), (1, 0, 1)), (None, (1, 1, 1)), ("abc", "d")]
)
def test_what_is_no_normalisation_is_refused(mean, std):
    with pytest.raises(ValueError, match="3 values each"):
        check_normalization(mean, std)


@pytest.mark.parametrize(("mean", "std"), [((0, 0, 0), (1, 1, 1e-300)), ((1e9, 0, 0), (1, 1, 1))])
def test_normalisations_that_leave_float32_are_refused(mean, std):
    with pytest.raises(ValueError, match="give std from 1e-06"):
        check_normalization(mean, std)


def test_training_gives_weights_one_normalisation():
    from upfeat.training.config import TrainConfig
    from upfeat.training.trainer import new_upsampler

    half, imagenet, raw = (_model(each).backbone for each in (HALF, IMAGENET, BYTES))
    config = TrainConfig(upsampler="neighbourhood", steps=1, back_projections=None)
    expected = {(half,): HALF, (imagenet,): IMAGENET, (raw,): IMAGENET, (half, raw): IMAGENET}
    for backbones, normalization in expected.items():
        assert new_upsampler(config, backbones).normalization == normalization
