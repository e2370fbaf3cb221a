"""Pixel features are the principal components of the model's map, and fit into scikit-learn."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upfeat
from upfeat.adapters import PixelFeatures


def network():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 12, 8, 8)


def picture(seed=0, size=(40, 56)):
    rows, columns = np.mgrid[: size[0], : size[1]]
    noise = np.random.default_rng(seed).integers(0, 60, (*size, 3))
    inside = (rows - size[0] / 2) ** 2 + (columns - size[1] / 2) ** 2 < (min(size) / 3) ** 2
    return (noise + np.where(inside[..., None], (150, 90, 30), (20, 60, 120))).astype(np.uint8)


@pytest.mark.parametrize("upsampler", ["bilinear", "detail"])
def test_it_is_the_components_of_the_whole_map(upsampler):
    image = picture()
    pixels = PixelFeatures(network(), upsampler, 5).fit(image)
    found = pixels.transform(image)
    full = pixels.model(pixels.model.preprocess(image))[0].flatten(1).T.numpy()
    expected = (full - pixels.mean_) @ pixels.components_.T
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.allclose(pixels.components_ @ pixels.components_.T, np.eye(5), atol=1e-5)
    assert 0 < pixels.explained_variance_ratio_.sum() <= 1 + 1e-5
    assert (np.diff(pixels.explained_variance_ratio_) <= 1e-6).all()


def test_all_channels_need_no_fit():
    image = picture()
    pixels = PixelFeatures(network(), "bilinear", None)
    expected = pixels.model(pixels.model.preprocess(image))[0].numpy()
    np.testing.assert_allclose(pixels.get_features(image), expected, atol=1e-5)
    assert pixels.fit(image).transform(image).shape == (40 * 56, 12)
    assert pixels.patch_size == 8
    names = PixelFeatures(network(), "bilinear", None).get_feature_names_out()
    assert list(names) == [f"pixelfeatures{index}" for index in range(12)]


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(1, 20))
def test_shapes(height, width, k):
    pixels = PixelFeatures(network(), "bilinear", k)
    images = [picture(0, (height, width)), picture(1, (24, 16))]
    features = pixels.fit(images).transform(images)
    assert features.shape == (height * width + 24 * 16, min(k, 12))
    assert features.dtype == np.float32
    assert pixels.get_features(images[1]).shape == (min(k, 12), 24, 16)
    np.testing.assert_array_equal(
        features[height * width :], pixels.get_features(images[1]).reshape(min(k, 12), -1).T
    )


def test_bands_may_come_first_and_the_backbone_may_see_less():
    image = picture()
    pixels = PixelFeatures(network(), "bilinear", 4).fit([image])
    np.testing.assert_array_equal(
        pixels.get_features(np.moveaxis(image, 2, 0)), pixels.get_features(image)
    )
    small = PixelFeatures(network(), "bilinear", 4, size=24).fit(image)
    assert small.get_features(image).shape == (4, 40, 56)
    deep = image.astype(np.uint16) * 16
    twelve = PixelFeatures(network(), "bilinear", None, reading={"max_value": 4080})
    np.testing.assert_allclose(
        twelve.get_features(deep), pixels.set_params(n_components=None).get_features(image),
        atol=1e-5,
    )  # fmt: skip


def test_scikit_learn_takes_it():
    sklearn = pytest.importorskip("sklearn")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pixels = PixelFeatures(network(), "bilinear", 4)
    copied = sklearn.base.clone(pixels)
    assert copied is not pixels
    assert copied.get_params()["n_components"] == 4
    assert not hasattr(copied, "components_")
    pipeline = make_pipeline(pixels, StandardScaler())
    found = pipeline.fit_transform([picture()])
    np.testing.assert_allclose(found.std(0), 1, atol=1e-3)
    assert list(pixels.get_feature_names_out()) == [f"pixelfeatures{n}" for n in range(4)]


def test_a_random_forest_on_strokes():
    """Two strokes, one for each class, segment the picture and another one of its kind."""
    pytest.importorskip("sklearn")
    from sklearn.ensemble import RandomForestClassifier

    size = (96, 128)
    image, other = picture(0, size), picture(1, size)
    strokes = np.zeros(size, int)
    strokes[40:56, 44:84] = 1
    strokes[2:6, 10:118] = strokes[90:94, 10:118] = strokes[10:86, 8:24] = 2
    pixels = PixelFeatures(n_components=16)
    features = pixels.fit_transform(image)
    labels = strokes.ravel()
    drawn = labels > 0
    forest = RandomForestClassifier(20, random_state=0).fit(features[drawn], labels[drawn])
    rows, columns = np.mgrid[: size[0], : size[1]]
    inside = (rows - 48) ** 2 + (columns - 64) ** 2 < (96 / 3) ** 2
    for one in (image, other):
        found = forest.predict(pixels.transform(one)).reshape(size) == 1
        assert (found == inside).mean() > 0.85


def test_it_is_pickled_without_the_weights_that_a_name_stands_for():
    pixels = PixelFeatures(n_components=3, upsampler="bilinear").fit(picture())
    content = pickle.dumps(pixels)
    assert len(content) < 1e5
    again = pickle.loads(content)
    np.testing.assert_array_equal(again.transform(picture()), pixels.transform(picture()))
    assert repr(again) == "PixelFeatures(upsampler='bilinear', n_components=3)"


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="not fitted"):
        PixelFeatures(network(), "bilinear").transform(picture())
    for wrong in (0, -1, 1.5, "all", True):
        with pytest.raises(ValueError, match=f"n_components={wrong!r}"):
            PixelFeatures(network(), "bilinear", wrong).fit(picture())
    fitted = PixelFeatures(network(), "bilinear", 3).fit(picture())
    for call in (fitted.fit, fitted.transform, fitted.fit_transform):
        for nothing in ([], (), np.zeros((0, 8, 8, 3), np.uint8)):
            with pytest.raises(ValueError, match="holds no image"):
                call(nothing)
    with pytest.raises(ValueError, match="colour: no setting"):
        PixelFeatures().set_params(colour=1)
    model = upfeat.load(network(), upsampler="bilinear")
    assert PixelFeatures(model).model is model


def test_components_of_another_backbone_are_not_used():
    image = np.zeros((32, 48, 3), np.uint8)
    pixels = PixelFeatures("efficientnet_lite0", "bilinear", 2).fit(image)
    pixels.set_params(backbone="efficientnet_lite0", upsampler="nearest")
    assert pixels.transform(image).shape == (32 * 48, 2)
    pixels.set_params(backbone="efficientnet_lite1")  # with as many channels
    with pytest.raises(ValueError, match="is not fitted"):
        pixels.transform(image)
