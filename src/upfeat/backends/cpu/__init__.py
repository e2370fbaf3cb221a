"""The compiled backend for processors: C++ from ``csrc/``, called through ctypes."""
