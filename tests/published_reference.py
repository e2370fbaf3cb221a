"""AnyUp, JAFAR, NAF and UPLiFT the obvious way, by the published tensor names.

All cells are read for all pixels. Written from the papers and the layouts, apart from the package;
slow, and meant for float64.
"""

import math

import torch
import torch.nn.functional as F

from upfeat.upsamplers.checkpoints import _names
from upfeat.upsamplers.layouts import LAYOUTS


def published_state(upsampler):
    """Its tensors by published names; what nobody reads is left out, or zero."""
    (layout,) = (each for each in LAYOUTS if each.label.lower() == upsampler.name)
    state = {}
    for ours, (theirs, part) in _names(layout, upsampler).items():
        value = upsampler.state_dict()[ours]
        if part is None:
            state[theirs] = value
        else:
            whole = state.setdefault(theirs, value.new_zeros(3 * len(value), *value.shape[1:]))
            whole[part * len(value) : (part + 1) * len(value)] = value
    return state


def encoder(x, state, prefix, *, entry=True, residual=True):
    names = ("norm1", "conv1", "norm2", "conv2")
    if f"{prefix}1.norm1.weight" not in state:
        names = ("block.0", "block.2", "block.3", "block.5")
    if entry:
        x = convolution(x, state, f"{prefix}0")
    for block in (1, 2):
        y = x
        for norm, conv in (names[:2], names[2:]):
            at = f"{prefix}{block}.{norm}"
            y = F.silu(F.group_norm(y, 8, state[f"{at}.weight"], state[f"{at}.bias"]))
            y = convolution(y, state, f"{prefix}{block}.{conv}")
        x = x + y if residual else y
    return x


def convolution(x, state, name):
    weight = state[f"{name}.weight"]
    reach = weight.shape[-1] // 2
    return F.conv2d(
        F.pad(x, (reach,) * 4, mode="reflect") if reach else x, weight, state.get(f"{name}.bias")
    )


def place(x, angles):
    """x_i turned against x_{i + half}; angles (D, H, W)."""
    half = x.shape[1] // 2
    partner = torch.cat([-x[:, half:], x[:, :half]], dim=1)
    return x * angles.cos() + partner * angles.sin()


def placed_image(state, image):
    x = encoder(image, state, "image_encoder.")
    y, x_ = (torch.linspace(0, 1, side, dtype=x.dtype) for side in x.shape[2:])
    by_row, by_column = state["rope.freqs"]
    angles = y[None, :, None] * by_row[:, None, None] + x_[None, None] * by_column[:, None, None]
    return place(x, angles)


