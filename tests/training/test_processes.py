"""Processes that train together do what one does."""

import pytest
import torch
from training.small import log, small_config, weights, write_photographs
from training.test_resume import run_children

from upfeat.training.processes import Processes
from upfeat.training.trainer import Trainer


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    run_children("together", write_photographs(folder / "photos"), folder)
    return folder


@pytest.mark.parametrize("divided", ["two", "four"])
def test_processes_have_the_gradient_of_one_with_the_whole_batch(done, divided):
    whole, parts = torch.load(done / "one"), torch.load(done / divided)
    assert len(whole) > 5
    largest = max(one.abs().max().item() for one in whole)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6 * largest)


def test_two_processes_run_as_one_that_accumulates_two_parts(done):
    """With everything drawn: views, projections, dropout."""
    for kind in ("", "-detail"):
        assert log(done / f"alone{kind}") == log(done / f"shared{kind}")
        assert weights(done / f"alone{kind}") == weights(done / f"shared{kind}")


def test_batches_that_cannot_be_divided(backbone, tmp_path):
    three = Processes(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size=4 cannot be divided evenly over 3 processes"):
        Trainer([backbone], small_config(tmp_path / "run", batch_size=4), three)
