"""Grids and their geometry go to disk and back, ours and those of others."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upfeat
from upfeat.adapters import DenseGrid, encode_grid, read_grid, write_grid


def model(upsampler="bilinear"):
    torch.manual_seed(0)
    return upfeat.load(torch.nn.Conv2d(3, 6, 14, 14), upsampler=upsampler)


def picture(height, width):
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3))
    return values.astype(np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(14, 60), st.integers(14, 60))
def test_the_grid_covers_the_image_with_whole_patches(height, width):
    grid = encode_grid(model(), picture(height, width))
    rows, columns = -(-height // 14), -(-width // 14)
    assert grid.features.shape == (6, rows, columns)
    assert grid.encoded_size == (14 * rows, 14 * columns)
    assert grid.pad == (14 * rows - height, 14 * columns - width)
    assert grid.upsample(model(), picture(height, width)).shape == (6, height, width)


def test_cells_without_padding_are_those_of_the_backbone():
    made_by, image = model(), picture(30, 44)
    grid = encode_grid(made_by, image)
    whole = made_by.backbone(made_by.preprocess(image[:28, :42]))[0]
    torch.testing.assert_close(grid.features[:, :2, :3], whole)
    exact = encode_grid(made_by, image[:28, :42])
    torch.testing.assert_close(exact.features, whole)
    full = made_by(made_by.preprocess(image[:28, :42]))[0]
    torch.testing.assert_close(exact.upsample(made_by, image[:28, :42]), full)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_grid_has_the_features_of_the_model(passes):
    torch.manual_seed(0)
    made_by = upfeat.load(torch.nn.Conv2d(3, 6, 8, 8), upsampler="bilinear", passes=passes)
    image = picture(40, 56)
    grid = encode_grid(made_by, image)
    full = made_by(made_by.preprocess(image))[0]
    torch.testing.assert_close(grid.upsample(made_by, image), full)
    larger = made_by(made_by.preprocess(image), (80, 112))[0]
    torch.testing.assert_close(grid.upsample(made_by, image, (80, 112)), larger)
    stride = made_by.backbone.stride
    part = encode_grid(made_by, image[:37, :51])  # is padded
    assert part.features.shape == (6, -(-37 // stride), -(-51 // stride))
    assert part.upsample(made_by, image[:37, :51]).shape == (6, 37, 51)


def test_early_layers_are_those_of_the_models_backbone():
    made_by, image = upfeat.load(early=True), picture(64, 96)
    full = made_by(made_by.preprocess(image))[0]
    torch.testing.assert_close(encode_grid(made_by, image).upsample(made_by, image), full)


def test_grid_and_geometry_on_disk(tmp_path):
    grid = encode_grid(model(), picture(30, 44))
    path = write_grid(tmp_path, "slide-1", grid)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["slide-1.meta.json", "slide-1.pt"]
    again = read_grid(path)
    assert torch.equal(again.features, grid.features)
    assert (again.target_size, again.patch_size) == ((30, 44), (14, 14))
    geometry = json.loads((tmp_path / "slide-1.meta.json").read_text())
    assert geometry["grid_shape"] == [3, 4]
    assert geometry["encoded_size"] == [42, 56]
    assert geometry["pad"] == [12, 12]
    half = read_grid(write_grid(tmp_path, "half", grid, "float16"))
    assert half.features.dtype is torch.float16


def test_grids_of_others_are_upsampled(tmp_path):
    """Any channels, any patch, a geometry with one number for both sides."""
    torch.save(torch.randn(20, 4, 4), tmp_path / "x.pt")
    geometry = {"target_size": 60, "patch_size": 16, "encoder_name": "of somebody"}
    (tmp_path / "x.meta.json").write_text(json.dumps(geometry))
    grid = read_grid(tmp_path / "x.pt")
    assert grid.encoded_size == (64, 64)
    made_by = model("detail")
    assert grid.upsample(made_by, picture(60, 60)).shape == (20, 60, 60)
    assert grid.upsample(made_by, picture(60, 60), (30, 30)).shape == (20, 30, 30)
    with pytest.raises(ValueError, match="the grid is of one of"):
        grid.upsample(made_by, picture(60, 61))


def test_a_grid_without_its_geometry_is_not_whole(tmp_path):
    path = write_grid(tmp_path, "a", encode_grid(model(), picture(28, 28)))
    (tmp_path / "a.meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.meta\.json: no such file"):
        read_grid(path)
    (tmp_path / "a.meta.json").write_text("{}")
    with pytest.raises(ValueError, match="no geometry of a grid"):
        read_grid(path)
    (tmp_path / "a.meta.json").write_text('{"target_size": [99, 28], "patch_size": 14}')
    with pytest.raises(ValueError, match="does not cover"):
        read_grid(path)
    with pytest.raises(ValueError, match="float64"):
        write_grid(tmp_path, "b", DenseGrid(torch.zeros(1, 2, 2), (28, 28), (14, 14)), "float64")


def test_a_backbone_of_more_bands_makes_grids_too():
    torch.manual_seed(0)
    bands = upfeat.load_backbone(torch.nn.Conv2d(5, 6, 14, 14), mean=[0.5] * 5, std=[0.2] * 5)
    made_by = upfeat.load(bands, upsampler="bilinear")
    image = np.random.default_rng(0).random((30, 44, 5), np.float32)
    grid = encode_grid(made_by, image)
    expected = made_by.backbone(made_by.preprocess(image[:28, :42]))[0]
    torch.testing.assert_close(grid.features[:, :2, :3], expected)
    assert grid.upsample(made_by, image).shape == (6, 30, 44)


@pytest.mark.parametrize(
    "geometry",
    [
        [],
        {"target_size": 28},
        {"target_size": 28, "patch_size": None},
        {"target_size": [28], "patch_size": 14},
        {"target_size": "28", "patch_size": 14},
        {"target_size": [28.5, 28], "patch_size": 14},
        {"target_size": [28, float("inf")], "patch_size": 14},
        {"target_size": [28, 28], "patch_size": 0},
        {"target_size": [28, 28], "patch_size": -14},
        {"target_size": True, "patch_size": 14},
    ],
    ids=json.dumps,
)
def test_geometries_that_are_none_are_named(tmp_path, geometry):
    path = write_grid(tmp_path, "a", encode_grid(model(), picture(28, 28)))
    (tmp_path / "a.meta.json").write_text(json.dumps(geometry))
    with pytest.raises(ValueError, match=r"a\.meta\.json: no geometry of a grid"):
        read_grid(path)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9, 0.99])
def test_a_grid_that_is_cut_off_is_named(tmp_path, share):
    path = write_grid(tmp_path, "a", encode_grid(model(), picture(28, 28)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a\.pt: not a tensor, or a damaged file"):
        read_grid(path)


@pytest.mark.parametrize("held", [{"features": torch.zeros(1, 2, 2)}, [1, 2], "text"], ids=str)
def test_a_file_that_holds_something_else_is_named(tmp_path, held):
    path = write_grid(tmp_path, "a", encode_grid(model(), picture(28, 28)))
    torch.save(held, path)
    with pytest.raises(ValueError, match=r"a\.pt: holds a \w+, not a tensor"):
        read_grid(path)


@pytest.mark.parametrize(
    ("shape", "target", "patch"),
    [((2, 2), 28, 14), ((1, 2, 3), 28, 14), ((1, 0, 2), (0, 28), 14), ((1, 2, 2), 29, 14)],
)
def test_grids_that_do_not_cover_their_image_are_refused(shape, target, patch):
    sides = (target if isinstance(target, tuple) else (target, target), (patch, patch))
    with pytest.raises(
        ValueError, match=r"features must be \(d, gh, gw\)|does not cover an image|target_size="
    ):
        DenseGrid(torch.zeros(shape), *sides)


def test_what_cannot_be_written_leaves_the_old_grid_whole(tmp_path, fill_disk):
    grid = DenseGrid(torch.full((2, 3, 4), 7e4), (40, 60), (16, 16))
    path = write_grid(tmp_path, "one", grid)
    with pytest.raises(ValueError, match="not written: features hold NaN or infinity in float16"):
        write_grid(tmp_path, "one", grid, dtype="float16")
    small = replace(grid, features=1e-12 * grid.features)
    with pytest.raises(ValueError, match="too small for float16; take float32"):
        write_grid(tmp_path, "one", small, dtype="float16")
    with pytest.raises(TypeError, match="JSON"):
        write_grid(tmp_path, "one", replace(grid, facts={"model": object()}))
    fill_disk()
    with pytest.raises(OSError, match="No space left on device"):
        write_grid(tmp_path, "one", replace(grid, features=grid.features + 1))
    assert torch.equal(read_grid(path).features, grid.features)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", torch.zeros(2, 3, 4).to_sparse(), torch.zeros(2, 1, 1).expand(2, 3, 4)],
)
def test_tensors_that_cannot_be_used_are_one_line(tmp_path, content):
    path = write_grid(tmp_path, "one", DenseGrid(torch.zeros(2, 3, 4), (40, 60), (16, 16)))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"one\.pt: (not a tensor|its tensor (is|repeats))"):
        read_grid(path)


def test_sizes_are_two_whole_numbers():
    with pytest.raises(ValueError, match="patch_size=16 must be"):
        DenseGrid(torch.zeros(2, 3, 4), (40, 60), 16)
    with pytest.raises(ValueError, match="target_size="):
        DenseGrid(torch.zeros(2, 3, 4), (40, 60.5), (16, 16))
    with pytest.raises(TypeError, match="features is of type ndarray; give a tensor"):
        DenseGrid(torch.zeros(2, 3, 4).numpy(), (40, 60), (16, 16))
