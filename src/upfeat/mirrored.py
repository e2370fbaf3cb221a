"""Mean features of an image and of its mirror image, for two passes of the backbone."""

from __future__ import annotations

from torch import Tensor

from upfeat.backbones import Backbone, OuterBackbone


class Mirrored(OuterBackbone):
    """A backbone whose features are those of the image and of its mirror image, averaged.

    Networks do not treat an image and its mirror image alike: features of the two, mirrored back,
    differ by three quarters of the features' variance (EfficientNet-Lite0, photographs of 224
    pixels). Most of the difference is noise to whatever reads the features, and the mean has half
    of its variance. Early layers are averaged too.

    Attributes:
        backbone: the backbone that is applied twice.
        passes: cost, in passes of the innermost backbone over the image.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Wrap a backbone.

        Args:
            backbone: any backbone; aligned, if at all, before it is wrapped.
        """
        super().__init__(backbone, suffix=".mirrored")
        self.passes = 2 * getattr(backbone, "passes", 1)

    def aligned(self, displacement: int) -> Mirrored:
        """See :meth:`Backbone.aligned`; the inner backbone is aligned."""
        return Mirrored(self.backbone.aligned(displacement))

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return (self.backbone(x) + self.backbone(x.flip(3)).flip(3)) / 2

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Backbone.extract_with_hidden`."""
        features, hidden = self.backbone.with_hidden(x)
        mirrored, mirrored_hidden = self.backbone.with_hidden(x.flip(3))
        features = (features + mirrored.flip(3)) / 2
        if hidden is None or mirrored_hidden is None:
            return features, None
        return features, (hidden + mirrored_hidden.flip(3)) / 2
