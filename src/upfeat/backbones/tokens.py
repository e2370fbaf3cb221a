"""Conversion of a transformer's tokens to a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.bounds import shown, whole
from upfeat.types import Size

_MOST_PREFIX_TOKENS = 16
"""Largest number of class and register tokens that is inferred without being given."""


def tokens_to_grid(tokens: Tensor, grid_size: Size, prefix_tokens: int | None = None) -> Tensor:
    """Arrange the tokens of cells as a feature map; prefix tokens are dropped.

    Args:
        tokens: (B, N, C): prefix tokens (class, registers), then one token for each cell, row by
            row.
        grid_size: (h, w) of the map.
        prefix_tokens: number of tokens before the cells' tokens; ``None`` for N − h·w.

    Returns:
        (B, C, h, w).

    Raises:
        TypeError: the tokens are no tensor.
        ValueError: the tokens are not (B, N, C), or do not fill the grid.

    Example:
        >>> import torch
        >>> tokens_to_grid(torch.zeros(1, 1 + 6, 32), (2, 3), prefix_tokens=1).shape
        torch.Size([1, 32, 2, 3])
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens is of type {type(tokens).__name__}; give a tensor")
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be (B, N, C), not {tuple(tokens.shape)}")
    height, width = _sides(grid_size)
    if prefix_tokens is not None and not isinstance(prefix_tokens, torch.SymInt):
        prefix_tokens = whole("prefix_tokens", prefix_tokens, 0)
    count = tokens.shape[1] - height * width
    expected = count if prefix_tokens is None else prefix_tokens
    if count != expected or not count >= 0:
        named = "" if prefix_tokens is None else f"{prefix_tokens} prefix tokens and "
        raise ValueError(
            f"{tokens.shape[1]} tokens are not {named}a grid of {height}×{width}; check grid_size= "
            "and prefix_tokens= (class and register tokens)"
        )
    return tokens[:, count:].mT.unflatten(2, (height, width))


def _sides(grid_size: Size) -> Size:
    """Check and return height and width, which are symbolic integers while a graph is traced."""
    try:
        height, width = grid_size
        if min(height, width) >= 1 and all(isinstance(n, int | torch.SymInt) for n in grid_size):
            return height, width
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"grid_size={shown(grid_size)} must be (height, width), two whole numbers of at least 1"
    )


def square_grid(count: int, side: int, prefix_tokens: int | None = None) -> tuple[int, int] | None:
    """Find the square grid that the tokens of a square image form.

    Args:
        count: number of all tokens.
        side: side of the image, pixels.
        prefix_tokens: number of tokens that are no cells; ``None`` for the smallest number with
            which the cells form a square that divides the image, or failing that, any square.

    Returns:
        Cells to a side and the number of prefix tokens; ``None`` if the tokens form no square.
    """
    prefixes = range(_MOST_PREFIX_TOKENS + 1) if prefix_tokens is None else (prefix_tokens,)
    squares = []
    for prefix in prefixes:
        cells = round(max(count - prefix, 0) ** 0.5)
        if cells >= 1 and cells * cells == count - prefix and cells <= side:
            squares.append((cells, prefix))
    whole = [square for square in squares if side % square[0] == 0 and square[0] > 1]
    return next(iter(whole or squares), None)
