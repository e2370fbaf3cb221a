# pyright: basic, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202, E741
"""Triton kernels for sums over a window: fold, gather, scatter, outer product and unfold.

Windows are defined in ``tables.py``. Importing this module imports Triton; ``launch.py`` does so
only when a kernel is about to run. Names in kernels:

* ``window`` (B, I, J, H, W): folded weights, any strides; ``start_y`` and ``start_x``: the tables.
* ``source`` (B, C, h, w), ``out`` and ``grad`` (B, C, H, W), any strides.
* The launch grid is flat. Channel blocks run fastest, so that programs that share a tile of weights
  run together; then tiles; then the batch. Offsets within a batch entry have type ``INDEX`` (int64
  only if a tensor needs it); the batch offset always has 64 bits.

The *groups* kernels keep 2×2 outputs in registers and multiply each loaded value into all four,
with plain float32 multiply-adds; they need tables in which a window moves by exactly ½ or 1 per
output. The *tiles* kernels expand a tile of the window weights to a matrix, which is zero outside
every window, and call ``tl.dot``: they accept any tables and use tensor cores in half precision.
"""

import triton
import triton.language as tl

from upfeat.backends.triton.masks import both


@triton.jit
def fold(
    weights, window, rows, columns, pixels, width,
    wb, wt, wy, wx, fb, fi, fj, fy, fx,
    K: tl.constexpr, I: tl.constexpr, J: tl.constexpr, J2: tl.constexpr,
    BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Fold taps: window[i, j] = Σ_kl rows[k, i] · columns[l, j] · weights[k, l]."""
    blocks = tl.cdiv(pixels, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    live = p < pixels
    y = (p // width).to(INDEX)
    x = (p % width).to(INDEX)
    j = tl.arange(0, J2)
    kept = live[:, None] & (j < J)[None, :]
    taps = weights + b * wb + y * wy + x * wx
    to = window + b * fb + (y * fy + x * fx)[:, None] + j[None, :].to(INDEX) * fj
    row = rows + y * (K * I)
    column = columns + (x * (K * J))[:, None] + j[None, :]
    for i in range(I):
        acc = tl.zeros([BLOCK, J2], tl.float32)
        for l in range(K):
            mixed = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(K):
                part = tl.load(row + k * I + i, mask=live, other=0.0)
                tap = tl.load(taps + (k * K + l) * wt, mask=live, other=0.0)
                mixed += part * tap.to(tl.float32)
            share = tl.load(column + l * J, mask=kept, other=0.0)
            acc += mixed[:, None] * share
        tl.store(to + i * fi, acc.to(window.dtype.element_ty), mask=kept)


@triton.jit
def unfold(
    window, weights, rows, columns, pixels, width,
    fb, fi, fj, fy, fx, wb, wt, wy, wx,
    K: tl.constexpr, I: tl.constexpr, J: tl.constexpr, J2: tl.constexpr,
    BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Adjoint of :func:`fold`: from gradients of window positions to gradients of taps."""
    blocks = tl.cdiv(pixels, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    live = p < pixels
    y = (p // width).to(INDEX)
    x = (p % width).to(INDEX)
    j = tl.arange(0, J2)
    kept = live[:, None] & (j < J)[None, :]
    taps = weights + b * wb + y * wy + x * wx
    at = window + b * fb + (y * fy + x * fx)[:, None] + j[None, :].to(INDEX) * fj
    row = rows + y * (K * I)
    column = columns + (x * (K * J))[:, None] + j[None, :]
    for k in range(K):
        mixed = tl.zeros([BLOCK, J2], tl.float32)
        for i in range(I):
            part = tl.load(row + k * I + i, mask=live, other=0.0)
            mixed += part[:, None] * tl.load(at + i * fi, mask=kept, other=0.0).to(tl.float32)
        for l in range(K):
            share = tl.load(column + l * J, mask=kept, other=0.0)
            total = tl.sum(mixed * share, 1)
            tl.store(taps + (k * K + l) * wt, total.to(weights.dtype.element_ty), mask=live)


@triton.jit
def _place(across, down, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr):
    """Batch entry, first row and first column of this program's tile, and its channels."""
    channel_blocks = tl.cdiv(channels, BC)
    c = (tl.program_id(0) % channel_blocks) * BC + tl.arange(0, BC)
    tile = tl.program_id(0) // channel_blocks
    tiles_across = tl.cdiv(across, COLUMNS)
    tiles = tl.cdiv(down, ROWS) * tiles_across
    b = (tile // tiles).to(tl.int64)
    tile = tile % tiles
    return b, (tile // tiles_across) * ROWS, (tile % tiles_across) * COLUMNS, c


@triton.jit
def gather_groups(
    source, window, out, h, w, height, width, channels, origin_y, origin_x,
    sb, sc, sy, sx, fb, fi, fj, fy, fx, ob, oc, oy, ox,
    I: tl.constexpr, J: tl.constexpr, FY: tl.constexpr, FX: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Out = Σ window · source, for ROWS × COLUMNS groups of 2×2 outputs and BC channels."""
    across, down = tl.cdiv(width, 2), tl.cdiv(height, 2)
    b, top, left, c = _place(across, down, channels, ROWS, COLUMNS, BC)
    n = tl.arange(0, ROWS * COLUMNS)
    gy = (top + n // COLUMNS).to(INDEX)
    gx = (left + n % COLUMNS).to(INDEX)
    y0 = (gy < down) & (gx < across)
    in_y = y0 & (2 * gy + 1 < height)
    in_x = y0 & (2 * gx + 1 < width)
    in_xy = in_y & in_x
    kept = (c < channels)[:, None]
    c = c.to(INDEX)
    here = source + b * sb + (c * sc)[:, None]
    from_y = gy * (2 // FY) + origin_y
    from_x = gx * (2 // FX) + origin_x
    at = window + b * fb + 2 * gy * fy + 2 * gx * fx
    acc00 = tl.zeros([BC, ROWS * COLUMNS], tl.float32)
    acc01, acc10, acc11 = acc00, acc00, acc00
    for i in range(I + 2 - FY):
        row = from_y + i
        row_ok = y0 & (row >= 0) & (row < h)
        # With FY = 1 a window moves by one row per output, so the second row's taps lag by one.
        lag = i - (2 - FY)
        first, second = both(row_ok, i < I), both(row_ok, lag >= 0)
        # Not unrolled: an unrolled loop issues all its loads at once, and their values spill.
        for j in range(J + 2 - FX):
            column = from_x + j
            inside = (column >= 0) & (column < w)
            value = tl.load(
                here + (row * sy + column * sx)[None, :],
                mask=(row_ok & inside)[None, :] & kept,
                other=0.0,
            ).to(tl.float32)
            behind = j - (2 - FX)
            left_ok, right_ok = both(inside, j < J), both(inside, behind >= 0)
            upper, lower = at + i * fi, at + fy + lag * fi
            w00 = tl.load(upper + j * fj, mask=first & left_ok, other=0.0)
            w10 = tl.load(lower + j * fj, mask=second & left_ok & in_y, other=0.0)
            w01 = tl.load(upper + fx + behind * fj, mask=first & right_ok & in_x, other=0.0)
            w11 = tl.load(lower + fx + behind * fj, mask=second & right_ok & in_xy, other=0.0)
            acc00 += w00.to(tl.float32)[None, :] * value
            acc01 += w01.to(tl.float32)[None, :] * value
            acc10 += w10.to(tl.float32)[None, :] * value
            acc11 += w11.to(tl.float32)[None, :] * value
    to = out + b * ob + (2 * gy * oy + 2 * gx * ox)[None, :] + (c * oc)[:, None]
    dtype = out.dtype.element_ty
    tl.store(to, acc00.to(dtype), mask=y0[None, :] & kept)
    tl.store(to + ox, acc01.to(dtype), mask=in_x[None, :] & kept)
    tl.store(to + oy, acc10.to(dtype), mask=in_y[None, :] & kept)
    tl.store(to + oy + ox, acc11.to(dtype), mask=in_xy[None, :] & kept)


@triton.jit
def scatter_groups(
    grad, window, out, h, w, height, width, channels, origin_y, origin_x,
    gb, gc, gy, gx, fb, fi, fj, fy, fx, ob, oc, oy, ox,
    I: tl.constexpr, J: tl.constexpr, FY: tl.constexpr, FX: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Adjoint of :func:`gather_groups` in its source, (B, C, h, w), computed as a gather."""
    across, down = tl.cdiv(w, 2), tl.cdiv(h, 2)
    b, top, left, c = _place(across, down, channels, ROWS, COLUMNS, BC)
    n = tl.arange(0, ROWS * COLUMNS)
    ay = (2 * (top + n // COLUMNS)).to(INDEX)
    ax = (2 * (left + n % COLUMNS)).to(INDEX)
    in_y0, in_y1 = ay < h, ay + 1 < h
    in_x0, in_x1 = ax < w, ax + 1 < w
    kept = (c < channels)[:, None]
    c = c.to(INDEX)
    here = grad + b * gb + (c * gc)[:, None]
    at = window + b * fb
    # The first output that reads a group's first position reads it with its window's last tap.
    from_y = (ay - origin_y - (I - 1)) * FY
    from_x = (ax - origin_x - (J - 1)) * FX
    acc00 = tl.zeros([BC, ROWS * COLUMNS], tl.float32)
    acc01, acc10, acc11 = acc00, acc00, acc00
    for i in range(FY * (I + 1)):
        y = from_y + i
        row_ok = (y >= 0) & (y < height)
        tap = I - 1 - i // FY  # tap of the group's first row; the second row's is the next one
        ok_0 = both(row_ok & in_y0, tap >= 0)
        ok_1 = both(row_ok & in_y1, tap + 1 < I)
        for j in range(FX * (J + 1)):
            x = from_x + j
            ok = (x >= 0) & (x < width)
            value = tl.load(
                here + (y * gy + x * gx)[None, :], mask=(row_ok & ok)[None, :] & kept, other=0.0
            ).to(tl.float32)
            side = J - 1 - j // FX  # tap of the group's first column
            left_ok, right_ok = both(ok & in_x0, side >= 0), both(ok & in_x1, side + 1 < J)
            pixel = at + y * fy + x * fx + tap * fi + side * fj
            w00 = tl.load(pixel, mask=ok_0 & left_ok, other=0.0)
            w10 = tl.load(pixel + fi, mask=ok_1 & left_ok, other=0.0)
            w01 = tl.load(pixel + fj, mask=ok_0 & right_ok, other=0.0)
            w11 = tl.load(pixel + fi + fj, mask=ok_1 & right_ok, other=0.0)
            acc00 += w00.to(tl.float32)[None, :] * value
            acc01 += w01.to(tl.float32)[None, :] * value
            acc10 += w10.to(tl.float32)[None, :] * value
            acc11 += w11.to(tl.float32)[None, :] * value
    to = out + b * ob + (ay * oy + ax * ox)[None, :] + (c * oc)[:, None]
    dtype = out.dtype.element_ty
    tl.store(to, acc00.to(dtype), mask=(in_y0 & in_x0)[None, :] & kept)
    tl.store(to + ox, acc01.to(dtype), mask=(in_y0 & in_x1)[None, :] & kept)
    tl.store(to + oy, acc10.to(dtype), mask=(in_y1 & in_x0)[None, :] & kept)
    tl.store(to + oy + ox, acc11.to(dtype), mask=(in_y1 & in_x1)[None, :] & kept)


@triton.jit
def gather_tiles(
    source, window, out, start_y, start_x, h, w, height, width, channels,
    sb, sc, sy, sx, fb, fi, fj, fy, fx, ob, oc, oy, ox,
    I: tl.constexpr, J: tl.constexpr, PITCH: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Out = Σ window · source, as (outputs × positions)·(positions × channels), for any tables."""
    b, top, left, c = _place(width, height, channels, ROWS, COLUMNS, BC)
    n = tl.arange(0, ROWS * COLUMNS)
    y, x = top + n // COLUMNS, left + n % COLUMNS
    live = (y < height) & (x < width)
    from_y = tl.load(start_y + y, mask=live, other=0)
    from_x = tl.load(start_x + x, mask=live, other=0)
    first_y = tl.maximum(tl.load(start_y + top), 0)
    first_x = tl.maximum(tl.load(start_x + left), 0)
    last_y = tl.minimum(tl.load(start_y + tl.minimum(top + ROWS, height) - 1) + I, h)
    y, x = y.to(INDEX), x.to(INDEX)
    kept = (c < channels)[None, :]
    c = c.to(INDEX)
    at = window + b * fb + (y * fy + x * fx)[:, None]
    here = source + b * sb + (c * sc)[None, :]
    acc = tl.zeros([ROWS * COLUMNS, BC], tl.float32)
    for step in range(0, (last_y - first_y) * PITCH, BK):
        s = step + tl.arange(0, BK)
        py, px = first_y + s // PITCH, first_x + s % PITCH
        inside = (py < last_y) & (px < w)
        i, j = py[None, :] - from_y[:, None], px[None, :] - from_x[:, None]
        ok = (i >= 0) & (i < I) & (j >= 0) & (j < J) & live[:, None] & inside[None, :]
        a = tl.load(at + i.to(INDEX) * fi + j.to(INDEX) * fj, mask=ok, other=0.0)
        place = (py.to(INDEX) * sy + px.to(INDEX) * sx)[:, None]
        value = tl.load(here + place, mask=inside[:, None] & kept, other=0.0)
        acc = tl.dot(a.to(COMPUTE), value.to(COMPUTE), acc, input_precision="ieee")
    to = out + b * ob + (y * oy + x * ox)[:, None] + (c * oc)[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & kept)


@triton.jit
def scatter_tiles(
    grad, window, out, start_y, start_x, begin_y, end_y, begin_x, end_x,
    h, w, height, width, channels,
    gb, gc, gy, gx, fb, fi, fj, fy, fx, ob, oc, oy, ox,
    I: tl.constexpr, J: tl.constexpr, PITCH: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Adjoint of :func:`gather_tiles` in its source, (B, C, h, w), computed as a gather."""
    b, top, left, c = _place(w, h, channels, ROWS, COLUMNS, BC)
    n = tl.arange(0, ROWS * COLUMNS)
    py, px = top + n // COLUMNS, left + n % COLUMNS
    live = (py < h) & (px < w)
    first_y = tl.load(begin_y + top)
    first_x = tl.load(begin_x + left)
    last_y = tl.load(end_y + tl.minimum(top + ROWS, h) - 1)
    last_x = tl.load(end_x + tl.minimum(left + COLUMNS, w) - 1)
    kept = (c < channels)[None, :]
    c = c.to(INDEX)
    at = window + b * fb
    here = grad + b * gb + (c * gc)[None, :]
    acc = tl.zeros([ROWS * COLUMNS, BC], tl.float32)
    for step in range(0, (last_y - first_y) * PITCH, BK):
        s = step + tl.arange(0, BK)
        y, x = first_y + s // PITCH, first_x + s % PITCH
        inside = (y < last_y) & (x < last_x)
        i = py[None, :] - tl.load(start_y + y, mask=inside, other=0)[:, None]
        j = px[None, :] - tl.load(start_x + x, mask=inside, other=0)[:, None]
        ok = (i >= 0) & (i < I) & (j >= 0) & (j < J) & live[None, :] & inside[:, None]
        y, x = y.to(INDEX), x.to(INDEX)
        place = (y * fy + x * fx)[:, None] + i.to(INDEX) * fi + j.to(INDEX) * fj
        # Transposed after loading, as one output's positions are contiguous in memory.
        a = tl.trans(tl.load(at + place, mask=ok, other=0.0))
        value = tl.load(here + (y * gy + x * gx)[:, None], mask=inside[:, None] & kept, other=0.0)
        acc = tl.dot(a.to(COMPUTE), value.to(COMPUTE), acc, input_precision="ieee")
    to = out + b * ob + (c * oc)[None, :]
    to = to + (py.to(INDEX) * oy + px.to(INDEX) * ox)[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & kept)


@triton.jit
def outer_tiles(
    grad, source, out, start_y, start_x, h, w, height, width, channels,
    gb, gc, gy, gx, sb, sc, sy, sx, fb, fi, fj, fy, fx,
    I: tl.constexpr, J: tl.constexpr, PITCH: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Gradient of the window, Σ_c grad · source: (outputs × channels)·(channels × positions).

    Every entry of ``out`` (B, I, J, H, W) is written: windows contain positions outside the source,
    too, whose gradient is 0.
    """
    b, top, left, _ = _place(width, height, BC, ROWS, COLUMNS, BC)
    n = tl.arange(0, ROWS * COLUMNS)
    y, x = top + n // COLUMNS, left + n % COLUMNS
    live = (y < height) & (x < width)
    from_y = tl.load(start_y + y, mask=live, other=0)
    from_x = tl.load(start_x + x, mask=live, other=0)
    first_y = tl.load(start_y + top)
    first_x = tl.load(start_x + left)
    last_y = tl.load(start_y + tl.minimum(top + ROWS, height) - 1) + I
    y, x = y.to(INDEX), x.to(INDEX)
    here = grad + b * gb + (y * gy + x * gx)[:, None]
    to = out + b * fb + (y * fy + x * fx)[:, None]
    for step in range(0, (last_y - first_y) * PITCH, BK):
        s = step + tl.arange(0, BK)
        py, px = first_y + s // PITCH, first_x + s % PITCH
        inside = (py >= 0) & (py < h) & (px >= 0) & (px < w)
        i, j = py[None, :] - from_y[:, None], px[None, :] - from_x[:, None]
        at = source + b * sb + (py.to(INDEX) * sy + px.to(INDEX) * sx)[None, :]
        acc = tl.zeros([ROWS * COLUMNS, BK], tl.float32)
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            kept = c < channels
            c = c.to(INDEX)
            g = tl.load(here + (c * gc)[None, :], mask=live[:, None] & kept[None, :], other=0.0)
            value = tl.load(at + (c * sc)[:, None], mask=inside[None, :] & kept[:, None], other=0.0)
            acc = tl.dot(g.to(COMPUTE), value.to(COMPUTE), acc, input_precision="ieee")
        ok = (i >= 0) & (i < I) & (j >= 0) & (j < J) & live[:, None]
        place = i.to(INDEX) * fi + j.to(INDEX) * fj
        tl.store(to + place, acc.to(out.dtype.element_ty), mask=ok)
