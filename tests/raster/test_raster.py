"""Rasters in tiles equal the whole; a ground point keeps its feature; killed runs go on."""

import json
import shutil
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import upfeat
from upfeat.cli import main
from upfeat.engines import Engine
from upfeat.heads import SavedHead, describe_backbone, load_head, save_head
from upfeat.mosaic import backbone_tiles
from upfeat.raster import (
    Features,
    HeadOutput,
    Scene,
    make_plan,
    unfinished_tiles,
    upsample_raster,
)
from upfeat.raster.outputs import RasterTile
from upfeat.raster.store import Store, write_axes
from upfeat.types import Window

rasterio = pytest.importorskip("rasterio")
zarr = pytest.importorskip("zarr", "3.0")

from rasterio.transform import from_origin  # noqa: E402

SIDE = (150, 205)


def write(path, values, **profile):
    """A GeoTIFF of (bands, H, W)."""
    profile = {"crs": "EPSG:32633", "transform": from_origin(500000, 5200000, 10, 10), **profile}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=values.shape[0],
        height=values.shape[1],
        width=values.shape[2],
        dtype=values.dtype,
        **profile,
    ) as file:
        file.write(values)
    return path


def picture(height=SIDE[0], width=SIDE[1], bands=3):
    """Fields with sharp borders, and noise."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    fields = ((x // 37 + y // 29) % 5)[None] * 40 + 20 * np.arange(bands)[:, None, None]
    return (fields + generator.integers(0, 15, (bands, height, width))).astype(np.uint8)


def tiny(upsampler="detail"):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 8, 8), torch.nn.GELU(), torch.nn.Conv2d(6, 5, 3, padding=1)
    )
    return upfeat.load(layers, upsampler=upsampler)


def staged(upsampler="detail"):
    """A network with an early layer, on cells half as wide as the features'."""
    torch.manual_seed(0)
    stages = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.GELU()),
        torch.nn.Conv2d(4, 4, 3, padding=1),
        torch.nn.Conv2d(4, 5, 3, stride=2, padding=1),
    )
    return upfeat.load(stages, upsampler=upsampler, early=True)


def taught():
    """An upsampler with a network of early layers whose weights are not 0."""
    torch.manual_seed(0)
    upsampler = upfeat.EarlyDetailUpsampler(5, hidden_dim=4, width=4, depth=2, smoothing=3)
    for layer in (upsampler.detail, upsampler.early_network[2].last):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return upsampler.eval()


def facts(model):
    return {"backbone": describe_backbone(model.backbone), "upsampler": model.upsampler.name}


def upsample(path, output, model, what=None, *, tile=64, scale=None, **options):
    what = what or Features(model.embed_dim, facts(model), "float32")
    with Scene(path, scale=scale) as scene:
        plan = make_plan(scene.size, model, what, tile=tile, backbone_tile=16)
        upsample_raster(scene, output, model, what, plan, **options)
    return output


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def values_of(output):
    if output.suffix == ".zarr":
        return zarr.open_group(str(output), mode="r")["features"][:]
    with rasterio.open(output) as file:
        return file.read()


