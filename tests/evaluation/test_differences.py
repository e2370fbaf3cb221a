"""Differences between rows, and the paired bootstrap over images."""

import math
from statistics import NormalDist

import pytest
import torch

from upfeat.evaluation import metrics
from upfeat.evaluation.differences import LEAST, find_differences, pack_sums, tail, unpack_sums
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


def test_intervals_of_few_images_contain_the_truth_as_often_as_they_say():
    """The middle 95 % of the drawn sets contain it in 86 % of such test sets."""
    generator = torch.Generator().manual_seed(0)
    inside, tries = 0, 400
    for _ in range(tries):
        base = torch.randint(0, 60, (8, 1), generator=generator)
        noise = torch.randn(8, 1, generator=generator) * 3
        mine = base + 5 + noise.round().long()
        found = find_differences(
            [row("bilinear", base + 10), row("a", mine + 10)], scores_of, {"rate": True}
        )
        inside += found[1].low <= 0.5 <= found[1].high
    assert 0.92 <= inside / tries <= 0.98


@pytest.mark.parametrize("count", [5, 6, 8, 20, 100, 10000])
def test_the_interval_is_that_of_student(count):
    student = pytest.importorskip("scipy.stats").t.ppf(0.975, count - 1)
    deviations = -NormalDist().inv_cdf(tail(count)) * math.sqrt((count - 1) / count)
    assert deviations == pytest.approx(student, rel=3e-3)


@pytest.mark.parametrize("count", [1, 2, LEAST - 1])
def test_no_interval_is_given_for_too_few_images(count):
    """Every drawn set of one image is this image, so its difference seemed certain."""
    base = draws(0.4, images=count)
    found = find_differences([row("bilinear", base), row("a", base + 1)], scores_of, {"rate": True})
    assert [(one.certain, one.to_json()["low"], one.to_json()["high"]) for one in found] == [
        (False, None, None)
    ] * 2


def test_pairs_that_share_images_are_not_taken_for_independent():
    """Images that are better or worse in all of their pairs; draws of pairs cover 0 in half."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(one, other) for one in range(12) for other in range(12) if one != other]
    inside, tries = 0, 60
    for _ in range(tries):
        there, back = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        gains = torch.tensor([there[one] + back[other] for one, other in pairs])
        counts = torch.full_like(gains, 10)
        rows = []
        for name, hits in (("bilinear", counts * 0), ("a", gains)):
            sums = torch.stack([hits, counts], dim=-1)[:, None]
            scores = {"rate": scores_of(sums.sum(0))["rate"].tolist()}
            rows.append(Row(name, "own", "", scores, sums=pack_sums(sums, pairs)))
        found = find_differences(rows, scores_of, {"rate": True}, rounds=300)
        inside += found[1].low <= 0 <= found[1].high
    assert inside / tries >= 0.9


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
