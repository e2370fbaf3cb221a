"""Labels of a raster: drawn where they lie, and refused in one line where they cannot be."""

import json
import warnings

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")

from raster.test_raster import picture, write  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402

from upfeat.raster import Scene  # noqa: E402
from upfeat.raster.labels import read_labels  # noqa: E402
from upfeat.types import Window  # noqa: E402

SIDE = (40, 60)
ALL = Window(0, 0, *SIDE)


@pytest.fixture
def scene(tmp_path):
    with Scene(write(tmp_path / "scene.tif", picture(*SIDE))) as scene:
        yield scene


def halves(dtype=np.uint8):
    return np.repeat([0, 1], SIDE[1] // 2)[None].repeat(SIDE[0], 0).astype(dtype)


def square(column, row, name, side=10):
    """A feature of so many pixels; pixels are of 10 metres."""
    left, top = 500000 + 10 * column, 5200000 - 10 * row
    right, bottom = left + 10 * side, top - 10 * side
    ring = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return feature({"type": "Polygon", "coordinates": [ring]}, name)


def feature(geometry, name):
    return {"type": "Feature", "geometry": geometry, "properties": {"class": name}}


def geojson(tmp_path, features):
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_indices_are_read_by_windows_without_those_that_are_none(tmp_path, scene, dtype):
    values = halves(dtype)
    values[:5], values[5:9] = 255, 7
    labels = read_labels(write(tmp_path / "labels.tif", values[None], nodata=7), scene)
    assert labels.names == ["0", "1"]
    expected = np.where(np.isin(values, (7, 255)), 255, values)
    np.testing.assert_array_equal(labels.read(ALL), expected)
    np.testing.assert_array_equal(labels.read(Window(3, 20, 9, 30)), expected[3:12, 20:50])


def test_places_without_a_reference_system_fit_each_other(tmp_path):
    plain = {"crs": None, "transform": rasterio.Affine.identity()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        path = write(tmp_path / "plain.tif", picture(*SIDE), **plain)
        labels = write(tmp_path / "labels.tif", halves()[None], **plain)
    with Scene(path) as scene:
        np.testing.assert_array_equal(read_labels(labels, scene).read(ALL), halves())


@pytest.mark.parametrize(
    ("values", "profile"),
    [
        (halves()[None, :30], {}),
        (halves()[None].repeat(2, 0), {}),
        (halves()[None], {"crs": "EPSG:32634"}),
        (halves()[None], {"crs": None}),
        (halves()[None], {"transform": from_origin(500005, 5200000, 10, 10)}),
        (halves()[None], {"transform": rasterio.Affine(10, 0, 500000, 0, 10, 5200000)}),
    ],
    ids=["smaller", "two bands", "other system", "no system", "shifted", "south up"],
)
def test_indices_on_another_grid_are_refused(tmp_path, scene, values, profile):
    with pytest.raises(ValueError, match=r"must have one band on the grid of .*scene\.tif"):
        read_labels(write(tmp_path / "labels.tif", values, **profile), scene)


def test_indices_that_are_no_class_are_refused(tmp_path, scene):
    def read(value, names=None, dtype="int32"):
        values = halves(dtype)
        values[0, 0] = value
        path = write(tmp_path / "labels.tif", values[None])
        return read_labels(path, scene, names).read(ALL)

    assert read(254).max() == 254
    for value, names, words in (
        (256, None, "has class 256; 254 is the largest"),
        (-1, None, r"has class -1, and there are 2 classes \(0 to 1, 255 for no label\)"),
        (2, ["a", "b"], "has class 2, and there are 2 classes"),
        (0, [str(index) for index in range(256)], "256 classes; 255 are the most"),
    ):
        with pytest.raises(ValueError, match=words):
            read(value, names)
    with pytest.raises(ValueError, match="holds float32; labels must be whole numbers"):
        read(0, dtype="float32")


def test_damaged_indices_are_one_line(tmp_path, scene):
    path = tmp_path / "labels.tif"
    path.write_text("no raster")
    with pytest.raises(ValueError, match=r"labels\.tif: not a raster"):
        read_labels(path, scene)
    noise = np.random.default_rng(0).integers(0, 5, (1, *SIDE), dtype=np.uint8)
    content = write(path, noise, compress="deflate").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for names in (None, list("abcde")):
        with pytest.raises(ValueError, match=r"labels\.tif: damaged, it cannot be read"):
            read_labels(path, scene, names).read(ALL)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_labels(tmp_path / "none.tif", scene)


def test_shapes_are_drawn_in_their_order_and_by_windows(tmp_path, scene):
    point = {"type": "Point", "coordinates": [500000 + 305, 5200000 - 305]}
    features = [square(5, 5, "b"), square(10, 10, "a"), feature(point, "c"), feature(None, "d")]
    labels = read_labels(geojson(tmp_path, features), scene)
    assert labels.names == ["a", "b", "c"]
    expected = np.full(SIDE, 255)
    expected[5:15, 5:15], expected[10:20, 10:20], expected[30, 30] = 1, 0, 2
    np.testing.assert_array_equal(labels.read(ALL), expected)
    np.testing.assert_array_equal(labels.read(Window(8, 3, 9, 11)), expected[8:17, 3:14])
    named = read_labels(geojson(tmp_path, features[:2]), scene, ["z", "b", "a"])
    assert set(np.unique(named.read(ALL))) == {1, 2, 255}


@pytest.mark.parametrize("name", ["EPSG:32632", "EPSG:3857", "urn:ogc:def:crs:OGC:1.3:CRS84"])
def test_shapes_of_another_reference_system_are_refused(tmp_path, scene, name):
    """Coordinates of the next zone overlap those of the raster, and lie elsewhere."""
    path = geojson(tmp_path, [square(5, 5, "a"), square(20, 20, "b")])
    content = json.loads(path.read_text())

    def read(name):
        crs = {"type": "name", "properties": {"name": name}}
        path.write_text(json.dumps(content | {"crs": crs}))
        return read_labels(path, scene)

    with pytest.raises(ValueError, match=rf"is in {name}, and .* in EPSG:32633; reproject it"):
        read(name)
    assert read("urn:ogc:def:crs:EPSG::32633").names == ["a", "b"]
    assert read("a name of my own").names == ["a", "b"]


def test_longitude_and_latitude_of_geojson_fit_rasters_in_degrees(tmp_path):
    path = write(tmp_path / "scene.tif", picture(*SIDE), crs="EPSG:4326",
                 transform=from_origin(10, 50, 0.1, 0.1))  # fmt: skip
    labels = geojson(tmp_path, [feature({"type": "Point", "coordinates": [10.55, 49.25]}, "a")])
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    labels.write_text(json.dumps(json.loads(labels.read_text()) | {"crs": crs}))
    with Scene(path) as scene:
        assert np.argwhere(read_labels(labels, scene).read(ALL) == 0).tolist() == [[7, 5]]


ELSEWHERE = {"type": "Point", "coordinates": [15.0, 46.9]}


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (3, 'not a GeoJSON of features with a property "class"'),
        ([3], 'not a GeoJSON of features with a property "class"'),
        ([{"geometry": None, "properties": {}}], 'not a GeoJSON of features with a property "clas'),
        ([], "holds no feature"),
        ([feature(None, "a")], "holds no feature"),
        ([square(0, 0, None)], 'feature 0, from 0, has no "class"'),
        ([square(0, 0, "z")], "has class 'z', which is none of"),
        ([feature(ELSEWHERE, "a")], r"no feature lies in .*scene\.tif; .* system \(EPSG:32633\)"),
    ],
    ids=str,
)
def test_shapes_that_are_no_labels_are_refused(tmp_path, scene, features, words):
    with pytest.raises(ValueError, match=words):
        read_labels(geojson(tmp_path, features), scene, ["a", "b"])


