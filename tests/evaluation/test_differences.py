"""Differences between rows, and the paired bootstrap over images."""

import math

import pytest
import torch

from upfeat.evaluation import metrics
from upfeat.evaluation.differences import find_differences, pack_sums, unpack_sums
from upfeat.evaluation.results import Row
from upfeat.evaluation.tasks.seg import Segmentation


def scores_of(sums):
    return {"rate": sums[..., 0] / sums[..., 1]}


def row(name, hits, protocol="own"):
    """Of 2 seeds and a count of 10 an image."""
    sums = torch.stack([hits, torch.full_like(hits, 10)], dim=-1)  # (images, seeds, 2)
    scores = {"rate": scores_of(sums.sum(0).double())["rate"].tolist()}
    return Row(name, protocol, "", scores, sums=pack_sums(sums))


def draws(rate, images=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full((images, 2), 10 * rate), generator=generator).long()


def test_sums_survive_packing():
    sums = torch.randint(0, 1 << 40, (3, 2, 5))
    torch.testing.assert_close(unpack_sums(pack_sums(sums)), sums.double(), rtol=0, atol=0)
    half = torch.rand(2, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(unpack_sums(pack_sums(half)), half, rtol=0, atol=0)
    with pytest.raises(ValueError, match="float32"):
        pack_sums(half.float())


def test_the_interval_is_that_of_a_mean():
    base, mine = draws(0.4), draws(0.5, seed=1)
    rows = [row("bilinear", base), row("mine", mine)]
    found = {
        (one.upsampler, one.against): one
        for one in find_differences(rows, scores_of, {"rate": True})
    }
    one = found["mine", "bilinear"]
    expected = (mine - base).double().mean(1) / 10
    assert one.mean == pytest.approx(float(expected.mean()), abs=1e-12)
    half = 1.96 * float(expected.std()) / math.sqrt(len(expected))
    assert one.low == pytest.approx(one.mean - half, abs=0.2 * half)
    assert one.high == pytest.approx(one.mean + half, abs=0.2 * half)
    assert one.certain
    back = found["bilinear", "mine"]
    assert (back.low, back.high) == pytest.approx((-one.high, -one.low), abs=1e-9)


def test_pairs_cancel_what_images_share():
    """Images of very unlike difficulty, and a method that is a little better on every one."""
    base = torch.arange(60)[:, None].expand(-1, 2)
    found = find_differences([row("bilinear", base), row("a", base + 1)], scores_of, {"rate": True})
    one = next(one for one in found if one.upsampler == "a")
    assert (one.low, one.high) == pytest.approx((0.1, 0.1))


def test_others_are_bilinear_and_the_best():
    rows = [row(name, draws(rate)) for name, rate in (("bilinear", 0.3), ("a", 0.4), ("b", 0.6))]
    rows.append(row("a", draws(0.5), protocol="transfer"))  # alone in its protocol
    rows.append(Row("old", "own", "", {"rate": [0.9, 0.9]}))  # without sums
    found = find_differences(rows, scores_of, {"rate": True})
    pairs = [(one.upsampler, one.against) for one in found]
    assert pairs == [
        ("bilinear", "b"),
        ("a", "bilinear"),
        ("a", "b"),
        ("b", "bilinear"),
        ("b", "a"),
    ]
    reverse = find_differences(rows, scores_of, {"rate": False})
    assert (reverse[0].upsampler, reverse[0].against) == ("bilinear", "a")


def test_scores_of_sums_are_the_scores():
    """What the bootstrap computes is what the table shows."""
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(0, 3, (24, 20), generator=generator)
    label[:3] = 255
    maps = torch.where(torch.rand(2, 24, 20, generator=generator) < 0.6, label, 1)
    maps = torch.where(maps == 255, 0, maps)
    matrix = metrics.confusion_matrix(maps, label, 4)
    boundary = metrics.boundary_counts(maps, label, 1)
    classes = (matrix.diagonal(dim1=1, dim2=2), matrix.sum(2), matrix.sum(1))
    found = Segmentation.scores_of(torch.cat([*classes, boundary], dim=1).double())
    assert found["miou"].tolist() == pytest.approx([metrics.mean_iou(one) for one in matrix])
    assert found["boundary_f"].tolist() == pytest.approx([metrics.boundary_f(o) for o in boundary])
