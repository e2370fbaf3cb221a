"""Modes of PyTorch around a call and after it: default type and device, inference, autocast."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap
from upsamplers.test_ways import MADE, close, inputs, make

import upfeat
from upfeat import pooling
from upfeat.backends.cpu.library import Layer, call
from upfeat.downsamplers import AttentionDownsampler
from upfeat.implicit.fields import NetworkField
from upfeat.losses import SpatialUncertainty
from upfeat.types import Window
from upfeat.upsamplers.queries import Pixels

WEIGHTED = [name for name in MADE if list(MADE[name]().parameters())]


@contextmanager
def doubles():
    """Floating-point tensors are float64 unless their type is named."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {"dtype": doubles, "device": lambda: torch.device("meta")}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", MADE)
def test_defaults_of_new_tensors_change_nothing(name, default, recorded, monkeypatch):
    upsampler, (features, guidance) = make(name).requires_grad_(recorded), inputs()
    monkeypatch.setattr("upfeat.upsamplers.maps.WHOLE", 100)  # windows have tables of their own
    points = torch.tensor([[3, 4], [20, 30]])
    expected = upsampler(features, guidance)
    with DEFAULTS[default]():
        lazy = upfeat.UpsampledFeatures(features, guidance, upsampler)
        found = upsampler(features, guidance), lazy.full(), lazy.crop(1, 2, 9, 7)
        at = lazy.at(points)
    for one, other in zip(found, (expected, expected, expected[:, :, 1:10, 2:9]), strict=True):
        assert one.dtype is torch.float32
        close(one, other, 1e-5)
    close(at, expected[0, :, points[:, 0], points[:, 1]].T, 1e-5)


def test_images_are_read_whatever_the_default_device():
    image = torch.rand(8, 9, 3)
    expected = upfeat.images.read_image(image.numpy())
    with torch.device("meta"):
        assert torch.equal(upfeat.images.read_image(image.numpy()), expected)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")]
)
def test_kept_tables_serve_all_modes(mode):
    """What one mode makes and the process keeps: training after validation in inference mode."""
    pooling._taps.cache_clear()
    pooling._spans.cache_clear()
    values = torch.randn(1, 2, 12, 9, requires_grad=True)
    weights = torch.rand(1, 4, 3, 4, 4, requires_grad=True)
    with mode():
        pooling._spans(12, 4, 4, 1, torch.float32, torch.device("cpu"))
        pooling._spans(9, 3, 4, 8, torch.float32, torch.device("cpu"))
    pooling.pool_patches(values, weights).sum().backward()
    pooling.sample_patches(values, (4, 3), 4).sum().backward()


CHANGES = {
    "in place": lambda up: [one.data.mul_(1.5) for one in up.parameters()],
    "assigned": lambda up: [setattr(one, "data", 1.5 * one) for one in up.parameters()],
    "loaded": lambda up: up.load_state_dict({k: 1.5 * x for k, x in up.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", WEIGHTED)
def test_maps_follow_every_change_of_weights(name, change):
    upsampler = make(name)
    lazy = upfeat.UpsampledFeatures(*inputs(), upsampler)
    before = lazy.kernels
    assert lazy.kernels is before
    CHANGES[change](upsampler)
    assert lazy.kernels is not before


@pytest.mark.parametrize("name", MADE)
def test_maps_of_autocast_are_not_kept_after_it(name):
    upsampler = make(name)
    lazy = upfeat.UpsampledFeatures(*inputs(), upsampler)
    expected = upfeat.UpsampledFeatures(*inputs(), upsampler)
    with torch.autocast("cpu", torch.bfloat16):
        lazy.full()
        lazy.crop(1, 2, 3, 4)
    assert torch.equal(lazy.crop(1, 2, 9, 7), expected.crop(1, 2, 9, 7))
    assert torch.equal(lazy.full(), expected.full())


def test_another_backend_computes_maps_again():
    upsampler = make("neighbourhood")
    lazy = upfeat.UpsampledFeatures(*inputs(), upsampler)
    before = lazy.kernels
    upsampler.set_backend("reference")
    assert lazy.kernels is not before
    assert lazy.kernels.backend == "reference"


class _Shared(Pixels):
    """Pixels whose kept window another thread replaces whenever this one has kept its own."""

    def compute(self, window):
        rows, columns = (torch.arange(64.0)[start : start + 8] for start in window[:2])
        return (64 * rows[:, None] + columns)[None, None, : window.height, : window.width]

    @property
    def _last(self):
        other = Window(0, 0, 2, 2)
        return other, self.compute(other)

    @_last.setter
    def _last(self, kept):
        pass


def test_windows_are_not_those_of_another_thread():
    window = Window(5, 7, 3, 4)
    pixels = _Shared((64, 64), whole=False, recorded=False)
    assert torch.equal(pixels.at(window), pixels.compute(window))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", WEIGHTED)
def test_ensembles_of_weights(name):
    models = [make(name) for _ in range(2)]
    with torch.no_grad():
        for one in models[1].parameters():
            one.mul_(1.1)
    parameters, buffers = stack_module_state(models)
    given = inputs()
    found = vmap(lambda *state: functional_call(models[0], state, given))(parameters, buffers)
    for one, model in zip(found, models, strict=True):
        close(one, model(*given))


def test_refused_arguments_are_an_error_without_assertions_too():
    with pytest.raises(RuntimeError, match="upfeat_layer_pool refused its arguments"):
        call("upfeat_layer_pool", torch.zeros(1, 4, 3, 3), Layer(), torch.zeros(2, 4, 3, 3))


DRAWN = {
    "field": lambda draw: NetworkField(4, hidden=8, frequencies=3, generator=draw),
    "downsampler": lambda draw: AttentionDownsampler(4, 3, generator=draw),
    "uncertainty": lambda draw: SpatialUncertainty(4, generator=draw),
}


@pytest.mark.parametrize("name", DRAWN)
def test_initial_weights_are_those_of_the_seed_in_any_default_type(name):
    expected = DRAWN[name](torch.Generator().manual_seed(3)).state_dict()
    with doubles():
        found = DRAWN[name](torch.Generator().manual_seed(3)).state_dict()
    for key, value in expected.items():
        assert torch.equal(found[key].float(), value), key


def test_images_and_their_normalisation_are_float32_in_any_default_type():
    image = torch.rand(16, 24, 3).numpy()
    with doubles():
        backbone = upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, stride=8))
        assert backbone.preprocess(image).dtype is torch.float32
        assert backbone.float().mean.dtype is torch.float32
        assert backbone(backbone.preprocess(image)).dtype is torch.float32
