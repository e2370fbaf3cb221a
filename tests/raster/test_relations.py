"""Relations between two computations of one map: by every command, kind of mask, and tile size."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import upfeat
from upfeat.cli import main
from upfeat.heads import SavedHead, describe_backbone, save_head

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("zarr", "3.0")

from raster.test_raster import picture, staged, tiny, upsample, values_of, write  # noqa: E402

HOLE = (slice(40, 90), slice(60, 130))


def test_a_head_says_the_same_by_every_command(tmp_path):
    """Of a raster of whole tiles, a photograph, and a frame of a video without loss."""
    av = pytest.importorskip("av")
    model, values = upfeat.load(), picture(256, 256)
    pixels = np.ascontiguousarray(values.transpose(1, 2, 0))
    torch.manual_seed(0)
    head = SavedHead(
        torch.randn(3, 112), torch.randn(3), ["x", "y", "z"], "classes",
        describe_backbone(model.backbone), model.upsampler.name,
    )  # fmt: skip
    save_head(tmp_path / "head.safetensors", head)
    write(tmp_path / "a.tif", values)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 256, 256, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    for command, source, out in (
        ("raster", "a.tif", "classes.tif"),
        ("run", "a.png", "run"),
        ("extract", "a.png", "set"),
        ("extract", "a.mkv", "video"),
    ):
        shared = ["-o", str(tmp_path / out), "--head", str(tmp_path / "head.safetensors")]
        assert main([command, str(tmp_path / source), *shared]) == 0
    with torch.no_grad():
        expected = model.lazy(model.preprocess(pixels)).project(head.weight, head.bias)[0]
    assert np.array_equal(values_of(tmp_path / "classes.tif")[0], expected.argmax(0).numpy())
    for name in ("run/a", "set/a.png", "video/a.mkv/000000"):
        said = load_file(tmp_path / f"{name}.safetensors")["features"]
        assert torch.equal(said, expected.half()), name


@pytest.mark.parametrize("make", [tiny, staged])
def test_every_kind_of_mask_hides_the_same(tmp_path, make):
    """A no-data value, NaN, a mask in the file or beside it, and a band of transparency."""
    model, values = make(), picture()
    values[values == 7] = 8
    valid = np.full(values.shape[1:], 255, np.uint8)
    valid[HOLE] = 0
    marked = np.where(valid, values, np.uint8(7))
    floats = np.where(valid, values / np.float32(255), np.float32(np.nan))
    deep = np.where(valid, values, np.int16(-32768))
    paths = {
        "nodata": write(tmp_path / "nodata.tif", marked, nodata=7),
        "int16": write(tmp_path / "int16.tif", deep, nodata=-32768),
        "nan": write(tmp_path / "nan.tif", floats),
        "alpha": write(tmp_path / "alpha.tif", np.concatenate([values, valid[None]])),
    }
    with rasterio.open(paths["alpha"], "r+") as file:
        names = ("red", "green", "blue", "alpha")
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in names]
    for name, inside in (("inside", True), ("beside", False)):
        paths[name] = write(tmp_path / f"{name}.tif", values)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(paths[name], "r+") as file:
            file.write_mask(valid)
    scales = {"int16": (0, 255), "nan": (0, 1)}
    outs = {
        name: values_of(upsample(path, tmp_path / f"{name}.zarr", model, scale=scales.get(name)))
        for name, path in paths.items()
    }
    expected = outs.pop("nodata")
    assert np.array_equal(np.isnan(expected[0]), valid == 0)
    for name, out in outs.items():
        np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("make", [tiny, staged, lambda: tiny("neighbourhood")])
def test_holes_are_filled_alike_in_tiles_of_any_size(tmp_path, make):
    model, values = make(), picture(300, 420)
    blocks = np.random.default_rng(0).random((6, 9)) < 0.4
    values[values == 255] = 254
    values[:, np.kron(blocks, np.ones((50, 50), bool))[:300, :420]] = 255
    path = write(tmp_path / "scene.tif", values, nodata=255)
    small, large = (
        values_of(upsample(path, tmp_path / f"{side}.zarr", model, tile=side)) for side in (64, 512)
    )
    np.testing.assert_allclose(small, large, atol=2e-5)
    assert np.array_equal(np.isnan(small[0]), (values[0] == 255))


@pytest.mark.parametrize("name", ["out.tif", "out.zarr"])
@pytest.mark.parametrize(
    "transform",
    [(10, 0, 5, 0, 10, 7), (-10, 0, 5, 0, -10, 7), (7, 7, 0, 7, -7, 0), (10, 0, 5, 0, -3.5, 7)],
    ids=["south up", "west right", "rotated", "pixels that are not square"],
)
def test_a_place_does_not_change_pixels(tmp_path, transform, name):
    model, place = tiny(), rasterio.Affine(*transform)
    plain = upsample(write(tmp_path / "plain.tif", picture()), tmp_path / "plain.zarr", model)
    path = write(tmp_path / "scene.tif", picture(), transform=place)
    out = upsample(path, tmp_path / name, model)
    assert np.array_equal(values_of(out), values_of(plain))
    if name == "out.tif":
        with rasterio.open(out) as file:
            assert file.transform == place
        return
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("rioxarray")
    assert xarray.open_zarr(out).rio.transform().almost_equals(place)
