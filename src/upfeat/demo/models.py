"""Backbones and upsamplers that the page offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.backbones import Backbone, load_backbone
from upfeat.loading import DEFAULT_BACKBONE, load
from upfeat.model import FeatUp
from upfeat.text import TextBackbone, load_text_backbone

if TYPE_CHECKING:
    import torch

BACKBONES = (DEFAULT_BACKBONE, "efficientnet_lite0.stride8", "efficientnet_lite0.stride32")
BEST = "default"
"""Name that the page gives to a backbone's default upsampler."""
UPSAMPLERS = (
    BEST,
    "detail",
    "neighbourhood",
    "jbu_stack",
    "joint_bilateral",
    "bicubic",
    "bilinear",
)


class Models:
    """Models by the names of a backbone and an upsampler, each of which is loaded once.

    Attributes:
        backbones: names of the offered backbones; the first is preselected.
        upsamplers: names or paths of the offered upsamplers; the first is preselected.
    """

    def __init__(
        self,
        backbones: Sequence[str] = (),
        upsamplers: Sequence[str] = (),
        *,
        text_backbone: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Load the models that the user named, so that errors show before the page opens.

        Args:
            backbones: names of backbones to offer before the embedded ones.
            upsamplers: upsamplers to offer before the built-in ones: folders that
                ``save_pretrained`` wrote, or published checkpoints.
            text_backbone: a CLIP or SigLIP, "hf:ID-OR-FOLDER" or "open_clip:NAME/TAG", to offer
                for searches by text.
            device: device of the models; ``None`` for the CPU.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a model cannot be loaded, or there is no such device.
        """
        texts = [] if text_backbone is None else [text_backbone]
        self._text_backbones = frozenset(texts)
        self.backbones = list(dict.fromkeys([*backbones, *texts, *BACKBONES]))
        self.upsamplers = list(dict.fromkeys([*upsamplers, *UPSAMPLERS]))
        self._device = device
        self._networks: dict[str, Backbone] = {}
        self._models: dict[tuple[str, str], FeatUp] = {}
        for name in [*backbones, *texts]:
            self._network(name)
        for name in dict.fromkeys([self.upsamplers[0], *upsamplers]):
            self(self.backbones[0], name)

    def __call__(self, backbone: str, upsampler: str) -> FeatUp:
        """Return the model of a backbone and an upsampler.

        Raises:
            ValueError: a name is not offered, or the upsampler does not fit the backbone.
        """
        for label, name, offered in (
            ("backbone", backbone, self.backbones),
            ("upsampler", upsampler, self.upsamplers),
        ):
            if name not in offered:
                raise ValueError(f"{label}={name!r} is not offered; choose one of the list")
        network = self._network(backbone)
        key = backbone, upsampler
        if key not in self._models:
            named = None if upsampler == BEST else upsampler
            self._models[key] = load(network, upsampler=named, device=self._device)
        return self._models[key]

    def has_texts(self, backbone: str) -> bool:
        """Return whether a loaded backbone can compare its features with texts."""
        return isinstance(self._networks.get(backbone), TextBackbone)

    def _network(self, name: str) -> Backbone:
        if name not in self._networks:
            if name in self._text_backbones:
                self._networks[name] = load_text_backbone(name)
            else:
                self._networks[name] = load_backbone(name)
        return self._networks[name]


def offered(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return names as a menu lists them, each with itself: paths without folders where possible."""
    short = [_without_folders(name) for name in names]
    return [
        (name if short.count(label) > 1 else label, name)
        for label, name in zip(short, names, strict=True)
    ]


def _without_folders(name: str) -> str:
    """``hf:/folders/model`` -> ``hf:model``; names that are no local paths stay as they are."""
    kind, colon, path = name.rpartition(":") if name.count(":") == 1 else ("", "", name)
    local = Path(path).is_absolute() or path.startswith(".")
    return f"{kind}{colon}{Path(path).name}" if local and Path(path).name else name
