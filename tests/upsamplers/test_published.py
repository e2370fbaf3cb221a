"""AnyUp, JAFAR, NAF and UPLiFT against the obvious way, their promises, and the published cases."""

from pathlib import Path

import numpy as np
import published_reference as obvious
import pytest
import torch

import upfeat
from upfeat.types import Window
from upfeat.upsamplers import doubling, uplift
from upfeat.upsamplers.attention import relative_window, shifted_window

CHECKPOINTS = Path(__file__).parents[2].parent / "shared" / "data" / "checkpoints"
NAMES = ("anyup", "jafar", "naf", "uplift")
CASES = [
    ("anyup_multi_backbone.pth", "anyup_multi"),
    ("anyup_paper.pth", "anyup_paper"),
    ("jafar_vit_small_patch14_dinov2.pth", "jafar"),
    ("naf_layout_random.pth", "naf"),
]


def tiny(name, dtype=torch.float64, **options):
    """A small one with random weights, large enough that heads disagree."""
    torch.manual_seed(0)
    make = {
        "anyup": lambda: upfeat.AnyUp(width=16, heads=2, **options),
        "jafar": lambda: upfeat.JAFAR(8, width=16, heads=2, **options),
        "naf": lambda: upfeat.NAF(width=32, heads=2, window_side=3, **options),
        "uplift": lambda: upfeat.UPLiFT(8, encoder_widths=(4, 7, 6), width=18, **options),
    }
    upsampler = make[name]()
    spread = 0.1 if name == "uplift" else 0.3  # no norm of the image itself keeps it in bounds
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        for label, buffer in upsampler.named_buffers():
            if label.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif label.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return upsampler.to(dtype).eval().requires_grad_(False)


def run_obvious(upsampler, image, features, size):
    options = {
        "anyup": lambda: {"heads": upsampler.heads, "ratio": upsampler.window_ratio},
        "jafar": lambda: {"heads": upsampler.heads},
        "naf": lambda: {"heads": upsampler.heads, "side": upsampler.window_side},
        "uplift": dict,
    }[upsampler.name]()
    way = getattr(obvious, upsampler.name)
    return way(obvious.published_state(upsampler), image, features, size, **options)


def sample(size=(20, 27), grid=(5, 4), channels=8, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    features = torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)
    return image.to(dtype), features.to(dtype)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["eager", "reference", "auto"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("size", "grid", "output_size"),
    [((20, 27), (5, 4), (20, 27)), ((24, 24), (3, 3), (12, 13)), ((9, 50), (2, 7), (11, 10))],
)
def test_equals_the_obvious_way(name, size, grid, output_size, backend):
    upsampler = tiny(name, backend=backend)
    image, features = sample(size, grid)
    expected = run_obvious(upsampler, image, features, output_size)
    assert error(upsampler(features, image, output_size), expected) < 1e-12
    half = tiny(name, torch.float32, backend=backend)
    found = half(features.float(), image.float(), output_size)
    assert found.dtype == torch.float32
    assert error(found, expected) < 1e-5
    found = half(features.bfloat16(), image.bfloat16(), output_size)
    assert found.dtype == torch.bfloat16
    exact = run_obvious(
        upsampler, image.bfloat16().double(), features.bfloat16().double(), output_size
    )
    assert error(found, exact) < 2e-2


@pytest.mark.parametrize("name", NAMES)
def test_grids_smaller_than_the_window(name):
    upsampler = tiny(name)
    image, features = sample((10, 8), (2, 2))
    expected = run_obvious(upsampler, image, features, (10, 8))
    assert error(upsampler(features, image), expected) < 1e-12
    image, features = sample((4, 6), (1, 1))
    out = upsampler(features, image)
    torch.testing.assert_close(out, features.expand_as(out))  # one cell: nothing else to take


