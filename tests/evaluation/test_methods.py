"""Methods: any way to features of an image's size, alike to every task."""

import itertools

import pytest
import torch

import upfeat
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.prepared import Prepared, PreparedSet, normalised
from upfeat.evaluation.methods import ImplicitMethod, UpsamplerMethod
from upfeat.evaluation.named import load_methods
from upfeat.evaluation.passes import Strided
from upfeat.implicit.fit import FitConfig, fit_guidance
from upfeat.storage import write_tensors

FEW = FitConfig(views=4, held_out=2, anchors=32, components=3, max_pad=4)


@pytest.fixture
def sample(colour_backbone):
    image = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    with torch.no_grad():
        features = colour_backbone(normalised(image, colour_backbone))[0]
    return Prepared("noise", image, features, None)


def test_an_upsampler_gives_what_it_gives(sample, colour_backbone):
    method = UpsamplerMethod(upfeat.Bilinear(), colour_backbone)
    expected = upfeat.Bilinear()(sample.features[None], torch.zeros(1, 3, 48, 64))
    assert torch.equal(method(sample).full(), expected)


def test_fits_are_kept_and_found(sample, colour_backbone, tmp_path, monkeypatch):
    method = ImplicitMethod(colour_backbone, FEW, tmp_path / "fits")
    drawn = method(sample).full()
    assert torch.equal(drawn, fit_guidance(sample.image, colour_backbone, FEW).full())
    assert len(list((tmp_path / "fits").iterdir())) == 1
    weight, bias = torch.randn(2, 6), torch.randn(2)
    expected = torch.nn.functional.conv2d(drawn, weight[..., None, None], bias)
    found = method(sample).project(weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def never(*arguments):
        raise AssertionError("was fitted before")

    monkeypatch.setattr("upfeat.evaluation.methods.fit_guidance", never)
    assert torch.equal(method(sample).full(), drawn)
    with pytest.raises(AssertionError, match="fitted before"):
        method.fresh()(sample)


def test_labels_are_told_apart(colour_backbone, tmp_path):
    for folder in ("a", "b"):
        upfeat.Bilinear().save_pretrained(tmp_path / folder / "mine")
    names = ["bilinear", str(tmp_path / "a" / "mine"), str(tmp_path / "b" / "mine")]
    assert list(load_methods(names, colour_backbone, tmp_path)) == ["bilinear", "mine", "mine-2"]
    with pytest.raises(ValueError, match="upsamplers is empty"):
        load_methods([], colour_backbone, tmp_path)


def test_one_upsampler_in_every_form(colour_backbone, tmp_path):
    upfeat.JointBilateral(radius=1).save_pretrained(tmp_path / "mine")
    made = upfeat.JointBilateral(radius=1).train()
    for given, label in (
        ("joint_bilateral", "joint_bilateral"),
        (str(tmp_path / "mine"), "mine"),
        (tmp_path / "mine", "mine"),
        (made, "joint_bilateral"),
        (["bilinear", made, made], "joint_bilateral"),  # one thing twice is one
    ):
        *_, (found, method) = load_methods(given, colour_backbone, tmp_path).items()
        assert found == label
        assert isinstance(method, UpsamplerMethod)
        assert not method.upsampler.training
    assert made.training  # it stays as it was
    labels = list(load_methods([made, upfeat.JointBilateral()], colour_backbone, tmp_path))
    assert labels == ["joint_bilateral", "joint_bilateral-2"]
    with pytest.raises(ValueError, match="jbu_stack expects 9 channels"):
        load_methods(upfeat.JBUStack(9), colour_backbone, tmp_path)


@pytest.mark.parametrize(
    ("name", "passes"), [("bilinear", 1), ("detail@5", 5), ("large_image", 4), ("shifted", 4)]
)
def test_methods_of_several_passes(sample, colour_backbone, tmp_path, name, passes):
    method = load_methods([name], colour_backbone, tmp_path)[name]
    assert method.passes == passes
    with torch.no_grad():
        full = method(sample).full()
    assert full.shape == (1, 6, 48, 64)
    # Mean colours are mean colours at every scale.
    inner = slice(2, -2)
    near = torch.nn.functional.avg_pool2d(full, 8)[0, :3, inner, inner]
    # Noise is averaged over other pixels where cells are seen a quarter of a cell off.
    assert (near - sample.features[:3, inner, inner]).abs().mean() < 0.12


def test_strided_cells_are_the_coarse_ones_and_those_between():
    """Every second one is the coarse grid's: inside, where no layer sees the image's borders."""
    backbone = upfeat.load_backbone("efficientnet_lite0")
    x = torch.randn(1, 3, 320, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        coarse, finer = backbone(x), Strided(backbone)(x)
    assert finer.shape == (1, 112, 40, 42)
    inside = slice(9, 11)
    found = finer[:, :, 1::2, 1::2][:, :, inside, inside]
    expected = coarse[:, :, inside, inside]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(coarse.abs().max()))
    assert Strided(backbone).passes == 2.5


@pytest.mark.parametrize("name", ["large_image", "shifted"])
def test_cells_of_an_odd_stride_have_no_half(tmp_path, name):
    odd = upfeat.load_backbone(lambda x: torch.nn.functional.avg_pool2d(x, 7))
    with pytest.raises(ValueError, match=f"{name} needs a backbone of an even stride; .* has 7"):
        load_methods([name], odd, tmp_path)


def test_what_early_layers_say(tmp_path):
    backbone = upfeat.load_backbone("efficientnet_lite0")
    method = load_methods(["detail@early"], backbone, tmp_path)["detail@early"]
    image = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    with torch.no_grad():
        found = method(Prepared("noise", image, torch.zeros(112, 3, 4), None)).full()
        model = upfeat.load(backbone, upsampler="detail", early=True)
        expected = model(normalised(image, backbone))
    torch.testing.assert_close(found, expected)


def test_other_backbones_are_not_strided(colour_backbone):
    with pytest.raises(ValueError, match="strided is for EfficientNet-Lite at stride 16"):
        Strided(colour_backbone)


def test_the_first_call_is_not_timed(tmp_path, colour_backbone, monkeypatch):
    """The median of two images would have half of it."""
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    write_tensors(tmp_path / "a", {"image": image, "features": torch.ones(6, 2, 2)}, {})
    images = PreparedSet(["a"], [tmp_path / "a"], torch.device("cpu"))

    clock = itertools.count()

    class Slow(UpsamplerMethod):
        """The first call takes a hundred seconds of a clock that else counts its readings."""

        def __call__(self, sample):
            nonlocal clock
            clock = itertools.count(next(clock) + (1 if self.warm else 100))
            self.warm = True
            return super().__call__(sample)

    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    method = Slow(upfeat.Bilinear(), colour_backbone)
    method.warm = False
    cost, drift = measure(method, images)
    assert cost["seconds"] < 10
    assert drift == pytest.approx(1)


def test_an_aligned_backbone_by_name(tmp_path):
    backbone = upfeat.load_backbone("efficientnet_lite0")
    image = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0))
    method = load_methods(["bilinear@+2"], backbone, tmp_path)["bilinear@+2"]
    assert method.passes == 1
    image = image.to(torch.uint8)
    with torch.no_grad():
        found = method(Prepared("noise", image, torch.zeros(112, 3, 4), None)).full()
        coarse = backbone.aligned(2)(normalised(image, backbone))
        expected = torch.nn.functional.interpolate(coarse, size=(48, 64), mode="bilinear")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="displacement=16 must be 15 or less"):
        load_methods(["bilinear@+16"], backbone, tmp_path)
