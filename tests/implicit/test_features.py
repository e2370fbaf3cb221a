"""Implicit features: a function of place and image, whatever it was fitted by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upfeat
from upfeat.implicit import grid
from upfeat.implicit import guides as implicit_guides
from upfeat.implicit.features import ImplicitFeatures
from upfeat.implicit.fields import (
    BilateralKernel,
    KernelField,
    NetworkField,
    whitening,
)
from upfeat.implicit.grid import GridField
from upfeat.implicit.guides import QueryGuide, colours, sample
from upfeat.normalization import HALF
from upfeat.storage import read_tensors, write_tensors
from upfeat.upsamplers import NeighbourhoodUpsampler, create_upsampler
from upfeat.upsamplers.neighbourhood import PyramidEncoder
from upfeat.upsamplers.smoothing import smooth_pixels

SCALES = torch.tensor([[0.75, 0.5, 0.7], [1.0, 5.0, 0.3]])
WIDTH = 8


def make_guide(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QueryGuide(PyramidEncoder(WIDTH, 2))


def make_field(kind, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "network":
        field = NetworkField(width, hidden=16, frequencies=3, generator=generator)
        return field.eval().requires_grad_(False)
    if kind == "grid":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            step = NeighbourhoodUpsampler(query_dim=WIDTH, levels=2)
        values, lengths = (torch.rand(width, *size, generator=generator) for size in ((6, 10), ()))
        return GridField(values, lengths, step, smoothed=True)
    places = torch.rand(40, 2, generator=generator) * torch.tensor([3.0, 5.0])
    queries = nn.functional.normalize(torch.randn(40, WIDTH, generator=generator)).half().float()
    coefficients = torch.randn(40, width, generator=generator).half().float()
    anchors = torch.cat([places, queries], dim=1)
    return KernelField(anchors, SCALES, coefficients, make_guide(), grid_size=(3, 5))


def make_features(kind="kernel", size=(24, 40), channels=6, width=4):
    generator = torch.Generator().manual_seed(1)
    guidance = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    components = torch.randn(width, channels, generator=generator)
    mean = torch.randn(channels, generator=generator)
    return ImplicitFeatures(make_field(kind, width), guidance, components, mean, {"preset": "x"})


every = pytest.mark.parametrize("kind", ["kernel", "network", "grid"])


@every
@pytest.mark.parametrize("output_size", [(24, 40), (48, 80), (96, 160), (7, 90), (1, 1)])
def test_every_resolution_samples_one_function(kind, output_size):
    features = make_features(kind)
    y = (torch.arange(output_size[0], dtype=torch.float64) + 0.5) * 24 / output_size[0] - 0.5
    x = (torch.arange(output_size[1], dtype=torch.float64) + 0.5) * 40 / output_size[1] - 0.5
    expected = features.at(torch.cartesian_prod(y, x)).T.reshape(1, 6, *output_size)
    torch.testing.assert_close(features.render(output_size), expected, rtol=1e-5, atol=1e-5)


@every
def test_odd_magnifications_share_pixel_centres(kind):
    features = make_features(kind)
    once, thrice = features.render(), features.render((72, 120))
    torch.testing.assert_close(thrice[:, :, 1::3, 1::3], once, rtol=1e-5, atol=1e-5)


@every
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_crop_is_a_window_of_the_whole(kind, data):
    features = make_features(kind)
    size = data.draw(st.sampled_from([(24, 40), (30, 17)]))
    top, left = (data.draw(st.integers(0, n - 1)) for n in size)
    height = data.draw(st.integers(1, size[0] - top))
    width = data.draw(st.integers(1, size[1] - left))
    crop = features.crop(top, left, height, width, output_size=size)
    expected = features.render(size)[:, :, top : top + height, left : left + width]
    torch.testing.assert_close(crop, expected, rtol=1e-5, atol=1e-5)


@every
def test_a_head_before_is_a_head_after(kind):
    features = make_features(kind)
    weight, bias = torch.randn(3, 6), torch.randn(3)
    expected = torch.einsum("kc,bchw->bkhw", weight, features.render((20, 20)))
    found = features.project(weight, bias, output_size=(20, 20))
    torch.testing.assert_close(found, expected + bias[:, None, None], rtol=1e-4, atol=1e-4)
    assert features.project(weight).shape == (1, 3, 24, 40)


def test_strips_make_up_the_map(monkeypatch):
    features = make_features()
    whole = features.render((50, 30))
    monkeypatch.setattr("upfeat.implicit.features._POINTS", 90)
    strips = list(features.strips((50, 30)))
    assert [top for top, _ in strips] == list(range(0, 50, 3))
    joined = torch.cat([strip for _, strip in strips], dim=1)
    torch.testing.assert_close(joined, whole[0], rtol=1e-5, atol=1e-5)
    out = torch.empty(1, 6, 50, 30, dtype=torch.float16)
    assert features.render((50, 30), out=out) is out
    torch.testing.assert_close(out.float(), whole, rtol=2e-3, atol=2e-3)


@every
@pytest.mark.parametrize("guidance", [True, False])
def test_a_file_draws_what_its_fit_drew(kind, guidance, tmp_path):
    features = make_features(kind)
    features.save(tmp_path / "f.safetensors", guidance=guidance)
    image = None if guidance else features.guidance
    loaded = ImplicitFeatures.load(tmp_path / "f.safetensors", image)
    assert torch.equal(loaded.render(), features.render())
    assert loaded.facts == {"preset": "x"}
    assert loaded.shape == features.shape


def test_the_image_must_be_the_one_of_the_fit(tmp_path):
    features = make_features()
    path = tmp_path / "f.safetensors"
    features.save(path)
    assert ImplicitFeatures.load(path, features.guidance).shape == features.shape
    with pytest.raises(ValueError, match="made from another image"):
        ImplicitFeatures.load(path, 255 - features.guidance)
    features.save(path, guidance=False)
    with pytest.raises(ValueError, match="give it as image="):
        ImplicitFeatures.load(path)


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError):
        ImplicitFeatures.load(path)
    features = make_features()
    features.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ImplicitFeatures.load(path)
    path.write_bytes(content)
    tensors, facts = read_tensors(path)
    write_tensors(path, tensors, {**facts, "format": "upfeat-implicit-1"})
    with pytest.raises(ValueError, match="not implicit features of this version"):
        ImplicitFeatures.load(path)
    missing_parts = ("field.anchor_places", "field.guide.entry.bias", "components", "guidance_png")
    for missing in missing_parts:
        write_tensors(path, {k: v for k, v in tensors.items() if k != missing}, facts)
        with pytest.raises(ValueError, match=r"f\.safetensors"):
            ImplicitFeatures.load(path)
    write_tensors(path, tensors, {**facts, "field": "network"})
    with pytest.raises(ValueError, match="damaged"):
        ImplicitFeatures.load(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: f.render((0, 5)), "output_size"),
        (lambda f: f.crop(20, 0, 5, 5), "does not lie"),
        (lambda f: f.at(torch.zeros(3)), r"\(N, 2\)"),
        (lambda f: f.at(torch.tensor([[24.0, 0.0]])), "in the image"),
        (lambda f: f.at(torch.tensor([[float("nan"), 0.0]])), "in the image"),
        (lambda f: f.project(torch.zeros(2, 5)), r"\(K, 6\)"),
        (lambda f: f.project(torch.zeros(2, 6), torch.zeros(3)), "bias"),
        (lambda f: f.render(out=torch.zeros(3)), "out is 3; the map is"),
        (lambda f: f.render(out=torch.zeros(f.shape, device="meta")), "meta device"),
        (lambda f: f.render(out=torch.zeros(1).expand(f.shape)), "same memory"),
        (lambda f: f.render(dtype=torch.float8_e4m3fn), "must be one of floating numbers"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(make_features())


def test_values_between_pixels():
    guidance = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (5, 7))
    at_centres = sample(colours(guidance), torch.cartesian_prod(y, x))
    torch.testing.assert_close(at_centres.T.reshape(3, 5, 7), guidance.float() / 255)
    corners = torch.tensor([[0.0, 0], [1, 1], [0.5 / 5, 1 / 7]], dtype=torch.float64)
    first, last, between = sample(colours(guidance), corners)
    torch.testing.assert_close(first, guidance[:, 0, 0] / 255)
    torch.testing.assert_close(last, guidance[:, -1, -1] / 255)
    torch.testing.assert_close(between, (guidance[:, 0, 0] / 255 + guidance[:, 0, 1] / 255) / 2)


def test_queries_are_those_of_the_shipped_upsampler():
    upsampler = create_upsampler("neighbourhood_universal")
    assert upsampler.normalization is not None
    guide = QueryGuide(upsampler.encoder, upsampler.normalization)
    guidance = torch.randint(256, (3, 33, 50), dtype=torch.uint8)
    with torch.no_grad():
        image = upsampler.normalization.apply(guidance[None].float() / 255)
        expected = upsampler.queries(image, (33, 50))
    found = guide(guidance)
    torch.testing.assert_close(found.permute(2, 0, 1)[None], expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(33, 50))
    again = QueryGuide.rebuild(guide.tensors(), guide.facts())
    assert torch.equal(again(guidance), found)
    # Files of before say nothing: colours from -1 to 1.
    former = {key: value for key, value in guide.facts().items() if key in ("width", "levels")}
    assert QueryGuide.rebuild(guide.tensors(), former).normalization == HALF
    with pytest.raises(ValueError, match="std above"):
        QueryGuide.rebuild(guide.tensors(), {**guide.facts(), "std": [0.0, 1.0, 1.0]})


def test_huge_images_have_coarser_queries(monkeypatch):
    guide = make_guide()
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    guidance = torch.stack([y * 4, x * 3, y + x]).to(torch.uint8)
    whole = guide(guidance)
    assert whole.shape == (60, 80, WIDTH)
    monkeypatch.setattr(implicit_guides, "_LARGEST_MAP", 30 * 40 * WIDTH)
    assert guide(guidance).shape == (30, 40, WIDTH)
    places = torch.rand(100, 2, dtype=torch.float64)
    torch.testing.assert_close(
        sample(guide(guidance), places), sample(whole, places), rtol=0, atol=0.2
    )


def test_a_field_and_its_guide_fit_together():
    field = make_field("kernel")
    with pytest.raises(ValueError, match="wide"):
        KernelField(
            field.anchors[:, :-1], SCALES, field.coefficients, field.guide, grid_size=(3, 5)
        )


def test_the_kernel_is_one():
    kernel = BilateralKernel(SCALES)
    a = torch.rand(30, 2 + WIDTH, dtype=torch.float64) * 3
    matrix = kernel(a, a)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(30, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9
    factor = whitening(kernel, a.float(), 1e-3)
    expected = kernel(a.float().double(), a.float().double()) + 1e-3 * torch.eye(30)
    torch.testing.assert_close(factor @ factor.T, expected)


def test_bumps_out_of_reach_are_not_missed():
    field = make_field("kernel")
    far = torch.tensor([40.0, 60, *[0] * WIDTH])
    wide = KernelField(
        torch.cat([field.anchors, field.anchors + far]),
        SCALES,
        field.coefficients.repeat(2, 1),
        field.guide,
        grid_size=(45, 70),
    )
    places, queries = torch.rand(200, 2, dtype=torch.float64).float(), torch.rand(200, WIDTH)
    positions = torch.cat([places * torch.tensor([45.0, 70.0]), queries], dim=1)
    expected = wide.kernel(positions, wide.anchors) @ wide._heights
    torch.testing.assert_close(wide(places, queries), expected, rtol=1e-5, atol=1e-5)


def test_the_published_network():
    field = NetworkField(128)
    assert sum(p.numel() for p in field.parameters()) == 73_098
    assert field.first.in_features == 303


def test_the_network_sees_colours_by_their_range():
    guidance = torch.rand(3, 8, 8)
    guidance[2] = 0.25
    field = make_field("network")
    field.set_range(guidance)
    darker = make_field("network")
    darker.set_range(guidance / 2)
    places, colours = torch.rand(9, 2), guidance.flatten(1).T[:9]
    torch.testing.assert_close(field(places, colours), darker(places, colours / 2))
    assert bool(torch.isfinite(field(places, colours)).all())


def test_no_gradients_are_kept():
    features = make_features("network")
    assert not features.render().requires_grad
    assert not features.at(torch.tensor([[1.0, 2.0]])).requires_grad


def test_public_name():
    assert upfeat.ImplicitFeatures is ImplicitFeatures


@every
def test_similarity_is_that_of_the_whole_map(kind):
    features = make_features(kind)
    whole, targets = features.full(), torch.randn(3, 6)
    cosines = nn.functional.cosine_similarity(whole[:, None], targets[:, :, None, None], dim=2)
    torch.testing.assert_close(features.similarity(targets), cosines, rtol=0, atol=1e-5)
    at_a_point = nn.functional.cosine_similarity(whole, whole[:, :, 5:6, 7:8], dim=1)[:, None]
    found = features.similarity(torch.tensor([5.0, 7.0]))
    torch.testing.assert_close(found, at_a_point, rtol=0, atol=1e-5)
    products = torch.einsum("bchw,kc->bkhw", whole, targets)
    torch.testing.assert_close(features.similarity(targets, cosine=False), products)


def test_a_grid_is_drawn_in_windows_that_fit_together(monkeypatch):
    features = make_features("grid", size=(80, 110))
    whole = features.render()
    monkeypatch.setattr(grid, "_TILE", 32)
    parts = make_features("grid", size=(80, 110)).render()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_pixels_of_a_grid_are_smoothed_if_at_all():
    field, guidance = make_field("grid"), make_features("grid", size=(48, 80)).guidance
    smoothed = field.look(guidance).permute(2, 0, 1)[None]
    field.smoothed = False
    plain = field.look(guidance).permute(2, 0, 1)[None]
    image = HALF.apply(guidance[None] / 255)
    torch.testing.assert_close(plain, field.step(field.values[None], image))
    alike = field.lengths[:, None, None] * (plain - field.values.mean((1, 2))[:, None, None])
    expected = smooth_pixels(plain, field.step.queries(image, (48, 80)), alike, 8)
    torch.testing.assert_close(smoothed, expected)
    assert (smoothed - plain).square().mean() > 0.01 * plain.var()


def test_a_map_of_a_grid_has_bounded_memory(monkeypatch):
    monkeypatch.setattr(grid, "_LARGEST_MAP", 4 * 30 * 50)
    features = make_features("grid", size=(60, 100))
    assert features.field.look(features.guidance).shape == (30, 50, 4)
    assert features.render().shape == (1, 6, 60, 100)


@pytest.mark.parametrize(("size", "radius"), [((12, 20), 4), ((30, 60), 5), ((90, 200), 8)])
def test_pixels_are_smoothed_within_a_cell(size, radius):
    assert make_field("grid").radius(size) == radius
