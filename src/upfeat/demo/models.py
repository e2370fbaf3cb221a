"""The backbones and upsamplers that a page offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from upfeat.backbones import Backbone, load_backbone
from upfeat.model import DEFAULT_BACKBONE, FeatUp, load
from upfeat.text import TextBackbone, load_text_backbone
from upfeat.upsamplers import Upsampler, create_upsampler

if TYPE_CHECKING:
    import torch

BACKBONES = (DEFAULT_BACKBONE, "efficientnet_lite0.stride8", "efficientnet_lite0.stride32")
UPSAMPLERS = ("detail", "neighbourhood", "jbu_stack", "joint_bilateral", "bicubic", "bilinear")


class Models:
    """Models by the names of a backbone and an upsampler; each is loaded once.

    Attributes:
        backbones: names offered, the first one preselected.
        upsamplers: likewise; files stand behind the names.
    """

    def __init__(
        self,
        backbones: Sequence[str] = (),
        upsamplers: Sequence[str] = (),
        *,
        text_backbone: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Load what the user named, so that mistakes show before the page does.

        Args:
            backbones: offered beside the embedded ones, the first of them preselected.
            upsamplers: likewise: folders that ``save_pretrained`` wrote, or published checkpoints.
            text_backbone: "hf:ID-OR-FOLDER" or "open_clip:NAME/TAG", a CLIP or SigLIP, with which
                the page answers texts.
            device: where they run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: one cannot be loaded.
        """
        texts = [] if text_backbone is None else [text_backbone]
        self._text_backbones = frozenset(texts)
        self.backbones = list(dict.fromkeys([*backbones, *texts, *BACKBONES]))
        self.upsamplers = list(dict.fromkeys([*upsamplers, *UPSAMPLERS]))
        self._device = device
        self._networks: dict[str, Backbone] = {}
        self._upsamplers: dict[tuple[str, str], Upsampler] = {}
        for name in [*backbones, *texts] or self.backbones[:1]:
            self._network(name)
        for name in [*upsamplers]:
            self(self.backbones[0], name)

    def __call__(self, backbone: str, upsampler: str) -> FeatUp:
        """Return a model.

        Raises:
            ValueError: one of the names is not offered, or the two do not fit.
        """
        for label, name, offered in (
            ("backbone", backbone, self.backbones),
            ("upsampler", upsampler, self.upsamplers),
        ):
            if name not in offered:
                raise ValueError(f"{label}={name!r} is not offered; choose one of the list")
        network = self._network(backbone)
        key = backbone, upsampler
        if key not in self._upsamplers:
            made = create_upsampler(upsampler, network.embed_dim, backbone=network.name)
            self._upsamplers[key] = load(network, upsampler=made, device=self._device).upsampler
        return FeatUp(network, self._upsamplers[key])

    def has_texts(self, backbone: str) -> bool:
        """True where texts can be held against a backbone's features."""
        return isinstance(self._networks.get(backbone), TextBackbone)

    def _network(self, name: str) -> Backbone:
        if name not in self._networks:
            if name in self._text_backbones:
                self._networks[name] = load_text_backbone(name)
            else:
                self._networks[name] = load_backbone(name)
        return self._networks[name]
