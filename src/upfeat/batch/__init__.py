"""Features of large sets of images: every item once, whatever happens in between."""

from upfeat.batch.engines import Engine
from upfeat.batch.extract import extract, read_extracted
from upfeat.batch.extraction import Extraction
from upfeat.batch.items import Item, list_items

__all__ = ["Engine", "Extraction", "Item", "extract", "list_items", "read_extracted"]
