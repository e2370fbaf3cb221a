"""Snapshots: whether tensors are what they were, whatever happened to them."""

import pytest
import torch

from upfeat.snapshots import Snapshot, watched


def made(inference=False):
    with torch.inference_mode(inference):
        return [torch.zeros(3), torch.ones(2, 2)]


CHANGES = {
    "in place": lambda tensors: tensors[0].add_(1),
    "through a view": lambda tensors: tensors[1][0].mul_(2),
    "through the transpose": lambda tensors: tensors[1].T.zero_(),
    "by copying": lambda tensors: tensors[0].copy_(torch.ones(3)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_values_are_seen(change, inference):
    tensors = made(inference)
    snapshot = Snapshot(tensors)
    assert snapshot.holds(tensors)
    assert snapshot.holds(list(tensors))
    with torch.inference_mode(inference):
        CHANGES[change](tensors)
    assert not snapshot.holds(tensors)


@pytest.mark.parametrize("inference", [False, True])
def test_other_tensors_of_equal_values_are_others(inference):
    tensors = made(inference)
    snapshot = Snapshot(tensors)
    assert not snapshot.holds(made(inference))
    assert not snapshot.holds(tensors[::-1])
    assert not snapshot.holds(tensors[:1])
    assert not snapshot.holds([*tensors, torch.zeros(1)])
    assert Snapshot([]).holds([])


def test_a_change_taken_back_is_a_change_of_what_counts_changes_and_none_of_inference():
    counted, uncounted = made(), made(inference=True)
    snapshots = Snapshot(counted), Snapshot(uncounted)
    for tensors in (counted, uncounted):
        with torch.inference_mode(tensors is uncounted):
            tensors[0].add_(1).sub_(1)
    assert not snapshots[0].holds(counted)  # another map may have been made between
    assert snapshots[1].holds(uncounted)


def test_what_autograd_records_is_told():
    tensors = made()
    plain = Snapshot(tensors)
    tensors[0].requires_grad_()
    assert watched(tensors)
    assert not plain.holds(tensors)
    recorded = Snapshot(tensors)
    assert recorded.holds(tensors)
    with torch.no_grad():
        assert not watched(tensors)
        assert not recorded.holds(tensors)
        assert plain.holds(tensors)


def test_a_step_of_an_optimiser_is_seen():
    layer = torch.nn.Linear(2, 2)
    snapshot = Snapshot(list(layer.parameters()))
    layer(torch.ones(2)).sum().backward()
    assert snapshot.holds(list(layer.parameters()))
    with torch.no_grad():  # as optimisers do
        layer.weight.sub_(layer.weight.grad)
    assert not snapshot.holds(list(layer.parameters()))
