"""Data of evaluations: listing, checks and preparation of photographs with labels or depth."""