def whole(path, model):
    """All pixels at once; the edges of image and features repeated up to whole steps."""
    stride, step = model.backbone.stride, model.upsampler.step
    with Scene(path) as scene, torch.no_grad():
        own = stride * model.backbone.step
        seen = [-(-side // own) * own for side in scene.size]
        height, width = (-(-side // (stride * step)) * stride * step for side in seen)
        image = scene.read(Window(0, 0, height, width))[0][None]
        image = (image - model.backbone.mean) / model.backbone.std
        features, hidden = model.backbone.with_hidden(image[..., : seen[0], : seen[1]])
        cells = (height // stride, width // stride)
        features = repeated(features, cells)
        if model.early:
            hidden = repeated(hidden, (2 * cells[0], 2 * cells[1]))
        given = {"hidden": hidden} if model.early else {}
        out = model.upsampler(features, model.guidance(image), **given)
    return out[0, :, : scene.size[0], : scene.size[1]].numpy()


def repeated(maps, size):
    beyond = (0, size[1] - maps.shape[3], 0, size[0] - maps.shape[2])
    return torch.nn.functional.pad(maps, beyond, mode="replicate")


@pytest.mark.parametrize("make", [partial(tiny, "bilinear"), tiny, staged])
@pytest.mark.parametrize("windows", [False, True], ids=["exact", "blended"])
def test_parts_in_files_give_the_tiles_of_one_process(tmp_path, make, windows, monkeypatch):
    """What workers of Ray do, in this process."""

    @contextmanager
    def here(engine, make_worker):
        workers = [make_worker(), make_worker()]
        yield lambda tasks: (workers[index % 2](task) for index, task in enumerate(tasks))

    model = make()
    if windows:
        monkeypatch.setattr("upfeat.raster.plan.receptive_halo", lambda backbone, early: None)
    path = write(tmp_path / "scene.tif", picture(), nodata=20)
    calm = upsample(path, tmp_path / "calm.zarr", model)
    monkeypatch.setattr("upfeat.raster.workers.ray_pool", here)
    output = upsample(path, tmp_path / "out.zarr", model, engine=Engine("ray", workers=2))
    assert tree(output) == tree(calm)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm.zarr", "out.zarr", "scene.tif"]


@pytest.mark.parametrize("early", [None, False])
def test_the_backbone_sees_no_cells_beyond_the_raster(tmp_path, early):
    """A raster of whole cells has the model's features up to its lower and right edges."""
    model = upfeat.load(early=early)
    values = picture(11 * 16, 21 * 16)
    path = write(tmp_path / "scene.tif", values)
    out = values_of(upsample(path, tmp_path / "out.zarr", model, tile=256))
    with torch.no_grad():
        expected = model(model.preprocess(values.transpose(1, 2, 0)))[0].numpy()
    error = np.abs(out - expected).mean(0) / expected.std((1, 2)).mean()
    assert max(error[-16:].mean(), error[:, -16:].mean()) < 0.55  # about 1 if it saw more
    assert error[:-16, :-16].mean() < 0.13


def test_a_worker_of_a_run_that_was_killed_writes_no_more(tmp_path):
    store = Store(tmp_path / "out.zarr", (5, 64, 64), np.dtype("float32"), 64, {})
    before = store.writer()
    store.close()
    after = Store(tmp_path / "out.zarr", (5, 64, 64), np.dtype("float32"), 64, {}, resume=True)
    values = np.ones((5, 64, 64), np.float32)
    with pytest.raises(ValueError, match="another run goes on with it"):
        before.write(Window(0, 0, 64, 64), values)
    after.write(0, Window(0, 0, 64, 64), values)
    after.close()
    shutil.rmtree(after.partial)
    with pytest.raises(ValueError, match="another run"):
        after.writer().write(Window(0, 0, 64, 64), values)
    assert not after.partial.exists()


@pytest.mark.parametrize("upsampler", ["bilinear", "neighbourhood", "detail"])
def test_tiles_equal_the_whole(tmp_path, upsampler):
    model = tiny(upsampler)
    path = write(tmp_path / "scene.tif", picture())
    out = values_of(upsample(path, tmp_path / "out.zarr", model))
    np.testing.assert_allclose(out, whole(path, model), atol=2e-5)


def test_tiles_of_an_upsampler_with_a_network_equal_the_whole(tmp_path):
    """Its image is read near the tile only, and what the regression sees far away is shared."""
    torch.manual_seed(0)
    upsampler = upfeat.DetailUpsampler(5, width=4, depth=1)
    for layer in (upsampler.detail, upsampler.channel_mix):
        torch.nn.init.normal_(layer.weight, std=0.1)
    model = tiny(upsampler)
    path = write(tmp_path / "scene.tif", picture(150, 500))
    out = values_of(upsample(path, tmp_path / "out.zarr", model, tile=128))
    np.testing.assert_allclose(out, whole(path, model), atol=5e-5)


@pytest.mark.parametrize("upsampler", ["detail", taught])
def test_tiles_of_early_layers_equal_the_whole(tmp_path, upsampler):
    model = staged(upsampler if isinstance(upsampler, str) else upsampler())
    path = write(tmp_path / "scene.tif", picture(150, 500))
    out = values_of(upsample(path, tmp_path / "out.zarr", model, tile=128))
    np.testing.assert_allclose(out, whole(path, model), atol=5e-5)
    without = upfeat.load(model.backbone, upsampler="detail")
    assert np.abs(out - whole(path, without)).mean() > 1e-3


def test_tiles_with_another_networks_layers_equal_the_whole(tmp_path):
    """The guide's coarsest cells are two of the backbone's: its parts begin at every second."""
    torch.manual_seed(0)
    model = upfeat.load(torch.nn.Conv2d(3, 5, 8, 8), early=True)
    assert model.backbone.step == 2
    path = write(tmp_path / "scene.tif", picture(150, 500))
    out = values_of(upsample(path, tmp_path / "out.zarr", model, tile=128))
    np.testing.assert_allclose(out, whole(path, model), atol=5e-5)


def test_tiles_of_the_embedded_backbones_early_layers_equal_the_whole(tmp_path):
    model = upfeat.load(early=True)
    path = write(tmp_path / "scene.tif", picture(300, 600))
    expected = whole(path, model)
    out = values_of(upsample(path, tmp_path / "out.zarr", model, tile=256))
    np.testing.assert_allclose(out, expected, atol=5e-5 * np.abs(expected).max())


def test_a_head_is_applied_before_upsampling_and_georeferenced(tmp_path):
    model = tiny()
    path = write(tmp_path / "scene.tif", picture())
    weight, bias = torch.randn(3, 5), torch.randn(3)
    names = ["water", "field", "road"]
    what = HeadOutput(weight, bias, names, facts(model), form="classes")
    out = upsample(path, tmp_path / "out.tif", model, what)
    logits = np.einsum("kc,chw->khw", weight, whole(path, model)) + bias.numpy()[:, None, None]
    agree = values_of(out)[0] == logits.argmax(0)
    assert agree.mean() > 0.999
    with rasterio.open(path) as before, rasterio.open(out) as after:
        assert (after.crs, after.transform) == (before.crs, before.transform)
        assert after.nodata == 255
        assert after.profile["tiled"]
    probabilities = HeadOutput(weight, bias, names, facts(model), form="probabilities")
    out = values_of(upsample(path, tmp_path / "soft.tif", model, probabilities))
    np.testing.assert_allclose(out.sum(0), 1, atol=1e-5)


def test_a_ground_point_keeps_its_feature_through_a_reprojection(tmp_path):
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture())
    output = upsample(path, tmp_path / "out.zarr", model)
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("rioxarray")
    data = xarray.open_zarr(output, consolidated=False)
    from rasterio.warp import transform

    longitude, latitude = transform("EPSG:32633", "EPSG:4326", [500000 + 1235], [5200000 - 705])
    x, y = transform("EPSG:4326", data.rio.crs, longitude, latitude)
    picked = data["features"].sel(x=x[0], y=y[0], method="nearest")
    np.testing.assert_allclose(picked, whole(path, model)[:, 70, 123], atol=2e-5)
    assert data.rio.crs.to_epsg() == 32633


@pytest.mark.parametrize("make", [tiny, staged])
def test_masked_pixels_are_neither_used_nor_written(tmp_path, make):
    model = make()
    values = picture().astype(np.float32)
    values[:, 40:90, 60:130] = -9999
    first = write(tmp_path / "a.tif", values, nodata=-9999)
    values[:, 40:90, 60:130] = np.nan
    second = write(tmp_path / "b.tif", values, nodata=np.nan)
    outs = [values_of(upsample(p, p.with_suffix(".zarr"), model)) for p in (first, second)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.isnan(outs[0][:, 40:90, 60:130]).all()
    assert np.isfinite(outs[0]).sum() == outs[0].size - 5 * 50 * 70


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    model = tiny()
    path = write(tmp_path / "scene.tif", picture())
    calm = upsample(path, tmp_path / "calm.zarr", model)
    output = tmp_path / "out.zarr"

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upsample(path, output, model, on_tile=stop)
    assert not output.exists()
    with pytest.raises(ValueError, match="unfinished raster; go on by --resume"):
        upsample(path, output, model)
    with pytest.raises(ValueError, match=r"begun with another .*tile"):
        upsample(path, output, model, tile=256, resume=True)
    what = Features(model.embed_dim, {**facts(model), "early": True}, "float32")
    with pytest.raises(ValueError, match=r"begun with another early; give what it was begun with"):
        upsample(path, output, model, what, tile=128, resume=True)
    assert unfinished_tiles(output)["tile"] == 128
    upsample(path, output, model, resume=True)
    upsample(path, output, model, resume=True)  # what is complete stays
    assert tree(output) == tree(calm)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm.zarr", "out.zarr", "scene.tif"]


@pytest.mark.parametrize("number", range(7))
def test_a_run_killed_as_it_finishes_is_finished_by_the_next(tmp_path, number, monkeypatch):
    """Stopped before each change of a folder's entries, in turn."""
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture(70, 80))
    calm, output = upsample(path, tmp_path / "calm.zarr", model), tmp_path / "out.zarr"
    finish, changes = Store.finish, iter(range(number, -1, -1))

    def stopping(change):
        def stop(*arguments, **options):
            own = threading.current_thread() is threading.main_thread()  # zarr's go to their end
            if own and next(changes, 1) == 0:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return stop

    def finish_and_stop(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("unlink", "replace"):
                patch.setattr(Path, name, stopping(getattr(Path, name)))
            patch.setattr("upfeat.raster.store.write_axes", stopping(write_axes))
            finish(*arguments)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Store, "finish", finish_and_stop)
        upsample(path, output, model)
    upsample(path, output, model, resume=True)
    assert tree(output) == tree(calm)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm.zarr", "out.zarr", "scene.tif"]


def test_work_and_memory_grow_with_the_area_and_no_faster(tmp_path):
    """Pixels through the backbone for each that is written; what a plan needs at once."""
    model, each = tiny(), []
    make_plan((64, 64), model, Features(5, {}))  # measures the backbone, once
    for side in (256, 768):
        seen = []
        hook = model.backbone.register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(arguments[0].shape[-2:].numel())
        )
        path = write(tmp_path / f"{side}.tif", picture(side, side))
        upsample(path, tmp_path / f"{side}.zarr", model, tile=128)
        hook.remove()
        each.append(sum(seen) / side**2)
    assert each[1] <= 1.15 * each[0] <= 1.4


def test_the_default_model_needs_less_than_its_bound_for_any_raster(held):
    model, bound = upfeat.load(), 4 * 10**9
    what = HeadOutput(torch.zeros(5, 112), torch.zeros(5), list("abcde"), {}, form="classes")
    each = []
    for side in (2000, 20000):
        # Beside what this process is said to hold, which is not the command's.
        limit = bound - 400_000_000 + held
        plan = make_plan((side, side), model, what, max_memory=limit)
        tiles = backbone_tiles(plan.seen, plan.backbone_tile, plan.backbone_halo)
        each.append(sum(t.outer.height * t.outer.width for t in tiles) * 16**2 / side**2)
    assert max(each) < 1.35


def test_one_process_at_a_time_writes_an_output(tmp_path):
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture())
    refused = []

    def meanwhile(done, total):
        with pytest.raises(ValueError, match="is being written by process"):
            upsample(path, tmp_path / "out.tif", model, resume=True)
        refused.append(done)

    upsample(path, tmp_path / "out.tif", model, on_tile=meanwhile, tile=256)
    assert refused
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif", "scene.tif"]


def test_a_damaged_block_is_one_line(tmp_path):
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    path = write(tmp_path / "scene.tif", picture(200, 200), **blocks)
    content = bytearray(path.read_bytes())
    content[-3000:] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scene\.tif: damaged, it cannot be read"):
        Scene(path)


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture())
    output = tmp_path / "out.zarr"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        upsample(path, output, model)
    with pytest.raises(ValueError, match="exists already and is a folder"):
        upsample(path, output, model, overwrite=True)
    assert (output / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is the input"):
        upsample(path, path, model, overwrite=True)


@pytest.mark.parametrize(
    ("values", "profile"),
    [
        (picture(bands=1), {}),
        ((picture().astype(np.uint16) * 13), {"crs": None}),
        (picture(9, 11), {}),
        (picture(), {"transform": rasterio.Affine(10, 0, 0, 0, 10, 0)}),  # south up
        (picture(), {"transform": rasterio.Affine(7, 7, 0, 7, -7, 0)}),  # rotated
    ],
    ids=["one band", "uint16 without CRS", "one tile", "south up", "rotated"],
)
def test_odd_rasters_come_out_at_their_place(tmp_path, values, profile):
    model = tiny()
    path = write(tmp_path / "scene.tif", values, **profile)
    head = HeadOutput(torch.randn(2, 5), torch.zeros(2), ["a", "b"], facts(model))
    out = upsample(path, tmp_path / "out.tif", model, head)
    with rasterio.open(path) as before, rasterio.open(out) as after:
        assert (after.crs, after.transform) == (before.crs, before.transform)
        assert after.shape == before.shape
        assert np.isfinite(after.read()).all()
    assert values_of(upsample(path, tmp_path / "out.zarr", model)).shape[1:] == values.shape[1:]


def test_bad_rasters_are_refused_in_one_line(tmp_path, capsys):
    scene = write(tmp_path / "many.tif", picture(bands=13))
    empty = write(tmp_path / "empty.tif", np.zeros((3, 9, 9), np.uint8), nodata=0)
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(scene.read_bytes()[:300])
    text = tmp_path / "text.tif"
    text.write_text("no raster")
    cases = [
        (scene, [], "choose three"),
        (scene, ["--bands", "1,2,14"], "from 1 to 13"),
        (scene, ["--bands", "1,x"], "must be bands"),
        (scene, ["--bands", "1,2,3", "--scale", "5,5"], "low below high"),
        (scene, ["--bands", "1,2,3", "--max-memory", "lots"], "must be an amount"),
        (scene, ["--bands", "1,2,3", "--max-memory", "1MB"], "smallest that can work"),
        (empty, [], "no valid pixel"),
        (damaged, [], "damaged.tif"),
        (text, [], "not a raster"),
        (tmp_path / "nothing.tif", [], "no such file"),
    ]
    for path, more, reason in cases:
        arguments = ["raster", str(path), "-o", str(tmp_path / "out.zarr"), *more]
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr().err.strip()
        assert code == 2
        assert reason in printed, printed
        assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out.zarr").exists()


def test_the_command_writes_what_a_head_says(tmp_path, capsys):
    path = write(tmp_path / "scene.tif", picture(100, 120))
    model = upfeat.load()
    head = SavedHead(
        torch.randn(2, 112),
        torch.randn(2),
        ["a", "b"],
        "classes",
        describe_backbone(model.backbone),
        "detail",
    )
    save_head(tmp_path / "head.safetensors", head)
    assert load_head(tmp_path / "head.safetensors").names == ["a", "b"]
    arguments = ["raster", str(path), "--head", str(tmp_path / "head.safetensors")]
    assert main([*arguments, "-o", str(tmp_path / "out.tif")]) == 0
    assert "1×100×120 uint8" in capsys.readouterr().out
    assert set(np.unique(values_of(tmp_path / "out.tif"))) <= {0, 1}
    code = main([*arguments, "--backbone", "efficientnet_lite0.stride8", "-o", "x.tif"])
    assert code == 2
    assert "was trained on features of efficientnet_lite0, not" in capsys.readouterr().err


def test_settings_are_plain_json(tmp_path):
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture())
    output = upsample(path, tmp_path / "out.zarr", model)
    attributes = json.loads((output / "zarr.json").read_text())["attributes"]
    assert attributes["Conventions"] == "CF-1.11"
    assert attributes["upfeat"]["backbone"]["name"] == "Sequential"
    shutil.rmtree(output)


@pytest.mark.parametrize("name", ["http:a.tif", "zip:a.tif", "a!b?c#d%20.tif", "ü 名.tif"])
def test_names_are_of_files_whatever_gdal_reads_into_them(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny("bilinear")
    scene = write(Path("scene.tif"), picture(70, 80)).replace(name)
    output = upsample(scene, Path(f"out {name}"), model)
    assert upsample(scene, output, model, resume=True) == output  # found to be complete
    with rasterio.open(output.absolute()) as file:
        np.testing.assert_allclose(file.read(), whole(scene, model), atol=2e-5)


@pytest.mark.parametrize("name", ["out.zarr", "out.tif"])
def test_another_head_of_the_same_classes_is_not_taken_for_the_first(tmp_path, name):
    """Nor another upsampler of the same name: neither goes on, nor is it done already."""
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture())
    weight, bias = torch.randn(3, 5), torch.zeros(3)
    heads = [HeadOutput(w, bias, ["a", "b", "c"], facts(model)) for w in (weight, -weight)]

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upsample(path, tmp_path / name, model, heads[0], on_tile=stop)
    with pytest.raises(ValueError, match="begun with another weights of the head"):
        upsample(path, tmp_path / name, model, heads[1], resume=True)
    upsample(path, tmp_path / name, model, heads[0], resume=True)
    with pytest.raises(ValueError, match="exists already"):
        upsample(path, tmp_path / name, model, heads[1], resume=True)
    out = upsample(path, tmp_path / name, model, heads[1], resume=True, overwrite=True)
    expected = -np.einsum("kc,chw->khw", weight, whole(path, model))
    np.testing.assert_allclose(values_of(out), expected, atol=1e-5)


def test_an_upsampler_trained_anew_does_not_go_on(tmp_path):
    path = write(tmp_path / "scene.tif", picture(70, 80))
    model = tiny("neighbourhood")
    upsample(path, tmp_path / "out.zarr", model)
    with torch.no_grad():
        next(model.upsampler.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="exists already"):
        upsample(path, tmp_path / "out.zarr", model, resume=True)


def test_readers_learn_which_pixels_have_no_data_and_what_axes_measure(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("rioxarray")
    model = tiny("bilinear")
    values = picture(70, 80).clip(1)
    values[:, 10:30, 20:50] = 0
    head = HeadOutput(torch.randn(2, 5), torch.zeros(2), ["a", "b"], facts(model), form="classes")
    names = {
        "EPSG:32633": ("projection_y_coordinate", "metre"),
        "EPSG:4326": ("latitude", "degrees_north"),
        None: (None, None),
    }
    for crs, (standard, unit) in names.items():
        path = write(tmp_path / "scene.tif", values, nodata=0, crs=crs)
        for what, nodata in ((None, np.nan), (head, 255)):
            output = upsample(path, tmp_path / "out.zarr", model, what, overwrite=True)
            with xarray.open_zarr(output) as data:  # a warning is an error
                assert data["y"].attrs.get("standard_name") == standard
                assert data["y"].attrs.get("units") == unit
                map_ = data["features"]
                np.testing.assert_equal(map_.rio.encoded_nodata, nodata)
                assert np.isnan(map_.values).sum() == map_.shape[0] * 20 * 30
            with xarray.open_zarr(output, mask_and_scale=False) as data:
                np.testing.assert_equal(data["features"].rio.nodata, nodata)
                assert data["features"].dtype == ("float32" if what is None else "uint8")


def test_a_raster_located_by_ground_control_points_keeps_them(tmp_path):
    from rasterio.control import GroundControlPoint

    model = tiny("bilinear")
    path = tmp_path / "scene.tif"
    corners = [(0, 0, 10, 50), (0, 80, 11, 50.1), (70, 0, 10.1, 49), (70, 80, 11.1, 49.1)]
    points, crs = [GroundControlPoint(*corner) for corner in corners], "EPSG:4326"
    write(path, picture(70, 80), crs=crs, transform=None, gcps=points)
    with rasterio.open(upsample(path, tmp_path / "out.tif", model)) as file:
        points, crs = file.gcps
        assert [(p.row, p.col, p.x, p.y) for p in points] == corners
        assert crs.to_epsg() == 4326


def test_geotiffs_are_copied_in_parts_and_may_grow_large(tmp_path, monkeypatch):
    """A row of tiles of all channels would not fit into memory, nor the file into 4 GB."""
    import rasterio.shutil

    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture(60, 600))
    read, copied = [], {}
    array, copy = zarr.Array.__getitem__, rasterio.shutil.copy

    def reading(self, selection):
        values = array(self, selection)
        read.append(values.size)
        return values

    def copying(*arguments, **options):
        copied.update(options)
        return copy(*arguments, **options)

    monkeypatch.setattr(zarr.Array, "__getitem__", reading)
    monkeypatch.setattr(rasterio.shutil, "copy", copying)
    output = upsample(path, tmp_path / "out.tif", model)
    assert max(read) <= 5 * 256 * 256
    assert sum(read) == 5 * 60 * 600
    assert copied["bigtiff"] == "if_safer"
    values = values_of(output)
    np.testing.assert_allclose(values, whole(path, model), atol=2e-5)
    with rasterio.open(output) as file:
        assert file.overviews(1) == [2]
        halved = file.read(out_shape=(5, 30, 300))
    means = values.reshape(5, 30, 2, 300, 2).mean((2, 4))
    np.testing.assert_allclose(halved, means, atol=1e-6)


def test_an_error_of_gdal_at_the_end_is_one_line_and_loses_no_tile(tmp_path, monkeypatch):
    import rasterio.shutil
    from rasterio._err import CPLE_AppDefinedError

    def failing(*arguments, **options):
        raise CPLE_AppDefinedError(3, 1, "TIFFAppendToStrip:Write error at scanline 0")

    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture(70, 80))
    with monkeypatch.context() as patch:
        patch.setattr(rasterio.shutil, "copy", failing)
        with pytest.raises(OSError, match=r"out\.tif: GDAL cannot write a GeoTIFF; .* scanline 0"):
            upsample(path, tmp_path / "out.tif", model)
    assert not (tmp_path / "out.tif").exists()
    tiles = []
    upsample(path, tmp_path / "out.tif", model, resume=True, on_tile=lambda *at: tiles.append(at))
    assert not tiles
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif", "scene.tif"]


