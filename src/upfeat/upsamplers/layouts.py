"""Layouts of published checkpoints: the names and sizes of each method's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from upfeat.upsamplers.anyup import AnyUp
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.jafar import JAFAR
from upfeat.upsamplers.naf import NAF
from upfeat.upsamplers.uplift import MOST_BLOCKS, UPLiFT


class Layout(NamedTuple):
    """Published names of one method's tensors, and a function that makes the upsampler."""

    label: str
    repository: str
    licence: str
    """Licence of the published weights."""
    mark: str
    """Name of a tensor that only this method has."""
    names: Mapping[str, str]
    """Regular expressions, applied in order, that turn our names into published names."""
    make: Callable[[Mapping[str, Tensor]], Upsampler]
    """Makes the upsampler, without the weights, from tensors by published names."""


def _inputs(state: Mapping[str, Tensor], name: str) -> int:
    """Input channels of a convolution; 1 if it is missing, which is reported later."""
    weight = state.get(name)
    return weight.shape[1] if weight is not None and weight.dim() == 4 else 1


def _uplift(state: Mapping[str, Tensor]) -> UPLiFT:
    """Make an UPLiFT of the sizes of a file's tensors; sizes that are missing are the published.

    Raises:
        ValueError: the file has a part that upfeat cannot run, or sizes out of range.
    """
    if any(name.startswith("refiner.") for name in state):
        raise ValueError(
            "holds an UPLiFT with a refiner, as published for VAEs, which reads noise and is not "
            "linear in the features; take one for a ViT"
        )
    widths = []
    while len(widths) < MOST_BLOCKS:
        weight = state.get(f"encoder.block_{len(widths)}.blocks.0.conv.0.weight")
        if weight is None or weight.dim() != 4:
            break
        widths.append(len(weight))
    if len(widths) < 2:  # reported later, with the names that are missing
        return UPLiFT(1)
    width = state.get("attender.conv1.weight")
    inputs = _inputs(state, "decoder.block_0.blocks.0.conv.0.weight")
    return UPLiFT(
        max(inputs - widths[-1], 1),
        encoder_widths=widths,
        width=width.shape[1] if width is not None and width.dim() == 4 else 64,
    )


_ATTENTION = "cross_decode.cross_attn.attention."
_QUERIES_AND_KEYS = {
    r"^image\.frequencies$": "rope.freqs",
    r"^image\.": "",
    r"^features_encoder\.": "key_features_encoder.",
    r"^projection\.blend\.": "cross_decode.conv2d.",
    r"^projection\.norm_query\.": "cross_decode.cross_attn.norm_q.",
    r"^projection\.norm_key\.": "cross_decode.cross_attn.norm_k.",
    r"^projection\.(query|key)\.bias$": f"{_ATTENTION}in_proj_bias",
}
LAYOUTS = (
    Layout(
        "AnyUp",
        "wimmerth/anyup",
        "CC-BY-4.0",
        "key_features_encoder.0.basis",
        {
            **_QUERIES_AND_KEYS,
            r"^projection\.(query|key)\.weight$": f"{_ATTENTION}in_proj_weight",
            r"\.norm1\.": ".block.0.",
            r"\.conv1\.": ".block.2.",
            r"\.norm2\.": ".block.3.",
            r"\.conv2\.": ".block.5.",
        },
        lambda state: AnyUp(),
    ),
    Layout(
        "JAFAR",
        "PaulCouairon/JAFAR",
        "Apache-2.0",
        "sft_key.gamma.weight",
        {
            **_QUERIES_AND_KEYS,
            r"^projection\.query\.weight$": f"{_ATTENTION}q_proj_weight",
            r"^projection\.key\.weight$": f"{_ATTENTION}k_proj_weight",
            r"^(gamma|beta)\.": r"sft_key.\1.",
        },
        lambda state: JAFAR(_inputs(state, "key_features_encoder.0.weight")),
    ),
    Layout(
        "NAF",
        "valeoai/NAF",
        "Apache-2.0",
        "image_encoder.sem_encoder.0.weight",
        {
            r"^colours\.": "image_encoder.encoder.",
            r"^surroundings\.": "image_encoder.sem_encoder.",
            r"^periods$": "image_encoder.rope.periods",
        },
        lambda state: NAF(),
    ),
    Layout(
        "UPLiFT",
        "mwalmer-umd/UPLiFT",
        "licensed as their model card says",
        "attender.conv1.weight",
        {
            r"^encoder\.(\d+)\.": r"encoder.block_\1.blocks.0.conv.",
            r"^coarse_block\.": "decoder.block_0.blocks.0.conv.",
            r"^fine_block\.": "decoder.block_1.blocks.0.conv.",
            r"^doubling\.": "decoder.up_1.up.",
            r"^scores\.": "attender.conv1.",
            # Members of a sequence: 3×3 convolution, norm, ReLU, once or twice, then the mixture.
            r"^(decoder\..*\.)mixture\.": r"\g<1>6.",
            r"mixture\.": "3.",
            r"convolutions\.0\.": "0.",
            r"norms\.0\.": "1.",
            r"convolutions\.1\.": "3.",
            r"norms\.1\.": "4.",
        },
        _uplift,
    ),
)
SHARED = (f"{_ATTENTION}in_proj_weight", f"{_ATTENTION}in_proj_bias")
"""Tensors that contain the rows of queries, of keys and of values, in this order."""
