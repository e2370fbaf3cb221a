"""Methods, the common interface through which tasks score all kinds of upsampling."""

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
from upfeat.translation import shipped_translation
from upfeat.upsamplers import Upsampler


class Method(ABC):
    """A computation of features at image size from a prepared image and its coarse features.

    Attributes:
        weights: digest of the method's weights, for results.
        identity: name of everything that the method's features depend on; stored rows are reused
            only for the same identity.
        passes: number of the backbone's passes over an image, the pass for the coarse features
            included; ``None`` for many.
        before: backbone whose pass over the image the method leaves out, because it starts from
            coarse features; ``None`` for a method that starts from the image.
    """

    weights: str
    identity: str
    passes: float | None = 1
    before: Backbone | None = None

    @abstractmethod
    def __call__(self, sample: Prepared) -> FeatureMap:
        """Return a feature map (1, C, H, W) of the image's size."""

    def fresh(self) -> Method:
        """Return the method without cached results, so that its cost can be measured."""
        return self


class UpsamplerMethod(Method):
    """One pass of an upsampler over coarse features."""

    def __init__(self, upsampler: Upsampler, backbone: Backbone) -> None:
        """Prepare an upsampler for one backbone.

        Args:
            upsampler: upsampler to use; it is put in eval mode, frozen, and moved to the backbone's
                device.
            backbone: backbone of the coarse features.
        """
        self.upsampler = upsampler.eval().requires_grad_(False).to(backbone.mean.device)
        self.backbone = self.before = backbone
        self.weights, self.identity = digest(upsampler), identify_upsampler(upsampler)

    def __call__(self, sample: Prepared) -> UpsampledFeatures:
        """See :meth:`Method.__call__`."""
        image = normalised(sample.image, self.backbone)
        guidance = self.upsampler.guidance_from(image, self.backbone)
        return UpsampledFeatures(sample.features[None], guidance, self.upsampler)


class ImplicitMethod(Method):
    """A fit to every image, cached on disk, so that an image is never fitted twice."""

    NAME = "implicit"
    passes = None  # one for each view of a fit
    CODE = "upfeat.implicit.fit"

    def __init__(
        self, backbone: Backbone, config: FitConfig | None = None, cache: Path | None = None
    ) -> None:
        """Prepare fits with one backbone.

        Args:
            backbone: backbone whose features are fitted.
            config: settings of the fits, of which ``size`` is ignored; ``None`` for the defaults.
            cache: folder in which fits are cached, created if need be; ``None`` for no cache.
        """
        self.backbone, self.config, self.cache = backbone, config or FitConfig(), cache
        parts = (backbone.name, digest(backbone), asdict(self.config), source_digest(self.CODE))
        known = hashlib.sha256(
            "|".join(map(str, (*parts, *map(digest, shipped_models(backbone))))).encode()
        )
        for kind in ("views", "translation"):
            for tensor in shipped_translation(backbone, kind) or ():
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
        except (FileNotFoundError, ValueError):  # no file yet, or a file of another version
            features = fit_guidance(image, self.backbone, self.config)
        self.cache.mkdir(parents=True, exist_ok=True)
        features.save(path)
        return features
