"""Every part of lazy features equals the same part of the whole."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_upsamplers import stack_of

import upfeat
from upfeat.upsamplers import create_upsampler
from upfeat.upsamplers.detail import DetailKernels
from upfeat.upsamplers.joint_bilateral import NeighbourhoodKernels


def _stack():
    torch.manual_seed(3)
    return stack_of(7).eval().requires_grad_(False)


def _detail():
    torch.manual_seed(3)
    made = upfeat.DetailUpsampler(7, query_dim=8, levels=2, width=4, depth=1)
    torch.nn.init.normal_(made.detail.weight)
    torch.nn.init.normal_(made.channel_mix.weight, std=0.3)
    return made.eval().requires_grad_(False)


def _neighbourhood():
    torch.manual_seed(3)
    made = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=2, back_projections=2)
    return made.eval().requires_grad_(False)


UPSAMPLERS = {
    "nearest": upfeat.Nearest(),
    "bilinear": upfeat.Bilinear(),
    "bicubic": upfeat.Bicubic(),
    "joint_bilateral": upfeat.JointBilateral(),
    "jbu_stack": _stack(),
    "neighbourhood": _neighbourhood(),
    "detail": _detail(),
}


@pytest.fixture(params=UPSAMPLERS)
def lazy(request):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 7, 5, 6, generator=generator)
    guidance = torch.randn(1, 3, 75, 101, generator=generator)
    return upfeat.UpsampledFeatures(features, guidance, UPSAMPLERS[request.param])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_full_is_the_upsamplers_output(lazy):
    close(lazy.full(), lazy.upsampler(lazy.features, lazy.guidance))
    assert lazy.full().shape == lazy.shape
    half = lazy.full(torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), lazy.full(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "window", [(0, 0, 75, 101), (0, 0, 1, 1), (74, 100, 1, 1), (31, 40, 9, 20)]
)
def test_crop(lazy, window):
    top, left, height, width = window
    close(lazy.crop(*window), lazy.full()[..., top : top + height, left : left + width])


def test_at_whole_and_fractional_points(lazy):
    full = lazy.full()[0]
    close(
        lazy.at(torch.tensor([[0, 0], [74, 100], [31, 63]])), full[:, [0, 74, 31], [0, 100, 63]].T
    )
    expected = 0.25 * (full[:, 31, 40] + full[:, 31, 41] + full[:, 32, 40] + full[:, 32, 41])
    close(lazy.at(torch.tensor([[31.5, 40.5]]))[0], expected)
    assert lazy.at(torch.empty(0, 2)).shape == (0, 7)


def test_project_similarity_and_pca(lazy):
    full = lazy.full()
    weight, bias = torch.randn(4, 7), torch.randn(4)
    close(
        lazy.project(weight, bias), torch.nn.functional.conv2d(full, weight[..., None, None], bias)
    )
    point = torch.tensor([10.0, 20.0])
    cosine = torch.cosine_similarity(full, full[:, :, 10, 20][..., None, None], dim=1)[:, None]
    close(lazy.similarity(point), cosine)
    close(
        lazy.similarity(weight[0], cosine=False),
        torch.einsum("bchw,c->bhw", full, weight[0])[:, None],
    )
    found = lazy.pca(2)
    centred = full - found.mean[:, None, None]
    close(found.map, torch.einsum("bchw,kc->bkhw", centred, found.components))
    close(found.components @ found.components.T, torch.eye(2))


PRECOMPUTING = {"neighbourhood": _neighbourhood, "detail": _detail}


@pytest.fixture(params=PRECOMPUTING)
def precomputing(request):
    """Upsamplers of which a part is done once for all windows, to be changed by a test."""
    return PRECOMPUTING[request.param]()


def _inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 7, 5, 6, generator=generator)
    return features, torch.randn(1, 3, 75, 101, generator=generator)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_no_window_changes_is_done_once(precomputing, mode, monkeypatch):
    calls = []
    for cls in (NeighbourhoodKernels, DetailKernels):
        precompute = cls.precompute

        def counted(self, features, precompute=precompute):
            calls.append(type(self))
            return precompute(self, features)

        monkeypatch.setattr(cls, "precompute", counted)
    with mode():
        lazy = upfeat.UpsampledFeatures(*_inputs(), precomputing)
        lazy.at(torch.tensor([[0.0, 0.0], [70.0, 90.0], [3.5, 80.0]]))
        lazy.crop(31, 40, 9, 20)
        lazy.similarity(torch.tensor([10.0, 20.0]))
        lazy.full(torch.float64)
    assert len(calls) == len(set(calls))


def _times(name):
    def change(lazy):
        with torch.no_grad():
            getattr(lazy, name).mul_(1.5)

    return change


def _other(lazy):
    lazy.features = lazy.features + 1


def _weights(lazy):
    with torch.no_grad():
        for parameter in lazy.upsampler.parameters():
            parameter.mul_(1.1)


CHANGES = {"features": _times("features"), "guidance": _times("guidance")}
CHANGES |= {"other features": _other, "weights": _weights}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_kept_of_what_has_changed(precomputing, mode, change):
    with mode():
        features, guidance = (one.clone() for one in _inputs())
        lazy = upfeat.UpsampledFeatures(features, guidance, precomputing)
        before = lazy.crop(31, 40, 9, 20)
        assert torch.equal(lazy.crop(31, 40, 9, 20), before)
        CHANGES[change](lazy)
        fresh = upfeat.UpsampledFeatures(lazy.features, lazy.guidance, precomputing)
        expected = fresh.crop(31, 40, 9, 20)
        assert not torch.allclose(before, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(lazy.crop(31, 40, 9, 20), expected)
        assert torch.equal(
            lazy.at(torch.tensor([[3.5, 7.5]])), fresh.at(torch.tensor([[3.5, 7.5]]))
        )
        assert torch.equal(lazy.full(), fresh.full())


def test_mixed_features_changed_in_place_are_seen(precomputing):
    lazy = upfeat.UpsampledFeatures(*_inputs(), precomputing)
    lazy.crop(31, 40, 9, 20)
    lazy.mixed.mul_(2)
    close(lazy.crop(31, 40, 9, 20), lazy.full()[..., 31:40, 40:60])


def test_gradients_are_those_of_the_whole_and_none_is_kept(precomputing):
    features, guidance = _inputs()
    features.requires_grad_()
    lazy = upfeat.UpsampledFeatures(features, guidance, precomputing)
    found = []
    for _ in range(2):  # the second time after a crop without gradient, and one with
        with torch.no_grad():
            assert not lazy.crop(31, 40, 9, 20).requires_grad
        loss = lazy.crop(31, 40, 9, 20).square().sum()
        found += torch.autograd.grad(loss, features, retain_graph=True)
        assert lazy._precomputed is None
    points = torch.tensor([[3.5, 7.5], [70.0, 90.0]])
    found += torch.autograd.grad(lazy.at(points).sum() + lazy.crop(0, 0, 9, 9).sum(), features)
    full = precomputing(features, guidance)
    sampled = full[0, :, 3:5, 7:9].mean((1, 2)).sum() + full[0, :, 70, 90].sum()
    first = torch.autograd.grad(full[..., 31:40, 40:60].square().sum(), features, retain_graph=True)
    last = torch.autograd.grad(sampled + full[..., :9, :9].sum(), features)
    for one, expected in zip(found, [*first, *first, *last], strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_weights_get_their_gradients_after_a_crop_without(precomputing):
    precomputing.requires_grad_()
    lazy = upfeat.UpsampledFeatures(*_inputs(), precomputing)
    with torch.no_grad():
        lazy.crop(31, 40, 9, 20)
    lazy.crop(31, 40, 9, 20).square().sum().backward()
    found = {name: one.grad for name, one in precomputing.named_parameters()}
    precomputing.zero_grad()
    precomputing(*_inputs())[..., 31:40, 40:60].square().sum().backward()
    for name, parameter in precomputing.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3)


def test_only_the_last_is_kept(precomputing):
    lazy = upfeat.UpsampledFeatures(*_inputs(), precomputing)
    seen = []
    for seed in range(3):
        lazy.features = _inputs(seed)[0]
        lazy.crop(31, 40, 9, 20)
        seen.append(weakref.ref(lazy.features))
    gc.collect()
    assert [one() is None for one in seen] == [True, True, False]


def test_saved_and_loaded(lazy, tmp_path):
    path = tmp_path / "lazy.safetensors"
    lazy.save(path, exact=True)
    again = upfeat.UpsampledFeatures.load(path, lazy.upsampler)
    assert torch.equal(again.full(), lazy.full())
    lazy.save(path)
    rough = upfeat.UpsampledFeatures.load(path, lazy.upsampler).full()
    assert torch.nn.functional.cosine_similarity(rough, lazy.full()).mean() > 0.99


def test_a_photograph_survives_saving_in_a_hundredth_of_the_map(tmp_path):
    model = upfeat.load(upsampler="joint_bilateral")
    x = model.backbone.preprocess(torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8))
    lazy = model.lazy(x)
    lazy.save(tmp_path / "x.safetensors")
    again = upfeat.UpsampledFeatures.load(tmp_path / "x.safetensors")
    close(again.guidance, lazy.guidance)
    explicit = 4 * torch.tensor(lazy.shape).prod().item()
    assert explicit / (tmp_path / "x.safetensors").stat().st_size > 90


def test_loading_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "x.safetensors"
    stack = UPSAMPLERS["jbu_stack"]
    upfeat.UpsampledFeatures(torch.randn(1, 7, 2, 2), torch.randn(1, 3, 32, 32), stack).save(path)
    with pytest.raises(ValueError, match="give it as upsampler="):
        upfeat.UpsampledFeatures.load(path)
    with pytest.raises(ValueError, match="other weights"):
        upfeat.UpsampledFeatures.load(path, upfeat.JBUStack(7))
    from upfeat.storage import write_tensors

    write_tensors(path, {"features": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="not lazy features"):
        upfeat.UpsampledFeatures.load(path)


def _reading(value, **changes):
    """Save lazy features, change what the file says, and read it."""

    def read(path):
        upsampler = upfeat.JointBilateral(radius=1)
        lazy = upfeat.UpsampledFeatures(*_inputs(), upsampler)
        lazy.save(path)
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        tensors = load_file(path)
        for name, change in changes.items():
            if name in tensors:
                tensors[name] = change(tensors[name])
            else:
                facts[name] = change
        save_file(tensors, path, metadata=facts)
        return upfeat.UpsampledFeatures.load(path, value)

    return read


def _filled(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


def _configured(**changes):
    config = {"upsampler": "joint_bilateral", "radius": 1, "sigma_spatial": 0.7, "sigma_range": 0.3}
    return json.dumps({**config, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "load"}, "dtype 'load' is none"),
        ({"dtype": "int8"}, "dtype 'int8' is none"),
        ({"output_size": "[1e9]"}, "its output size is not"),
        ({"output_size": "[3, 1000000000000]"}, "its output size is not"),
        ({"output_size": "[" * 9999}, "its output size is not"),
        ({"output_size": "[true, 3]"}, "its output size is not"),
        ({"upsampler": _configured(radius=10**9)}, "upsampler: radius=1000000000 must be 16 or"),
        ({"upsampler": _configured(radius="2")}, "radius='2' must be a whole"),
        ({"upsampler": _configured(sigma_range=0)}, "sigma_range=0 must be"),
        ({"upsampler": _configured(start="x")}, 'argument "start" is unknown'),
        ({"upsampler": '{"upsampler": "detail", "levels": 1000000}'}, "levels=1000000 must be"),
        ({"upsampler": '{"upsampler": 3}'}, "does not say which upsampler"),
        ({"upsampler": "[]"}, "holds list"),
        ({"upsampler": "{" * 9999}, "not JSON"),
        ({"weights": "abc"}, "with weights; give it"),
        ({"normalization": '{"mean": [0, 0]}'}, "mean must be 3 values"),
        ({"normalization": '{"mean": [0, 0, 0], "std": [1, 1, 0]}'}, "std=0 must be"),
        ({"normalization": '{"mean": [0, "0", 0], "std": [1, 1, 1]}'}, "mean='0' must be"),
        ({"features": _filled(torch.nan)}, "features holds NaN or infinity"),
        ({"features": _filled(torch.inf)}, "features holds NaN or infinity"),
        ({"features": lambda x: x.to(torch.int32)}, "features is torch.int32|features holds"),
        ({"features": lambda x: x[0]}, r"lacks features \(B"),
        ({"features": lambda x: x[:, :0]}, "features must be"),
        ({"guidance": lambda x: x[:0]}, "batch size"),
        ({"guidance": lambda x: x.float()}, "guidance holds torch.float32, not levels"),
        ({"scale": _filled}, None),
        ({"scale": lambda x: x * torch.nan}, "scale holds NaN"),
        ({"scale": lambda x: x * 0}, "scale holds 0"),
        ({"scale": lambda x: x[:2]}, r"scale is \(2,\), not a value for each of 3 channels"),
        ({"shift": lambda x: x.double() * 1e40}, "shift holds"),
    ],
)
def test_files_from_anywhere_are_refused_in_one_line(tmp_path, changes, words):
    path = tmp_path / "x.safetensors"
    if words is None:
        assert _reading(None)(path).shape == (1, 7, 75, 101)
        return
    with pytest.raises(ValueError, match=words) as raised:
        _reading(None, **changes)(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_an_upsampler_of_other_settings_is_another_one(tmp_path):
    with pytest.raises(ValueError, match=r"made by a joint_bilateral with radius=1; give that"):
        _reading(upfeat.JointBilateral(radius=2))(tmp_path / "x.safetensors")
    detail = _detail()
    upfeat.UpsampledFeatures(*_inputs(), detail).save(tmp_path / "y.safetensors")
    detail.ridge = 0.5
    with pytest.raises(ValueError, match=r"made by a detail with ridge=0.3"):
        upfeat.UpsampledFeatures.load(tmp_path / "y.safetensors", detail)


def test_files_of_earlier_versions_have_the_defaults_of_later_settings(tmp_path):
    detail, path = _detail(), tmp_path / "x.safetensors"
    upfeat.UpsampledFeatures(*_inputs(), detail).save(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    config = json.loads(facts["upsampler"])
    assert (config.pop("smoothing"), config.pop("least_contrast")) == (0, 0.0)
    save_file(load_file(path), path, facts | {"upsampler": json.dumps(config)})
    assert upfeat.UpsampledFeatures.load(path, detail).shape == (1, 7, 75, 101)
    detail.neighbourhood.least_contrast = 0.045
    with pytest.raises(ValueError, match=r"made by a detail with least_contrast=0.0; give"):
        upfeat.UpsampledFeatures.load(path, detail)


IMAGES = {
    "hdr": lambda: 10 * torch.randn(1, 3, 75, 101),
    "a bright spot": lambda: _filled(1e6)(torch.randn(1, 3, 75, 101)),
    "a large constant": lambda: 1e5 + torch.randn(1, 3, 75, 101),
    "tiny": lambda: 1e-20 * torch.randn(1, 3, 75, 101),
    "constant": lambda: torch.full((1, 3, 75, 101), 7.0),
    "double": lambda: 10 * torch.randn(1, 3, 75, 101, dtype=torch.float64),
    "half": lambda: 10 * torch.randn(1, 3, 75, 101).half(),
    "several": lambda: torch.cat([torch.randn(1, 3, 75, 101), 50 * torch.randn(1, 3, 75, 101)]),
}


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("image", IMAGES)
def test_images_beyond_a_photographs_range_are_kept(tmp_path, image, normalised):
    """Within a thousandth of a channel's deviation, whatever its values are."""
    guidance = IMAGES[image]()
    facts = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} if normalised else {}
    features = torch.randn(len(guidance), 4, 5, 6, dtype=guidance.dtype)
    lazy = upfeat.UpsampledFeatures(features, guidance, upfeat.Bilinear(), **facts)
    for attempt in (lazy, None):  # what was read may be saved again
        attempt = attempt or upfeat.UpsampledFeatures.load(tmp_path / "x.safetensors")
        attempt.save(tmp_path / "x.safetensors")
    again = upfeat.UpsampledFeatures.load(tmp_path / "x.safetensors")
    assert again.guidance.dtype == guidance.dtype
    error = (again.guidance - guidance).abs().amax((0, 2, 3)).double()
    deviation = guidance.double().transpose(0, 1).flatten(1).std(1)
    allowed = 2e-3 * deviation + 2e-7 * guidance.double().abs().amax((0, 2, 3))
    if image == "half":
        allowed += 1e-2  # its own steps
    if image == "tiny" and normalised:
        allowed += 0.51 / 255 / 0.25  # of a photograph, half a level
    assert bool((error <= allowed).all())


