"""A JBU stack in float64, written from its definition, sharing no code with the library."""

import math

import torch
import torch.nn.functional as F


def _gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _linear(weight, bias, x):
    """A 1×1 convolution written as what it is: one matrix at every pixel."""
    return (
        torch.tensordot(weight[:, :, 0, 0], x, dims=([1], [1])).movedim(0, 1) + bias[:, None, None]
    )


def _mirror(index, length):
    if length == 1:
        return 0
    index = abs(index) % (2 * length - 2)
    return min(index, 2 * length - 2 - index)


def _stage(features, guidance, p, radius=3):
    """One stage, straight from its definition; p holds a stage's tensors in float64."""
    height, width = guidance.shape[-2:]
    side = 2 * radius + 1
    keys = _linear(p["range_proj.0.weight"], p["range_proj.0.bias"], guidance)
    keys = _linear(p["range_proj.3.weight"], p["range_proj.3.bias"], _gelu(keys))
    tau = min(max(math.exp(p["range_temperature"].item()), 1e-4), 1e4)
    rows = torch.tensor(
        [[_mirror(y + d - radius, height) for d in range(side)] for y in range(height)]
    )
    columns = torch.tensor(
        [[_mirror(x + d - radius, width) for d in range(side)] for x in range(width)]
    )
    window = keys[:, :, rows][:, :, :, :, columns]  # (B, D, H, side, W, side)
    window = window.permute(0, 1, 3, 5, 2, 4).flatten(2, 3)  # (B, D, T, H, W)
    scores = tau * (window * keys[:, :, None]).sum(1)
    scores = torch.exp(scores - scores.max(1, keepdim=True).values)
    kernel = scores / scores.sum(1, keepdim=True)
    u = torch.linspace(-1, 1, side, dtype=torch.float64)
    distance = (u[:, None] ** 2 + u[None] ** 2).flatten()
    kernel = kernel * torch.exp(-distance / (2 * p["sigma_spatial"] ** 2))[:, None, None]
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
    hidden = _gelu(
        _linear(
            p["fixup_proj.0.weight"], p["fixup_proj.0.bias"], torch.cat([kernel, guidance], dim=1)
        )
    )
    kernel = kernel + 0.1 * _linear(p["fixup_proj.3.weight"], p["fixup_proj.3.bias"], hidden)
    source = F.interpolate(features, size=(height, width), mode="bicubic", align_corners=False)
    source = source[:, :, rows][:, :, :, :, columns].permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    return (source * kernel[:, None]).sum(2)


def reference(stack, features, guidance, output_size):
    """The whole stack in float64."""
    state = {name: value.double() for name, value in stack.state_dict().items()}
    x, guidance = features.double(), guidance.double()
    height, width = x.shape[-2:]
    for index in range(4):
        height, width = min(2 * height, output_size[0]), min(2 * width, output_size[1])
        if index == 3:
            height, width = output_size
        prefix = f"stages.{index}."
        p = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        x = _stage(x, F.adaptive_avg_pool2d(guidance, (height, width)), p)
    if "channel_mix.weight" in state:
        x = x + 0.1 * _linear(state["channel_mix.weight"], state["channel_mix.bias"], x)
    return x


def relative_error(out, expected):
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


def published_state(embed_dim=6, seed=0):
    """Tensors under the published names, as `torch.save` would hold them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "range_temp": (),
        "sigma_spatial": (),
        "range_proj.0.weight": (32, 3, 1, 1),
        "range_proj.0.bias": (32,),
        "range_proj.3.weight": (32, 32, 1, 1),
        "range_proj.3.bias": (32,),
        "fixup_proj.0.weight": (49, 52, 1, 1),
        "fixup_proj.0.bias": (49,),
        "fixup_proj.3.weight": (49, 49, 1, 1),
        "fixup_proj.3.bias": (49,),
    }
    state = {
        f"upsampler.up{stage}.{name}": 0.2 * torch.randn(shape, generator=generator) + 0.1
        for stage in range(1, 5)
        for name, shape in shapes.items()
    }
    state["upsampler.fixup_proj.1.weight"] = torch.randn(embed_dim, embed_dim, 1, 1)
    state["upsampler.fixup_proj.1.bias"] = torch.randn(embed_dim)
    return state
