"""Extraction of features from large sets of images; an interrupted run can be resumed."""

from upfeat.batch.extract import extract, read_extracted
from upfeat.batch.extraction import Extraction
from upfeat.batch.items import Item, list_items
from upfeat.engines import Engine

__all__ = ["Engine", "Extraction", "Item", "extract", "list_items", "read_extracted"]