def test_features_that_float16_cannot_hold_are_refused(tmp_path):
    guidance = torch.randn(1, 3, 20, 20)
    path = tmp_path / "x.safetensors"
    for factor, words in ((1e6, r"overflows? (torch\.)?float16"), (1e-9, "too small for float16")):
        features = factor * torch.randn(1, 4, 5, 6)
        lazy = upfeat.UpsampledFeatures(features, guidance, upfeat.Bilinear())
        out = torch.empty(1, 2, 20, 20, dtype=torch.float16)
        for store in (
            lambda: lazy.save(path),  # noqa: B023
            lambda: lazy.full(torch.float16),  # noqa: B023
            lambda: lazy.project(torch.eye(4)[:2], out=out),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=words):
                store()
        assert not path.exists()
        lazy.save(path, exact=True)
        assert torch.equal(upfeat.UpsampledFeatures.load(path).features, features)
        path.unlink()
    lazy.features.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="features holds NaN"):
        lazy.save(path, exact=True)
    assert not path.exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_used_features_can_be_copied(lazy, copied, mode):
    with mode():
        features, guidance = (one.clone() for one in (lazy.features, lazy.guidance))
        used = upfeat.UpsampledFeatures(features, guidance, lazy.upsampler)
        used.crop(3, 4, 20, 30)
        used.at(torch.tensor([[1.5, 2.5]]))
        expected = used.full()
        again = copied(used)
        assert again.features is not used.features
        close(again.full(), expected)
        close(again.crop(3, 4, 20, 30), expected[..., 3:23, 4:34])
        # A copy is one of the features as they are, and goes its own way.
        used.features.mul_(2)
        close(copied(used).full(), used.full())
        close(again.full(), expected)


