"""Values of a wrong kind are refused by a line that names the argument, before any work."""

import numpy as np
import pytest
import torch
from hostile import HOSTILE, refuses
from torch import nn

import upfeat
from upfeat import views
from upfeat.batch import Engine, Extraction, extract, list_items
from upfeat.bounds import quoted, shown
from upfeat.downsamplers import AttentionDownsampler
from upfeat.evaluation import compare, evaluate
from upfeat.heads import load_head, save_head
from upfeat.losses import SpatialUncertainty, crf_pairwise, random_projection
from upfeat.raster import Scene, make_plan, unfinished_tiles
from upfeat.upsamplers import write_checkpoint
from upfeat.video import VideoSettings, render_video


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return upfeat.load(nn.Conv2d(3, 8, 16, stride=16), upsampler="bilinear")


@pytest.fixture(scope="module")
def lazy(model):
    return model.lazy(torch.randn(1, 3, 32, 48))


def test_values_are_shown_in_one_short_line():
    for value in (*HOSTILE, torch.ones(9, 9), np.ones((9, 9)), "a\nb" * 99, nn.Conv2d(3, 3, 1)):
        for line in (shown(value), quoted(value)):
            assert "\n" not in line
            assert len(line) < 130


@pytest.mark.parametrize(
    "call",
    [
        lambda name: upfeat.load_backbone(name),
        lambda name: upfeat.load(upsampler=name.replace("x", "")),
        lambda name: upfeat.functional.adaptive_conv2d(
            torch.ones(1, 1, 3, 3), torch.ones(1, 9, 1, 1), backend=name
        ),
        lambda name: upfeat.load(device=name),
        lambda name: upfeat.load(max_memory=name),
        lambda name: upfeat.TrainConfig(schedule=name),
        lambda name: upfeat.FitConfig(preset=name),
        lambda name: evaluate(name, "data", "out"),
        lambda name: Engine(name),
        lambda name: Extraction(name),
    ],
)
def test_unknown_names_are_shown_in_one_short_line(call):
    with pytest.raises(ValueError) as caught:
        call("\n" + "x" * 150)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


