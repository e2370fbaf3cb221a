"""An upsampler inside a network: in, at work in every way a network is called, and out again."""

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upfeat
from upfeat.attachment import Attachment


class Segmenter(nn.Module):
    """A coarse network with a head, as they are."""

    def __init__(self, width=6, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.Tanh())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixel_values):
        return self.head(self.body(pixel_values))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Segmenter().eval()


@pytest.fixture
def upsampler():
    torch.manual_seed(1)
    return upfeat.NeighbourhoodUpsampler(query_dim=8, levels=2).eval()


def image(seed=0, batch=1, size=(32, 40)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_it_upsamples_the_layer_and_leaves_no_trace(network, upsampler):
    x = image()
    coarse, names = network(x), sorted(network.state_dict())
    attachment = upfeat.attach(network, "body", upsampler)
    assert isinstance(attachment, Attachment)
    expected = network.head(upsampler(network.body(x), x))
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network(pixel_values=x), expected)
    assert sorted(network.state_dict()) == names
    assert "stride 1" in repr(attachment)
    attachment.remove()
    attachment.remove()
    assert torch.equal(network(x), coarse)
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    assert not network.body._forward_hooks


class Stages(nn.Module):
    """A network whose first stage has cells half as wide as the second's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Tanh())
        self.second = nn.Conv2d(5, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def small_detail(early=False):
    torch.manual_seed(1)
    if not early:
        return upfeat.DetailUpsampler(query_dim=8, levels=2).eval()
    up = upfeat.EarlyDetailUpsampler(6, hidden_dim=5, query_dim=8, levels=2, width=4, depth=1)
    nn.init.normal_(up.detail.weight)
    return up.eval()


@pytest.mark.parametrize("early", [False, True])
def test_an_early_layer_of_the_same_call(early):
    torch.manual_seed(0)
    network, upsampler = Stages().eval(), small_detail(early)
    x, other = image(), image(1, 2, (40, 64))
    expected = []
    for one in (x, other):
        hidden = network.first(one)
        expected.append(network.head(upsampler(network.second(hidden), one, hidden=hidden)))
    with upfeat.attach(network, "second", upsampler, early="first") as attachment:
        for one, output in zip((x, other), expected, strict=True):
            torch.testing.assert_close(network(one), output)
        network(x).square().mean().backward()
        assert network.first[0].weight.grad.abs().max() > 0
        assert not attachment._layers
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected[0])
    assert not network.first._forward_hooks


def test_early_layers_that_cannot_be_are_named():
    network = Stages().eval()
    with pytest.raises(ValueError, match="early_detail' was trained on early layers; name the lay"):
        upfeat.attach(network, "second", small_detail(early=True))
    with pytest.raises(ValueError, match="early=first: bilinear makes no use of early layers"):
        upfeat.attach(network, "second", upfeat.Bilinear(), early="first")
    with pytest.raises(ValueError, match='early "frist" is unknown; did you mean first'):
        upfeat.attach(network, "second", small_detail(), early="frist")
    with (
        upfeat.attach(network, "first", small_detail(), early="second"),
        pytest.raises(ValueError, match="the early layer returned no map before the layer"),
    ):
        network(image())


def test_a_module_in_place_of_its_name_and_a_wanted_stride(network, upsampler):
    with upfeat.attach(network, network.body[1], upsampler, stride=4) as attachment:
        assert network(image(size=(30, 41))).shape == (1, 4, 8, 11)
        assert attachment.ratio() == (1, 1)  # of no call any more
    assert network(image()).shape == (1, 4, 4, 5)


def test_a_linear_head_gives_what_it_gives_on_upsampled_features(network):
    bilinear = upfeat.Bilinear()
    x = image()
    with upfeat.attach(network, "body", bilinear):
        fine = network(x)
    torch.testing.assert_close(fine, F.interpolate(network(x), (32, 40), mode="bilinear"))


def test_guidance_is_brought_into_the_normalisation_of_the_upsampler(network, upsampler):
    upsampler.mean, upsampler.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    pixels = torch.rand(1, 3, 32, 40)
    mean = torch.tensor(upsampler.mean)[:, None, None]
    std = torch.tensor(upsampler.std)[:, None, None]
    expected = network.head(upsampler(network.body(pixels), (pixels - mean) / std))
    with upfeat.attach(network, "body", upsampler, mean=(0, 0, 0), std=(1, 1, 1)):
        torch.testing.assert_close(network(pixels), expected)


def test_gradients_reach_the_network_and_the_upsampler(network, upsampler):
    with upfeat.attach(network, "body", upsampler):
        network(image()).square().sum().backward()
    for module in (network, upsampler):
        assert all(one.grad is not None for one in module.parameters())
    assert network.body[0].weight.grad.abs().sum() > 0
    assert upsampler.encoder.entry.weight.grad.abs().sum() > 0


def test_nested_calls_keep_their_images_apart(upsampler):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.segmenter = Segmenter()

        def forward(self, x, depth=1):
            inner = self(x.flip(3), depth - 1) if depth else None
            own = self.segmenter(x)
            return own if inner is None else own + inner.flip(3)

    network = Twice().eval()
    x = image()
    with upfeat.attach(network, "segmenter.body", upsampler):
        both = network(x)
        expected = network(x, 0) + network(x.flip(3), 0).flip(3)
    torch.testing.assert_close(both, expected)


def test_a_failed_call_leaves_nothing_behind(network, upsampler):
    with upfeat.attach(network, "body", upsampler) as attachment:
        with pytest.raises(ValueError, match="without an image"):
            network(torch.zeros(3))
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 5, 32, 32))
        assert not attachment._images
        assert network.body(image()).shape == (1, 6, 4, 5)  # by itself, as it was
        assert network(image()).shape == (1, 4, 32, 40)


def test_threads_have_images_of_their_own(network, upsampler):
    images = [image(seed) for seed in range(4)]
    with torch.no_grad(), upfeat.attach(network, "body", upsampler):
        expected = [network(x) for x in images]
        results = {}

        def work(index):
            with torch.no_grad():
                for _ in range(5):
                    results[index] = network(images[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, value in enumerate(expected):
        torch.testing.assert_close(results[index], value)


def test_replicas_copies_and_files_keep_it(network, upsampler):
    x = image(batch=2)
    with torch.no_grad(), upfeat.attach(network, "body", upsampler):
        expected = network(x)
        torch.testing.assert_close(nn.DataParallel(network)(x), expected)
        replica = network._replicate_for_data_parallel()
        torch.testing.assert_close(replica(x), expected)
        torch.testing.assert_close(copy.deepcopy(network)(x), expected)
        buffer = io.BytesIO()
        torch.save(network, buffer)
        again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        torch.testing.assert_close(again(x), expected)
    with upfeat.attach(nn.DataParallel(network), "body", upsampler):
        torch.testing.assert_close(network(x), expected)


def test_two_attachments_in_one_network(network, upsampler):
    x = image()
    with upfeat.attach(network, "body", upsampler, stride=4):
        with upfeat.attach(network, "head", upfeat.Bilinear()):
            both = network(x)
        one = network(x)
    torch.testing.assert_close(both, F.interpolate(one, (32, 40), mode="bilinear"))


def test_a_head_of_wide_convolutions_is_dilated(upsampler):
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.Conv2d(6, 5, 3, padding=1, padding_mode="replicate"),
        nn.ReLU(),
        nn.Conv2d(5, 4, (3, 1), padding="same"),
        nn.Upsample(scale_factor=8, mode="bilinear"),
    )
    network = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), head).eval()
    x = image()
    before = network(x)
    with upfeat.attach(network, "0", upfeat.Nearest(), head=head):
        # Of cells that are constant, a dilated head makes what the coarse one makes of the cells.
        fine = network(x)
        assert fine.shape == before.shape == (1, 4, 32, 40)
        coarse = nn.Sequential(network[0], *head[:3])
        expected = F.interpolate(_without_hooks(coarse)(x), scale_factor=8, mode="nearest")
        torch.testing.assert_close(fine, expected)
    assert torch.equal(network(x), before)
    assert {type(module) for module in head} == {nn.Conv2d, nn.ReLU, nn.Upsample}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("kernel", [2, 4, (3, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])  # ratios 6, 3, 2
def test_an_even_kernel_keeps_the_grid_and_its_place(kernel, stride, mode):
    torch.manual_seed(0)
    head = nn.Conv2d(6, 4, kernel, padding="same", padding_mode=mode)
    network = nn.Sequential(nn.Conv2d(3, 6, 6, stride=6), head).eval()
    x = image(size=(30, 42))
    before = network(x)
    with upfeat.attach(network, "0", upfeat.Nearest(), stride=stride, head=head):
        expected = F.interpolate(before, (30 // stride, 42 // stride), mode="nearest")
        torch.testing.assert_close(network(x), expected)


def test_an_even_kernel_keeps_a_grid_of_an_uneven_ratio():
    head = nn.Conv2d(6, 4, 4, padding="same")
    network = nn.Sequential(nn.Conv2d(3, 6, 16, stride=16), head).eval()
    with upfeat.attach(network, "0", upfeat.Nearest(), stride=5, head=head):
        assert network(image(size=(96, 96))).shape == (1, 4, 20, 20)


def _without_hooks(network):
    plain = copy.deepcopy(network)
    for module in plain.modules():
        module._forward_hooks.clear()
        if type(module).__name__ == "_DilatedConv2d":
            module.__class__ = nn.Conv2d
    return plain


def test_what_cannot_be_carried_over_is_said(network, upsampler):
    network.head = nn.Sequential(nn.Conv2d(6, 4, 3, stride=2), nn.MaxPool2d(2))
    with pytest.warns(UserWarning, match="head: 0, 1 cannot be carried over"):
        upfeat.attach(network, "body", upsampler, head="head").remove()


def test_precision_follows_the_network(network, upsampler):
    expected = network.head(upsampler(network.body(image()), image()))
    with upfeat.attach(network.bfloat16(), "body", upsampler):
        out = network(image().bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_it_runs_in_a_compiled_network(network, upsampler):
    x = image()
    with torch.no_grad(), upfeat.attach(network, "body", upsampler):
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), network(x))
        torch.testing.assert_close(compiled(image(1)), network(image(1)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "bdy"}, "did you mean body"),
        ({"layer": nn.Conv2d(3, 3, 1)}, "not in the network"),
        ({"layer": "body", "stride": 0}, "stride=0"),
        ({"layer": "body", "mean": (0, 0)}, "3 values each"),
        ({"layer": "body", "head": "hed"}, "did you mean head"),
    ],
)
def test_bad_arguments_are_named(network, upsampler, options, words):
    with pytest.raises(ValueError, match=words):
        upfeat.attach(network, options.pop("layer"), upsampler, **options)
    assert not network._forward_hooks


def test_layers_without_a_grid_are_refused(upsampler):
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(2)).eval()
    with (
        upfeat.attach(network, "1", upsampler),
        pytest.raises(ValueError, match=r"\(1, 4, 20\), not features"),
    ):
        network(image())


@pytest.mark.parametrize("image", [None, torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32).long()])
def test_guidance_that_returns_no_image_is_refused(image):
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8))
    with (
        upfeat.attach(network, "0", upfeat.load_upsampler("bilinear"), guidance=lambda a, k: image),
        pytest.raises(ValueError, match=r"guidance returned .*; return the image \(B, 3, H, W\)"),
    ):
        network(torch.zeros(1, 3, 32, 32))


def test_what_is_no_module_is_refused():
    bilinear = upfeat.load_upsampler("bilinear")
    with pytest.raises(TypeError, match="network is of type function; give a module"):
        upfeat.attach(lambda x: x, "0", bilinear)
    with pytest.raises(TypeError, match="layer is of type int; give a module or its name"):
        upfeat.attach(nn.Sequential(nn.Conv2d(3, 4, 8, 8)), 0, bilinear)


def test_a_layer_that_returns_several_things_is_named_in_one_line():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    network = nn.Sequential(Pair())
    with (
        upfeat.attach(network, "0", upfeat.load_upsampler("bilinear")),
        pytest.raises(ValueError, match="returned a tuple, not features"),
    ):
        network(torch.zeros(1, 3, 32, 32))


def test_a_layer_or_a_head_has_one_upsampler(network, upsampler):
    """A second one would upsample an upsampled map, and leave the head broken when removed."""
    other = nn.Sequential(network, nn.Conv2d(4, 2, 3, padding=1))
    with upfeat.attach(network, "body", upsampler) as first:
        with pytest.raises(ValueError, match=r"there is an Attachment.* behind body, stride 1"):
            upfeat.attach(network, "body", upsampler)
        with pytest.raises(ValueError, match="already; call its remove"):
            upfeat.attach(other, "0.body", upsampler)
        with upfeat.attach(other, "0", upsampler, head="1"):  # another layer, which contains it
            with pytest.raises(ValueError, match="already; call its remove"):
                upfeat.attach(other, "0.head", upsampler, head="1")
            assert other(image()).shape == (1, 2, 32, 40)
    assert not first.attached
    copied = copy.deepcopy(network)
    upfeat.attach(copied, "body", upsampler).remove()
    upfeat.attach(network, "body", upsampler).remove()
