"""Implicit features where an upsampler is expected: each guidance is fitted when it is met."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.implicit.features import ImplicitFeatures, fingerprint
from upfeat.implicit.fit import FitConfig, fit_guidance
from upfeat.types import Size, Window
from upfeat.upsamplers.base import Upsampler


class ImplicitKernels:
    """One image's fit. Not linear in the coarse features: those are not looked at."""

    def __init__(self, features: ImplicitFeatures, output_size: Size) -> None:
        """Keep the fit and the size of the map."""
        self.features = features
        self.output_size = output_size

    def __call__(self, features: Tensor) -> Tensor:
        """The map, (1, C, H, W); ``features`` (1, C, h, w) only say how many channels they have.

        Raises:
            ValueError: they have another number, as after a head: use :meth:`project`.
        """
        self._check(features)
        return self.features.render(self.output_size)

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """A window of the map, (1, C, window.height, window.width)."""
        self._check(features)
        return self.features.crop(*window, output_size=self.output_size)

    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear head (K, C), (K,) applied to the map: (1, K, H, W)."""
        return self.features.project(weight, bias, output_size=self.output_size)

    def _check(self, features: Tensor) -> None:
        if features.shape[0] != 1 or features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"features must be (1, {self.features.shape[1]}, h, w), got "
                f"{tuple(features.shape)}; apply heads with project()"
            )


class ImplicitUpsampler(Upsampler):
    """Fits every image it is given, and keeps the results.

    An image is known by its pixels; fits are kept as files where a folder for them is given, so
    that repetitions and interrupted runs cost nothing.
    """

    name = "implicit"
    linear = False

    def __init__(
        self, backbone: Backbone, config: FitConfig | None = None, cache: Path | None = None
    ) -> None:
        """Choose what to fit with.

        Args:
            backbone: that the features come from.
            config: of the fits; their ``size`` plays no part.
            cache: folder for fits, made if need be; ``None`` keeps the last one only.
        """
        super().__init__()
        # Not registered: the weights of the backbone are no part of the upsampler's.
        self._backbone = (backbone,)
        self.fit_config = config or FitConfig()
        self.cache = cache
        self._last: tuple[str, ImplicitFeatures] | None = None
        state = sorted(backbone.state_dict().items())
        weights = hashlib.sha256(f"{backbone.name}|{asdict(self.fit_config)}".encode())
        for key, value in state:
            weights.update(key.encode())
            weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self._recipe = weights.hexdigest()

    def config(self) -> dict[str, Any]:
        """Settings of the fits and a digest of the backbone, as JSON values."""
        return {"fit": json.loads(json.dumps(asdict(self.fit_config))), "recipe": self._recipe}

    def uncached(self) -> ImplicitUpsampler:
        """The same, without results: what it does then shows what a fit costs."""
        return ImplicitUpsampler(self._backbone[0], self.fit_config)

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> ImplicitKernels:
        """Fit the image, or find it fitted.

        Args:
            guidance: (1, 3, H, W) normalised image; 8-bit colours.
            grid_size: of the features; plays no part.
            output_size: (height, width) of the map.
            features: play no part.

        Raises:
            ValueError: more than one image.
        """
        if guidance.shape[0] != 1:
            raise ValueError(
                f"guidance must be one image, got {guidance.shape[0]}; give one by one"
            )
        (backbone,) = self._backbone
        pixels = (backbone.denormalize(guidance)[0] * 255).round().to(torch.uint8).cpu()
        key = hashlib.sha256(f"{fingerprint(pixels)}|{self._recipe}".encode()).hexdigest()[:32]
        if self._last is None or self._last[0] != key:
            self._last = key, self._fit(pixels, key)
        return ImplicitKernels(self._last[1], output_size)

    def _fit(self, pixels: Tensor, key: str) -> ImplicitFeatures:
        (backbone,) = self._backbone
        if self.cache is None:
            return fit_guidance(pixels, backbone, self.fit_config)
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"implicit-{key}.safetensors"
        if path.is_file():
            try:
                return ImplicitFeatures.load(path)
            except ValueError:
                pass  # left by another version; fitted again
        features = fit_guidance(pixels, backbone, self.fit_config)
        features.save(path)
        return features
