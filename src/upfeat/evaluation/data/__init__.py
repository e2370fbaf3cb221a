"""Photographs with labels or depth: listed, checked, resized, and kept with their features."""
