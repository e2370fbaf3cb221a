"""Features of pixels as a transformer of scikit-learn, usable by viewers' plug-ins too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upfeat.bounds import shown, whole
from upfeat.features import UpsampledFeatures
from upfeat.linear import leading_axes
from upfeat.loading import load
from upfeat.model import FeatUp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upfeat.images import ImageLike


class PixelFeatures:
    """A few features of every pixel, for classifiers of rows of numbers.

    ``fit`` computes the principal components of the backbone's features over some images, and
    ``transform`` the coordinates of every pixel in these components. Features are projected before
    upsampling: the result is the same, and only ``n_components`` channels are upsampled.
    scikit-learn is not required, but its pipelines, ``clone`` and searches accept this class.

    Attributes:
        components_: (k, C) principal components after ``fit``, orthonormal, most variance first.
        mean_: (C,) mean of the features.
        explained_variance_ratio_: (k,) fraction of the variance along each component.
        n_features_out_: number k of components.

    Example:
        >>> image = np.zeros((32, 48, 3), np.uint8)
        >>> pixels = PixelFeatures(n_components=4, upsampler="bilinear").fit(image)
        >>> pixels.transform(image).shape, pixels.get_features(image).shape
        ((1536, 4), (4, 32, 48))
    """

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        upsampler: Any = None,
        n_components: int | None = 48,
        *,
        size: int | None = None,
        reading: dict[str, Any] | None = None,
    ) -> None:
        """Store the settings unchanged, as scikit-learn requires; ``fit`` checks them.

        Args:
            backbone: backbone for :func:`upfeat.load`, or a :class:`upfeat.FeatUp`.
            upsampler: upsampler for :func:`upfeat.load`.
            n_components: number of components, at most the backbone's channels; ``None`` for all
                channels unchanged, which needs no ``fit``.
            size: shorter side, pixels, to which images are resized for the backbone; the result has
                the image's size all the same. ``None``: not resized.
            reading: options of :func:`upfeat.images.read_image`, such as ``{"max_value": 4095}``.
        """
        self.backbone = backbone
        self.upsampler = upsampler
        self.n_components = n_components
        self.size = size
        self.reading = reading

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings by name, for scikit-learn; ``deep`` has no effect."""
        names = ("backbone", "upsampler", "n_components", "size", "reading")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> PixelFeatures:
        """Change settings; fitted components stay, unless the backbone is another.

        Raises:
            ValueError: there is no such setting.
        """
        known, before = self.get_params(), self.backbone
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"{name}: no setting; use {', '.join(known)}")
            setattr(self, name, value)
        if {"backbone", "upsampler"} & set(params):
            self.__dict__.pop("_model", None)
        if "backbone" in params and self.backbone != before:
            for name in ("components_", "mean_", "explained_variance_ratio_", "n_features_out_"):
                self.__dict__.pop(name, None)
        return self

    def fit(self, X: ImageLike | list[Any], y: object = None) -> PixelFeatures:
        """Compute the principal components of the features over all cells of some images.

        Args:
            X: an image or a list of images of any sizes: paths, arrays (H, W) or (H, W, 3), or PIL
                images.
            y: not used.

        Raises:
            ValueError: an image cannot be read, or ``n_components`` is out of range.
        """
        channels = self.model.embed_dim
        k = channels
        if self.n_components is not None:
            k = min(whole("n_components", self.n_components, 1), channels)
        count, total = 0, torch.zeros(channels, dtype=torch.float64)
        products = torch.zeros(channels, channels, dtype=torch.float64)
        for image in _images(X):
            cells = self._lazy(image).features[0].flatten(1).cpu().double()  # (C, h·w)
            count, total = count + cells.shape[1], total + cells.sum(1)
            products += cells @ cells.T
        mean = total / count
        axes, variances = leading_axes(products / count - mean.outer(mean), k)
        variances = variances.clamp(min=0)
        self.components_ = axes.float().numpy()  # (k, C)
        self.mean_ = mean.float().numpy()
        whole_variance = (products.trace() / count - mean.square().sum()).clamp(min=1e-30)
        self.explained_variance_ratio_ = (variances / whole_variance).numpy()
        self.n_features_out_ = k
        return self

    def transform(self, X: ImageLike | list[Any]) -> NDArray[np.float32]:
        """Compute the features of every pixel.

        Args:
            X: as in :meth:`fit`.

        Returns:
            (pixels, k) float32: a row for each pixel, image after image, in reading order.

        Raises:
            ValueError: ``fit`` was not called, or an image cannot be read.
        """
        rows = [self.get_features(image) for image in _images(X)]
        return np.concatenate([one.reshape(len(one), -1).T for one in rows])

    def fit_transform(self, X: ImageLike | list[Any], y: object = None) -> NDArray[np.float32]:
        """Call :meth:`fit`, then :meth:`transform`."""
        return self.fit(X).transform(X)

    def get_features(self, image: ImageLike) -> NDArray[np.float32]:
        """Compute the features of one image; plug-ins for pixel classification call this method.

        Args:
            image: an image as in :meth:`fit`, or an array with its bands first.

        Returns:
            (k, H, W) float32.

        Raises:
            ValueError: ``fit`` was not called, and ``n_components`` is not ``None``.
        """
        if isinstance(image, np.ndarray) and image.ndim == 3:
            bands = (1, 3, self.model.backbone.in_channels)
            if image.shape[0] in bands and image.shape[2] not in bands:
                image = np.moveaxis(image, 0, 2)
        weight, bias = self._head()
        with torch.inference_mode():
            lazy = self._lazy(image)
            if weight is None:
                return lazy.full()[0].float().cpu().numpy()
            maps = lazy.project(weight.to(lazy.features), bias.to(lazy.features))
            return maps[0].float().cpu().numpy()

    def get_feature_names_out(self, input_features: object = None) -> NDArray[Any]:
        """Return the names of the columns of :meth:`transform`, for scikit-learn."""
        weight, _ = self._head()
        count = self.model.embed_dim if weight is None else len(weight)
        return np.array([f"pixelfeatures{index}" for index in range(count)], object)

    @property
    def model(self) -> FeatUp:
        """Backbone and upsampler, loaded on first use."""
        if "_model" not in self.__dict__:
            given = self.backbone
            self._model = given if isinstance(given, FeatUp) else load(
                given, upsampler=self.upsampler
            )  # fmt: skip
        return self._model

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the backbone, along one side."""
        return self.model.backbone.stride

    def __sklearn_is_fitted__(self) -> bool:
        return self.n_components is None or hasattr(self, "components_")

    def __sklearn_tags__(self) -> Any:
        utils = importlib.import_module("sklearn.utils")
        return utils.Tags(
            estimator_type="transformer",
            target_tags=utils.TargetTags(required=False),
            transformer_tags=utils.TransformerTags(),
            input_tags=utils.InputTags(two_d_array=False, three_d_array=True),
        )

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults."""
        defaults = PixelFeatures().get_params()
        given = {
            name: value
            for name, value in self.get_params().items()
            if type(value) is not type(defaults[name]) or value != defaults[name]
        }
        return (
            f"PixelFeatures({', '.join(f'{name}={shown(value)}' for name, value in given.items())})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A model loaded by name is not pickled: the copy loads it again on first use.
        state = dict(self.__dict__)
        if isinstance(self.backbone, str):
            state.pop("_model", None)
        return state

    def _head(self) -> tuple[Tensor | None, Tensor]:
        if self.n_components is None:
            return None, torch.empty(0)
        if not hasattr(self, "components_"):
            raise ValueError(
                "PixelFeatures is not fitted: call fit(images) first, or give n_components=None "
                "for all channels"
            )
        weight = torch.from_numpy(self.components_)
        return weight, -weight @ torch.from_numpy(self.mean_)

    @torch.inference_mode()
    def _lazy(self, image: Any) -> UpsampledFeatures:
        model, reading = self.model, self.reading or {}
        x = model.preprocess(image, **reading)
        if self.size is None:
            return model.lazy(x)
        small = model.preprocess(image, self.size, **reading)
        return model.lazy(small, (x.shape[2], x.shape[3]))


def _images(X: Any) -> Iterator[Any]:
    """Yield the images of a list or of an array (N, H, W, bands), or a single image."""
    if isinstance(X, list | tuple) or (isinstance(X, np.ndarray) and X.ndim == 4):
        if not len(X):
            raise ValueError("X holds no image; give at least one")
        yield from X
    else:
        yield X
