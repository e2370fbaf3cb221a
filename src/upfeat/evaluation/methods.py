"""Methods: every way from an image's coarse features to a feature map, alike to every task."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path

from upfeat.backbones import Backbone
from upfeat.evaluation.data.prepared import Prepared, normalised
from upfeat.feature_map import FeatureMap
from upfeat.features import UpsampledFeatures
from upfeat.implicit.features import ImplicitFeatures, fingerprint
from upfeat.implicit.fit import FitConfig, fit_guidance
from upfeat.implicit.one_pass import shipped_models
from upfeat.provenance import digest, identify_upsampler, source_digest
from upfeat.scales import shipped_translation
from upfeat.upsamplers import Upsampler


class Method(ABC):
    """A way from a prepared image and its coarse features to features of its size.

    Attributes:
        weights: name of its weights, for results.
        identity: name for all that decides what it gives, for rows that are kept.
        passes: of the backbone over an image, those that the coarse features took included.
    """

    weights: str
    identity: str
    passes: float | None = 1

    @abstractmethod
    def __call__(self, sample: Prepared) -> FeatureMap:
        """Features (1, C, H, W) at the image's own size."""

    def fresh(self) -> Method:
        """The same without anything kept from before, so that its cost can be measured."""
        return self


class UpsamplerMethod(Method):
    """One pass of an upsampler."""

    def __init__(self, upsampler: Upsampler, backbone: Backbone) -> None:
        """Prepare an upsampler for one backbone.

        Args:
            upsampler: put in eval mode, frozen, and moved to the backbone's device.
            backbone: makes the features.
        """
        self.upsampler = upsampler.eval().requires_grad_(False).to(backbone.mean.device)
        self.backbone = backbone
        self.weights, self.identity = digest(upsampler), identify_upsampler(upsampler)

    def __call__(self, sample: Prepared) -> UpsampledFeatures:
        """See :meth:`Method.__call__`."""
        image = normalised(sample.image, self.backbone)
        guidance = self.upsampler.guidance_from(image, self.backbone)
        return UpsampledFeatures(sample.features[None], guidance, self.upsampler)


class ImplicitMethod(Method):
    """A fit to every image, kept on disk so that repetitions and interruptions cost nothing."""

    NAME = "implicit"
    passes = None  # as many as the fit has views
    CODE = "upfeat.implicit.fit"

    def __init__(
        self, backbone: Backbone, config: FitConfig | None = None, cache: Path | None = None
    ) -> None:
        """Choose what to fit with.

        Args:
            backbone: makes the features.
            config: of the fits; their ``size`` plays no part.
            cache: folder for fits, made if need be; ``None`` for none.
        """
        self.backbone, self.config, self.cache = backbone, config or FitConfig(), cache
        parts = (backbone.name, digest(backbone), asdict(self.config), source_digest(self.CODE))
        known = hashlib.sha256(
            "|".join(map(str, (*parts, *map(digest, shipped_models())))).encode()
        )
        for tensor in shipped_translation(backbone, "views") or ():
            known.update(tensor.numpy().tobytes())
        self.weights = known.hexdigest()
        self.identity = f"{self.NAME}|{self.weights}"

    def fresh(self) -> ImplicitMethod:
        """See :meth:`Method.fresh`."""
        return ImplicitMethod(self.backbone, self.config)

    def __call__(self, sample: Prepared) -> ImplicitFeatures:
        """See :meth:`Method.__call__`."""
        image = sample.image.cpu()
        if self.cache is None:
            return fit_guidance(image, self.backbone, self.config)
        key = hashlib.sha256(f"{fingerprint(image)}|{self.weights}".encode()).hexdigest()[:32]
        path = self.cache / f"implicit-{key}.safetensors"
        try:
            return ImplicitFeatures.load(path)
        except (FileNotFoundError, ValueError):  # not there yet, or left by another version
            features = fit_guidance(image, self.backbone, self.config)
        self.cache.mkdir(parents=True, exist_ok=True)
        features.save(path)
        return features
