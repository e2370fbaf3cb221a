"""Files appear whole or not at all; one colour means one thing in every panel."""

import pytest
import torch
from PIL import Image

from upfeat.storage import read_tensors, replacing, write_bytes, write_tensors
from upfeat.visualize import PCABasis, comparison, side_by_side


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6.0).half()}, {"who": "me"})
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6.0).half())
    assert metadata == {"who": "me"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "none")


@pytest.mark.parametrize("channels", [1, 2, 3, 40])
def test_basis_is_shared_and_stable(channels):
    features = torch.randn(channels, 6, 5)
    basis = PCABasis(features)
    colours = basis.colours(basis.project(features))
    assert colours.shape == (3, 6, 5)
    assert colours.min() >= 0
    assert colours.max() <= 1
    crop = basis.colours(basis.project(features[:, 2:4]))
    torch.testing.assert_close(crop, colours[:, 2:4], rtol=1e-4, atol=1e-4)


def test_constant_features_do_not_divide_by_zero():
    basis = PCABasis(torch.ones(8, 3, 3))
    assert torch.isfinite(basis.colours(basis.project(torch.ones(8, 3, 3)))).all()
    assert torch.isfinite(PCABasis(torch.ones(4, 1, 1)).low).all()


def test_comparison_has_four_panels():
    picture = comparison(torch.rand(3, 48, 64), torch.randn(7, 3, 4), torch.randn(7, 48, 64))
    assert picture.width > 4 * 320
    assert picture.height > 240
    wide = side_by_side([("a long caption below a narrow picture", Image.new("RGB", (4, 400)))])
    assert wide.width > 100