@pytest.mark.parametrize(
    "geometry",
    [
        3,
        {},
        {"type": "Blob", "coordinates": [1, 2]},
        {"type": "Point"},
        {"type": "Point", "coordinates": ["x", "y"]},
        {"type": "Point", "coordinates": [float("nan"), 0]},
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], ["a", 1], [0, 0]]]},
        {"type": "GeometryCollection", "geometries": []},
    ],
    ids=str,
)
def test_damaged_shapes_are_named(tmp_path, scene, geometry):
    path = geojson(tmp_path, [square(0, 0, "a"), feature(geometry, "b")])
    with pytest.raises(ValueError, match="feature 1, from 0, has no geometry to be drawn"):
        read_labels(path, scene)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=len)
def test_text_that_is_no_geojson_is_refused(tmp_path, scene, content):
    path = tmp_path / "labels.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"labels\.json: not a GeoJSON"):
        read_labels(path, scene)


def test_no_more_classes_than_a_byte_tells(tmp_path, scene):
    names = [f"{index:03}" for index in range(256)]
    features = [square(index % 30, 0, name, 1) for index, name in enumerate(names)]
    with pytest.raises(ValueError, match="256 classes; 255 are the most"):
        read_labels(geojson(tmp_path, features), scene)
    assert read_labels(geojson(tmp_path, features[:255]), scene).names == names[:255]


@pytest.mark.parametrize("name", ["\ud800", "\0", 3, [], "no system"])
def test_names_of_systems_that_are_none_are_ignored(tmp_path, scene, name):
    path = geojson(tmp_path, [square(3, 4, "a"), square(20, 4, "b")])
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "crs": {"properties": {"name": name}}}))
    assert read_labels(path, scene).names == ["a", "b"]
