"""Whole JBU stages in the compiled CPU library: inference only, without intermediate tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upfeat.backends.cpu.arguments import (
    check_image,
    check_rank,
    check_shape,
    output,
    radius_of,
    reason_against,
    shrinks,
    weights_shape,
)
from upfeat.backends.cpu.library import Stage, call

_STAGE_PARAMETERS = (
    *("proj_w0", "proj_b0", "proj_w1", "proj_b1", "temperature", "sigma_spatial"),
    *("fix_w0", "fix_b0", "fix_w1", "fix_b1"),
)


def can_run_jbu_stage_weights(guidance: Tensor, *_: object, **__: object) -> str | None:
    """Return why :func:`jbu_stage_weights` cannot run on these arguments, or ``None``."""
    return reason_against(guidance=guidance)


def can_run_jbu_stage(features: Tensor, guidance: Tensor, *_: object, **__: object) -> str | None:
    """Return why :func:`jbu_stage` cannot run on these arguments, or ``None``."""
    if features.dim() == 4 and guidance.dim() == 4 and shrinks(features, guidance):
        return "the output is smaller than the features"
    return reason_against(features=features, guidance=guidance)


def jbu_stage_weights(guidance: Tensor, *parameters: Any, fixup_scale: float = 0.1) -> Tensor:
    """Compute all weights of one JBU stage, without gradients and intermediate tensors.

    Args:
        guidance: (B, G, H, W), any strides; G is 3 for an image.
        parameters: ``proj_w0`` (D, G), ``proj_b0``, ``proj_w1`` (D, D), ``proj_b1``,
            ``temperature``, ``sigma_spatial``, ``fix_w0`` (T, T+G), ``fix_b0``, ``fix_w1`` (T, T),
            ``fix_b1``, for D channels of keys and T taps; matrices may have trailing axes of size 1
            (1×1 convolutions).
        fixup_scale: factor of the fix-up network's output before it is added.

    Returns:
        (B, T, H, W), contiguous, of the guidance's dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    stage, radius = _stage(guidance, parameters, fixup_scale)
    out = guidance.new_empty(weights_shape(guidance, radius))
    if out.numel():
        call("upfeat_stage_weights", guidance, stage, out, radius)
    return out


def jbu_stage(
    features: Tensor,
    guidance: Tensor,
    *parameters: Any,
    fixup_scale: float = 0.1,
    channels_last: bool | None = None,
) -> Tensor:
    """Compute one whole JBU stage without gradients; only one tile of weights is in memory.

    Args:
        features: (B, C, h, w), any strides.
        guidance: (B, G, H, W), the stage's output size; H ≥ h and W ≥ w.
        parameters: as in :func:`jbu_stage_weights`.
        fixup_scale: as in :func:`jbu_stage_weights`.
        channels_last: memory format of the result; ``None`` chooses the format of ``features``.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the shapes do not fit.
    """
    check_rank("features", features)
    stage, radius = _stage(guidance, parameters, fixup_scale)
    check_shape("guidance", guidance, (features.shape[0], *guidance.shape[1:]))
    if 0 in features.shape[2:] or shrinks(features, guidance):
        raise ValueError(
            f"guidance has size {tuple(guidance.shape[2:])}, smaller than the features' "
            f"{tuple(features.shape[2:])}; a stage enlarges"
        )
    out = output(features, guidance, channels_last)
    if out.numel():
        call("upfeat_stage_forward", features, guidance, stage, out, radius)
    return out


def _stage(guidance: Tensor, parameters: Sequence[Any], fixup_scale: float) -> tuple[Stage, int]:
    if len(parameters) != len(_STAGE_PARAMETERS):
        names = ", ".join(_STAGE_PARAMETERS)
        raise ValueError(f"parameters has {len(parameters)} entries; give {names}")
    named = dict(zip(_STAGE_PARAMETERS, parameters, strict=True))
    taps, width = named["fix_b0"].numel(), named["proj_b0"].numel()
    radius = radius_of("fix_b0", taps)
    check_image("guidance", guidance, radius)
    channels = guidance.shape[1]
    shapes = {
        "proj_w0": (width, channels),
        "proj_b0": (width,),
        "proj_w1": (width, width),
        "proj_b1": (width,),
        "fix_w0": (taps, taps + channels),
        "fix_b0": (taps,),
        "fix_w1": (taps, taps),
        "fix_b1": (taps,),
    }
    if not width:
        raise ValueError("proj_b0 is empty; keys need at least one channel")
    dense = {name: _dense(name, named[name], shape) for name, shape in shapes.items()}
    stage = Stage(
        **{name: value.data_ptr() for name, value in dense.items()},
        key_width=width,
        temperature=float(named["temperature"]),
        sigma_spatial=float(named["sigma_spatial"]),
        fixup_scale=fixup_scale,
    )
    stage.keep = dense  # the structure contains addresses alone, which own no memory
    return stage, radius


def _dense(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    trailing = value.shape[len(shape) :]
    if tuple(value.shape[: len(shape)]) != shape or any(size != 1 for size in trailing):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
    return value.detach().reshape(shape).to("cpu", torch.float32).contiguous()
