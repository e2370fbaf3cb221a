"""Sizes and normalisation from configurations, and libraries that are there, missing or broken."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from upfeat.backbones.libraries import import_library, quiet, without_broken
from upfeat.backbones.settings import (
    OPENAI,
    Settings,
    cropping,
    settings_of,
    timm_settings,
    transformers_settings,
)
from upfeat.normalization import HALF, IMAGENET

CLIP = SimpleNamespace(model_type="clip_vision_model", image_size=224, patch_size=16, to_dict=dict)


@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": None, "image_std": [0.3, 0.2, 0.1]},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": 0.1, "image_std": 0.2},
        {"include_top": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"include_top": True, "image_std": [0.4, 0.5, 0.6], "do_normalize": False},
        {"do_flip_channel_order": True, "image_mean": [0.1, 0.2, 0.3]},
    ],
)
def test_the_arithmetic_of_a_processor_is_that_of_colours(processor):
    """What it makes of bytes is what mean and deviation make of colours in [0, 1]."""
    bytes_ = torch.stack([torch.arange(0.0, 256, 17).roll(n) for n in range(3)], 1)
    expected = bytes_.flip(1) if processor.get("do_flip_channel_order") else bytes_
    if processor.get("do_rescale", True):
        expected = expected * processor.get("rescale_factor", 1 / 255)
    if processor.get("rescale_offset"):
        expected = expected - 1
    if processor.get("do_normalize", True):
        mean, std = processor.get("image_mean"), processor.get("image_std")
        mean = OPENAI.mean if mean is None else mean
        std = OPENAI.std if std is None else std
        expected = (expected - torch.tensor(mean)) / torch.tensor(std)
    if processor.get("include_top"):
        expected = expected / torch.tensor(processor["image_std"])
    found = transformers_settings(CLIP, processor)
    made = (bytes_ / 255 - torch.tensor(found.mean)) / torch.tensor(found.std)
    made = made.flip(1) if found.blue_first else made
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert (found.input_size, found.patch_size) == (224, 16)


@pytest.mark.parametrize("factor", [0, -1 / 255, "1/255", float("nan"), None])
def test_a_processor_that_scales_by_nothing_is_refused(factor):
    with pytest.raises(ValueError, match="rescale_factor="):
        transformers_settings(CLIP, {"rescale_factor": factor})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_size": 384, "patch_size": 14}, (384, 14)),
        ({"image_size": (224, 384), "patch_size": (16, 16)}, (384, 1)),
        ({"image_size": []}, (None, 1)),
        ({"image_size": "224"}, (None, 1)),
        ({}, (None, 1)),
    ],
)
def test_sizes_of_a_configuration_are_believed_where_they_are_numbers(config, expected):
    found = transformers_settings(SimpleNamespace(**config))
    assert (found.input_size, found.patch_size) == expected


@pytest.mark.parametrize(
    ("kind", "normalization"),
    [
        ("clip", OPENAI),
        ("siglip_vision_model", HALF),
        ("qwen3_vl_vision", HALF),
        ("sam3_vit_model", HALF),
        ("vit_mae", IMAGENET),
        ("dinov3_vit", IMAGENET),
        ("radio", ((0.0,) * 3, (1.0,) * 3)),
        ("deit", IMAGENET),
        ("unheard_of", IMAGENET),
    ],
)
def test_without_a_processor_the_kind_decides(kind, normalization):
    found = transformers_settings(SimpleNamespace(model_type=kind))
    assert (found.mean, found.std) == tuple(normalization)


@pytest.mark.parametrize(
    ("number", "name"), [(2, "bilinear"), (3, "bicubic"), (0, "bicubic"), (None, "bicubic")]
)
def test_filters_have_numbers(number, name):
    assert transformers_settings(CLIP, {"resample": number}).interpolation == name


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({}, None),
        ({"do_center_crop": False, "crop_size": 224}, None),
        ({"do_center_crop": True, "crop_size": 224}, "224×224"),
        ({"do_center_crop": True, "crop_size": {"height": 224, "width": 196}}, "224×196"),
        ({"do_center_crop": True, "size": {"shortest_edge": 256}}, "?×?"),
        ({"do_center_crop": True, "crop_size": [224, 224]}, "a square"),
    ],
)
def test_what_a_processor_would_crop_is_told(processor, size):
    assert cropping(processor) == size


def configured(mean=0.5, **config):
    module = nn.Conv2d(3, 4, 8, 8)
    module.pretrained_cfg = {"mean": (mean,) * 3, "std": (0.25,) * 3, **config}
    return module


def test_modules_inside_are_asked_and_must_agree(caplog):
    plain = nn.Conv2d(3, 4, 8, 8)
    assert settings_of(plain) == Settings()
    inside = nn.Sequential(plain, nn.Sequential(configured(input_size=(3, 224, 256))))
    found = settings_of(inside)
    assert (found.mean, found.std, found.input_size) == ((0.5,) * 3, (0.25,) * 3, 256)
    assert settings_of([plain, configured(), configured()]).mean == (0.5,) * 3
    assert not caplog.text
    assert settings_of([configured(), configured(0.1)]) == Settings()
    assert "different normalisations; ImageNet's is taken: give mean=" in caplog.text


def test_images_of_other_bands_are_not_normalised():
    found = timm_settings(configured().pretrained_cfg)
    assert found.for_channels(3) is found
    other = found.for_channels(5)
    assert (other.mean, other.std) == ((0.0,) * 5, (1.0,) * 5)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Write a library of one file, by name and content, to where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, content):
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"libx is not installed: pip install 'upfeat\[x\]'$"),
        ("import no_such_part", "libx cannot be imported: No module named 'no_such_part'"),
        (
            "raise RuntimeError('of another age\\nand more')",
            "installed but cannot be imported: of ano",
        ),
        ("raise ImportError('torchvision::nms')", "torchvision::nms; install torchvision from whe"),
        ("raise KeyError", "installed but cannot be imported: KeyError$"),
    ],
)
def test_libraries_that_cannot_be_imported_are_one_line(library, content, words):
    if content is not None:
        library("libx", content)
    with pytest.raises(ValueError, match=words) as refused:
        import_library("libx", extra="x")
    assert "\n" not in str(refused.value)


def test_libraries_that_can_be_are(library):
    assert import_library(library("liby", "answer = 42"), extra="y").answer == 42


def test_a_broken_library_is_put_aside_and_comes_back(library, caplog):
    broken = library("libz", "raise RuntimeError('of another build')")
    with without_broken(broken):
        assert sys.modules[broken] is None
        with pytest.raises(ImportError):
            __import__(broken)
    assert "libz cannot be imported (of another build): going on without it" in caplog.text
    assert broken not in sys.modules
    caplog.clear()
    whole = library("libw", "answer = 42")
    for name in (whole, whole, "libv"):
        with without_broken(name):
            pass
    assert sys.modules[whole].answer == 42
    assert not caplog.text


def test_downloads_are_quiet_and_what_was_heard_is_heard_again(caplog):
    log = logging.getLogger("somebody")
    with pytest.raises(KeyError), quiet():
        raise KeyError(log.error("a retry"))
    log.error("a failure")
    assert caplog.messages == ["a failure"]


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("form", [float, lambda one: [one], lambda one: [one] * 3])
def test_one_mean_is_that_of_every_band(channels, form):
    config = SimpleNamespace(model_type="vit", num_channels=channels)
    found = transformers_settings(config, {"image_mean": form(0.25), "image_std": form(0.5)})
    assert (found.mean, found.std) == ((0.25,) * channels, (0.5,) * channels)
    means = [0.1 * n for n in range(channels)]
    found = transformers_settings(config, {"image_mean": means, "image_std": form(0.5)})
    assert (found.mean, len(found.std)) == (pytest.approx(means), channels)


def test_models_whose_processors_do_not_normalise_are_known():
    """The configurations of MobileViT and GLPN name neither normalisation nor its absence."""
    mobile = transformers_settings(SimpleNamespace(model_type="mobilevit"), {"do_resize": True})
    assert (mobile.mean, mobile.std, mobile.blue_first) == ((0,) * 3, (1,) * 3, True)
    assert transformers_settings(SimpleNamespace(model_type="mobilevitv2")).blue_first
    given = {"do_flip_channel_order": False, "do_normalize": True, "image_mean": 0.5}
    found = transformers_settings(SimpleNamespace(model_type="mobilevit"), given | {"image_std": 1})
    assert (found.mean, found.blue_first) == ((0.5,) * 3, False)
    assert transformers_settings(SimpleNamespace(model_type="glpn"), {}).mean == (0,) * 3
    assert transformers_settings(SimpleNamespace(model_type="vit"), {}).mean == HALF.mean
