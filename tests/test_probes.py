"""Heads before upsampling, sampling, and what the fits converge to."""

import pytest
import torch

import upfeat
from upfeat.evaluation.data.prepared import named_generator
from upfeat.evaluation.tasks.seg import upsample_probabilities
from upfeat.probes import (
    LinearProbe,
    Pixels,
    draw_pixels,
    fit_classifier,
    fit_depth,
    fit_normals,
    read_cells,
    read_pixels,
)
from upfeat.upsamplers import create_upsampler


def _case(name):
    torch.manual_seed(0)
    upsampler = create_upsampler(name)
    features, guidance = torch.randn(1, 5, 4, 6), torch.randn(1, 3, 32, 48)
    return upsampler, features, guidance, LinearProbe(torch.randn(7, 5), torch.randn(7))


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "joint_bilateral"])
@torch.no_grad()
def test_upsampled_logits_are_logits_of_upsampled_features(name):
    upsampler, features, guidance, head = _case(name)
    logits = torch.einsum("kc,bchw->bkhw", head.weight, features) + head.bias[:, None, None]
    lazy = upfeat.UpsampledFeatures(features, guidance, upsampler)
    found = lazy.project(head.weight, head.bias)
    torch.testing.assert_close(found, lazy.kernels(logits), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_upsampled_probabilities_stay_probabilities_under_convex_weights():
    upsampler, features, guidance, _ = _case("joint_bilateral")
    head = LinearProbe(torch.randn(6, 5), torch.randn(6))
    kernels = upsampler.prepare(guidance, (4, 6), (32, 48))
    maps = upsample_probabilities(kernels, features, head, 3).view(2, 3, 32, 48)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 32, 48))
    assert (maps >= 0).all()


@torch.no_grad()
def test_cells_are_what_nearest_reads():
    upsampler, features, guidance, _ = _case("nearest")
    upsampled = upsampler(features, guidance)[0]
    places = torch.arange(32 * 48)
    expected = read_pixels(upsampled, places)
    assert torch.equal(read_cells(features[0], places, (32, 48)), expected)


def test_only_usable_pixels_are_drawn():
    usable = torch.zeros(6, 7, dtype=torch.bool)
    usable[2, 3] = usable[5, 1] = True
    places = draw_pixels(usable, 50, torch.Generator().manual_seed(0))
    assert set(places.tolist()) == {2 * 7 + 3, 5 * 7 + 1}
    again = draw_pixels(usable, 50, torch.Generator().manual_seed(0))
    assert torch.equal(places, again)


def test_generators_differ_by_seed_and_name():
    draws = [
        torch.rand(4, generator=named_generator(seed, name)).tolist()
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3] != draws[0]


def _classification(n_images=20, n_pixels=30):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(n_images, n_pixels, 4, generator=generator) * torch.tensor(
        [1, 100, 0.01, 1]
    )
    features += torch.tensor([5, 0, 1, -200])
    noisy = features[..., 0] - 5 + features[..., 1] / 100
    targets = (noisy > 0).long() + (noisy > 1).long()
    return Pixels(features, targets)


def test_classifier_learns_whatever_the_scale_of_features():
    pixels = _classification()
    head = fit_classifier(pixels, 3, torch.Generator().manual_seed(0))
    right = head(pixels.features.flatten(0, 1)).argmax(1) == pixels.targets.flatten()
    assert right.float().mean() > 0.95


def test_classifier_against_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    pixels = _classification()
    head = fit_classifier(pixels, 3, torch.Generator().manual_seed(0))
    flat, targets = pixels.features.flatten(0, 1), pixels.targets.flatten()
    scaled = ((flat - flat.mean(0)) / flat.std(0, correction=0)).numpy()
    # The weakest penalty is best for clean classes: 1e-4/2·|W|² beside the mean is C = 1/(n·1e-4).
    reference = linear_model.LogisticRegression(C=1 / (len(scaled) * 1e-4), max_iter=5000)
    probabilities = reference.fit(scaled, targets.numpy()).predict_proba(scaled)
    found = head(flat).softmax(1)
    torch.testing.assert_close(found, torch.from_numpy(probabilities).float(), rtol=0.05, atol=0.02)


