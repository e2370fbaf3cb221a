"""Values of a wrong kind are refused by a line that names the argument, before any work."""

import numpy as np
import pytest
import torch
from hostile import HOSTILE, refuses
from torch import nn

import upfeat
from upfeat import views
from upfeat.adapters import TileSampler, encode_grid, stitch, write_grid
from upfeat.batch import Engine, Extraction, extract, list_items
from upfeat.bounds import quoted, shown
from upfeat.downsamplers import AttentionDownsampler, CellDownsampler, SimpleDownsampler
from upfeat.evaluation import compare, evaluate
from upfeat.heads import SavedHead, describe_backbone, load_head, save_head
from upfeat.losses import (
    SpatialUncertainty,
    crf_pairwise,
    magnitude_consistency,
    random_projection,
)
from upfeat.probes import LinearProbe
from upfeat.raster import Features, HeadOutput, Scene, make_plan, unfinished_tiles
from upfeat.scales import fit_translation
from upfeat.testing import check_upsampler
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


@pytest.mark.parametrize("size", [48, (5,), (0, 4), (2.5, 3), (10**9, 10**9), "ab"])
def test_sizes_of_masked_images_are_checked_before_the_mask_is_resized(model, size):
    x, mask = torch.randn(1, 3, 32, 48), np.zeros((32, 48), bool)
    for call in (model, model.lazy):
        with pytest.raises(ValueError, match=r"^output_size=.* (must be|has a side)"):
            call(x, size, mask=mask)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), not .* give x\[None\]"):
        model(x[0], mask=mask)
    with pytest.raises(TypeError, match="x is of type NoneType"):
        model.lazy(None, mask=mask)


def test_grids_are_of_models_and_have_names(model, tmp_path):
    image = np.zeros((32, 48, 3), np.uint8)
    grid = encode_grid(model, image)
    for wrong in (model.backbone, "efficientnet_lite0"):
        for call in (encode_grid, grid.upsample):
            with pytest.raises(TypeError, match=r"^model is of type .*; give what upfeat\.load"):
                call(wrong, image)
    for name in ("../a", "folder/a", "/a", ""):
        with pytest.raises(ValueError, match=r"^name=.* must be the name of a file"):
            write_grid(tmp_path, name, grid)
    with pytest.raises(TypeError, match=r"^name is of type NoneType; give a text"):
        write_grid(tmp_path, None, grid)
    with pytest.raises(TypeError, match=r"^grid is of type Tensor; give a DenseGrid"):
        write_grid(tmp_path, "a", grid.features)
    assert not list(tmp_path.iterdir())


def test_no_head_is_saved_that_could_not_be_loaded(model, tmp_path):
    path, told = tmp_path / "head.safetensors", describe_backbone(model.backbone)
    good = {"names": ["a", "b"], "kind": "values", "backbone": told, "upsampler": "bilinear"}
    for name, values in {
        "names": ([0, 1], None, "ab", torch.ones(2)),
        "backbone": (None, "efficientnet_lite0", model.backbone, {"stride": 16}),
        "upsampler": (None, model.upsampler),
    }.items():
        for wrong in values:
            head = SavedHead(torch.ones(2, 8), torch.ones(2), **{**good, name: wrong})
            with pytest.raises(TypeError, match=rf"{name}.*(must be|name of one)"):
                save_head(path, head)
    assert not list(tmp_path.iterdir())
    save_head(path, SavedHead(torch.ones(2, 8), torch.ones(2), **good))
    assert load_head(path).backbone == told
    with pytest.raises(TypeError, match=r"^backbone is of type FeatUp; give model\.backbone"):
        describe_backbone(model)


def test_what_a_raster_gets_is_checked_before_its_tiles(model):
    weight, bias, names = torch.ones(2, 8), torch.ones(2), ["a", "b"]
    for wrong in ((weight.T, bias, names), (weight, bias[:1], names), (weight, bias, ["a"])):
        with pytest.raises(ValueError, match=r"^weight is .*; give \(K, C\), \(K,\) and K names"):
            HeadOutput(*wrong, {})
    with pytest.raises(TypeError, match=r"^weight is of type ndarray; give a tensor"):
        HeadOutput(weight.numpy(), bias, names, {})
    refuses(lambda embed_dim: Features(embed_dim, {}), "embed_dim", (int,))
    for wrong in ("float8", "int8", torch.float16):
        with pytest.raises(ValueError, match=r"^dtype: "):
            Features(8, {}, wrong)
    given = {"size": (64, 64), "model": model, "what": Features(8, {})}
    for name in (*given, "tile", "backbone_tile"):
        refuses(make_plan, name, **given)


def test_views_and_maps_of_downsamplers_and_losses():
    values = torch.rand(2, 4, 32, 48)
    for down in (AttentionDownsampler(4, 8), SimpleDownsampler(8), CellDownsampler(5)):
        with pytest.raises(TypeError, match=r"^jitter is of type int; give views"):
            down(values, (4, 6), jitter=3)
        with pytest.raises(TypeError, match=r"^values is of type NoneType; give a tensor"):
            down(None, (4, 6))
    with pytest.raises(TypeError, match=r"^target is of type NoneType; give a tensor"):
        magnitude_consistency(values, None)


def test_image_first_wraps_upsamplers():
    for wrong in ("anyup", upfeat.Bilinear, None):
        with pytest.raises(TypeError, match=r"^upsampler is of type .*; give an Upsampler"):
            upfeat.ImageFirst(wrong)


def test_tools_name_what_they_cannot_use(model):
    sampler, parts = TileSampler((0, 0, 8, 4), 1.0, tile=4), [torch.ones(2, 4, 4)] * 2
    for call, kind in {
        lambda: stitch(parts, 3): "sampler is of type int; give the TileSampler",
        lambda: stitch([part.numpy() for part in parts], sampler): "part 1 is of type ndarray; giv",
        lambda: upfeat.WrappedBackbone("resnet50"): "module is of type str; give a module or a fun",
        lambda: upfeat.backbones.estimate_displacement("resnet50", []): "backbone is of type str",
        lambda: fit_translation(model, []): "backbone is of type FeatUp; give what load_backbone",
        lambda: check_upsampler(upfeat.Bilinear()): "make is of type Bilinear; give a function",
        lambda: check_upsampler("bilinear"): "make is of type str; give a function",
        lambda: views.Jitter.identity(1, size=(4, 4)).to_view(np.ones((1, 2))): "points is of type",
    }.items():
        with pytest.raises(TypeError, match=f"^{kind}"):
            call()


def test_heads_of_exports_are_tensors(model, tmp_path):
    weight, bias, path = torch.ones(2, 8), torch.ones(2), tmp_path / "model.pt2"
    for head, words in (
        ((weight.numpy(), None), "weight of head is of type ndarray; give a tensor"),
        ((None, bias), "weight of head is of type NoneType; give a tensor"),
        ((weight, [1.0, 1.0]), "bias of head is of type list; give a tensor"),
        (LinearProbe(weight, bias), "head is of type LinearProbe; give a SavedHead, its file, or"),
        (nn.Linear(8, 2), "head is of type Linear; give a SavedHead"),
    ):
        with pytest.raises(TypeError, match=f"^{words}"):
            upfeat.export(model, path, head=head, size=(32, 32))
    with pytest.raises(ValueError, match=r"^head: bias is \(3,\); give \(2,\)"):
        upfeat.export(model, path, head=(weight, torch.ones(3)), size=(32, 32))
    assert not list(tmp_path.iterdir())
