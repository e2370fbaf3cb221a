"""Models of libraries inside other modules: parallel, compiled, with adapters, or of users."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import upfeat

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def network():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
    return transformers.Dinov2Model(transformers.Dinov2Config(**small)).eval()


class Adapted(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, network):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = network

    def get_base_model(self):
        return self.base_model.model

    def forward(self, x):
        return self.base_model.model(x)


def _compiled(network):
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, _compiled, Adapted])
@pytest.mark.parametrize("layer", [None, 0])
def test_wrapped_models_are_read_as_the_model_inside(network, wrap, layer):
    """Layers are the model's; of the wrapper's output, entry 0 would be the last layer."""
    x = torch.randn(1, 3, 56, 70)
    backbone = upfeat.load_backbone(wrap(network), layer=layer)
    torch.testing.assert_close(backbone(x), upfeat.load_backbone(network, layer=layer)(x))
    assert backbone.name == "Dinov2Model"


def test_a_compiled_model_stays_as_it_is(torchvision_operators):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", **options).eval()
    embed = network.patch_embed
    assert upfeat.load_backbone(_compiled(network)).input_size is None
    assert network.patch_embed is embed
    assert not network.dynamic_img_size


class Mine(nn.Module):
    def __init__(self, network, read):
        super().__init__()
        self.trunk = network
        self.read = read

    def forward(self, x):
        return self.read(self.trunk(x))


def test_the_model_inside_is_named(network):
    pooled = Mine(network, lambda output: output.pooler_output)
    with pytest.raises(ValueError, match=r"Mine holds a Dinov2Model: give that, its \.trunk"):
        upfeat.load_backbone(pooled)
    with pytest.raises(ValueError, match=r"Mine holds a Dinov2Model: give that, its \.trunk"):
        upfeat.load_backbone(lambda x: pooled(x))
    encoder = transformers.VisionEncoderDecoderModel.__new__(transformers.VisionEncoderDecoderModel)
    nn.Module.__init__(encoder)
    encoder.encoder, encoder.config = network, SimpleNamespace()
    encoder.forward = lambda pixel_values: pixel_values.mean((2, 3))
    with pytest.raises(ValueError, match=r"holds a Dinov2Model: give that, its \.encoder"):
        upfeat.load_backbone(encoder)


@pytest.mark.parametrize("layer", [0, 1, [0, 1]])
def test_numbers_count_no_entries_of_an_output(network, layer):
    """Entry 0 of the output of a model of transformers is its last layer."""
    whole = Mine(network, lambda output: output)
    assert upfeat.load_backbone(whole).stride == 14
    with pytest.raises(ValueError, match=r"does not number the layers .* give that, its \.trunk"):
        upfeat.load_backbone(whole, layer=layer)


@pytest.mark.parametrize("layer", [np.int64(1), np.array(1), np.array([1]), [np.int32(1)]])
def test_numbers_of_numpy_are_layers(network, layer):
    x = torch.randn(1, 3, 56, 56)
    expected = upfeat.load_backbone(network, layer=1)(x)
    torch.testing.assert_close(upfeat.load_backbone(network, layer=layer)(x), expected)


@pytest.mark.parametrize(("value", "std"), [(0.45, 1.0), (114.75, 1 / 255)])
def test_modules_that_normalise_images_are_given_them_without(value, std, caplog):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("norm_mean", torch.full((3, 1, 1), value))
            self.patches = nn.Conv2d(3, 8, 16, stride=16)

        def forward(self, x):
            return self.patches(x - self.norm_mean)

    backbone = upfeat.load_backbone(Conditioned())
    assert backbone.normalization == ((0.0,) * 3, (std,) * 3)
    assert "the module holds norm_mean" in caplog.text
    given = upfeat.load_backbone(Conditioned(), mean=[0.5] * 3, std=[0.5] * 3)
    assert given.normalization == ((0.5,) * 3, (0.5,) * 3)


def test_bands_of_models_with_a_time_axis_are_counted():
    patches = nn.Conv3d(6, 8, (1, 16, 16), stride=(1, 16, 16)).eval()
    backbone = upfeat.load_backbone(lambda x: patches(x[:, :, None])[:, :, 0])
    assert (backbone.in_channels, backbone.stride) == (6, 16)
    with pytest.raises(ValueError, match="give in_channels=, the bands that it takes"):
        upfeat.load_backbone(lambda x: patches(x[:, :, None])[:, :, 0], in_channels=4)


def test_backbones_inside_keep_their_normalisation():
    inner = upfeat.load_backbone(nn.Conv2d(3, 8, 16, 16), mean=[0.1] * 3, std=[0.2] * 3)
    backbone = upfeat.load_backbone(Mine(inner, lambda features: features))
    assert backbone.normalization == inner.normalization
