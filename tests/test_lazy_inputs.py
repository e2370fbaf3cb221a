"""Bad input of lazy maps and models: refused by name, value and fix; and what is no bad input."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

import upfeat

C, SIZE = 4, (24, 32)


@pytest.fixture(scope="module")
def lazy():
    draw = torch.Generator().manual_seed(0)
    up = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=3).eval().requires_grad_(False)
    features = torch.randn(1, C, 3, 4, generator=draw)
    return upfeat.UpsampledFeatures(features, torch.randn(1, 3, *SIZE, generator=draw), up)


class Patches(torch.nn.Module):
    """A backbone of one convolution."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, C, 8, stride=8)

    def forward(self, x):
        return self.convolution(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return upfeat.load(Patches(), upsampler="bilinear")


NO_TENSORS = [None, [[1.0, 2.0]], np.ones((1, 2)), "points", 3]


@pytest.mark.parametrize("value", NO_TENSORS, ids=lambda value: type(value).__name__)
def test_what_is_no_tensor_is_named(lazy, value):
    kind = type(value).__name__
    for label, call in (
        ("points", lazy.at),
        ("weight", lazy.project),
        ("target", lazy.similarity),
    ):
        with pytest.raises(TypeError, match=f"^{label} is of type {kind}; give a tensor"):
            call(value)
    if value is not None:
        with pytest.raises(TypeError, match=f"^bias is of type {kind}; give a tensor"):
            lazy.project(torch.ones(2, C), value)


def test_a_layer_is_no_weight_but_has_one(lazy):
    head = torch.nn.Linear(C, 5)
    with pytest.raises(TypeError, match=r"weight is of type Linear; give its \.weight and \.bias"):
        lazy.project(head)
    out = lazy.project(head.weight, head.bias)
    torch.testing.assert_close(out, head(lazy.full().movedim(1, -1)).movedim(-1, 1))


POINTS = [
    (torch.tensor([1.0, 2.0]), r"points must be \(N, 2\)"),
    (torch.zeros(2, 3), r"points must be \(N, 2\)"),
    (torch.tensor([[torch.nan, 1.0]]), "points must lie in the map"),
    (torch.tensor([[torch.inf, 1.0]]), "points must lie in the map"),
    (torch.tensor([[-0.01, 0.0]]), "y from 0 to 23, x from 0 to 31"),
    (torch.tensor([[0.0, 31.01]]), "y from 0 to 23, x from 0 to 31"),
    (torch.tensor([[True, False]]), r"points is torch\.bool; give numbers"),
    (torch.tensor([[1j, 2.0]]), r"points is torch\.complex64; give numbers"),
    (torch.zeros(1, 2).to_sparse(), r"points is torch\.sparse_coo"),
    (torch.zeros(1, 2, device="meta"), "points is on meta"),
]


@pytest.mark.parametrize(("points", "words"), POINTS)
def test_points_that_are_none_are_refused(lazy, points, words):
    with pytest.raises(ValueError, match=words):
        lazy.at(points)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.uint8])
def test_points_of_any_type_of_number(lazy, dtype):
    points = torch.tensor([[0, 0], [23, 31], [7, 5]]).to(dtype)
    expected = lazy.full()[0][:, [0, 23, 7], [0, 31, 5]].T
    torch.testing.assert_close(lazy.at(points), expected)
    assert lazy.at(points[:0]).shape == (0, C)


WINDOWS = [
    ((0, 0, 0, 4), "does not lie in the map of 24×32"),
    ((-1, 0, 4, 4), "crop.top=-1"),
    ((21, 0, 4, 4), "does not lie"),
    ((0, 29, 4, 4), "does not lie"),
    ((0.5, 0, 4, 4), r"top=0\.5 must be a whole number"),
    ((0, "1", 4, 4), "left='1' must be a whole number"),
    ((0, 0, None, 4), "height=None must be a whole number"),
    ((0, 0, 4, True), "width=True must be a whole number"),
    ((0, 0, 2**40, 4), "height=1099511627776 must be 2147483648 or less"),
    ((0, 0, float("nan"), 4), "height=nan must be a whole number"),
]


@pytest.mark.parametrize(("window", "words"), WINDOWS, ids=repr)
def test_windows_that_are_none_are_refused(lazy, window, words):
    with pytest.raises(ValueError, match=words):
        lazy.crop(*window)


