"""Conformance suites: one line tests an upsampler, a backbone or a backend of one's own.

Each suite runs every property that the library relies on and raises :class:`AssertionError` with
the property's name and what it found; it returns the names of the properties that hold. Nothing but
PyTorch is needed, so they serve in any test runner.

Example:
    >>> import upfeat
    >>> from upfeat.testing import check_upsampler
    >>> "windows" in check_upsampler(upfeat.Bilinear)
    True
"""

from upfeat.testing.backbones import check_backbone
from upfeat.testing.operators import check_backend
from upfeat.testing.upsamplers import check_upsampler

__all__ = ["check_backbone", "check_backend", "check_upsampler"]
