"""Scores against hand-computed values and scikit-learn."""

import math

import pytest
import torch

from upfeat.evaluation import metrics


def test_hand_computed():
    label = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 2]])
    matrix = metrics.confusion_matrix(predicted, label, 3)
    assert matrix.tolist() == [[3, 1, 0], [1, 2, 0], [0, 0, 0]]
    iou = metrics.class_iou(matrix)
    assert iou[:2].tolist() == [3 / 5, 2 / 4]
    assert math.isnan(iou[2])
    assert metrics.mean_iou(matrix) == pytest.approx(0.55)
    assert metrics.pixel_accuracy(matrix) == pytest.approx(5 / 7)


def test_a_class_predicted_but_never_labelled_costs_the_others_only():
    label = torch.tensor([[0, 0, 1, 1]])
    matrix = metrics.confusion_matrix(torch.tensor([[0, 2, 1, 1]]), label, 3)
    assert metrics.mean_iou(matrix) == pytest.approx((0.5 + 1) / 2)


def test_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (40, 50), generator=generator)
    label[torch.rand(40, 50, generator=generator) < 0.1] = 255
    predicted = torch.randint(0, 5, (2, 40, 50), generator=generator)
    matrices = metrics.confusion_matrix(predicted, label, 5)
    assert matrices.shape == (2, 5, 5)
    for matrix, guess in zip(matrices, predicted, strict=True):
        pair = label[label != 255].numpy(), guess[label != 255].numpy()
        assert (matrix.numpy() == sklearn.confusion_matrix(*pair)).all()
        assert metrics.pixel_accuracy(matrix) == pytest.approx(sklearn.accuracy_score(*pair))
        expected = sklearn.jaccard_score(*pair, average=None)
        torch.testing.assert_close(metrics.class_iou(matrix), torch.from_numpy(expected))
        expected = sklearn.jaccard_score(*pair, average="macro")
        assert metrics.mean_iou(matrix) == pytest.approx(expected)