def test_features_too_small_for_float16_are_refused(tmp_path):
    model = upfeat.load(lambda x: torch.nn.functional.avg_pool2d(x, 8) * 1e-8, upsampler="bilinear")
    path = write(tmp_path / "scene.tif", picture())
    with pytest.raises(ValueError, match="too small for float16; store them as float32"):
        upsample(path, tmp_path / "half.zarr", model, Features(3, facts(model)))
    assert values_of(upsample(path, tmp_path / "whole.zarr", model)).any()


def test_a_tile_of_faint_features_does_not_end_a_raster():
    model, out = tiny("bilinear"), Features(3, {})
    guidance = torch.zeros(1, 3, 16, 16)
    for scale in (0.0, 1.0, 1e-8):
        coarse = torch.full((1, 3, 2, 2), scale)
        tile = RasterTile(coarse, None, guidance, None, Window(0, 0, 16, 16))
        assert out.render(model, tile).shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["out.zarr", "out.tif"])
def test_an_output_that_a_program_keeps_open_stays_whole(tmp_path, name, monkeypatch):
    """As Windows refuses to rename it; all the work is kept, and --resume ends it."""
    model = tiny("bilinear")
    path = write(tmp_path / "scene.tif", picture())
    folder = tmp_path / "results"
    folder.mkdir()
    output = upsample(path, folder / name, model)
    before = tree(folder)

    def refuse(source, target):
        raise PermissionError(13, "open in another program", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("upfeat.raster.store.move", refuse)
        with pytest.raises(ValueError, match=r"cannot be replaced .*; close and remove it"):
            upsample(path, output, model, overwrite=True)
    assert {key: value for key, value in tree(folder).items() if key in before} == before
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    upsample(path, output, model, resume=True)
    assert tree(folder) == before
    upsample(path, output, model, overwrite=True)  # the old output is moved away and removed
    assert tree(folder) == before
