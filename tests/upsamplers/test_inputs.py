"""What every upsampler does with what it is given, right or wrong, and where it runs."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_upsamplers import SMALL

import upfeat
from upfeat.upsamplers.base import UPSAMPLERS

PUBLISHED = ("anyup", "jafar", "naf", "uplift")


def make(name):
    torch.manual_seed(0)
    return SMALL[name]().eval().requires_grad_(False)


def inputs(batch=1, grid=(3, 4), size=(24, 32), dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    shapes = ((batch, 4, *grid), (batch, 3, *size))
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def test_every_class_is_here():
    assert sorted(SMALL) == sorted(UPSAMPLERS)


NO_TENSORS = {"array": np.asarray, "list": torch.Tensor.tolist, "none": lambda _: None, "text": str}
WRONG = {
    "without a batch": (lambda x: x[0], r"must be \(B, channels, height, width\)"),
    "of five axes": (lambda x: x[None], r"must be \(B, channels, height, width\)"),
    "of no rows": (lambda x: x[:, :, :0], r"must be .*none of the last three 0"),
    "of no channels": (lambda x: x[:, :0], r"must be .*none of the last three 0|has 0 channels"),
    "whole": (lambda x: x.int(), r"is torch\.int32; give floating numbers"),
    "bytes": (lambda x: x.byte(), r"is torch\.uint8; give floating numbers"),
    "masks": (lambda x: x > 0, r"is torch\.bool; give floating numbers"),
    "complex": (lambda x: x.to(torch.complex64), r"is torch\.complex64; give floating"),
    "of 8 bits": (lambda x: x.to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn; give floating"),
    "sparse": (lambda x: x.to_sparse(), r"is torch\.sparse_coo; give a dense one"),
    "with NaN": (lambda x: x.index_fill(3, torch.tensor([1]), torch.nan), "holds NaN or infinity"),
    "infinite": (lambda x: x / 0, "holds NaN or infinity"),
    "elsewhere": (lambda x: x.to("meta"), "is on (meta|cpu) and guidance on (cpu|meta)"),
}


@pytest.mark.parametrize("label", ["features", "guidance"])
@pytest.mark.parametrize("name", SMALL)
def test_what_cannot_be_upsampled_is_refused_by_name(name, label):
    up, good = make(name), dict(zip(("features", "guidance"), inputs(), strict=True))
    for change in NO_TENSORS.values():
        with pytest.raises(TypeError, match=f"^{label} is of type .*; give a tensor"):
            up(**{**good, label: change(good[label])})
    for kind, (change, words) in WRONG.items():
        said = "features" if kind == "elsewhere" else label
        with pytest.raises(ValueError, match=rf"^{said} ({words})"):
            up(**{**good, label: change(good[label])})
    with pytest.raises(ValueError, match=r"^features has batch size .* and guidance"):
        up(**{**good, label: good[label].expand(2, -1, -1, -1)})


@pytest.mark.parametrize("name", SMALL)
def test_the_mark_of_missing_data_is_no_brightness(name):
    features, guidance = inputs()
    guidance[0, 1, 2, 3] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match=r"^guidance holds -3\.4e\+38; if that stands for missing"):
        make(name)(features, guidance)


SIZES = [0, 12, "ab", (5,), (5, 6, 7), (5.5, 6), (-5, 6), (0, 5), (True, 5), ("5", "6")]
SIZES += [(2**40, 1), (float("nan"), 5), (float("inf"), 5), {5: 6}, (None, 5)]


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_sizes_that_are_none_are_refused_by_value(size):
    with pytest.raises(ValueError, match=r"^output_size="):
        upfeat.Bilinear()(*inputs(), size)
    with pytest.raises(ValueError, match=r"^output_size="):
        upfeat.UpsampledFeatures(*inputs(), upfeat.Bilinear(), size)


@pytest.mark.parametrize("kind", [list, tuple, torch.Size, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["bilinear", "jbu_stack", "anyup"])
def test_sizes_are_any_two_whole_numbers(name, kind):
    out = make(name)(*inputs(), kind([5, 6]))
    assert torch.equal(out, make(name)(*inputs(), (5, 6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_types_are_kept_or_the_weights_are_named(name, dtype):
    up = make(name)
    features, guidance = inputs()
    expected = up(features, guidance)
    meets = {"features": name in ("detail", "jbu_stack"), "guidance": name not in PUBLISHED}
    for label, pair in (
        ("features", (features.to(dtype), guidance)),
        ("guidance", (features, guidance.to(dtype))),
    ):
        if meets[label] and any(True for _ in up.parameters()):
            words = rf"{label} is {dtype} and the upsampler's weights are torch\.float32; convert"
            with pytest.raises(ValueError, match=words):
                up(*pair)
            continue
        if label == "features" and name == "neighbourhood" and dtype == torch.float64:
            continue  # queries in float32 are no match for it; see the next test
        out = up(*pair)
        assert out.dtype == pair[0].dtype
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(up(features, guidance)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_no_images_give_no_features(name, dtype):
    up = make(name).to(dtype)
    assert up(*inputs(0, dtype=dtype)).shape == (0, 4, 24, 32)
    assert up(*inputs(0, dtype=dtype), (5, 7)).dtype == dtype


@pytest.mark.parametrize("name", SMALL)
def test_extreme_shapes_are_finite_and_keep_what_is_constant(name):
    up = make(name)
    keeps = name not in ("detail", "jbu_stack")  # a mix of random weights, weights of any sum
    for grid, size in (
        ((1, 1), (1, 1)),
        ((1, 1), (60, 1)),
        ((9, 1), (7, 80)),
        ((12, 3), (5, 4)),
        ((3, 4), (1, 1)),
        ((2, 2), (67, 35)),
    ):
        features, guidance = inputs(2, grid, size)
        features = features[..., :1, :1].expand(features.shape)
        out = up(features, guidance)
        assert out.shape == (2, 4, *size)
        assert torch.isfinite(out).all()
        if keeps:
            torch.testing.assert_close(out, features[..., :1, :1].expand(out.shape))


@pytest.mark.parametrize("name", SMALL)
def test_threads_share_one_upsampler(name):
    up = make(name)
    cases = [inputs(1, (2 + n, 3), (16, 24 + n)) for n in range(4)]
    expected = [up(*case) for case in cases]
    found = {}

    def work(index):
        with torch.no_grad():
            found[index] = [up(*cases[(index + turn) % 4]) for turn in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, outs in found.items():
        for turn, out in enumerate(outs):
            torch.testing.assert_close(out, expected[(index + turn) % 4])
    assert len(found) == 4


@pytest.mark.parametrize("name", SMALL)
def test_inference_mode_gives_what_no_grad_gives_and_leaves_nothing_behind(name):
    up, (features, guidance) = make(name), inputs()
    with torch.inference_mode():
        inside = up(features, guidance).clone()
    features.requires_grad_()
    out = up(features, guidance)  # nothing that was made inside may be kept for this
    torch.testing.assert_close(out.detach(), inside, rtol=1e-3, atol=1e-3)
    out.square().mean().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert features.grad.any()


@pytest.mark.parametrize("name", SMALL)
def test_a_state_read_from_a_file_gives_the_same_output(name, tmp_path):
    up = make(name)
    torch.save(up.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(5)
    other = SMALL[name]().eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs()), up(*inputs()))
    if list(up.parameters()):
        first = next(iter(up.state_dict()))
        missing = {key: value for key, value in up.state_dict().items() if key != first}
        with pytest.raises((RuntimeError, ValueError), match=first):
            other.load_state_dict(missing)


@pytest.mark.parametrize("name", SMALL)
def test_training_mode_comes_and_goes(name):
    up = make(name)
    expected = up(*inputs())
    up.train()
    assert torch.isfinite(up(*inputs(2))).all()
    assert torch.equal(up.eval()(*inputs()), expected)


@pytest.mark.parametrize("name", SMALL)
def test_the_image_first_gives_the_same(name):
    features, guidance = inputs()
    up = make(name)
    assert torch.equal(
        upfeat.ImageFirst(up)(guidance, features, (9, 7)), up(features, guidance, (9, 7))
    )


class Own(upfeat.upsamplers.Upsampler):
    """An upsampler as a user writes it; its kernels change bilinear maps by a function."""

    name = "own"

    def __init__(self, function=None, width=4):
        super().__init__()
        self.function, self.layer = function, torch.nn.Conv2d(3, width, 1)

    def prepare(self, guidance, grid_size, output_size, features=None):
        return lambda features: self.function(F.interpolate(features, output_size))


@pytest.mark.parametrize(
    "function", [lambda out: out.mT, lambda out: out.permute(0, 2, 3, 1), lambda out: (out,)]
)
def test_an_upsampler_of_ones_own_returns_the_size_asked_for(function):
    features, guidance = torch.rand(1, 4, 3, 5), torch.rand(1, 3, 24, 40)
    upsampler = Own(function)
    lazy = upfeat.UpsampledFeatures(features, guidance, upsampler)
    for call in (lambda: upsampler(features, guidance), lazy.full):
        with pytest.raises((TypeError, ValueError), match=r"^own: its kernels returned .*return"):
            call()


def test_an_upsampler_without_config_is_not_saved_as_another(tmp_path):
    with pytest.raises(ValueError, match=r"Own defines no config\(\); .* function, width$"):
        Own(width=8).save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    with pytest.raises(TypeError, match="upsampler=Own is a class; give its name"):
        upfeat.load(upsampler=Own)
    with pytest.raises(ValueError, match="has no name; set its attribute name"):
        upfeat.upsamplers.base.UPSAMPLERS.register(type("Nameless", (), {}))