def test_depth_probe_ignores_scale_and_shift_of_images():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 40, 5, generator=generator)
    truth = features @ torch.tensor([1.0, -2, 0, 0.5, 0])
    scale = torch.rand(20, 1, generator=generator) * 10 + 0.1
    shift = torch.randn(20, 1, generator=generator) * 100
    head = fit_depth(Pixels(features, truth * scale + shift), generator)
    predicted = head(features.flatten(0, 1)).view(20, 40)
    for row, expected in zip(predicted, truth, strict=True):
        assert torch.corrcoef(torch.stack([row, expected]))[0, 1] > 0.999


def test_one_image_is_enough_to_fit():
    pixels = _classification(1, 200)
    head = fit_classifier(pixels, 3, torch.Generator().manual_seed(0))
    assert torch.isfinite(head.weight).all()


def drawn(images=3, pixels=8, channels=4):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, pixels, channels, generator=generator)
    return features, torch.randint(3, (images, pixels), generator=generator)


FEATURES, CLASSES = drawn()


@pytest.mark.parametrize(
    ("features", "targets", "words"),
    [
        (FEATURES, CLASSES[:2], r"features are \(3, 8, 4\) and targets \(2, 8\); give \(N, P, C\)"),
        (FEATURES[0], CLASSES[0], r"features are \(8, 4\)"),
        (FEATURES[:0], CLASSES[:0], "a pixel of an image at least"),
        (FEATURES.long(), CLASSES, "features are torch.int64; give floating numbers"),
        (FEATURES * torch.inf, CLASSES, "features hold NaN or infinity; leave such pixels out"),
        (FEATURES, CLASSES + 1, "targets are from 1 to 3; give classes 0 to 2"),
        (FEATURES, CLASSES - 1, "targets are from -1 to 1; give classes 0 to 2"),
    ],
)
def test_pixels_that_no_head_can_be_fitted_on(features, targets, words):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=words):
        fit_classifier(Pixels(features, targets), 3, generator)
    if "classes" not in words:
        with pytest.raises(ValueError, match=words):
            fit_depth(Pixels(features, targets.float()), generator)


def test_of_no_usable_pixel_none_is_drawn():
    with pytest.raises(ValueError, match="no pixel is usable"):
        draw_pixels(torch.zeros(3, 4, dtype=torch.bool), 2, torch.Generator())


def test_depths_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="targets hold NaN"):
        fit_depth(Pixels(FEATURES, CLASSES * torch.nan), torch.Generator())


@pytest.mark.parametrize("features", [FEATURES * 0 + 1, FEATURES * 1e-30, FEATURES * 1e30])
def test_features_of_any_size_give_finite_heads(features):
    for head in (
        fit_classifier(Pixels(features, CLASSES), 3, torch.Generator().manual_seed(0)),
        fit_classifier(Pixels(features, CLASSES * 0), 3, torch.Generator().manual_seed(0)),
        fit_depth(Pixels(features, CLASSES.float()), torch.Generator().manual_seed(0)),
    ):
        assert torch.isfinite(head.weight).all()
        assert torch.isfinite(head.bias).all()
        assert torch.isfinite(head(features.flatten(0, 1))).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-3, 1e9])
def test_the_unit_of_features_does_not_matter(scale):
    torch.manual_seed(0)
    features = torch.randn(4, 50, 6)
    targets = (features[..., 0] > 0).long()
    units = torch.ones(6)
    units[::2] = scale
    head = fit_classifier(Pixels(features * units, targets), 2, torch.Generator().manual_seed(0))
    found = head((features * units).flatten(0, 1)).argmax(1)
    assert (found == targets.flatten()).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_16_bits_are_taken(dtype):
    torch.manual_seed(0)
    features = torch.randn(4, 50, 6).to(dtype)
    targets = (features[..., 0] > 0).long()
    head = fit_classifier(Pixels(features, targets), 2, torch.Generator().manual_seed(0))
    assert (head(features.float().flatten(0, 1)).argmax(1) == targets.flatten()).all()