@pytest.mark.parametrize("kind", [int, float, np.int64, torch.tensor])
def test_windows_of_any_whole_numbers(lazy, kind):
    assert torch.equal(lazy.crop(*map(kind, (3, 5, 7, 9))), lazy.crop(3, 5, 7, 9))


HEADS = [
    ((torch.ones(5, 3), None), r"weight must be \(K, 4\) for these features, not \(5, 3\)"),
    ((torch.ones(C), None), r"weight must be \(K, 4\)"),
    ((torch.ones(5, C, 1, 1), None), r"weight must be \(K, 4\)"),
    ((torch.ones(5, C).int(), None), r"weight is torch\.int32; give floating"),
    ((torch.ones(5, C).to(torch.complex64), None), r"weight is torch\.complex64"),
    ((torch.full((5, C), torch.nan), None), "weight holds NaN"),
    ((torch.ones(5, C).to_sparse(), None), r"weight is torch\.sparse_coo"),
    ((torch.ones(5, C), torch.ones(4)), r"bias must be \(5,\), not \(4,\)"),
    ((torch.ones(5, C), torch.ones(5, 1)), r"bias must be \(5,\)"),
    ((torch.ones(5, C), torch.full((5,), torch.inf)), "bias holds NaN or infinity"),
]


@pytest.mark.parametrize(("head", "words"), HEADS)
def test_heads_that_do_not_fit_are_refused(lazy, head, words):
    with pytest.raises(ValueError, match=words):
        lazy.project(*head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_heads_of_other_types_are_taken(lazy, dtype):
    weight, bias = torch.linspace(-1, 1, 3 * C).view(3, C), torch.tensor([0.5, -2, 1])
    expected = lazy.project(weight.to(dtype).float(), bias)
    out = lazy.project(weight.to(dtype), bias.to(dtype))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    assert lazy.project(weight[:0]).shape == (1, 0, *SIZE)
    filled = lazy.project(weight.to(dtype), bias.to(dtype), out=torch.empty(1, 3, *SIZE))
    torch.testing.assert_close(filled, expected)
    target = torch.linspace(-1, 1, C)
    expected = lazy.similarity(target.to(dtype).float())
    torch.testing.assert_close(lazy.similarity(target.to(dtype)), expected)


TARGETS = [
    (torch.ones(3), r"target must be a point \(2,\), a vector \(4,\)"),
    (torch.ones(0, C), "target must be"),
    (torch.ones(2, 2), "target must be"),
    (torch.tensor([99.0, 0.0]), "points must lie in the map"),
    (torch.full((C,), torch.nan), "target holds NaN"),
]


@pytest.mark.parametrize(("target", "words"), TARGETS)
def test_targets_that_are_none_are_refused(lazy, target, words):
    with pytest.raises(ValueError, match=words):
        lazy.similarity(target)


DTYPES = [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float16", np.float16, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_the_whole_that_are_none_are_refused(lazy, dtype):
    with pytest.raises(ValueError, match=r"^dtype=.* must be one of floating numbers"):
        lazy.full(dtype)


def _read_only():
    array = np.zeros((1, C, *SIZE), np.float32)
    array.setflags(write=False)
    return array


def _of_inference():
    with torch.inference_mode():
        return torch.zeros(1, C, *SIZE)


BUFFERS = [
    (lambda: torch.zeros(1, C, 24, 31), "out is 1×4×24×31; the map is 1×4×24×32"),
    (lambda: torch.zeros(1, C, *SIZE, dtype=torch.int32), r"out is torch\.int32"),
    (lambda: torch.zeros(1, C, *SIZE, requires_grad=True), r"give out\.detach"),
    (lambda: torch.zeros(1, 1, 1, 1).expand(1, C, *SIZE), r"several values; give out\.clone"),
    (lambda: np.zeros((1, C, *SIZE), int), "out is int64; give float16"),
    (lambda: np.zeros((1, C, *SIZE), ">f4"), "out is >f4"),
    (lambda: np.zeros((1, C, *SIZE), complex), "out is complex128"),
    (_read_only, "out is read-only"),
    (lambda: np.zeros((1, C, *SIZE), np.float32)[..., ::-1], "counts backwards"),
    (lambda: torch.zeros(1, C, *SIZE, device="meta"), "meta device"),
    (lambda: torch.zeros(1, C, *SIZE).to_sparse(), "give a dense tensor"),
    (lambda: torch.zeros(1, C, *SIZE).to(torch.float8_e4m3fn), r"out is torch\.float8"),
    (lambda: torch.zeros(9999).as_strided((1, C, *SIZE), (1, 9, 5, 1)), "several values"),
    (_of_inference, "made in inference mode"),
]


@pytest.mark.parametrize(("make", "words"), BUFFERS)
def test_buffers_that_do_not_fit_are_refused(lazy, make, words):
    with pytest.raises(ValueError, match=words):
        lazy.full(out=make())


def test_a_buffer_in_the_memory_of_the_inputs_is_refused():
    """Windows read what earlier windows would have overwritten."""
    room = torch.randn(2, C, *SIZE)
    lazy = upfeat.UpsampledFeatures(
        room[:1], torch.randn(1, 3, *SIZE), upfeat.load_upsampler("neighbourhood"), SIZE
    )
    expected = lazy.full()
    with pytest.raises(ValueError, match="shares memory with the map's inputs"):
        lazy.full(out=room[:1])
    assert torch.equal(lazy.full(out=room[1:]), expected)


def test_overflow_of_a_type_of_equal_width_is_refused():
    lazy = upfeat.UpsampledFeatures(
        torch.full((1, C, 3, 4), 1e5, dtype=torch.bfloat16),
        torch.randn(1, 3, *SIZE),
        upfeat.Bilinear(),
        SIZE,
    )
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        lazy.full(torch.float16)


@pytest.mark.parametrize("out", [[1], "a.npy", 3])
def test_buffers_that_are_none_are_refused(lazy, out):
    with pytest.raises(TypeError, match="out must be a tensor or a NumPy array, not"):
        lazy.full(out=out)


@pytest.mark.parametrize("bound", [0, -1, "x", "", 1.5, True, "nan", "-2GB", "1KB"], ids=repr)
def test_bounds_that_are_none_are_refused(lazy, bound):
    with pytest.raises(ValueError, match=r"max_memory"):
        lazy.full(max_memory=bound)


@pytest.mark.parametrize("count", [0, 5, 1.5, None, "3", True], ids=repr)
def test_components_that_there_are_not_are_refused(lazy, count):
    with pytest.raises(ValueError, match=r"^k="):
        lazy.pca(count)


@pytest.mark.parametrize("given", [None, 3, "detail", upfeat.Bilinear, torch.nn.Identity()])
def test_what_is_no_upsampler_is_named(lazy, model, given, tmp_path):
    said = r"^upsampler is (a class|of type \w+); give an Upsampler, as upfeat\.load_upsampler"
    with pytest.raises(TypeError, match=said):
        upfeat.UpsampledFeatures(lazy.features, lazy.guidance, given)
    with pytest.raises(TypeError, match=said):
        upfeat.FeatUp(model.backbone, given)
    if given is not None:
        lazy.save(tmp_path / "lazy.safetensors")
        with pytest.raises(TypeError, match=said):
            upfeat.UpsampledFeatures.load(tmp_path / "lazy.safetensors", given)


def test_places_that_cannot_be_written_are_named(lazy, tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        lazy.save(tmp_path)
    with pytest.raises(IsADirectoryError):
        lazy.save("")
    with pytest.raises(FileNotFoundError, match="none"):
        lazy.save(tmp_path / "none" / "a.safetensors")
    assert not list(tmp_path.iterdir())
    for name in ("with space.safetensors", "–é漢.safetensors", "-dash"):
        lazy.save(tmp_path / name)
        read = upfeat.UpsampledFeatures.load(tmp_path / name, lazy.upsampler)
        assert read.shape == lazy.shape


def test_copies_and_threads_of_one_map(lazy):
    points = torch.tensor([[3.2, 4.7], [20.0, 30.5]])
    expected = lazy.at(points), lazy.crop(2, 3, 9, 8), lazy.full()
    for other in (copy.copy(lazy), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        torch.testing.assert_close(other.full(), expected[2])
    fresh = copy.deepcopy(lazy)
    found = []

    def work():
        found.extend((fresh.at(points), fresh.crop(2, 3, 9, 8), fresh.full()) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for results in found:
        for result, one in zip(results, expected, strict=True):
            torch.testing.assert_close(result, one)


IMAGES = [None, "photo.jpg", np.zeros((8, 8, 3)), [1], 3]


@pytest.mark.parametrize("image", IMAGES, ids=lambda value: type(value).__name__)
def test_images_that_are_not_preprocessed_are_told_how(model, image):
    for call in (model, model.lazy, model.backbone, model.backbone.with_hidden):
        with pytest.raises(TypeError, match=r"^x is of type .*; give the normalised image, as pre"):
            call(image)


WRONG = [
    (torch.zeros(3, 16, 16), r"x must be \(B, 3, H, W\)"),
    (torch.zeros(1, 1, 16, 16), r"x must be \(B, 3, H, W\)"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"x is torch\.uint8"),
    (torch.zeros(1, 3, 16, 16).to_sparse(), r"x is torch\.sparse_coo"),
    (torch.zeros(1, 3, 1, 16), "stride"),
]


@pytest.mark.parametrize(("x", "words"), WRONG)
def test_images_that_are_none_are_refused(model, x, words):
    for call in (model, model.lazy, model.backbone):
        with pytest.raises(ValueError, match=words):
            call(x)


TOKENS = [
    ((torch.zeros(5, 3), (2, 2)), r"tokens must be \(B, N, C\)"),
    ((torch.zeros(2, 5, 3), (2, 3)), "5 tokens are not a grid of 2×3"),
    ((torch.zeros(2, 5, 3), (2, 2), 0), "0 prefix tokens and a grid of 2×2"),
    ((torch.zeros(2, 5, 3), (2, 2), -1), "prefix_tokens=-1 must be 0 or more"),
    ((torch.zeros(2, 5, 3), (2, 2), 1.5), r"prefix_tokens=1\.5 must be a whole number"),
    ((torch.zeros(2, 5, 3), (2, 2), "1"), "prefix_tokens='1' must be a whole number"),
    ((torch.zeros(2, 5, 3), (0, 2)), r"grid_size=\(0, 2\) must be"),
    ((torch.zeros(2, 5, 3), (2.0, 2.0)), "grid_size=.* two whole numbers"),
    ((torch.zeros(2, 5, 3), 4), "grid_size=4 must be"),
    ((torch.zeros(2, 5, 3), None), "grid_size=None must be"),
    ((torch.zeros(2, 5, 3), "22"), "grid_size='22' must be"),
]


@pytest.mark.parametrize(("arguments", "words"), TOKENS)
def test_tokens_that_make_no_grid_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        upfeat.tokens_to_grid(*arguments)
    with pytest.raises(TypeError, match=r"^tokens is of type ndarray; give a tensor"):
        upfeat.tokens_to_grid(np.zeros((2, 5, 3)), (2, 2))


LOADS = [
    ({"upsampler": "bilinaer"}, 'upsampler "bilinaer" is unknown; did you mean bilinear'),
    ({"upsampler": ""}, 'upsampler "" is unknown'),
    ({"passes": 3}, r"passes=3 must be one of \(1, 2, 5, 8\)"),
    ({"passes": "5"}, "passes='5' must be"),
    ({"early": 3}, "early=3 must be true or false"),
    ({"device": "x"}, 'device="x" cannot be used'),
    ({"device": "meta"}, 'device="meta" cannot be used'),
    ({"max_memory": "much"}, 'max_memory="much" must be an amount'),
    ({"bands": (0, 1, 3)}, r"bands=\(0, 1, 3\) must be three of the 3 bands"),
    ({"bands": (0, 1)}, "must be three"),
    ({"upsampler": "anyup"}, "anyup has no weights in this package; give the file"),
]


@pytest.mark.parametrize(("options", "words"), LOADS, ids=repr)
def test_options_of_load_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        upfeat.load(Patches(), **options)


def test_heads_that_overflow_the_features_type_are_refused():
    features, image = torch.rand(1, 4, 3, 3).half(), torch.rand(1, 3, 12, 12).half()
    lazy = upfeat.UpsampledFeatures(features, image, upfeat.load_upsampler("bilinear"))
    with pytest.raises(ValueError, match=r"weight holds NaN or infinity.*float16 overflows"):
        lazy.project(torch.full((2, 4), 1e5))


def test_masks_of_other_images_are_refused():
    model, x = upfeat.load(upsampler="bilinear"), torch.zeros(1, 3, 32, 32)
    for call in (model, model.lazy):
        with pytest.raises(ValueError, match="mask is of 2 images and x of 1; give as many"):
            call(x, mask=torch.zeros(2, 1, 32, 32, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"mask must be \(H, W\)"):
            call(x, mask=torch.zeros(0, 5, dtype=torch.bool))
