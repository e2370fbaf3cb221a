"""One line each: names, shapes, and what the whole would take."""

import torch
from implicit.test_features import make_features

import upfeat


def test_model():
    model = upfeat.load("efficientnet_lite0", upsampler="bilinear")
    count = sum(one.numel() for one in model.parameters())
    assert repr(model) == (
        f"FeatUp(efficientnet_lite0 + bilinear: 112 channels, stride 16; {count:,} + 0 parameters, "
        "float32 on cpu)"
    )
    assert "bfloat16" in repr(model.bfloat16())


def test_lazy():
    lazy = upfeat.UpsampledFeatures(
        torch.randn(1, 7, 5, 6), torch.randn(1, 3, 75, 101), upfeat.Bilinear()
    )
    expected = (
        "UpsampledFeatures(1×7×75×101, float32 on cpu; from features 1×7×5×6 and guidance "
        "1×3×75×101 by bilinear; 212.1 kB if full)"
    )
    assert repr(lazy) == expected
    lazy.crop(0, 0, 3, 3)
    assert str(lazy) == expected


def test_implicit():
    features = make_features()
    shown = repr(features)
    assert "\n" not in shown
    assert shown.startswith("ImplicitFeatures(1×6×24×")
    assert "kernel field of" in shown
    assert "kB if full" in shown
