"""Layers by number: every library's reader keeps the same rules."""

import pytest
import torch
from torch import nn

import upfeat

LIBRARIES = ("timm", "transformers", "open_clip", "open_clip_resnet", "dinov2", "chunked", "dino")
DEPTH = {"open_clip_resnet": 5}


class Dino(nn.Module):
    """A network as the repository of the first DINO makes it: it gives its last n layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.get_intermediate_layers(x, 1)[0].mean(1)

    def _each(self):
        return self.blocks

    def _layers(self, x, wanted):
        x = self.embed(x).flatten(2).mT
        found = []
        for number, block in enumerate(self._each()):
            x = block(x)
            if number in wanted:
                found.append(x)
        assert len(found) == len(wanted)
        return found

    def get_intermediate_layers(self, x, n=1):
        return [self.norm(one) for one in self._layers(x, range(3 - n, 3))]


class Dinov2(Dino):
    """As those of DINOv2: it gives chosen layers, each once and from the first to the last."""

    def get_intermediate_layers(self, x, n=1, reshape=False, norm=True):
        found = self._layers(x, range(3 - n, 3) if isinstance(n, int) else n)
        found = [self.norm(one) for one in found] if norm else found
        grid = (x.shape[2] // 16, x.shape[3] // 16)
        return tuple(one.mT.unflatten(2, grid) if reshape else one for one in found)


class Chunked(Dinov2):
    """As DINOv2 may store its blocks."""

    def __init__(self):
        super().__init__()
        self.n_blocks, self.blocks = 3, nn.ModuleList([nn.Sequential(*self.blocks)])

    def _each(self):
        return self.blocks[0]


def _make(library):
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        return timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, embed_dim=32, depth=3, num_heads=2
        )
    if library == "transformers":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=16))
    if library.startswith("open_clip"):
        open_clip = pytest.importorskip(
            "open_clip", reason="open_clip is not installed", exc_type=ImportError
        )
        if library == "open_clip_resnet":
            tower = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
        else:
            tower = {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        vision = {**tower, "head_width": 32}
        return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual
    return {"dino": Dino, "dinov2": Dinov2, "chunked": Chunked}[library]()


def _shuffled_norms(network):
    """Make norms visible: at first they are close to what they norm."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", "ln_post.weight")):
                value.copy_(torch.linspace(0.5, 2, len(value)))
    return network.eval()


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request):
    return request.param


@pytest.fixture
def network(library):
    return _shuffled_norms(_make(library))


@pytest.fixture
def read(network):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def one(layer):
        with torch.no_grad():
            return upfeat.load_backbone(network, layer=layer)(x)

    return one


def test_the_last_layer_by_number_is_the_default(library, read):
    last = DEPTH.get(library, 3) - 1
    default = read(None)
    for layer in (last, -1, [last]):
        torch.testing.assert_close(read(layer), default)


def test_a_list_keeps_its_order_and_repetitions(library, read):
    last = DEPTH.get(library, 3) - 1
    sizes = [read(last - 1).shape[1], read(last).shape[1]]
    first, second = read([last - 1, last]).split(sizes, dim=1)
    torch.testing.assert_close(first, read(last - 1))
    torch.testing.assert_close(read([last, last - 1]), torch.cat([second, first], dim=1))
    torch.testing.assert_close(read([-1, last - 1, -1]), torch.cat([second, first, second], dim=1))


LAST = {
    "timm": "blocks.2",
    "transformers": "encoder.layer.2",
    "open_clip": "transformer.resblocks.2",
    "open_clip_resnet": "layer4",
}
"""The last block of the libraries that can stop before it."""


@pytest.mark.parametrize("library", LAST, indirect=True)
def test_blocks_behind_the_layer_do_not_run(library, network, monkeypatch):
    backbone, x = upfeat.load_backbone(network, layer=1), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        backbone(x)  # transformers: the first image tells whether it can stop
        calls = []
        block = network.get_submodule(LAST[library])
        run = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, **k: calls.append(1) or run(*a, **k))
        backbone(x)
        assert not calls
        upfeat.load_backbone(network)(x)
        assert calls