PATHS = {
    "UpsampledFeatures.save": (lambda lazy, path: lazy.save(path), "path"),
    "UpsampledFeatures.load": (lambda _, path: upfeat.UpsampledFeatures.load(path), "path"),
    "ImplicitFeatures.load": (lambda _, path: upfeat.ImplicitFeatures.load(path), "path"),
    "load_upsampler": (lambda _, path: upfeat.load_upsampler(path), "name"),
    "save_pretrained": (lambda _, path: upfeat.Bilinear().save_pretrained(path), "folder"),
    "from_pretrained": (lambda _, path: upfeat.Bilinear.from_pretrained(path), "folder"),
    "from_featup": (lambda _, path: upfeat.JBUStack.from_featup(path), "path"),
    "write_checkpoint": (lambda _, path: write_checkpoint(path, "out"), "source"),
    "export": (lambda _, path: upfeat.export(upfeat.Bilinear(), path), "path"),
    "load_head": (lambda _, path: load_head(path), "path"),
    "evaluate": (lambda _, path: evaluate("seg", "none", path), "out"),
    "compare": (lambda _, path: compare(path), "paths"),
    "list_items": (lambda _, path: list(list_items(path)), "sources"),
    "Scene": (lambda _, path: Scene(path), "path"),
    "unfinished_tiles": (lambda _, path: unfinished_tiles(path), "output"),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths(name, lazy):
    call, argument = PATHS[name]
    for wrong in (None, 3, b"file", object()):
        with pytest.raises(TypeError, match=f"^{argument} is of type {type(wrong).__name__}; give"):
            call(lazy, wrong)


def test_one_path_is_as_good_as_a_list_of_one(tmp_path, model):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo = folder / "a.png"
    upfeat.visualize.to_image(torch.rand(3, 32, 48)).save(photo)
    for source in (str(folder), folder, str(photo)):
        keys = [item.key for item in list_items(source)]
        assert keys == [item.key for item in list_items([source])]
    done = extract(model, str(folder), tmp_path / "out", Extraction(), engine=Engine(workers=1))
    assert done.made == 1
    with pytest.raises(FileNotFoundError, match=r"results\.json: no such file"):
        compare(str(tmp_path))


def test_flags_are_true_or_false(tmp_path, model, lazy):
    image = np.zeros((32, 48, 3), np.uint8)
    flags = {
        "align": lambda **flag: model.preprocess(image, **flag),
        "exact": lambda **flag: lazy.save(tmp_path / "lazy.safetensors", **flag),
        "cosine": lambda **flag: lazy.similarity(torch.ones(8), **flag),
        "pretrained": lambda **flag: upfeat.load_backbone("efficientnet_lite0", **flag),
        "subpixel": lambda **flag: views.sample_jitters(1, size=(4, 4), **flag),
        "beside": lambda **flag: VideoSettings(**flag),
        "resume": lambda **flag: upfeat.train(model.backbone, tmp_path, **flag),
        "overwrite": lambda **flag: extract(model, tmp_path, tmp_path, Extraction(), **flag),
    }
    for name, call in flags.items():
        refuses(call, name, (bool,))
    assert not list(tmp_path.iterdir())


def test_sources_of_randomness_are_generators():
    image = torch.rand(1, 3, 8, 8)
    calls = [
        lambda **given: views.sample_jitters(1, size=(4, 4), **given),
        lambda **given: views.spread_jitters(1, size=(4, 4), **given),
        lambda **given: AttentionDownsampler(3, 4, **given),
        lambda **given: SpatialUncertainty(3, **given),
        lambda **given: random_projection(3, **given),
        lambda **given: crf_pairwise(image, image, **given),
    ]
    for call in calls:
        refuses(call, "generator")


def test_settings_and_engines_are_objects(tmp_path, model):
    given = {"extraction": Extraction(), "engine": Engine()}

    def run(extraction, model=model, **options):
        return extract(model, tmp_path, tmp_path / "out", extraction, **options)

    for name in ("model", "extraction", "engine", "on_item"):
        refuses(run, name, **given)
    for name in ("model", "settings", "on_frame"):
        refuses(render_video, name, model=model, source="none.mp4", output="out.mp4")
    for name in ("config", "on_step"):
        refuses(upfeat.fit_implicit, name, image="none.jpg", backbone=model.backbone)
    for kind in (VideoSettings, lambda **head: Extraction("head", **head)):
        refuses(kind, "head")
    assert not list(tmp_path.iterdir())


def test_sizes_and_images_of_a_backbone(model):
    backbone = model.backbone
    for call in (backbone.grid_size, backbone.grid_aligned):
        refuses(call, "size")
    for call in (backbone.denormalize, model.guidance):
        refuses(call, "x", (torch.Tensor,))
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), not \(1, 2, 4, 4\)"):
        model.guidance(torch.ones(1, 2, 4, 4))


def test_views_are_jitters():
    image = torch.rand(1, 3, 8, 8)
    refuses(views.apply_jitter, "jitter", x=image)
    refuses(views.apply_jitter_adjoint, "jitter", y=image)
    refuses(lambda n: views.Jitter.identity(n, size=(4, 4)), "n", (int,))


def test_lazy_features_take_mean_and_std_together():
    given = torch.ones(1, 4, 2, 2), torch.ones(1, 3, 8, 8), upfeat.Bilinear()
    for wrong in ({"mean": [0.5] * 3}, {"std": [1.0] * 3}, {"mean": [0.5], "std": [1.0]}):
        with pytest.raises(ValueError, match=r"mean=.* and std=.* must be 3 values each"):
            upfeat.UpsampledFeatures(*given, **wrong)


def test_memory_of_a_plan_is_bytes_or_text(model):
    what = upfeat.raster.Features(8, {})
    plans = [make_plan((64, 64), model, what, max_memory=most) for most in ("8GB", 8 * 10**9)]
    assert plans[0] == plans[1]
    with pytest.raises(ValueError, match='max_memory="much" must be an amount'):
        make_plan((64, 64), model, what, max_memory="much")


def test_heads_are_saved_to_paths(tmp_path):
    head = upfeat.heads.SavedHead(torch.ones(1, 2), torch.ones(1), ["a"], "values", {}, "bilinear")
    with pytest.raises(TypeError, match="path is of type NoneType; give a path"):
        save_head(None, head)
    refuses(lambda head: save_head(tmp_path / "head.safetensors", head), "head")


@pytest.mark.parametrize(
    ("shape", "fix"),
    [((3, 64, 64), r"x\[None\]$"), ((1, 64, 64, 3), r"x\.permute\(0, 3, 1, 2\)$")],
)
def test_images_of_usual_other_shapes_get_the_fix(model, shape, fix):
    for call in (model, model.backbone, model.lazy, model.guidance):
        with pytest.raises(ValueError, match=rf"x must be \(B, 3, H, W\), not .*{fix}"):
            call(torch.zeros(shape))
