"""Models as users hold them: what they return is recognised, or asked about in one line."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upfeat
from upfeat.normalization import IMAGENET
from upfeat.testing import check_backbone


class Patches(nn.Module):
    """A map of means over patches, with what it takes and returns chosen by options."""

    def __init__(self, shape="NCHW", *, prefix=0, patch=16, stride=16, size=None):
        super().__init__()
        self.project = nn.Conv2d(3, 12, patch, stride)
        self.shape, self.prefix, self.size = shape, prefix, size

    def forward(self, x):
        assert self.size in (None, x.shape[2]), f"expected {self.size} pixels"
        assert self.size in (None, x.shape[3])
        maps = self.project(x)
        tokens = F.pad(maps.flatten(2).mT, (0, 0, self.prefix, 0), value=9.0)
        return {
            "NCHW": maps,
            "NHWC": maps.permute(0, 2, 3, 1),
            "tokens": tokens,
            "list": [F.interpolate(maps, scale_factor=2.0), maps],
            "tuple": (tokens.mean(1), tokens),
            "dict": {"x_norm_clstoken": tokens.mean(1), "x_norm_patchtokens": tokens},
        }[self.shape]


def _checked(module, **options):
    backbone = upfeat.load_backbone(module, **options)
    check_backbone(lambda: backbone)
    return backbone


@pytest.mark.parametrize(
    ("shape", "prefix"),
    [
        *(("NCHW", 0), ("NHWC", 0), ("tokens", 0), ("tokens", 1), ("tokens", 5)),
        *(("list", 0), ("tuple", 1), ("dict", 0)),
    ],
)
def test_every_form_is_recognised(shape, prefix):
    torch.manual_seed(0)
    module = Patches(shape, prefix=prefix)
    backbone = _checked(module)
    assert (backbone.stride, backbone.embed_dim) == (16, 12)
    x = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(backbone(x), module.project(x))


@pytest.mark.parametrize("shape", ["NCHW", "tokens"])
@pytest.mark.parametrize(("patch", "stride"), [(16, 8), (14, 7), (16, 12)])
def test_overlapping_patches(patch, stride, shape):
    backbone = _checked(Patches(shape, patch=patch, stride=stride, prefix=1))
    assert backbone.stride == stride
    for cells in ((6, 4), (64, 2), (3, 70)):
        x = torch.randn(1, 3, cells[0] * stride, cells[1] * stride)
        assert backbone(x).shape[-2:] == cells


def test_patches_are_centred_on_their_cells():
    torch.manual_seed(0)
    backbone = upfeat.load_backbone(Patches(patch=16, stride=8))
    x = torch.randn(1, 3, 48, 48)
    flipped = upfeat.load_backbone(Patches(patch=16, stride=8))
    flipped.module.project.weight.data = backbone.module.project.weight.data.flip(3)
    flipped.module.project.bias.data = backbone.module.project.bias.data
    torch.testing.assert_close(flipped(x.flip(3)).flip(3), backbone(x))


@pytest.mark.parametrize(("side", "stride"), [(240, 32), (300, 32), (224, 64), (528, 32)])
def test_a_last_cell_that_reaches_beyond_the_image_says_nothing_of_the_stride(side, stride):
    # 240 pixels are 8 cells of 32, as of EfficientNet-B1: 8 cells of 30 would lie elsewhere.
    torch.manual_seed(0)
    project = nn.Conv2d(3, 12, 3, stride, padding=1)
    backbone = _checked(project, input_size=side)
    assert backbone.stride == stride
    x = torch.randn(1, 3, 4 * stride, 17 * stride)
    torch.testing.assert_close(backbone(x), project(x))
    cells = -(-side // stride)
    if side % cells == 0:
        with pytest.raises(ValueError, match=f"was given, but its cells are {stride} pixels apart"):
            upfeat.load_backbone(project, input_size=side, stride=side // cells)


def test_images_are_of_three_bands_whatever_the_first_convolution_takes():
    torch.manual_seed(0)
    network = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 4, 4))
    backbone = _checked(network)
    assert (backbone.in_channels, backbone.stride) == (3, 16)
    x = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(backbone(x), network(x))
    with pytest.raises(ValueError, match="takes none of the image sizes tried"):
        upfeat.load_backbone(network, in_channels=48)


def test_channels_before_the_cells_are_refused():
    # 24 channels of 28 × 28 cells, which could be 8 prefix tokens and 4 × 4 cells.
    project = nn.Conv2d(3, 24, 8, 8)
    with pytest.raises(ValueError, match=r"its axes are \(B, C, N\); give a function"):
        upfeat.load_backbone(lambda x: project(x).flatten(2))
    backbone = upfeat.load_backbone(lambda x: project(x).flatten(2).mT)
    x = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(backbone(x), project(x))


class TestOneSize:
    @pytest.mark.parametrize("fit", ["tile", "resize"])
    def test_contract(self, fit):
        backbone = _checked(Patches(size=64), fit=fit)
        assert backbone.input_size == (64, 64)

    def test_tiles_are_what_the_whole_would_be(self):
        torch.manual_seed(0)
        module = Patches(size=64)
        backbone = upfeat.load_backbone(module)
        x = torch.randn(2, 3, 160, 112)
        torch.testing.assert_close(backbone(x), module.project(x), rtol=1e-4, atol=1e-5)

    def test_small_images_are_enlarged(self):
        backbone = upfeat.load_backbone(Patches(size=64))
        assert backbone(torch.randn(1, 3, 32, 48)).shape[-2:] == backbone.grid_size((32, 48))
        assert backbone.grid_size((32, 48)) == (4, 6)
        assert backbone.grid_size((640, 48)) == (54, 4)

    def test_it_is_said(self, caplog):
        with caplog.at_level(logging.INFO, logger="upfeat"):
            upfeat.load_backbone(Patches(size=64), name="mine")
        assert "mine takes images of 64×64 only" in caplog.text
        assert 'fit="resize"' in caplog.text

    def test_what_cannot_be_is_refused(self):
        with pytest.raises(ValueError, match='fit="interpolate" is not possible'):
            upfeat.load_backbone(Patches(size=64), fit="interpolate")
        with pytest.raises(ValueError, match="fit='squeeze' must be one of"):
            upfeat.load_backbone(Patches(), fit="squeeze")
        with pytest.raises(ValueError, match=r"takes none of the image sizes tried .* input_size="):
            upfeat.load_backbone(Patches(size=80))
        assert upfeat.load_backbone(Patches(size=80), input_size=80).input_size == (80, 80)


class TestFunctions:
    def test_a_module_in_train_mode_is_put_in_eval_mode_and_said(self, caplog):
        net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8))
        mean = net[1].running_mean.clone()
        model = upfeat.load(lambda x: net(x), upsampler="bilinear")
        assert "was in train mode" in caplog.text
        assert not any(parameter.requires_grad for parameter in net.parameters())
        a, b = torch.randn(2, 3, 64, 64), 3 * torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(torch.cat([a, b]))[:2], model(a))
        assert torch.equal(net[1].running_mean, mean)

    def test_chance_is_noticed_where_the_module_is_hidden(self, caplog):
        hidden = {"net": nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Dropout(0.5))}
        upfeat.load_backbone(lambda x: hidden["net"](x))
        assert "two calls differ" in caplog.text

    def test_the_batch_is_noticed_where_the_module_is_hidden(self, caplog):
        hidden = {"net": nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8, momentum=0.0))}
        upfeat.load_backbone(lambda x: hidden["net"](x))
        assert "they depend on the batch" in caplog.text

    def test_they_move_with_the_backbone(self):
        net = nn.Conv2d(3, 8, 8, 8)
        backbone = upfeat.load_backbone(lambda x: net(x), dtype=torch.bfloat16)
        assert backbone.dtype == net.weight.dtype == torch.bfloat16
        assert backbone(torch.randn(1, 3, 32, 32)).dtype == torch.float32


class TestLayersInside:
    def test_by_name(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 8, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        backbone = _checked(net, layer="1")
        assert (backbone.stride, backbone.embed_dim) == (8, 8)
        both = _checked(net, layer=["0", "1"])
        assert (both.stride, both.embed_dim) == (4, 12)
        net = nn.Sequential()
        net.layer1 = nn.Conv2d(3, 4, 4, 4)
        with pytest.raises(ValueError, match='layer "layr1" is unknown; did you mean layer1'):
            upfeat.load_backbone(net, layer="layr1")

    def test_keys_and_numbers_of_outputs(self):
        module = Patches("list")
        assert upfeat.load_backbone(module, layer=0).stride == 8
        assert upfeat.load_backbone(module, layer=[0, 1]).embed_dim == 24
        with pytest.raises(ValueError, match="layer=2 does not exist; there are 2, 0 to 1"):
            upfeat.load_backbone(module, layer=2)
        with pytest.raises(ValueError, match="layer=3 picks nothing"):
            upfeat.load_backbone(Patches(), layer=3)
        with pytest.raises(ValueError, match=r"layer=\[\] is empty"):
            upfeat.load_backbone(module, layer=[])


def test_ambiguity_is_asked_about():
    def cube(x):
        assert x.shape[2] == x.shape[3] == 224
        return F.avg_pool2d(x[:, :1], 16).expand(-1, 14, -1, -1)

    with pytest.raises(ValueError, match='give layout="NCHW" or layout="NHWC"'):
        upfeat.load_backbone(cube)
    assert upfeat.load_backbone(cube, layout="NCHW").embed_dim == 14
    with pytest.raises(ValueError, match="layout='CHW' must be one of"):
        upfeat.load_backbone(cube, layout="CHW")


def test_settings_inside_a_module_are_read():
    net = nn.Conv2d(3, 8, 8, 8)
    net.pretrained_cfg = {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "input_size": (3, 64, 64),
        "interpolation": "bilinear",
    }
    for backbone in (
        upfeat.load_backbone(nn.Sequential(net)),
        upfeat.load_backbone(lambda x: net(x)),
    ):
        assert backbone.normalization == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        assert backbone.interpolation == "bilinear"
    own = upfeat.load_backbone(nn.Sequential(net), mean=IMAGENET.mean, std=IMAGENET.std)
    assert own.normalization == IMAGENET


class TestTokensToGrid:
    def test_order(self):
        grid = torch.arange(6.0).view(1, 1, 2, 3)
        tokens = torch.cat([torch.full((1, 2, 1), -1.0), grid.flatten(2).mT], dim=1)
        for prefix in (2, None):
            torch.testing.assert_close(upfeat.tokens_to_grid(tokens, (2, 3), prefix), grid)

    def test_what_fills_no_grid_is_refused(self):
        tokens = torch.zeros(1, 7, 4)
        with pytest.raises(ValueError, match="7 tokens are not 0 prefix tokens and a grid of 2×3"):
            upfeat.tokens_to_grid(tokens, (2, 3), prefix_tokens=0)
        with pytest.raises(ValueError, match="not a grid of 4×3"):
            upfeat.tokens_to_grid(tokens, (4, 3))
        with pytest.raises(ValueError, match=r"tokens must be \(B, N, C\)"):
            upfeat.tokens_to_grid(tokens[0], (2, 3))


def test_a_size_that_fails_later_is_one_line():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Conv2d(3, 8, 16, 16)

        def forward(self, x):
            return self.project(x) + torch.zeros(32, 32)[: x.shape[2] // 16, : x.shape[3] // 16]

    backbone = upfeat.load_backbone(Picky())
    with pytest.raises(ValueError, match=r'Picky fails on an image of 64×640.* fit="tile"'):
        backbone(torch.randn(1, 3, 64, 640))
    assert upfeat.load_backbone(Picky(), fit="tile")(torch.randn(1, 3, 64, 640)).shape[1] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_a_backbone_in_half_precision(tmp_path, dtype):
    from PIL import Image

    for index in range(2):
        pixels = torch.rand(3, 40, 44, generator=torch.Generator().manual_seed(index))
        image = Image.fromarray(pixels.mul(255).byte().permute(1, 2, 0).numpy())
        image.save(tmp_path / f"{index}.png")
    backbone = upfeat.load_backbone(nn.Conv2d(3, 6, 8, stride=8), dtype=dtype)
    config = upfeat.TrainConfig(
        upsampler="neighbourhood", steps=1, batch_size=1, views=2, size=32, validation_images=0
    )
    upsampler = upfeat.train(backbone, tmp_path, config)
    model = upfeat.FeatUp(backbone, upsampler)
    assert model(model.preprocess(tmp_path / "0.png")).dtype == torch.float32
