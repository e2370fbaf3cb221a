# pyright: basic, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels for attention from pixels to rectangles of cells.

A program processes BLOCK pixels of one row, which attend to the same rows of cells. It loops over
the columns of cells that any of these pixels attends to, CELLS at a time, with a mask of the cells
of each pixel. ``attend_norms`` stores the logarithm of every softmax's denominator;
``attend_values`` recomputes the weights, and sums the values of BC channels with them. Arithmetic
is in float32, whatever the tensors' dtype.
"""

import triton
import triton.language as tl


@triton.jit
def _pixels(width, columns, h, w, BLOCK: tl.constexpr):
    """This program's columns of pixels, a mask of those in the image, and bounds of their cells."""
    x = (tl.program_id(0) % tl.cdiv(width, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    live = x < width
    first = tl.load(columns + x, mask=live, other=w)
    stop = tl.load(columns + width + x, mask=live, other=0)
    return x, live, first, stop


@triton.jit
def _products(query, keys, r, j, seen, depth, kd, ky, kx, scale, D: tl.constexpr):
    """Logits scale · query (BLOCK, D) · keys of row r, columns j (D, CELLS); −inf if masked."""
    d = tl.arange(0, D)
    at = keys + r * ky + (d * kd)[:, None] + (j * kx)[None, :]
    live = (d < depth)[:, None] & tl.max(seen.to(tl.int32), 0)[None, :].to(tl.int1)
    key = tl.load(at, mask=live, other=0.0).to(tl.float32)
    logits = tl.dot(query, key, input_precision="ieee") * scale
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def attend_norms(
    queries, keys, norms, rows, columns, height, width, h, w, depth, scale,
    qb, qd, qy, qx, kb, kd, ky, kx,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """norms[b, n, y, x] = log Σ exp(scale · ⟨query, key⟩) over the pixel's cells, for head n."""
    x, live, first, stop = _pixels(width, columns, h, w, BLOCK)
    row = tl.program_id(0) // tl.cdiv(width, BLOCK)
    y, n = row % height, (row // height) % HEADS
    b = (row // height // HEADS).to(tl.int64)
    d = tl.arange(0, D)
    at = queries + b * qb + n * depth * qd + y.to(tl.int64) * qy
    mask = live[:, None] & (d < depth)[None, :]
    query = tl.load(at + (x * qx)[:, None] + (d * qd)[None, :], mask=mask, other=0.0)
    query = query.to(tl.float32)
    low, high = tl.min(first, 0), tl.max(stop, 0)
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    key = keys + b * kb + n * depth * kd
    for r in range(tl.load(rows + y), tl.load(rows + height + y)):
        for start in range(low, high, CELLS):
            j = start + tl.arange(0, CELLS)
            seen = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
            logits = _products(query, key, r, j, seen, depth, kd, ky, kx, scale, D)
            above = tl.maximum(top, tl.max(logits, 1))
            total = total * tl.exp(top - above) + tl.sum(tl.exp(logits - above[:, None]), 1)
            top = above
    to = norms + ((b * HEADS + n) * height + y) * width + x
    tl.store(to, top + tl.log(tl.where(live, total, 1.0)), mask=live)


@triton.jit
def attend_values(
    queries, keys, values, norms, out, rows, columns, blocks, height, width, h, w, depth, scale,
    n_blocks, qb, qd, qy, qx, kb, kd, ky, kx, vb, vc, vy, vx, ob, oc, oy, ox,
    HEADS: tl.constexpr, MEAN: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    CELLS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Out = Σ weight · value over the pixel's cells, for one block of channels.

    ``blocks`` (3, n_blocks) contains the head of each block of channels, its first channel, and one
    past its last; with MEAN, weights are averaged over all heads.
    """
    x, live, first, stop = _pixels(width, columns, h, w, BLOCK)
    rest = tl.program_id(0) // tl.cdiv(width, BLOCK)
    block, rest = rest % n_blocks, rest // n_blocks
    y, b = rest % height, (rest // height).to(tl.int64)
    head = tl.load(blocks + block)
    c = tl.load(blocks + n_blocks + block) + tl.arange(0, BC)
    kept = c < tl.load(blocks + 2 * n_blocks + block)
    c = c.to(tl.int64)
    d = tl.arange(0, D)
    mask = live[:, None] & (d < depth)[None, :]
    at = queries + b * qb + y.to(tl.int64) * qy + (x * qx)[:, None] + (d * qd)[None, :]
    low, high = tl.min(first, 0), tl.max(stop, 0)
    acc = tl.zeros([BLOCK, BC], tl.float32)
    for r in range(tl.load(rows + y), tl.load(rows + height + y)):
        for start in range(low, high, CELLS):
            j = start + tl.arange(0, CELLS)
            seen = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
            weight = tl.zeros([BLOCK, CELLS], tl.float32)
            for index in range(HEADS if MEAN else 1):
                n = index if MEAN else head
                query = tl.load(at + n * depth * qd, mask=mask, other=0.0).to(tl.float32)
                key = keys + b * kb + n * depth * kd
                logits = _products(query, key, r, j, seen, depth, kd, ky, kx, scale, D)
                norm = tl.load(norms + ((b * HEADS + n) * height + y) * width + x,
                               mask=live, other=0.0)  # fmt: skip
                weight += tl.exp(logits - norm[:, None])
            if MEAN:
                weight = weight * (1.0 / HEADS)
            inside = (j < w)[:, None] & kept[None, :]
            value = values + b * vb + r * vy + (j * vx)[:, None] + (c * vc)[None, :]
            value = tl.load(value, mask=inside, other=0.0).to(tl.float32)
            acc += tl.dot(weight, value, input_precision="ieee")
    to = out + b * ob + y.to(tl.int64) * oy + (x * ox)[:, None] + (c * oc)[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & kept[None, :])
