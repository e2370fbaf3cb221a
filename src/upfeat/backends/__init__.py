"""Implementations of the operators, one module per backend; use ``upfeat.functional``."""
