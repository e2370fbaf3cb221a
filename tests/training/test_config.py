"""Settings: ranges, recipes, files."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hostile import fault

from upfeat.training import TrainConfig
from upfeat.training.config import OPERATIONAL, PRESETS, REFERENCE
from upfeat.training.settings_file import read_settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"views": True}, "views=True must be a whole number"),
        ({"batch_size": "four"}, "batch_size='four' must be a whole number"),
        ({"workers": -1}, "workers=-1 must be 0 or more"),
        ({"max_zoom": 0.5}, "max_zoom=0.5 must be a number of at least 1"),
        ({"zoom_probability": 2}, "zoom_probability=2 must be a number from 0 to 1"),
        ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number above 0"),
        ({"crf_weight": "much"}, "crf_weight='much' must be a number of at least 0"),
        ({"saliency_dropout": 1}, "saliency_dropout=1.0 must be below 1"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"precision": "fp16"}, "did you mean"),
        ({"source_size": 100}, "source_size=100 must be at least size=224"),
        ({"accumulate": 3}, "accumulate=3 must divide batch_size=4"),
        ({"downsampler_size": 7}, "downsampler_size=7 is of the downsamplers attention and simple"),
        ({"upsampler_options": [2]}, "must be names and values"),
        ({"tensorboard": "yes"}, "must be true or false"),
        ({"learning_rat": 1}, "settings: .*did you mean learning_rate"),
        ({"preset": "referense"}, "did you mean reference"),
    ],
)
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as raised:
        TrainConfig.from_mapping(settings)
    assert "\n" not in str(raised.value)


HOSTILE = [
    True, "many", b"1", [], {}, (1,), object(), math.nan, math.inf, -math.inf, -1, 10**30, 10**5000,
    1e300, -1e300, 1j, np.True_, np.float64("nan"), torch.tensor(True), torch.ones(2),
]  # fmt: skip


# What is not there is found out when it is used.
NAMES = ("upsampler", "device", "out")
HARMLESS = (True, 1, -1, {}, [], (), "many")


@pytest.mark.parametrize("name", sorted(field.name for field in fields(TrainConfig)))
def test_hostile_values_of_every_setting(name):
    """Refused in one line that names the setting, or kept and harmless."""
    for value in HOSTILE:
        error = fault(TrainConfig, **{name: value})
        if error is not None:
            assert name in error
            assert "\n" not in error
            assert len(error) < 300
        else:
            assert isinstance(value, str) if name in NAMES else value in HARMLESS


def test_the_reference_recipe_is_the_published_one():
    config = TrainConfig.reference()
    assert (config.upsampler, config.steps, config.batch_size, config.views) == (
        "jbu_stack",
        2000,
        4,
        5,
    )
    assert (config.max_pad, config.max_zoom, config.projection_dim) == (20, 2.0, 30)
    assert (config.crf_weight, config.tv_weight, config.learning_rate) == (1e-3, 0, 1e-3)
    recipe = {field.name for field in fields(TrainConfig)} - OPERATIONAL
    runs = {"seed", "accumulate", "precision", "validation_images", "validate_every", "patience"}
    assert set(REFERENCE) == recipe - runs
    assert TrainConfig.reference(steps=3).steps == 3


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_survive_a_file(tmp_path, name):
    config = TrainConfig.preset(name, out=tmp_path / "run")
    (tmp_path / "c.json").write_text(json.dumps(config.to_json()))
    again = TrainConfig.from_mapping(read_settings(tmp_path / "c.json"))
    assert again == config
    assert config.differences(json.loads(json.dumps(config.to_json()))) == []


TWICE = "steps: 2\nseed: 3\nsteps: 4\n"


def test_yaml(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    path.write_text("preset: reference\nlearning_rate: 2e-3\nsource_size: null\n")
    config = TrainConfig.from_mapping(read_settings(path))
    assert config.learning_rate == 2e-3
    path.write_text("")
    assert read_settings(path) == {}
    for content, words in (
        ("a: [", "not YAML"),
        ("- 1", "holds list, not settings"),
        (TWICE, "steps is given twice"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_settings(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_settings(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_settings(tmp_path / "none.yaml")


def test_yaml_without_pyyaml(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "c.yaml").write_text("steps: 1")
    with pytest.raises(ValueError, match=r'pip install "upfeat\[train\]", or give a .json file'):
        read_settings(tmp_path / "c.yaml")


def test_settings_cannot_be_changed_from_outside():
    options = {"radius": 2}
    config = TrainConfig(upsampler_options=options)
    options["radius"] = 3
    assert config.upsampler_options == {"radius": 2}