def test_fits_run_in_inference_mode():
    with torch.inference_mode():
        features = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(0))
        depth = features[..., 0] + 0.1 * features[..., 1]
        normals = torch.nn.functional.normalize(features[..., :3], dim=2)
        depths = fit_depth(Pixels(features, depth), torch.Generator().manual_seed(0))
        fit_normals(Pixels(features, normals), torch.Generator().manual_seed(0))
    again = fit_depth(Pixels(features.clone(), depth.clone()), torch.Generator().manual_seed(0))
    assert torch.equal(depths.weight, again.weight)


def test_classes_are_whole_numbers():
    features, targets = torch.randn(2, 9, 3), torch.full((2, 9), 0.5)
    with pytest.raises(ValueError, match=r"from 0\.5 to 0\.5; give classes 0 to 1, whole numbers"):
        fit_classifier(Pixels(features, targets), 2, torch.Generator())
    with pytest.raises(ValueError, match="n_classes=0 must be 1 or more"):
        fit_classifier(Pixels(features, targets), 0, torch.Generator())


@pytest.mark.parametrize("types", [("float64", "float32"), ("float32", "float64")])
def test_targets_of_other_types_than_the_features_are_taken(types):
    features, targets = (torch.randn(3, 20, 3).to(getattr(torch, kind)) for kind in types)
    for fit, given in ((fit_depth, targets[..., 0]), (fit_normals, targets)):
        head = fit(Pixels(features, given), torch.Generator())
        assert head.weight.dtype == features.dtype
        equal = fit(Pixels(features, given.to(features)), torch.Generator())
        assert torch.equal(head.weight, equal.weight)


def test_what_is_no_pixels_is_refused_by_name():
    pixels, generator = Pixels(torch.randn(3, 9, 4), torch.zeros(3, 9)), torch.Generator()
    fits = (lambda *given: fit_classifier(given[0], 2, given[1])), fit_depth
    for fit in (*fits, fit_normals):
        with pytest.raises(TypeError, match=r"^pixels is of type Tensor; give Pixels\("):
            fit(pixels.features, generator)
        with pytest.raises(TypeError, match=r"^generator is of type int; give torch\.Generator"):
            fit(pixels, 0)
    elsewhere = Pixels(pixels.features, pixels.targets.to("meta"))
    with pytest.raises(ValueError, match=r"^features are on cpu and targets on meta; move"):
        fit_depth(elsewhere, generator)


def test_pixels_of_one_image_are_read():
    upsampled, places = torch.randn(4, 8, 9), torch.tensor([0, 5])
    for label, read in (
        ("upsampled", read_pixels),
        ("features", lambda maps, places: read_cells(maps, places, (16, 18))),
    ):
        with pytest.raises(ValueError, match=rf"^{label} must be .*4, 8, 9\); give {label}\[0\]"):
            read(upsampled[None], places)
        with pytest.raises(TypeError, match=f"^{label} is of type ndarray; give a tensor"):
            read(upsampled.numpy(), places)
        with pytest.raises(TypeError, match=r"^places is of type list; give a tensor"):
            read(upsampled, [0, 5])
        for wrong in (places.float(), places[None]):
            with pytest.raises(ValueError, match=r"^places are torch.*; give .* indices"):
                read(upsampled, wrong)
    with pytest.raises(ValueError, match=r"^size=8 must be"):
        read_cells(upsampled, places, 8)


def test_pixels_are_drawn_from_a_mask():
    usable, generator = torch.ones(4, 5, dtype=torch.bool), torch.Generator()
    with pytest.raises(TypeError, match=r"^usable is of type ndarray; give a tensor"):
        draw_pixels(usable.numpy(), 3, generator)
    for wrong in (usable[None], usable.float()):
        with pytest.raises(ValueError, match=r"^usable is torch.*; give \(H, W\) bool"):
            draw_pixels(wrong, 3, generator)
    with pytest.raises(ValueError, match=r"^count=-1 must be 0 or more"):
        draw_pixels(usable, -1, generator)
    with pytest.raises(TypeError, match=r"^generator is of type int; give"):
        draw_pixels(usable, 3, 0)
