"""Implicit features, one image's features as a function of the place: fields, fits and files."""
