# pyright: basic, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels for the range kernel: from keys to normalised weights, and its gradients.

A program processes two rows of a strip of columns. The windows of two pixels in one column overlap,
so the program loads the (2r+2) × (2r+1) keys of both windows as one block, (positions × columns),
and multiplies each key with the keys of both pixels: 1.75 multiply-adds per load at r = 3, where a
single row has 1, all along contiguous columns. The scores stay in registers until the weights are
computed. Importing this module imports Triton.
"""

import triton
import triton.language as tl

from upfeat.backends.triton.masks import both


@triton.jit
def _reflect(position, length):
    """Reflect a position at the borders, repeatedly if need be, into 0 … length-1."""
    period = tl.maximum(2 * (length - 1), 1)
    folded = tl.abs(position) % period
    return tl.minimum(folded, period - folded)


@triton.jit
def _place(height, width, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """Batch entry, upper row and columns of this program."""
    strips = tl.cdiv(width, BLOCK)
    pairs = tl.cdiv(height, 2)
    b = (tl.program_id(0) // (strips * pairs)).to(tl.int64)
    within = tl.program_id(0) % (strips * pairs)
    x = (within % strips) * BLOCK + tl.arange(0, BLOCK)
    return b, (within // strips) * 2, x.to(INDEX)


@triton.jit
def _scores(
    keys, depth, height, width, y, x, kd, ky, kx,
    RADIUS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Products of the keys in both windows with the keys of both pixels, each (SIDE², BLOCK)."""
    n = tl.arange(0, SIDE * SIDE)
    i, j = n // SIDE, n % SIDE
    used = (i < 2 * RADIUS + 2) & (j < 2 * RADIUS + 1)
    row = _reflect(y - RADIUS + i, height).to(INDEX)
    column = _reflect(x[None, :] - RADIUS + j[:, None], width)
    around = keys + (row * ky)[:, None] + column * kx
    live = x < width
    upper = keys + y.to(INDEX) * ky + x * kx
    lower = keys + tl.minimum(y + 1, height - 1).to(INDEX) * ky + x * kx
    acc0 = tl.zeros([SIDE * SIDE, BLOCK], tl.float32)
    acc1 = acc0
    for _ in range(depth):
        key = tl.load(around, mask=used[:, None] & live[None, :], other=0.0).to(tl.float32)
        acc0 += key * tl.load(upper, mask=live, other=0.0).to(tl.float32)[None, :]
        acc1 += key * tl.load(lower, mask=live, other=0.0).to(tl.float32)[None, :]
        around += kd
        upper += kd
        lower += kd
    return acc0, acc1


@triton.jit
def _taps(LAG: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr):
    """Number of the tap at each position of the block, its |u|², and a mask of positions with taps.

    The taps are those of the pixel ``LAG`` rows down; u is the tap's offset from the pixel, divided
    by the radius.
    """
    n = tl.arange(0, SIDE * SIDE)
    i, j = n // SIDE - LAG, n % SIDE
    is_tap = (i >= 0) & (i < 2 * RADIUS + 1) & (j < 2 * RADIUS + 1)
    step = 2.0 / max(2 * RADIUS, 1)
    uy, ux = i.to(tl.float32) * step - 1, j.to(tl.float32) * step - 1
    return i * (2 * RADIUS + 1) + j, uy * uy + ux * ux, is_tap


@triton.jit
def _normalise(score, squared, is_tap, temperature, sigma):
    """Softmax over taps, the softmax times the spatial kernel, and the sum of these products."""
    score = tl.where(is_tap[:, None], score * temperature, float("-inf"))
    share = tl.exp(score - tl.max(score, 0)[None, :])
    share = share / tl.sum(share, 0)[None, :]
    kernel = share * tl.exp(-squared / (2 * sigma * sigma))[:, None]
    return share, kernel, tl.sum(kernel, 0)


@triton.jit
def range_forward(
    keys, temperature, sigma, out, depth, height, width,
    kb, kd, ky, kx, ob, ot, oy, ox,
    RADIUS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Compute weights (B, T, H, W) from keys (B, D, H, W)."""
    b, y, x = _place(height, width, BLOCK, INDEX)
    tau, width_of_kernel = tl.load(temperature), tl.load(sigma)
    acc0, acc1 = _scores(
        keys + b * kb, depth, height, width, y, x, kd, ky, kx, RADIUS, SIDE, BLOCK, INDEX
    )
    for lag in tl.static_range(2):
        tap, squared, is_tap = _taps(lag, RADIUS, SIDE)
        score = acc0 if lag == 0 else acc1
        _, kernel, total = _normalise(score, squared, is_tap, tau, width_of_kernel)
        weight = kernel / tl.maximum(total, 1e-7)[None, :]
        to = out + b * ob + (y + lag).to(INDEX) * oy + x * ox
        kept = both(is_tap[:, None] & (x < width)[None, :], y + lag < height)
        tl.store(
            to[None, :] + (tap.to(INDEX) * ot)[:, None], weight.to(out.dtype.element_ty), mask=kept
        )


@triton.jit
def range_backward(
    keys, temperature, sigma, grad, pairwise, partial, depth, height, width,
    kb, kd, ky, kx, gb, gt, gy, gx, pb, pt, py, px,
    RADIUS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradients of the products ⟨q[p], q[p+δ]⟩, and this program's terms of the scalars' gradients.

    ``pairwise`` (B, T, H, W) float32: the products, of the keys q at pixel p and at p + δ;
    ``partial`` (programs, 2) float32: temperature, sigma.
    """
    b, y, x = _place(height, width, BLOCK, INDEX)
    tau, width_of_kernel = tl.load(temperature), tl.load(sigma)
    acc0, acc1 = _scores(
        keys + b * kb, depth, height, width, y, x, kd, ky, kx, RADIUS, SIDE, BLOCK, INDEX
    )
    for_temperature = tl.zeros([BLOCK], tl.float32)
    for_sigma = tl.zeros([BLOCK], tl.float32)
    for lag in tl.static_range(2):
        tap, squared, is_tap = _taps(lag, RADIUS, SIDE)
        score = acc0 if lag == 0 else acc1
        share, kernel, total = _normalise(score, squared, is_tap, tau, width_of_kernel)
        spatial = tl.exp(-squared / (2 * width_of_kernel * width_of_kernel))[:, None]
        kept = both(is_tap[:, None] & (x < width)[None, :], y + lag < height)
        place = (y + lag).to(INDEX)
        at = (place * gy + x * gx)[None, :] + (tap.to(INDEX) * gt)[:, None]
        g = tl.load(grad + b * gb + at, mask=kept, other=0.0).to(tl.float32)
        bounded = tl.maximum(total, 1e-7)
        # Where the divisor is clamped to 1e-7, it is a constant and passes no gradient.
        moved = tl.where(total >= 1e-7, tl.sum(g * kernel, 0) / bounded, 0.0)
        g = (g - moved[None, :]) / bounded[None, :]
        for_sigma += tl.sum(g * kernel * squared[:, None], 0)
        g = g * spatial
        g = share * (g - tl.sum(share * g, 0)[None, :])
        for_temperature += tl.sum(g * score, 0)
        to = pairwise + b * pb + (place * py + x * px)[None, :]
        tl.store(to + (tap.to(INDEX) * pt)[:, None], g * tau, mask=kept)
    cube = width_of_kernel * width_of_kernel * width_of_kernel
    ours = partial + tl.program_id(0).to(tl.int64) * 2
    tl.store(ours, tl.sum(for_temperature, 0))
    tl.store(ours + 1, tl.sum(for_sigma, 0) / cube)
