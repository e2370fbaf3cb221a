"""Rasters of any kind show the backbone the same picture; bad options are refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("zarr", "3.0")

from raster.test_raster import facts, picture, values_of, whole, write  # noqa: E402

import upfeat  # noqa: E402
from upfeat.raster import Features, Scene, make_plan, upsample_raster  # noqa: E402
from upfeat.types import Window  # noqa: E402

SIDE = (40, 56)
ALL = Window(0, 0, *SIDE)


def shown(path, **options):
    """The picture of a whole raster, and where it is valid."""
    with Scene(path, **options) as scene:
        image, valid = scene.read(ALL)
        return image.numpy(), valid.numpy()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_a_band_of_any_type_is_the_same_picture(tmp_path, dtype):
    values = picture(*SIDE)
    path = write(tmp_path / "scene.tif", values.astype(dtype))
    image, valid = shown(path, scale=(0, 255))
    np.testing.assert_allclose(image, values / 255, atol=1e-6)
    assert valid.all()
    image, _ = shown(path)  # the 2nd and 98th percentile of each band
    low, high = np.percentile(values, (2, 98), axis=(1, 2))[..., None, None]
    np.testing.assert_allclose(image, np.clip((values - low) / (high - low), 0, 1), atol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_large_numbers_keep_their_last_digits(tmp_path, dtype):
    """Seconds since 1970, or places in millimetres: float32 would not tell them apart."""
    values = picture(*SIDE)
    path = write(tmp_path / "scene.tif", values.astype(dtype) + dtype_(dtype, 1_700_000_000))
    image, _ = shown(path, scale=(1_700_000_000, 1_700_000_255))
    np.testing.assert_allclose(image, values / 255, atol=1e-6)


def dtype_(dtype, value):
    return np.dtype(dtype).type(value)


@pytest.mark.parametrize("value", [0, 7, 2_000_000_000])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_a_band_of_one_value_is_black(tmp_path, dtype, value):
    path = write(tmp_path / "scene.tif", np.full((3, *SIDE), value, dtype))
    image, valid = shown(path)
    assert valid.all()
    assert not image.any()


def test_a_pixel_is_valid_where_all_its_bands_are(tmp_path):
    values = picture(*SIDE).astype(np.float32)
    values[0, 3, 4], values[1, 5, 6], values[2, 7, 8], values[1, 9, 9] = -1, np.nan, np.inf, -np.inf
    path = write(tmp_path / "scene.tif", values, nodata=-1)
    image, valid = shown(path)
    assert np.argwhere(~valid).tolist() == [[3, 4], [5, 6], [7, 8], [9, 9]]
    assert np.isfinite(image).all()
    filled = image[:, ~valid]
    np.testing.assert_array_equal(filled, np.repeat(filled[:, :1], 4, axis=1))
    np.testing.assert_allclose(filled[:, 0], image[:, valid].mean(1), atol=1e-5)


def test_bands_are_chosen_in_their_order(tmp_path):
    values = picture(*SIDE, bands=13)
    path = write(tmp_path / "scene.tif", values)
    image, _ = shown(path, bands=[8, 4, 3])
    np.testing.assert_allclose(image, values[[7, 3, 2]] / 255, atol=1e-6)
    grey, _ = shown(path, bands=[13])
    np.testing.assert_array_equal(grey, np.repeat(grey[:1], 3, axis=0))
    pairs = [(0, 100), (50, 60), (10, 300)]
    image, _ = shown(path, bands=[1, 2, 3], scale=pairs)
    low, high = np.array(pairs, np.float32).T[..., None, None]
    np.testing.assert_allclose(image, np.clip((values[:3] - low) / (high - low), 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "names", [("blue", "green", "red", "alpha"), ("blue", "green", "red", "alpha", "undefined")]
)
def test_colours_are_found_by_their_names_and_transparency_is_a_mask(tmp_path, names):
    values = picture(*SIDE, bands=len(names))
    values[3] = 255
    values[3, :9] = 0
    path = write(tmp_path / "scene.tif", values)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in names]
    image, valid = shown(path)
    np.testing.assert_allclose(image[:, 9:], values[[2, 1, 0], 9:] / 255, atol=1e-6)
    np.testing.assert_array_equal(valid, values[3] > 0)


@settings(max_examples=30, deadline=None)
@given(
    top=st.integers(0, SIDE[0] + 9),
    left=st.integers(0, SIDE[1] + 9),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
)
def test_a_window_is_the_part_of_the_whole_and_repeats_its_edge(
    scene_file, top, left, height, width
):
    window = Window(top, left, height, width)
    with Scene(scene_file) as scene:
        image, valid = scene.read(window)
        everything, all_valid = scene.read(ALL)
        assert torch.equal(scene.read_valid(window), valid)
    rows = torch.arange(top, top + height).clamp(max=SIDE[0] - 1)
    columns = torch.arange(left, left + width).clamp(max=SIDE[1] - 1)
    assert torch.equal(image, everything[:, rows][:, :, columns])
    assert torch.equal(valid, all_valid[rows][:, columns])


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory):
    values = picture(*SIDE)
    values[:, 10:14, -3:] = 9
    return write(tmp_path_factory.mktemp("scene") / "scene.tif", values, nodata=9)


FAR = 1e39  # beyond float32


@pytest.mark.parametrize(
    "scale",
    [
        (5, 5),
        (5, 4),
        (0, np.nan),
        (0, np.inf),
        (-np.inf, 0),
        (0, FAR),
        (0, 1e-320),
        (1, 2, 3),
        ("low", "high"),
        7,
        [(0, 1), (0, 1)],
        [(0, 1), (0, 1), (1, 0)],
        [(0, 1), (0, 1), (0,)],
    ],
    ids=str,
)
def test_a_scale_is_two_numbers_or_a_pair_for_each_band(scene_file, scale):
    with pytest.raises(ValueError, match=r"must be \(low, high\), two finite numbers"):
        Scene(scene_file, scale=scale)


@pytest.mark.parametrize(
    "bands",
    [[], [1, 2], [0, 1, 2], [1, 2, 4], [1.5, 2, 3], [True, 2, 3], ["1", 2, 3], 2, "123", [[1]]],
    ids=str,
)
def test_bands_are_one_or_three_that_there_are(scene_file, bands):
    with pytest.raises(ValueError, match="must be three bands or one, each from 1 to 3"):
        Scene(scene_file, bands=bands)


def test_complex_numbers_are_no_picture(tmp_path):
    path = write(tmp_path / "radar.tif", picture(*SIDE).astype(np.complex64))
    with pytest.raises(ValueError, match=r"radar\.tif: holds complex numbers"):
        Scene(path)


@pytest.mark.parametrize("stride", [3, 7, 12, 14, 16, 56])
def test_tiles_of_any_stride_are_stored_and_go_on(tmp_path, stride):
    """Patches of 14 pixels, as DINOv2's: their tiles are no multiple of the store's chunks."""
    torch.manual_seed(0)
    model = upfeat.load(torch.nn.Conv2d(3, 4, stride, stride), upsampler="bilinear")
    path = write(tmp_path / "scene.tif", picture(150, 205))
    what = Features(4, facts(model), "float32")
    with Scene(path) as scene:
        for tile in (None, 60):
            plan = make_plan(scene.size, model, what, tile=tile)
            side = plan.tile * stride
            assert make_plan(scene.size, model, what, tile=side).tile == plan.tile
            assert tile is None or side <= max(tile, stride)
            out = tmp_path / f"{tile}.zarr"
            upsample_raster(scene, out, model, what, plan)
            expected = whole(path, model)
            close = {"rtol": 0, "atol": 2e-5 * np.abs(expected).max()}
            np.testing.assert_allclose(values_of(out), expected, **close)


def test_a_palette_is_seen_in_its_colours(tmp_path):
    from rasterio.shutil import copy

    indices = np.arange(40 * 56, dtype=np.uint8).reshape(1, *SIDE) % 7
    colours = np.random.default_rng(0).integers(0, 256, (256, 4)).astype(np.uint8)
    colours[:, 3] = 255
    colours[5, 3] = 0  # a transparent colour
    path = write(tmp_path / "scene.tif", indices)
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {index: tuple(map(int, one)) for index, one in enumerate(colours)})
    with rasterio.open(path) as file:
        assert file.colormap(1)[5] == (*map(int, colours[5, :3]), 255)  # GeoTIFF has no such thing
    image, valid = shown(path)
    assert valid.all()
    np.testing.assert_allclose(image, colours[indices[0], :3].transpose(2, 0, 1) / 255, atol=1e-6)
    with rasterio.open(path) as file:
        copy(file, tmp_path / "scene.vrt", driver="VRT")
    text = (tmp_path / "scene.vrt").read_text()
    entry = '<Entry c1="{}" c2="{}" c3="{}" c4="{}" />'.format
    (tmp_path / "scene.vrt").write_text(
        text.replace(entry(*colours[5, :3], 255), entry(*colours[5, :3], 0))
    )
    image, valid = shown(tmp_path / "scene.vrt")
    np.testing.assert_array_equal(valid, indices[0] != 5)
    np.testing.assert_allclose(image[:, valid], colours[indices[0][valid], :3].T / 255, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_largest_number_of_few_bits_is_white(tmp_path, bits):
    values = picture(*SIDE, bands=1) % 2**bits
    path = write(tmp_path / "scene.tif", values, nbits=bits)
    image, _ = shown(path)
    np.testing.assert_allclose(image[0], values[0] / (2**bits - 1), atol=1e-6)


def test_bands_of_different_types_are_read_together(tmp_path):
    values = picture(*SIDE)
    for band, dtype in enumerate(("uint8", "uint16", "float32")):
        write(tmp_path / f"{band}.tif", values[band : band + 1].astype(dtype))
    kinds = ("Byte", "UInt16", "Float32")
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{band + 1}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{band}.tif</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for band, kind in enumerate(kinds)
    )
    (tmp_path / "scene.vrt").write_text(
        f'<VRTDataset rasterXSize="{SIDE[1]}" rasterYSize="{SIDE[0]}">{bands}</VRTDataset>'
    )
    image, valid = shown(tmp_path / "scene.vrt", scale=(0, 255))
    assert valid.all()
    np.testing.assert_allclose(image, values / 255, atol=1e-6)


@pytest.mark.parametrize("name", ["s3://bucket/scene.tif", "NETCDF:scene.nc:band", "/vsizip/a.tif"])
def test_names_of_gdal_that_are_no_files_are_told_from_missing_files(name):
    with pytest.raises(FileNotFoundError, match=r"is no file; .* -of VRT /vsicurl"):
        Scene(name)
    with pytest.raises(FileNotFoundError, match=r"^missing\.tif: no such file$"):
        Scene("missing.tif")


def test_a_file_of_several_rasters_names_them(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"] = np.zeros((64, 64), np.float32)
        file["b"] = np.zeros((64, 64), np.float32)
    with pytest.raises(ValueError, match="holds several rasters; write one of them by"):
        Scene(tmp_path / "two.h5")


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".png", ".jpg", ".jp2"])
def test_only_a_vrt_by_name_refers_to_other_files(tmp_path, suffix):
    """A VRT that is named as a picture would read any file, and ask any server."""
    write(tmp_path / "private.tif", picture(*SIDE))
    band = (
        '<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename relativeToVRT="1">'
        "private.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
    )
    content = f'<VRTDataset rasterXSize="56" rasterYSize="40">{band}</VRTDataset>'
    (tmp_path / "scene.vrt").write_text(content)
    np.testing.assert_allclose(shown(tmp_path / "scene.vrt")[0][0], picture(*SIDE)[0] / 255)
    (tmp_path / f"scene{suffix}").write_text(content)
    with pytest.raises(ValueError, match=rf"scene\{suffix}: not a raster that GDAL can read as "):
        Scene(tmp_path / f"scene{suffix}")


@pytest.mark.parametrize("inside", [True, False])
def test_overviews_are_of_no_other_file(tmp_path, inside):
    """Metadata of a GeoTIFF, or of the file beside it, may name any file or address for them."""
    private = write(tmp_path / "private.tif", picture(*SIDE))
    path = write(tmp_path / "scene.tif", picture(*SIDE))
    if inside:
        with rasterio.open(path, "r+") as file:
            file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(private))
    else:
        name = f'<MDI key="OVERVIEW_FILE">{private}</MDI>'
        (tmp_path / "scene.tif.aux.xml").write_text(
            f'<PAMDataset><Metadata domain="OVERVIEWS">{name}</Metadata></PAMDataset>'
        )
    with pytest.raises(ValueError, match=r"scene\.tif: takes its overviews from .*private\.tif; r"):
        Scene(path)
