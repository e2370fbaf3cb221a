"""What ``prepare`` and ``render`` do with what they are given, right or wrong."""

import numpy as np
import pytest
import torch
from small_upsamplers import SMALL

from upfeat.upsamplers import Window
from upfeat.upsamplers.head import Head

GRID, SIZE = (3, 4), (24, 32)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def given(name, batch=1):
    """An upsampler and the arguments of its ``prepare``."""
    torch.manual_seed(0)
    up = SMALL[name]().eval().requires_grad_(False)
    features, guidance = torch.randn(batch, 4, *GRID), torch.randn(batch, 3, *SIZE)
    return up, {
        "guidance": guidance,
        "grid_size": GRID,
        "output_size": SIZE,
        "features": features,
    }


def prepared(name, batch=1):
    """An upsampler, and the arguments of its ``render``."""
    up, arguments = given(name, batch)
    return up, {"kernels": up.prepare(**arguments), "mixed": up.mix(arguments["features"])}


NO_IMAGES = {
    "none": (lambda _: None, TypeError, "is of type NoneType; give a tensor"),
    "array": (np.asarray, TypeError, "is of type ndarray; give a tensor"),
    "no batch": (lambda x: x[0], ValueError, r"must be \(B, channels, height, width\)"),
    "bytes": (lambda x: x.byte(), ValueError, r"is torch\.uint8; give floating numbers"),
}
NO_SIZES = [12, (5,), (5, 6, 7), (2.5, 3), (0, 3), (-1, 3), (2**40, 1), "ab", ("5", "6")]


@pytest.mark.parametrize("name", SMALL)
def test_weights_are_made_of_an_image_and_two_sizes(name):
    up, good = given(name)
    labels = ["guidance", *(["features"] if up.needs_features else [])]
    for label in labels:
        for wrong, (change, kind, words) in NO_IMAGES.items():
            if label == "features" and wrong == "none":
                continue  # upsamplers say in their own words that features are missing
            with pytest.raises(kind, match=f"^{label} {words}"):
                up.prepare(**{**good, label: change(good[label])})
    for label in ("grid_size", "output_size"):
        for size in NO_SIZES:
            with pytest.raises(ValueError, match=rf"^{label}=.* (must be|has a side)"):
                up.prepare(**{**good, label: size})
    with pytest.raises(ValueError, match=r"^output_size=None must be"):
        up.prepare(**{**good, "output_size": None})
    if up.needs_features:
        with pytest.raises(ValueError, match=r"^features is of 3×4 cells, and grid_size=\(4, 4\)"):
            up.prepare(**{**good, "grid_size": (4, 4)})


@pytest.mark.parametrize("kind", [list, torch.Size, np.array, torch.tensor])
@pytest.mark.parametrize("name", SMALL)
def test_sizes_are_any_two_whole_numbers(name, kind):
    up, good = given(name)
    expected = up(good["features"], good["guidance"])
    kernels = up.prepare(**{**good, "grid_size": kind(GRID), "output_size": kind(SIZE)})
    assert torch.equal(up.render(kernels, up.mix(good["features"])), expected)


NO_HEADS = {
    "an array": (np.ones((2, 4)), TypeError, "head is of type ndarray; give a tensor"),
    "a module": (torch.nn.Linear(4, 2), TypeError, "head is of type Linear; give a tensor"),
    "a number": (3, TypeError, "head is of type int"),
    "transposed": (torch.ones(4, 2), ValueError, r"head is \(4, 2\); give a weight of \(K, 4\)"),
    "a vector": (torch.ones(4), ValueError, r"head is \(4,\); give a weight of \(K, 4\)"),
    "doubles": (torch.ones(2, 4).double(), ValueError, r"head is torch\.float64 on cpu and mixed"),
    "whole": (torch.ones(2, 4).long(), ValueError, r"head is torch\.int64 on cpu and mixed"),
    "elsewhere": (torch.ones(2, 4, device="meta"), ValueError, "head is torch.float32 on meta and"),
    "no tensor inside": (Head([[1.0] * 4]), TypeError, "head is of type list"),
    "of a long bias": (
        Head(torch.ones(2, 4), torch.ones(3)),
        ValueError,
        r"bias of head is \(3,\); give \(2,\)",
    ),
    "a bias for all": (
        Head(None, torch.ones(3)),
        ValueError,
        r"bias of head is \(3,\); give \(4,\)",
    ),
    "a list for a bias": (Head(None, [1.0] * 4), TypeError, "bias of head is of type list"),
}
OUTSIDE = [(20, 0, 10, 10), (0, 23, 1, 10), (-1, 0, 3, 3), (0, 0, 0, 4), (0, 0, 10**9, 10**9)]


@pytest.mark.parametrize("name", SMALL)
def test_what_cannot_be_rendered_is_refused_by_name(name):
    up, good = prepared(name)
    for head, kind, words in NO_HEADS.values():
        with pytest.raises(kind, match=f"^{words}"):
            up.render(**good, head=head)
    for window in [*OUTSIDE, (0.5, 0, 3, 3)]:
        with pytest.raises(ValueError, match=r"^window=\(.*\) does not lie in the output of 24×32"):
            up.render(**good, window=Window(*window))
    with pytest.raises(TypeError, match=r"^window is of type tuple; give Window"):
        up.render(**good, window=(0, 0, 3, 3))
    for wrong in (None, np.ones((1, 4, *GRID)), [1.0]):
        with pytest.raises(TypeError, match=f"^mixed is of type {type(wrong).__name__}; give"):
            up.render(**{**good, "mixed": wrong})
    with pytest.raises(ValueError, match=r"^mixed must be \(B, channels, height, width\)"):
        up.render(**{**good, "mixed": good["mixed"][0]})
    with pytest.raises(TypeError, match=r"^kernels is of type NoneType; give those of prepare"):
        up.render(**{**good, "kernels": None})


@pytest.mark.parametrize("name", [one for one in SMALL if one not in INTERPOLATIONS])
def test_features_of_another_grid_are_refused(name):
    up, good = prepared(name)
    with pytest.raises(ValueError, match=r"^mixed is of 3×3 cells, and kernels of 3×4; prepare"):
        up.render(good["kernels"], good["mixed"][..., :3])


@pytest.mark.parametrize("name", SMALL)
def test_each_image_may_have_a_head_of_its_own(name):
    up, good = prepared(name, batch=2)
    heads, bias = torch.randn(2, 5, 4), torch.randn(5)
    together = up.render(**good, head=Head(heads, bias))
    for index, head in enumerate(heads):
        alone = up.render(**good, head=Head(head, bias))[index]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-4)