@pytest.mark.parametrize("name", NAMES)
def test_a_window_is_the_window_of_the_whole(name):
    upsampler = tiny(name)
    image, features = sample(batch=1)
    lazy = upfeat.UpsampledFeatures(features, image, upsampler, (33, 21))
    whole = lazy.full()
    torch.testing.assert_close(lazy.crop(7, 3, 11, 9), whole[:, :, 7:18, 3:12])
    points = torch.tensor([[0.0, 0.0], [32.0, 20.0], [7.0, 13.0]])
    expected = torch.stack([whole[0, :, int(y), int(x)] for y, x in points])
    torch.testing.assert_close(lazy.at(points), expected)
    weight, bias = torch.randn(3, 8).double(), torch.randn(3).double()
    expected = torch.einsum("kc,bcyx->bkyx", weight, whole) + bias[:, None, None]
    torch.testing.assert_close(lazy.project(weight, bias), expected)
    torch.testing.assert_close(lazy.project(weight[:1]), expected[:, :1] - bias[0])


def test_channels_of_split_heads_by_range():
    upsampler = tiny("naf")
    image, features = sample()
    kernels = upsampler.prepare(image, (5, 4), (20, 27))
    whole = upsampler.render(kernels, features)
    window = Window(2, 3, 5, 6)
    for channels in (slice(0, 3), slice(2, 7), slice(4, None)):
        part = upsampler.render(kernels, features, head=channels)
        torch.testing.assert_close(part, whole[:, channels])
        part = upsampler.render(kernels, features, head=channels, window=window)
        torch.testing.assert_close(part, whole[:, channels, 2:7, 3:9])


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_do_not_meet(name):
    upsampler = tiny(name)
    image, features = sample()
    both = upsampler(features, image)
    for index in (0, 1):
        alone = upsampler(features[index : index + 1], image[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_mean_of_the_features(name):
    upsampler = tiny(name)
    image, features = sample()
    out = upsampler(features, image)
    assert float(out.max()) <= float(features.max()) + 1e-9
    constant = features[:, :, :1, :1].expand_as(features)
    out = upsampler(constant, image)
    torch.testing.assert_close(out, constant[:, :, :1, :1].expand_as(out))


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    upsampler = tiny(name)
    image, features = sample((7, 6), (3, 2), channels=8, batch=1)
    image, features = image.requires_grad_(), features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, x: upsampler(f, x, (6, 5)), (features, image), fast_mode=True
    )
    names = [name for name, _ in upsampler.named_parameters()]
    values = [value.clone().requires_grad_() for value in upsampler.parameters()]

    def by_parameters(*given):
        state = dict(zip(names, given, strict=True))
        return torch.func.functional_call(upsampler, state, (features.detach(), image.detach()))

    assert torch.autograd.gradcheck(by_parameters, values, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fills_a_buffer(name, dtype, monkeypatch):
    monkeypatch.setattr("upfeat.upsamplers.published._BAND_BYTES", 5000)  # several bands
    upsampler = tiny(name, torch.float32)
    image, features = sample(dtype=torch.float32)
    expected = upsampler(features, image)
    buffer = torch.full((2, 8, 20, 27), torch.nan, dtype=dtype)
    assert upsampler(features, image, out=buffer) is buffer
    torch.testing.assert_close(buffer.float(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="buffer of"):
        upsampler(features, image, out=buffer[:, :, 1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("learns", ["features", "image", "weights", "nothing"])
def test_autocast_costs_no_digits(name, learns):
    upsampler = tiny(name, torch.float32).requires_grad_(learns == "weights")
    image, features = sample(dtype=torch.float32)
    image.requires_grad_(learns == "image")
    features.requires_grad_(learns == "features")
    expected = upsampler(features, image).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = upsampler(features, image)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("large", [1, 2**24])
def test_buffers_in_the_memory_of_the_inputs_are_refused(name, large, monkeypatch):
    monkeypatch.setattr("upfeat.upsamplers.naf._LARGE", large)
    upsampler = tiny(name, torch.float32)
    image, features = sample(dtype=torch.float32)
    size, kept = tuple(features.shape[2:]), features.clone()
    with pytest.raises(ValueError, match="out shares memory with the map's inputs"):
        upsampler(features, image, size, out=features)
    assert torch.equal(features, kept)
    spread = features[:1].clone().expand_as(features)
    with pytest.raises(ValueError, match="the same memory for several values"):
        upsampler(features, image, size, out=spread)


@pytest.mark.parametrize("size", [(20, 27), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_outputs_head_by_head(dtype, size, monkeypatch):
    upsampler = tiny("naf", torch.float32)
    image, features = (each.to(dtype) for each in sample(dtype=torch.float32))
    expected = upsampler(features, image, size)
    monkeypatch.setattr("upfeat.upsamplers.naf._LARGE", 1)
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    found = upsampler(features, image, size)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **close)
    buffer = torch.full_like(expected, torch.nan, memory_format=torch.channels_last)
    assert upsampler(features, image, size, out=buffer) is buffer
    torch.testing.assert_close(buffer, expected, **close)
    with pytest.raises(ValueError, match="buffer of"):
        upsampler(features, image, size, out=buffer[:, :, 1:])
    with pytest.raises(ValueError, match="cannot share"):
        upsampler(features[:, :7], image, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_modules_of_half_precision(name, dtype):
    image, features = (each.to(dtype) for each in sample(batch=1))
    halved = tiny(name, torch.float32).to(dtype)
    out = halved(features, image)
    assert out.dtype == dtype
    exact = halved.double()(features.double(), image.double())
    assert error(out, exact) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert halved.to(dtype)(features.float(), image.float()).dtype == torch.float32


@pytest.mark.parametrize("channels", [8, 129])
def test_channels_in_parts(channels, monkeypatch):
    monkeypatch.setattr("upfeat.upsamplers.doubling._CHANNELS", 3)
    upsampler = tiny("uplift")
    image, features = sample(batch=1)
    kernels = upsampler.prepare(image, (5, 4), (20, 27), features)
    values = torch.randn(1, channels, 5, 4, dtype=torch.float64)
    with torch.enable_grad():
        expected = kernels(values.requires_grad_()).detach()
    torch.testing.assert_close(kernels(values.detach()), expected)
    with torch.no_grad():
        found = torch.func.vmap(kernels)(values.detach()[None])
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("size", [(80, 64), (61, 57), (10, 8), (90, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_in_tiles(size, dtype, monkeypatch):
    """UPLiFT computes large maps tile by tile: equal to rounding, and with less memory."""
    image, features = (one.to(dtype) for one in sample((77, 66), batch=1))
    upsampler = tiny("uplift", dtype)
    with torch.enable_grad():  # which computes whole maps
        expected = (
            upsampler(features.requires_grad_(), image).detach(),
            upsampler.prepare(image, (5, 4), size, features),
        )
    features = features.detach()
    monkeypatch.setitem(uplift._SIDES, "cpu", 32)
    monkeypatch.setattr(uplift, "_WHOLE", 0)
    monkeypatch.setitem(doubling._ROWS, "cpu", 5)
    kernels = upsampler.prepare(image, (5, 4), size, features)
    close = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-14}
    for found, whole in zip(kernels.weights, expected[1].weights, strict=True):
        torch.testing.assert_close(found, whole.detach(), **close)
    torch.testing.assert_close(upsampler(features, image), expected[0], **close)
    window = Window(3, 2, 6, 5)
    part = upsampler.render(kernels, features, window=window)
    torch.testing.assert_close(part, upsampler.render(kernels, features)[..., 3:9, 2:7], **close)


def test_output_much_smaller_than_the_image():
    """NAF shrinks it first: coordinates in float32 alone would cost two digits."""
    upsampler = tiny("naf", torch.float32)
    image, features = sample((90, 61), (7, 9), batch=1)
    expected = tiny("naf")(features, image, (8, 5))
    assert error(upsampler(features.float(), image.float(), (8, 5)), expected) < 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_image_first(name):
    upsampler = tiny(name)
    image, features = sample()
    module = upfeat.ImageFirst(upsampler)
    torch.testing.assert_close(module(image, features), upsampler(features, image))
    out = module(image, features, (9, 9), q_chunk_size=100)
    torch.testing.assert_close(out, upsampler(features, image, (9, 9)))
    buffer = torch.empty_like(out)
    torch.testing.assert_close(module(image, features, (9, 9), out=buffer), out)


def test_saved_and_read(tmp_path):
    for name in NAMES:
        upsampler = tiny(name, torch.float32)
        upsampler.save_pretrained(tmp_path / name)
        again = upfeat.load_upsampler(tmp_path / name)
        image, features = sample(dtype=torch.float32)
        assert torch.equal(upsampler(features, image), again(features, image))
        assert again.normalization == upsampler.normalization


def test_bad_input():
    image, features = sample(channels=6)
    with pytest.raises(ValueError, match="6 channels but this JAFAR is made for 8"):
        tiny("jafar")(features, image)
    with pytest.raises(ValueError, match="6 channels but this UPLiFT is made for 8"):
        tiny("uplift")(features, image)
    with pytest.raises(ValueError, match="5 channels, which its 2 heads cannot share"):
        tiny("naf")(features[:, :5], image)
    for name in ("anyup", "jafar", "uplift"):
        with pytest.raises(ValueError, match="features are missing"):
            tiny(name).prepare(image, (5, 4), (20, 27))
    for make in (
        lambda: upfeat.AnyUp(width=20),
        lambda: upfeat.AnyUp(window_ratio=0),
        lambda: upfeat.AnyUp(basis_side=4),
        lambda: upfeat.JAFAR(0),
        lambda: upfeat.NAF(window_side=2),
        lambda: upfeat.NAF(backend="cuda"),
        lambda: upfeat.UPLiFT(0),
        lambda: upfeat.UPLiFT(8, encoder_widths=[16]),
        lambda: upfeat.UPLiFT(8, encoder_widths=[16, 0]),
        lambda: upfeat.UPLiFT(8, width=16),
    ):
        with pytest.raises(ValueError, match="="):
            make()


def test_windows_of_cells():
    assert shifted_window(12, 12, 9)[:12] == [0, 0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3]
    assert shifted_window(4, 8, 9) == [0] * 8 + [4] * 8
    # 10 pixels on 3 cells: the cell that a pixel's centre lies in, not a ratio rounded down
    assert shifted_window(3, 10, 1)[:10] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    for cells, length in ((14, 56), (11, 47), (16, 224), (5, 35), (64, 1000), (10, 100)):
        at = (torch.arange(length, dtype=torch.float32) + 0.5) / length
        low = ((at - 0.1).clamp(0, 1) * cells).floor().long().tolist()
        high = ((at + 0.1).clamp(0, 1) * cells).ceil().long().tolist()
        assert relative_window(cells, length, 0.1) == low + high


@pytest.mark.slow
@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="no ../shared beside this checkout")
@pytest.mark.parametrize(("file", "cases"), CASES)
def test_published_cases(file, cases, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    upsampler = upfeat.load_upsampler(CHECKPOINTS / file)
    for path in sorted((CHECKPOINTS / "cases").glob(f"{cases}*.npz")):
        case = np.load(path)
        image, features = (torch.from_numpy(case[name]) for name in ("image", "features"))
        expected = torch.from_numpy(case["output"]).double()
        size = tuple(case["output_size"].tolist())
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert error(upsampler(features, image, size), expected) < 1e-5, path.name
        found = upsampler(features.bfloat16(), image.bfloat16(), size)
        assert error(found, expected) < 2e-2, path.name
