"""Class activation maps at full resolution, of any classifier with a global mean at its end."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import upfeat

PHOTO = Path(__file__).parents[1] / "photos" / "cat.jpg"


class Embedded(nn.Module):
    """The embedded classifier, as a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = upfeat.load_backbone("efficientnet_lite0.stride32")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> ImageNet logits."""
        return self.backbone.classify(x)


def activation_map(
    network: nn.Module, layer: str, x: Tensor, upsampler: upfeat.Upsampler, **normalisation: object
) -> tuple[Tensor, Tensor]:
    """Map what the most probable class rests on, at every pixel (Grad-CAM).

    The network runs once, with an upsampler behind the layer: its logits hardly change, since they
    rest on the mean over all pixels, and the gradient tells the weight of each channel.

    Returns:
        (H, W) from 0 to 1, and the logits.
    """
    kept: list[Tensor] = []
    with upfeat.attach(network, layer, upsampler, **normalisation):  # pyright: ignore[reportArgumentType]
        keep = network.get_submodule(layer).register_forward_hook(
            lambda module, args, features: kept.append(features)
        )
        with torch.enable_grad():
            logits = network(x.requires_grad_())
            weights = torch.autograd.grad(logits.max(), kept[0])[0].sum((2, 3))  # (1, C)
        keep.remove()
    heat = torch.einsum("bc,bchw->hw", weights, kept[0].detach()).clamp(min=0)
    return heat / heat.max().clamp(min=1e-12), logits.detach()


def main() -> dict[str, float]:
    """Return how the logits agree with the plain ones, and the size of the map."""
    network = Embedded().eval()
    x = network.backbone.preprocess(PHOTO, 224)
    norm = network.backbone.normalization
    upsampler = upfeat.load_upsampler("detail_universal")
    heat, logits = activation_map(
        network, "backbone.head", x, upsampler, mean=norm.mean, std=norm.std
    )
    plain = network(x).detach()
    agreement = torch.nn.functional.cosine_similarity(plain, logits)
    return {
        "logits agree": float(agreement),
        "same class": float(plain.argmax() == logits.argmax()),
        "height": heat.shape[0],
        "width": heat.shape[1],
    }


if __name__ == "__main__":
    print(main())
