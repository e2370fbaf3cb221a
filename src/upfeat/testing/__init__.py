"""Conformance suites: one call tests an upsampler, a backbone or a backend that a user has written.

Each suite checks every property that the library relies on and returns the names of the properties
that hold. If a property does not hold, the suite raises :class:`AssertionError` with the property's
name and the measured error. The suites need only PyTorch and work in any test runner.

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
