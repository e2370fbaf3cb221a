# pyright: basic, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201
"""Masks of Triton kernels. Importing this module imports Triton."""

import triton
import triton.language as tl


@triton.jit
def both(mask, condition):
    """``mask & condition`` for one condition, of which Triton 3.9's interpreter makes integers."""
    return tl.where(condition, mask, False)