def unit_scale(x, weight):
    scale = (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
    return x * scale * weight[:, None, None]


def averaged(state, queries, keys, features, query_map, key_map, heads, seen):
    """The mean of the heads' weights over the cells that ``seen`` (H, W, h, w) allows."""
    queries = F.conv2d(queries, state["cross_decode.conv2d.weight"], padding=1)
    queries = unit_scale(queries, state["cross_decode.cross_attn.norm_q.weight"])
    keys = unit_scale(keys, state["cross_decode.cross_attn.norm_k.weight"])
    bias = state["cross_decode.cross_attn.attention.in_proj_bias"].chunk(3)
    total = 0
    for q, k, b, c in zip(
        query_map.chunk(heads), key_map.chunk(heads), bias[0].chunk(heads), bias[1].chunk(heads),
        strict=True,
    ):  # fmt: skip
        one = torch.einsum("od,bdyx->boyx", q, queries) + b[:, None, None]
        other = torch.einsum("od,bdij->boij", k, keys) + c[:, None, None]
        logits = torch.einsum("boyx,boij->byxij", one, other) / math.sqrt(len(q))
        logits = logits.masked_fill(~seen, -math.inf)
        total = total + logits.flatten(3).softmax(3).view_as(logits) / heads
    return torch.einsum("byxij,bcij->bcyx", total, features)


def anyup(state, image, features, size, *, heads=4, ratio=0.1):
    grid, basis = features.shape[2:], state["key_features_encoder.0.basis"]
    placed = placed_image(state, image)
    queries = F.adaptive_avg_pool2d(encoder(placed, state, "query_encoder."), size)
    keys = F.adaptive_avg_pool2d(encoder(placed, state, "key_encoder."), grid)
    batch, channels = features.shape[:2]
    side = basis.shape[-1]
    normed = F.normalize(features, dim=1)
    bank = basis.repeat(channels, 1, 1, 1)  # every channel meets every pattern
    responses = F.conv2d(normed, bank, padding=side // 2, groups=channels)
    ones = F.conv2d(
        features.new_ones(1, 1, *grid), features.new_ones(1, 1, side, side), padding=side // 2
    )
    responses = (responses / ones).view(batch, len(basis), channels, *grid)
    patterns = responses.softmax(1).mean(2)
    patterns = encoder(patterns, state, "key_features_encoder.", entry=False)
    keys = encoder(torch.cat([keys, patterns], 1), state, "aggregation.")
    seen = []
    for cells, length in zip(grid, size, strict=True):
        at = (torch.arange(length, dtype=torch.float32) + 0.5) / length
        low = ((at - ratio).clamp(0, 1) * cells).floor()
        high = ((at + ratio).clamp(0, 1) * cells).ceil()
        cell = torch.arange(cells)
        seen.append((cell >= low[:, None]) & (cell < high[:, None]))
    both = seen[0][:, None, :, None] & seen[1][None, :, None, :]
    maps = state["cross_decode.cross_attn.attention.in_proj_weight"].chunk(3)
    return averaged(state, queries, keys, features, maps[0], maps[1], heads, both)


def jafar(state, image, features, size, *, heads=4):
    grid = features.shape[2:]
    placed = placed_image(state, image)
    queries = F.adaptive_avg_pool2d(encoder(placed, state, "query_encoder."), size)
    keys = F.adaptive_avg_pool2d(encoder(placed, state, "key_encoder."), grid)
    known = encoder(F.normalize(features, dim=1), state, "key_features_encoder.")
    gamma, beta = (convolution(known, state, f"sft_key.{name}") for name in ("gamma", "beta"))
    keys = gamma * F.group_norm(keys, 8) + beta
    at = "cross_decode.cross_attn.attention."
    maps = state[f"{at}q_proj_weight"], state[f"{at}k_proj_weight"]
    seen = torch.ones(*size, *grid, dtype=torch.bool)
    return averaged(state, F.group_norm(queries, 8), keys, features, *maps, heads, seen)


def naf(state, image, features, size, *, heads=4, side=9):
    height, width = image.shape[2:]
    if height > 4 * size[0] or width > 4 * size[1]:
        most = 4 * min(size)
        image = F.interpolate(image, size=(min(height, most), min(width, most)), mode="bilinear")
    parts = [
        encoder(image, state, f"image_encoder.{name}.", residual=False)
        for name in ("encoder", "sem_encoder")
    ]
    codes = F.adaptive_avg_pool2d(torch.cat(parts, dim=1), size)
    turns = 2 * math.pi / state["image_encoder.rope.periods"]
    y, x = ((torch.arange(n, dtype=codes.dtype) + 0.5) / n * 2 - 1 for n in size)
    down = (y[None] * turns[:, None])[:, :, None].expand(-1, -1, size[1])
    across = (x[None] * turns[:, None])[:, None].expand(-1, size[0], -1)
    angles = torch.cat([down, across, down, across])
    grid, out = features.shape[2:], []
    first = []
    for cells, length in zip(grid, size, strict=True):
        own = ((torch.arange(length) + 0.5) * cells / length).floor().long()
        first.append((own - min(side, cells) // 2).clamp(0, cells - min(side, cells)))
    for head, values in zip(codes.chunk(heads, 1), features.chunk(heads, 1), strict=True):
        queries = place(head, angles)
        keys = F.adaptive_avg_pool2d(queries, grid)
        result = torch.empty(*values.shape[:2], *size, dtype=values.dtype)
        for row in range(size[0]):
            for column in range(size[1]):
                i, j = int(first[0][row]), int(first[1][column])
                cells = (..., slice(i, i + min(side, grid[0])), slice(j, j + min(side, grid[1])))
                query = queries[:, :, row, column]
                logits = torch.einsum("bd,bdij->bij", query, keys[cells]) / math.sqrt(len(angles))
                weights = logits.flatten(1).softmax(1).view_as(logits)
                result[:, :, row, column] = torch.einsum("bij,bcij->bc", weights, values[cells])
        out.append(result)
    return torch.cat(out, dim=1)


def blocks(x, state, prefix, convolutions):
    """3×3 convolutions with batch norms and ReLUs, a 1×1 convolution, and the input added."""
    y = x
    for index in range(convolutions):
        convolution, norm = f"{prefix}{3 * index}.", f"{prefix}{3 * index + 1}."
        y = F.conv2d(y, state[f"{convolution}weight"], padding=1)
        moments = state[f"{norm}running_mean"], state[f"{norm}running_var"]
        y = F.relu(F.batch_norm(y, *moments, state[f"{norm}weight"], state[f"{norm}bias"]))
    last = f"{prefix}{3 * convolutions}."
    y = F.conv2d(y, state[f"{last}weight"], state[f"{last}bias"])
    shared = min(x.shape[1], y.shape[1])
    y[:, :shared] += x[:, :shared]
    return y


def resized(x, size):
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)


def uplift(state, image, features, size):
    cells = tuple(features.shape[2:])
    maps = [resized(image, tuple(16 * side for side in cells))]
    while f"encoder.block_{len(maps) - 1}.blocks.0.conv.0.weight" in state:
        maps.append(blocks(maps[-1], state, f"encoder.block_{len(maps) - 1}.blocks.0.conv.", 1))
    for _ in range(4):
        cells = tuple(features.shape[2:])
        finer = tuple(2 * side for side in cells)
        x = torch.cat([features, F.interpolate(maps[-1], size=cells)], dim=1)
        x = blocks(x, state, "decoder.block_0.blocks.0.conv.", 2)
        up = F.conv_transpose2d(
            x, state["decoder.up_1.up.weight"], state["decoder.up_1.up.bias"], stride=2
        )
        x = up + F.interpolate(x, size=finer, mode="bilinear", align_corners=True)
        x = torch.cat([x, F.interpolate(maps[-2], size=finer)], dim=1)
        x = blocks(x, state, "decoder.block_1.blocks.0.conv.", 2)
        scores = F.conv2d(x, state["attender.conv1.weight"], state["attender.conv1.bias"])
        weights = (scores + x[:, :17]).softmax(1)
        padded = F.pad(features, (2, 2, 2, 2), mode="replicate")
        features, index = 0, 0
        for row in range(5):
            for column in range(5):
                if {abs(row - 2), abs(column - 2)} == {1, 2}:
                    continue  # the move of a knight
                shifted = padded[:, :, row : row + cells[0], column : column + cells[1]]
                own = shifted.repeat_interleave(2, 2).repeat_interleave(2, 3)
                features = features + weights[:, index : index + 1] * own
                index += 1
        if all(side >= least for side, least in zip(finer, size, strict=True)):
            break
    return features if features.shape[2:] == size else resized(features, size)
