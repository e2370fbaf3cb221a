"""A bound of memory, or a caller's buffer, changes no bit of a map."""

import numpy as np
import pytest
import torch

import upfeat
from upfeat import budget
from upfeat.upsamplers import maps

UPSAMPLERS = ["bilinear", "bicubic", "joint_bilateral", "neighbourhood", "detail", "jbu_stack"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Several threads split sums of small matrices otherwise than of large ones."""
    threads(1)


def make_lazy(upsampler, size=(144, 176), channels=20, batch=1):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, channels, size[0] // 16, size[1] // 16, generator=generator)
    guidance = torch.rand(batch, 3, 9, 11, generator=generator)
    guidance = torch.nn.functional.interpolate(guidance, size=size, mode="bicubic")
    torch.manual_seed(0)
    made = upfeat.JBUStack() if upsampler == "jbu_stack" else upfeat.load_upsampler(upsampler)
    made.eval().requires_grad_(False)
    return upfeat.UpsampledFeatures(features, guidance, made)


@pytest.fixture
def in_pieces(monkeypatch):
    """Parts as small as they get."""
    monkeypatch.setattr(budget, "_ROWS", ())
    monkeypatch.setattr(budget, "_SIDES", (32,))
    monkeypatch.setattr(budget, "_BLOCKS", (4,))


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
def test_parts_have_the_bits_of_the_whole(upsampler, in_pieces):
    weight, bias = torch.randn(5, 22), torch.randn(5)
    lazy = make_lazy(upsampler, channels=22, batch=2)
    assert torch.equal(lazy.full(max_memory="100GB"), lazy.full())
    bounded = lazy.project(weight, bias, max_memory="100GB")
    assert torch.equal(bounded, lazy.project(weight, bias))
    assert torch.equal(lazy.full(torch.float16), lazy.full().half())


def test_parts_of_a_map_that_is_not_made_at_once_have_its_bits(in_pieces, monkeypatch):
    monkeypatch.setattr(maps, "WHOLE", 1000)
    lazy = make_lazy("detail", (96, 656), channels=4)
    assert torch.equal(lazy.full(max_memory="100GB"), make_lazy("detail", (96, 656), 4).full())


def test_a_callers_buffer_is_filled(tmp_path, in_pieces):
    lazy = make_lazy("detail")
    whole = lazy.full()
    tensor = torch.empty(lazy.shape)
    assert lazy.full(out=tensor) is tensor
    assert torch.equal(tensor, whole)
    halves = torch.empty(lazy.shape, dtype=torch.bfloat16)
    assert torch.equal(lazy.full(out=halves), whole.bfloat16())
    file = np.memmap(tmp_path / "map.bin", np.float32, "w+", shape=tuple(lazy.shape))
    assert lazy.full(out=file, max_memory="100GB") is file
    again = np.memmap(tmp_path / "map.bin", np.float32, "r", shape=tuple(lazy.shape))
    np.testing.assert_array_equal(again, whole)
    head = np.empty((1, 2, *lazy.shape[2:]))
    weight = torch.randn(2, 20)
    np.testing.assert_array_equal(lazy.project(weight, out=head), lazy.project(weight).double())


def test_a_model_keeps_to_its_bound(monkeypatch, held):
    monkeypatch.setattr(budget, "_ROWS", (64,))
    model = upfeat.load("efficientnet_lite0")
    x = torch.randn(1, 3, 192, 208, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(192, 208, dtype=torch.bool)
    mask[:100, :50] = True
    whole, masked = model(x), model(x, mask=mask)
    model.max_memory = held + 10**9
    assert torch.equal(model(x), whole)
    out = torch.empty(whole.shape, dtype=torch.float64)
    assert torch.equal(model(x, mask=mask, out=out), masked.double())
    assert upfeat.load(upsampler="bilinear", max_memory="2GB").max_memory == 2 * 10**9


@pytest.mark.parametrize("upsampler", ["detail", "bilinear"])
def test_a_bound_that_cannot_be_kept_is_refused(upsampler):
    lazy = make_lazy(upsampler)
    with pytest.raises(ValueError, match=r"max_memory=.* smallest that can work is about .* out="):
        lazy.full(max_memory="1MB")
    with pytest.raises(ValueError, match=r"smallest that can work is about [\d.]+ [MG]B$"):
        lazy.full(max_memory="1MB", out=torch.empty(lazy.shape))
    with pytest.raises(ValueError, match='max_memory="lots"'):
        lazy.project(torch.randn(2, 20), max_memory="lots")


def test_a_buffer_that_does_not_fit_is_refused(tmp_path):
    lazy = make_lazy("bilinear")
    whole = lazy.shape
    with pytest.raises(ValueError, match="out is 1×20×144×175; the map is 1×20×144×176"):
        lazy.full(out=torch.empty(1, 20, 144, 175))
    with pytest.raises(ValueError, match=r"out is torch.int64"):
        lazy.full(out=torch.empty(whole, dtype=torch.long))
    with pytest.raises(TypeError, match="not list"):
        lazy.full(out=[])
    with pytest.raises(ValueError, match="disagree"):
        lazy.full(torch.float16, out=torch.empty(whole))
    np.zeros(whole, np.float32).tofile(tmp_path / "map.bin")
    with pytest.raises(ValueError, match="read-only"):
        lazy.full(out=np.memmap(tmp_path / "map.bin", np.float32, "r", shape=tuple(whole)))
    lazy.features.mul_(1e9)
    with pytest.raises(ValueError, match="overflows"):
        lazy.full(out=np.empty(whole, np.float16))
    lazy.features.requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        lazy.full(out=torch.empty(whole))