@pytest.mark.parametrize("layer", [9, -7, [0, 9]])
def test_a_layer_that_is_not_there_is_named_in_one_line(library, read, layer):
    wrong, last = -7 if layer == -7 else 9, DEPTH.get(library, 3) - 1
    words = f": layer={wrong} does not exist; its layers are 0 to {last}$"
    with pytest.raises(ValueError, match=words):
        read(layer)


def test_a_module_named_twice_ends_the_network_as_early():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 8, 8)

        def forward(self, x):
            raise RuntimeError(f"a head that {self.first(x).shape} does not suit")

    x = torch.randn(1, 3, 32, 32)
    network = Net()
    twice = upfeat.load_backbone(network, layer=["first", "first"])(x)
    torch.testing.assert_close(twice, network.first(x).repeat(1, 2, 1, 1))


class Rows(nn.Module):
    """Tokens (B, N, C) of a flattened map (B, C, N)."""

    def forward(self, x):
        return x.mT


class Stages(nn.Module):
    """Stages of strides 4, 8 and 32, with padding at the border of uneven grids."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 4, 4)
        self.two = nn.Conv2d(4, 5, 3, 2, padding=1)
        self.three = nn.Sequential(
            nn.Conv2d(5, 5, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(5, 6, 3, 2, padding=1)
        )

    def forward(self, x):
        return self.three(self.two(self.one(x)))


def test_named_layers_lie_on_one_grid():
    """A coarse cell beyond the image's edge was squeezed into it, and moved all cells before it."""
    torch.manual_seed(0)
    backbone = upfeat.load_backbone(Stages().eval(), layer=["one", "three"])
    assert (backbone.embed_dim, backbone.stride, backbone.step) == (10, 4, 8)
    x = torch.randn(1, 3, 100, 132)
    padded = torch.nn.functional.pad(x, (0, 28, 0, 28), mode="replicate")  # to whole cells of 32
    torch.testing.assert_close(backbone(x), backbone(padded)[:, :, :25, :33])
    maps = Stages().eval()
    assert upfeat.load_backbone(maps, layer=["three", "one", "three"]).embed_dim == 16


def test_strides_of_several_layers_are_measured_where_they_divide_the_image():
    """At 240 pixels, the size in its configuration, 8 cells of 32 pixels look like cells of 30."""

    class Sized(Stages):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {"mean": [0.0] * 3, "std": [1.0] * 3, "input_size": (3, 240, 240)}

        def forward(self, x):
            one = self.one(x)
            return nn.functional.avg_pool2d(x, 2), self.three(self.two(one))

    backbone = upfeat.load_backbone(Sized().eval(), layer=[0, 1])
    assert (backbone.stride, backbone.answer.multiple) == (2, 32)


def test_two_layers_of_tokens_by_name():
    network = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2))
    rows = nn.Sequential(network, Rows(), nn.Linear(8, 6), nn.Linear(6, 5)).eval()
    backbone = upfeat.load_backbone(rows, layer=["2", "1"])
    assert (backbone.embed_dim, backbone.stride) == (14, 8)
    x = torch.randn(1, 3, 40, 56)
    expected = network(x).unflatten(2, (5, 7))
    torch.testing.assert_close(backbone(x)[:, 6:], expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_features_are_floating_numbers(dtype):
    with pytest.raises(ValueError, match=r"returned (int|complex)64 .*; return floating numbers"):
        upfeat.load_backbone(lambda x: nn.functional.avg_pool2d(x, 8).to(dtype))


@pytest.mark.parametrize("shape", [(4, 16, 8), (8, 8, 8, 8)])
def test_outputs_whose_first_axis_is_no_batch_are_refused(shape):
    with pytest.raises(ValueError, match="for one image: the first axis is not the batch"):
        upfeat.load_backbone(lambda x: x.new_zeros(shape))