def test_a_copy_carries_no_graph():
    features, guidance = _inputs()
    features = features.requires_grad_() * 2
    lazy = upfeat.UpsampledFeatures(features, guidance, upfeat.Bilinear())
    lazy.crop(0, 0, 3, 3)
    assert not copy.deepcopy(lazy).full().requires_grad
    assert lazy.full().requires_grad


def test_numbers_of_another_kind_are_refused(lazy):
    for window in [(1.5, 0, 2, 2), (True, 0, 2, 2), ("1", 0, 2, 2), (0, 0, 2, float("nan"))]:
        with pytest.raises(ValueError, match="must be a whole number"):
            lazy.crop(*window)
    assert lazy.crop(torch.tensor(1), 2.0, 3, 4).shape == (1, 7, 3, 4)
    with pytest.raises(ValueError, match=r"points is torch.bool"):
        lazy.at(torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"points is torch.complex64"):
        lazy.at(torch.zeros(1, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="points must lie"):
        lazy.at(torch.tensor([[torch.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"weight is torch.int64"):
        lazy.project(torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight holds NaN"):
        lazy.project(torch.full((2, 7), torch.nan))
    with pytest.raises(ValueError, match="bias holds NaN"):
        lazy.project(torch.ones(2, 7), torch.full((2,), torch.inf))
    with pytest.raises(ValueError, match="target holds NaN"):
        lazy.similarity(torch.full((7,), torch.nan))
    for dtype in (torch.int32, torch.bool, torch.complex64, "float16"):
        with pytest.raises(ValueError, match="dtype="):
            lazy.full(dtype)
    for k in (1.5, True, "2", 8):
        with pytest.raises(ValueError, match="k="):
            lazy.pca(k)


def test_an_overflow_of_the_whole_map_is_said():
    features, guidance = _inputs()
    lazy = upfeat.UpsampledFeatures(1e5 * features, guidance, upfeat.Bilinear())
    with pytest.raises(ValueError, match=r"overflows torch.float16"):
        lazy.full(torch.float16)
    assert torch.isfinite(lazy.full(torch.bfloat16)).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("which", ["features", "guidance"])
def test_inputs_must_be_floating(lazy, dtype, which):
    inputs = dict(zip(("features", "guidance"), _inputs(), strict=True))
    inputs[which] = inputs[which].abs().to(dtype)
    with pytest.raises(ValueError, match=rf"{which} is {dtype}; give floating"):
        lazy.upsampler(*inputs.values())
    with pytest.raises(ValueError, match=rf"{which} is {dtype}; give floating"):
        upfeat.UpsampledFeatures(*inputs.values(), lazy.upsampler)


@pytest.mark.parametrize(
    "size", [(True, 3), ("3", 3), (3, 10**30), (10**9, 3), (2.5, 3), (float("nan"), 3), 3, (3,)]
)
def test_output_sizes(lazy, size):
    with pytest.raises(ValueError, match="output_size="):
        lazy.upsampler(lazy.features, lazy.guidance, size)


def test_bad_arguments_are_named(lazy):
    for window in [(-1, 0, 2, 2), (0, 0, 76, 2), (0, 0, 0, 2), (0, 100, 1, 2)]:
        with pytest.raises(ValueError, match="does not lie in"):
            lazy.crop(*window)
    with pytest.raises(ValueError, match="points must lie"):
        lazy.at(torch.tensor([[75.0, 0.0]]))
    with pytest.raises(ValueError, match=r"points must be \(N, 2\)"):
        lazy.at(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"weight must be \(K, 7\)"):
        lazy.project(torch.ones(2, 3))
    with pytest.raises(ValueError, match="target must be"):
        lazy.similarity(torch.ones(3))
    with pytest.raises(ValueError, match="k=0"):
        lazy.pca(0)


def test_several_images():
    lazy = upfeat.UpsampledFeatures(
        torch.randn(2, 3, 2, 2), torch.randn(2, 3, 20, 30), create_upsampler("bilinear")
    )
    assert lazy.crop(3, 4, 5, 6).shape == (2, 3, 5, 6)
    with pytest.raises(ValueError, match="takes one image"):
        lazy.at(torch.zeros(1, 2))
