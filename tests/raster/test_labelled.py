"""Heads trained from labels tell classes apart, and say how well."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from upfeat.cli import main
from upfeat.heads import load_head
from upfeat.labelled import train_on_folder, train_on_raster
from upfeat.raster import Scene

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("zarr", "3.0")

from raster.test_raster import picture, staged, tiny, upsample, values_of, write  # noqa: E402


def fields(height=320, width=384):
    """Two kinds of field, and which is where."""
    y, x = np.mgrid[:height, :width]
    label = ((x // 64 + y // 80) % 2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 30, (3, height, width))
    return (np.stack([60 + 120 * label, 90 + 20 * label, 140 - 80 * label]) + noise).astype(
        np.uint8
    ), label


def test_a_labelled_raster_gives_a_map(tmp_path, capsys):
    values, label = fields()
    scene = write(tmp_path / "scene.tif", values)
    partly = label.copy()
    partly[:, 100:] = 255
    partly[90:] = 255
    labels = write(tmp_path / "labels.tif", partly[None])
    head, out = tmp_path / "head.safetensors", tmp_path / "map.tif"
    shared = [str(scene), "-o"]
    code = main(["probe", *shared, str(head), "--labels", str(labels), "--classes", "wheat,clover"])
    assert code == 2  # one tile cannot be kept out
    assert "two are the least" in capsys.readouterr().err
    partly = label.copy()
    partly[:, 100:200] = 255
    write(tmp_path / "labels.tif", partly[None])  # a small raster has tiles enough
    code = main(["probe", *shared, str(head), "--labels", str(labels), "--classes", "wheat,clover"])
    assert code == 0
    large = np.tile(values, (1, 2, 3))
    write(tmp_path / "scene.tif", large)
    write(tmp_path / "labels.tif", np.tile(partly, (2, 3))[None])
    assert (
        main(["probe", *shared, str(head), "--labels", str(labels), "--classes", "wheat,clover"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "wheat" in printed
    assert "mean IoU" in printed
    assert load_head(head).names == ["wheat", "clover"]
    assert main(["raster", *shared, str(out), "--head", str(head)]) == 0
    found = values_of(out)[0]
    assert (found == np.tile(label, (2, 3))).mean() > 0.95
    arguments = ["probe", *shared, str(tmp_path / "mine.safetensors"), "--labels", str(labels)]
    (tmp_path / "mine.safetensors").write_text("mine")
    assert main(arguments) == 2
    assert "was not made by upfeat" in capsys.readouterr().err
    assert main(["probe", *shared, str(scene), "--labels", str(labels), "--overwrite"]) == 2


@pytest.mark.parametrize("make", [tiny, staged])
def test_a_head_is_trained_on_what_the_raster_gets(tmp_path, make, monkeypatch):
    """Also far from a tile's border, and where pixels have no data."""
    model, tiles, count = make(), [], 30
    values = picture(300, 600)
    values[values == 255] = 254
    values[:, 40:140, 80:140] = 255
    scene = write(tmp_path / "scene.tif", values, nodata=255)
    labels = write(tmp_path / "labels.tif", np.ones((1, 300, 600), np.uint8))
    expected = values_of(upsample(scene, tmp_path / "out.zarr", model))
    monkeypatch.setattr(
        "upfeat.labelled.draw_pixels", lambda usable, *_: usable[0].nonzero()[:count, 0]
    )
    monkeypatch.setattr("upfeat.labelled._train", lambda groups, *_: groups)
    with Scene(scene) as opened:
        groups = train_on_raster(model, opened, labels, on_tile=tiles.append)
    places = [tuple(int(part.split()[1]) for part in tile.split(", ")) for tile in tiles]
    assert len(places) == len(groups) > 3
    for (top, left), (features, _) in zip(places, groups, strict=True):
        known = expected[:, top, left:][:, np.isfinite(expected[0, top, left:])]
        np.testing.assert_allclose(features.T, known[:, :count], atol=2e-5)


def test_polygons_are_labels_too(tmp_path, capsys):
    values, _ = fields()
    scene = write(tmp_path / "scene.tif", np.tile(values, (1, 2, 2)))

    def square(column, row, name):
        left, top = 500000 + 10 * column, 5200000 - 10 * row
        ring = [(left, top), (left + 600, top), (left + 600, top - 700), (left, top - 700)]
        geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        return {"type": "Feature", "geometry": geometry, "properties": {"class": name}}

    places = [(2, 5, "a"), (66, 5, "b"), (400, 5, "a"), (464, 5, "b")]
    places += [(2, 325, "a"), (66, 325, "b"), (600, 325, "b")]
    content = {"type": "FeatureCollection", "features": [square(*place) for place in places]}
    (tmp_path / "fields.geojson").write_text(json.dumps(content))
    arguments = ["probe", str(scene), "-o", str(tmp_path / "head.safetensors")]
    assert main([*arguments, "--labels", str(tmp_path / "fields.geojson")]) == 0
    assert "2 classes" in capsys.readouterr().out
    (tmp_path / "fields.geojson").write_text("{}")
    code = main([*arguments, "--labels", str(tmp_path / "fields.geojson"), "--overwrite"])
    assert code == 2
    assert 'property "class"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"folds": 1}, "folds=1 must be 2 or more"),
        ({"folds": 2.5}, "folds=2.5 must be a whole number"),
        ({"pixels": 0}, "pixels=0 must be 1 or more"),
        ({"pixels": "all"}, "pixels='all' must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_named_before_anything_is_read(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        train_on_folder(None, tmp_path / "none", **settings)
    with pytest.raises(ValueError, match=words):
        train_on_raster(None, None, tmp_path / "none", **settings)


def test_a_folder_of_photographs_gives_a_head_for_extract(tmp_path, capsys):
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for index in range(4):
        values, label = fields(96 + 16 * index, 128)
        Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / "data/images" / f"{index}.png")
        Image.fromarray(label).save(tmp_path / "data/labels" / f"{index}.png")
    (tmp_path / "data/classes.json").write_text('{"classes": ["wheat", "clover"]}')
    head = tmp_path / "head.safetensors"
    assert main(["probe", str(tmp_path / "data"), "-o", str(head), "--folds", "2"]) == 0
    assert "4 images or tiles in 2 folds" in capsys.readouterr().out
    out = tmp_path / "out"
    images = str(tmp_path / "data" / "images")
    assert main(["extract", images, "-o", str(out), "--head", str(head)]) == 0
    from safetensors.torch import load_file

    logits = load_file(out / "3.png.safetensors")["features"]
    right = logits.argmax(0).numpy() == fields(144, 128)[1]
    assert torch.tensor(right).float().mean() > 0.9
