"""Public objects: their names, lines, comparison, copies; and state that calls leave as it was."""

import copy
import importlib.util
import inspect
import os
import pickle
import random
import re
import signal
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import upfeat
from upfeat import heads, probes, views
from upfeat.adapters import DenseGrid, PixelFeatures, TileSampler
from upfeat.batch import Engine, Extraction
from upfeat.features import PCA
from upfeat.raster import Features, HeadOutput

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


def documented():
    """Modules of which the reference documents all that is public."""
    names = re.findall(
        r"^::: ([\w.]+)", "\n".join(p.read_text() for p in REFERENCE.glob("*.md")), re.M
    )
    return [name for name in names if name.rpartition(".")[2].islower() and _is_module(name)]


def _is_module(name):
    try:
        return isinstance(importlib.import_module(name), types.ModuleType)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", documented())
def test_documented_modules_list_their_names(name):
    module = importlib.import_module(name)
    assert all(hasattr(module, one) for one in module.__all__)
    own = {
        one
        for one, value in vars(module).items()
        if getattr(value, "__module__", None) == name and not one.startswith("_")
    }
    hidden = own - set(module.__all__)
    assert not hidden, f"{hidden} of {name} are neither private nor in __all__"


@pytest.mark.parametrize("package", [upfeat, upfeat.evaluation, upfeat.training])
def test_no_module_replaces_a_public_name(package):
    """Importing a module sets it in its package, in place of a function that is not loaded yet."""
    for name in package._LAZY:
        assert importlib.util.find_spec(f"{package.__name__}.{name}") is None, name


def test_classes_show_the_arguments_of_their_constructors():
    for kind in (upfeat.Backbone, upfeat.WrappedBackbone, upfeat.TextBackbone):
        names = list(inspect.signature(kind).parameters)
        assert names == list(inspect.signature(kind.__init__).parameters)[1:]
        assert "mean" in names


def objects():
    weight, bias = torch.randn(2, 8), torch.randn(2)
    head = heads.SavedHead(weight, bias, ["a", "b"], "classes", {"name": "one"}, "bilinear")
    return [
        views.sample_jitters(3, size=(8, 8), max_pad=2),
        probes.LinearProbe(weight, bias),
        probes.Pixels(torch.randn(2, 3, 8), torch.ones(2, 3)),
        head,
        Extraction("head", head=head),
        DenseGrid(torch.randn(8, 2, 3), (32, 48), (16, 16)),
        TileSampler((0.0, 0.0, 40.0, 24.0), 0.5, tile=32),
        Features(8, {}),
        HeadOutput(weight, bias, ["a", "b"], {}),
        PCA(torch.randn(1, 3, 20, 30), torch.randn(3, 8), torch.randn(8)),
        PixelFeatures(upfeat.load_backbone(nn.Conv2d(3, 8, 16, stride=16))),
        upfeat.FitConfig(),
        Engine(),
    ]


@pytest.mark.parametrize("one", objects(), ids=lambda one: type(one).__name__)
def test_one_line_shows_an_object(one):
    line = repr(one)
    assert line.startswith(type(one).__name__)
    assert "\n" not in line
    assert len(line) < 320
    assert " at 0x" not in line


@pytest.mark.parametrize("one", objects(), ids=lambda one: type(one).__name__)
def test_objects_are_compared_and_copied(one):
    for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert type(other) is type(one)
        assert repr(other) == repr(one)
        if not isinstance(one, PCA):  # a tuple of tensors, which Python compares one by one
            assert (other == one) in (True, False)
        if type(one).__hash__ is not None:
            hash(other)


def _state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "types": (torch.get_default_dtype(), torch.get_default_device()),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "errors": np.geterr(),
    }


class Stop(Exception):
    pass


def _stop(*_):
    raise Stop


@pytest.mark.parametrize("on_step", [None, _stop], ids=["ends", "raises"])
def test_calls_leave_the_state_of_the_process(tmp_path, on_step):
    photos = tmp_path / "photos"
    photos.mkdir()
    photo = photos / "a.png"
    upfeat.visualize.to_image(torch.rand(3, 32, 48)).save(photo)
    backbone = upfeat.load_backbone(nn.Conv2d(3, 8, 16, stride=16))
    config = upfeat.TrainConfig(steps=1, size=32, views=1, batch_size=1, workers=0)

    def everything():
        model = upfeat.load()
        lazy = model.lazy(model.preprocess(photo))
        lazy.pca()
        lazy.full(max_memory="16GB")
        upfeat.load_upsampler("detail")
        views.sample_jitters(2, size=(8, 8), generator=torch.Generator().manual_seed(0))
        calls = [
            lambda: upfeat.fit_implicit(photo, backbone, views=2, size=32, on_step=on_step),
            lambda: upfeat.train(backbone, photos, config, on_step=on_step),
        ]
        for call in calls:
            if on_step is None:
                call()
            else:
                with pytest.raises(Stop):
                    call()

    everything()  # imports of libraries may change the state once
    before = _state()
    everything()
    after = _state()
    assert [name for name in before if before[name] != after[name]] == []
