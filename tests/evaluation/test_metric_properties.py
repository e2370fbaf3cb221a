"""Scores against their definitions, pixel by pixel, on label and depth maps of any size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upfeat.evaluation import metrics
from upfeat.evaluation.differences import LEAST, find_differences, pack_sums, tail
from upfeat.evaluation.results import Row

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**32)
few = settings(max_examples=40, deadline=None)


def draw_maps(seed, size, classes, ignored=0.0):
    """A label with ignored pixels, and a prediction that often agrees with it."""
    random = np.random.default_rng(seed)
    label = random.integers(0, classes, size)
    guess = np.where(random.random(size) < 0.5, label, random.integers(0, classes, size))
    label[random.random(size) < ignored] = 255
    return torch.from_numpy(guess), torch.from_numpy(label)


def pixels(mask):
    return set(map(tuple, mask.nonzero().tolist()))


@few
@given(SEEDS, SIZES, st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_every_pixel_is_counted_once(seed, size, classes, ignored):
    guess, label = draw_maps(seed, size, classes, ignored)
    expected = [[0] * classes for _ in range(classes)]
    for true, predicted in zip(label.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if true != 255:
            expected[true][predicted] += 1
    matrix = metrics.confusion_matrix(guess, label.to(torch.uint8), classes)
    assert matrix.tolist() == expected


@few
@given(SEEDS, SIZES, st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_intersection_over_union_and_accuracy_are_those_of_sets(seed, size, classes, ignored):
    guess, label = draw_maps(seed, size, classes, ignored)
    matrix = metrics.confusion_matrix(guess, label, classes)
    counted = pixels(label != 255)
    ious = []
    for index, found in enumerate(metrics.class_iou(matrix).tolist()):
        true, predicted = pixels(label == index), pixels(guess == index) & counted
        if true:
            ious.append(len(true & predicted) / len(true | predicted))
            assert found == pytest.approx(ious[-1])
        else:
            assert math.isnan(found)
    right = len(pixels(guess == label)) / len(counted) if counted else math.nan
    assert metrics.pixel_accuracy(matrix) == pytest.approx(right, nan_ok=True)
    mean = sum(ious) / len(ious) if ious else math.nan
    assert metrics.mean_iou(matrix) == pytest.approx(mean, nan_ok=True)


@few
@given(SEEDS, SIZES)
def test_classes_in_another_order_have_the_same_scores(seed, size):
    guess, label = draw_maps(seed, size, 4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed % 2**31))
    matrix = metrics.confusion_matrix(guess, label, 4)
    other = metrics.confusion_matrix(order[guess], order[label], 4)
    assert metrics.mean_iou(other) == pytest.approx(metrics.mean_iou(matrix), nan_ok=True)
    assert metrics.pixel_accuracy(other) == metrics.pixel_accuracy(matrix)
    assert torch.equal(
        metrics.boundary_counts(order[guess], order[label], 1),
        metrics.boundary_counts(guess, label, 1),
    )


def edge_pixels(label, valid):
    """Pixels with a neighbour of another class, both valid."""
    height, width = label.shape
    found = set()
    for y in range(height):
        for x in range(width):
            for other in ((y + 1, x), (y, x + 1)):
                inside = other[0] < height and other[1] < width
                if inside and label[y, x] != label[other] and valid[y, x] and valid[other]:
                    found |= {(y, x), other}
    return found


def near(place, places, distance):
    return any(max(abs(place[0] - y), abs(place[1] - x)) <= distance for y, x in places)


@few
@given(SEEDS, SIZES, st.sampled_from([0.0, 0.1, 0.4]), st.integers(1, 3))
def test_boundaries_are_counted_as_they_are_defined(seed, size, ignored, distance):
    guess, label = draw_maps(seed, size, 2, ignored)
    valid = label != 255
    true, drawn = edge_pixels(label, valid), edge_pixels(guess, torch.ones_like(valid))
    hidden = pixels(~valid)
    counted = [
        {place for place in edges if not near(place, hidden, distance)} for edges in (drawn, true)
    ]
    expected = []
    for mine, theirs in zip(counted, (true, drawn), strict=True):
        expected += [sum(near(place, theirs, distance) for place in mine), len(mine)]
    assert metrics.boundary_counts(guess, label, distance).tolist() == expected
    assert pixels(metrics.edges(label, valid)) == true
    band = metrics.near_edges(label, distance)
    assert pixels(band != 255) == {one for one in pixels(valid) if near(one, true, distance)}
    found = metrics.boundary_f(torch.tensor(expected))
    hits, guessed, met, edges = expected
    if edges:
        precision, recall = hits / max(guessed, 1), met / edges
        assert found == pytest.approx(2 * precision * recall / max(precision + recall, 1e-9))
    else:
        assert math.isnan(found)


@few
@given(SEEDS, SIZES, st.integers(1, 3))
def test_boundary_f_is_the_same_both_ways(seed, size, distance):
    guess, label = draw_maps(seed, size, 3)
    there, back = (
        metrics.boundary_f(metrics.boundary_counts(*pair, distance))
        for pair in ((guess, label), (label, guess))
    )
    # Where one of them has no edge at all it is 0 one way and not defined the other.
    assert there == pytest.approx(back, nan_ok=True) or {there, back} & {0.0}


@few
@given(SEEDS, SIZES, st.integers(0, 3))
def test_a_window_around_set_pixels_is_a_dilation(seed, size, distance):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = np.random.default_rng(seed).random((2, *size)) < 0.2
    side = 2 * distance + 1
    expected = ndimage.binary_dilation(mask, np.ones((1, side, side)))
    found = metrics.within(torch.from_numpy(mask), distance)
    assert (found.numpy() == expected).all()


def draw_depth(seed, size, unknown=0.2):
    random = np.random.default_rng(seed)
    depth = random.uniform(0.5, 9, size)
    depth[random.random(size) < unknown] = math.nan
    depth.flat[:2] = (1, 2)  # two at least
    return torch.from_numpy(random.normal(2, 3, size)), torch.from_numpy(depth)


DEPTH_SIZES = st.tuples(st.integers(2, 9), st.integers(1, 9))


@few
@given(SEEDS, DEPTH_SIZES)
def test_depth_is_aligned_by_least_squares(seed, size):
    predicted, depth = draw_depth(seed, size)
    known = ~depth.isnan()
    x, y = predicted[known].numpy(), depth[known].numpy()
    design = np.stack([x, np.ones_like(x)], 1)
    slope, shift = np.linalg.lstsq(design, y, rcond=None)[0]
    aligned = metrics.align_depth(predicted, depth)
    expected = slope * predicted + shift
    tolerance = 1e-8 * (1 + float(expected.abs().max()))
    torch.testing.assert_close(aligned, expected, rtol=0, atol=tolerance)
    again = metrics.align_depth(7 - 3 * predicted, depth)
    torch.testing.assert_close(again, aligned, rtol=0, atol=tolerance)


@few
@given(SEEDS, DEPTH_SIZES)
def test_depth_errors_are_sums_over_known_pixels(seed, size):
    predicted, depth = draw_depth(seed, size)
    pairs = [
        (guess, true)
        for guess, true in zip(predicted.flatten().tolist(), depth.flatten().tolist(), strict=True)
        if not math.isnan(true)
    ]
    close = sum(guess > 0 and max(guess / true, true / guess) < 1.25 for guess, true in pairs)
    scores = metrics.depth_scores(metrics.depth_errors(predicted, depth))
    squares = [(guess - true) ** 2 for guess, true in pairs]
    assert float(scores["rmse"]) == pytest.approx(math.sqrt(sum(squares) / len(pairs)))
    relative = [abs(guess - true) / true for guess, true in pairs]
    assert float(scores["abs_rel"]) == pytest.approx(sum(relative) / len(pairs))
    assert float(scores["delta_1.25"]) == pytest.approx(close / len(pairs))
    halves = [
        metrics.depth_errors(predicted[rows], depth[rows]) for rows in (slice(1), slice(1, None))
    ]
    torch.testing.assert_close(sum(halves), metrics.depth_errors(predicted, depth))


def test_depth_of_no_known_pixel_has_no_score():
    nowhere = torch.full((2, 3), math.nan)
    scores = metrics.depth_scores(metrics.depth_errors(torch.ones(2, 3), nowhere))
    assert all(math.isnan(value) for value in scores.values())


def rate(sums):
    return {"rate": sums[..., 0] / sums[..., 1]}


def row_of(name, sums):
    return Row(name, "own", "", {"rate": rate(sums.sum(0))["rate"].tolist()}, sums=pack_sums(sums))


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(LEAST, 12), st.integers(1, 3))
def test_the_bootstrap_is_that_of_a_loop_over_drawn_sets(seed, images, seeds):
    generator = torch.Generator().manual_seed(seed % 2**31)
    counts = torch.randint(1, 9, (2, images, seeds, 2), generator=generator).double()
    rows = [row_of(name, sums) for name, sums in zip(("bilinear", "a"), counts, strict=True)]
    found = find_differences(rows, rate, {"rate": True}, rounds=50, seed=3)
    (one,) = (each for each in found if each.upsampler == "a")
    places = torch.randint(images, (50, images), generator=torch.Generator().manual_seed(3))
    base, mine = ([rate(sums[drawn].sum(0))["rate"] for drawn in places] for sums in counts)
    gains = [float((m - b).mean()) for b, m in zip(base, mine, strict=True)]
    edges = tail(images), 1 - tail(images)
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(gains, edges)), abs=1e-9)
    assert one.certain == (one.low > 0 or one.high < 0)
    again = find_differences(rows, rate, {"rate": True}, rounds=50, seed=3)
    assert again == found


def test_rows_that_are_alike_do_not_differ():
    sums = torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]]], dtype=torch.float64).repeat(3, 1, 1)
    found = find_differences(
        [row_of(name, sums) for name in ("bilinear", "a")], rate, {"rate": True}
    )
    assert [(one.low, one.high, one.mean, one.certain) for one in found] == [(0, 0, 0, False)] * 2


def test_scores_that_no_drawn_set_has_are_left_open():
    """As the boundaries of a set whose labels have none: JSON knows no NaN."""
    nothing = torch.zeros(LEAST, 2, 2, dtype=torch.float64)
    one, _ = find_differences(
        [row_of(name, nothing) for name in ("bilinear", "a")], rate, {"rate": True}
    )
    assert not one.certain
    content = one.to_json()
    assert (content["low"], content["high"], content["mean"]) == (None, None, None)
    assert content["values"] == [None, None]


def test_a_difference_in_sets_of_which_some_have_no_score_is_that_of_the_others():
    sums = torch.tensor([[[0.0, 0.0]], [[2.0, 4.0]]], dtype=torch.float64).repeat(3, 1, 1)
    gain = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)
    better = sums + gain.repeat(3, 1, 1)
    one, _ = find_differences([row_of("a", better), row_of("bilinear", sums)], rate, {"rate": True})
    assert (one.low, one.high) == (0.25, 0.25)