def test_perfect_and_shuffled_predictors():
    generator = torch.Generator().manual_seed(0)
    label = (torch.arange(200)[:, None] // 50).expand(200, 200).contiguous()
    perfect = metrics.confusion_matrix(label, label, 4)
    assert (metrics.mean_iou(perfect), metrics.pixel_accuracy(perfect)) == (1.0, 1.0)
    assert metrics.boundary_f(metrics.boundary_counts(label, label, 2)) == 1.0
    shuffled = label.flatten()[torch.randperm(40000, generator=generator)].view(200, 200)
    chance = metrics.confusion_matrix(shuffled, label, 4)
    # Four equal classes: a quarter is right, and of 2/4 - 1/16·4 that each union holds, 1/7.
    assert metrics.pixel_accuracy(chance) == pytest.approx(1 / 4, abs=0.01)
    assert metrics.mean_iou(chance) == pytest.approx(1 / 7, abs=0.01)


@pytest.mark.parametrize("value", [-1, 3])
def test_indices_outside_the_list_are_refused(value):
    label = torch.tensor([[0, value]])
    with pytest.raises(ValueError, match="label has indices"):
        metrics.confusion_matrix(torch.zeros(1, 2, dtype=torch.long), label, 3)
    with pytest.raises(ValueError, match="predicted has indices"):
        metrics.confusion_matrix(label, torch.zeros(1, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="bring the prediction"):
        metrics.confusion_matrix(torch.zeros(2, 2), torch.zeros(3, 2), 3)


def test_boundary_f_by_hand():
    label = torch.zeros(9, 12, dtype=torch.long)
    label[:, 6:] = 1  # edge pixels: columns 5 and 6
    assert metrics.edges(label).sum(0).tolist() == [0] * 5 + [9, 9] + [0] * 5
    moved = torch.zeros_like(label)
    moved[:, 8:] = 1  # columns 7 and 8
    # One column is near enough at distance 1, both at distance 3.
    assert metrics.boundary_counts(moved, label, 1).tolist() == [9, 18, 9, 18]
    assert metrics.boundary_f(metrics.boundary_counts(moved, label, 1)) == 0.5
    assert metrics.boundary_f(metrics.boundary_counts(moved, label, 3)) == 1.0
    assert metrics.boundary_f(metrics.boundary_counts(torch.zeros_like(label), label, 3)) == 0
    assert math.isnan(metrics.boundary_f(metrics.boundary_counts(moved, label * 0, 3)))


def test_ignored_pixels_make_no_edges():
    label = torch.zeros(5, 8, dtype=torch.long)
    label[:, 4:] = 255
    assert not metrics.edges(label, label != 255).any()
    predicted = torch.zeros(5, 8, dtype=torch.long)
    predicted[:, 6:] = 1
    assert metrics.boundary_counts(predicted, label, 2).tolist() == [0, 0, 0, 0]
    assert (metrics.near_edges(label, 2) == 255).all()


def test_edges_beside_ignored_pixels_are_not_judged():
    label = torch.zeros(6, 24, dtype=torch.long)
    label[:, 6:8] = 255  # hides where class 0 becomes class 1
    label[:, 8:] = 1
    label[:, 16:] = 0  # edge pixels: columns 15 and 16
    guess = torch.zeros_like(label)
    guess[:, 9:16] = 1  # edge pixels: columns 8 and 9, beside the hidden edge; and 15 and 16
    assert metrics.boundary_counts(guess, label, 2).tolist() == [12, 12, 12, 12]
    # At distance 1, column 9 is two from the ignored ones: far enough to be wrong.
    assert metrics.boundary_counts(guess, label, 1).tolist() == [12, 18, 12, 12]
    guess[:, 11:16] = 0  # now edges at 8, 9, 10 and 11, none of them near the true one
    assert metrics.boundary_counts(guess, label, 2).tolist() == [0, 12, 0, 12]


def test_a_prediction_hidden_by_ignored_pixels_is_not_missed():
    label = torch.zeros(4, 12, dtype=torch.long)
    label[:, 4:] = 1  # edge pixels: columns 3 and 4
    label[:, 5] = 255
    guess = torch.zeros_like(label)
    guess[:, 5:] = 1  # its edge, columns 4 and 5, is half ignored
    assert metrics.boundary_counts(guess, label, 1).tolist() == [0, 0, 4, 4]
    assert metrics.boundary_counts(guess, label, 2).tolist() == [0, 0, 0, 0]


def test_scenes_without_ignored_pixels_count_every_edge():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (9, 11), generator=generator)
    guess = torch.randint(0, 3, (2, 9, 11), generator=generator)
    counts = metrics.boundary_counts(guess, label, 1)
    assert counts[:, 1].tolist() == metrics.edges(guess).flatten(1).sum(1).tolist()
    assert counts[:, 3].tolist() == [int(metrics.edges(label).sum())] * 2


def test_within_is_a_square_window():
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[3, 3] = True
    assert metrics.within(mask, 2).sum() == 25
    assert metrics.edge_distance((336, 224)) == 3
    assert metrics.edge_distance((8, 8)) == 1


def test_depth_by_hand():
    depth = torch.tensor([[1.0, 2.0], [4.0, math.nan]])
    predicted = torch.tensor([[1.0, 3.0], [4.0, 9.0]])
    scores = metrics.depth_scores(metrics.depth_errors(predicted, depth))
    assert float(scores["rmse"]) == pytest.approx(math.sqrt(1 / 3))
    assert float(scores["abs_rel"]) == pytest.approx(1 / 6)
    assert float(scores["delta_1.25"]) == pytest.approx(2 / 3)


def test_depth_alignment_undoes_scale_and_shift():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(8, 9, generator=generator) + 1
    depth[2, 3] = math.nan
    known = torch.isfinite(depth)
    aligned = metrics.align_depth(-3 * depth.nan_to_num() + 7, depth)
    torch.testing.assert_close(aligned[known], depth[known].double())
    flat = metrics.align_depth(torch.ones(8, 9), depth)
    torch.testing.assert_close(flat, depth[known].double().mean().expand(8, 9))
