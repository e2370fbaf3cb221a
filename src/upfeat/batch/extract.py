"""Features of a set of images into a folder: one file for each, exactly once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.batch.items import Damaged, Item, content_hash, list_items
from upfeat.batch.ledger import Ledger
from upfeat.failures import failure_reason
from upfeat.features import UpsampledFeatures
from upfeat.heads import SavedHead, describe_backbone
from upfeat.locks import hold
from upfeat.model import FeatUp
from upfeat.storage import write_tensors
from upfeat.upsamplers import Upsampler

KINDS = ("lazy", "features", "head")
_AHEAD = 4
"""Images decoded before they are needed, and files that wait to be written."""

OnItem = Callable[[str, int], None]
"""Is told the key of an item and how many are through."""


@dataclass(frozen=True)
class Extraction:
    """What is made of every image.

    Attributes:
        kind: "lazy", coarse features and the image, from which any part of the full map is made
            when it is read (about a hundredth of its size); "features", the full map; "head", what
            a linear head says at every pixel.
        size: shorter side that images are brought to, pixels; ``None`` for their own.
        dtype: of stored maps, "float16" or "float32".
        head: for "head".
    """

    kind: str = "lazy"
    size: int | None = None
    dtype: str = "float16"
    head: SavedHead | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: one is out of range.
        """
        if self.kind not in KINDS:
            raise ValueError(f'kind="{self.kind}" must be one of {", ".join(KINDS)}')
        if (self.kind == "head") != (self.head is not None):
            raise ValueError(f'kind="{self.kind}" and head={self.head!r} do not go together')
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f'dtype="{self.dtype}" must be float16 or float32')

    def settings(self, model: FeatUp) -> dict[str, Any]:
        """All that decides results beside the images, as JSON values."""
        from upfeat.evaluation.provenance import digest

        head = self.head
        return {
            "upfeat_version": __version__,
            "kind": self.kind,
            "size": self.size,
            "dtype": self.dtype,
            "backbone": describe_backbone(model.backbone),
            "upsampler": {
                "name": model.upsampler.name,
                "config": model.upsampler.config(),
                "weights": digest(model.upsampler),
            },
            "head": None
            if head is None
            else {"names": head.names, "weight": content_hash(head.weight.numpy())},
        }


@dataclass
class Summary:
    """What became of a set.

    Attributes:
        made: items that were computed.
        kept: items that were there already.
        failures: key and reason of those that cannot be had.
    """

    made: int = 0
    kept: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def extract(
    model: FeatUp,
    sources: Sequence[str | Path],
    folder: str | Path,
    extraction: Extraction,
    *,
    overwrite: bool = False,
    on_item: OnItem | None = None,
) -> Summary:
    """Compute features of every image of a set.

    Each gets a file ``KEY.safetensors``; ``manifest.json`` lists them with their hashes, and bad
    ones with reasons. A run that was cut off goes on where it stopped, and its result is the same,
    byte for byte. Images are decoded, computed and written at the same time.

    Args:
        model: backbone and upsampler.
        sources: see :func:`upfeat.batch.items.list_items`.
        folder: where results go.
        extraction: what is made of every image.
        overwrite: replace what was made with other settings.
        on_item: is told of progress.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: the folder holds features of other settings, or is being written by another
            process.
        OSError: the disk is full or cannot be written; what is done is kept.
    """
    folder = Path(folder)
    ledger = Ledger(folder, extraction.settings(model), overwrite=overwrite)
    summary = Summary()
    tell = on_item or (lambda key, through: None)
    with hold(folder), ThreadPoolExecutor(_AHEAD) as decoders, ThreadPoolExecutor(1) as writer:
        writing: deque[tuple[dict[str, Any], Future[None]]] = deque()
        try:
            pieces = _decoded(model, sources, extraction, ledger, decoders, summary)
            for through, (entry, pixels) in enumerate(pieces, start=1):
                if pixels is not None:
                    save = _compute(model, pixels, extraction)
                    path = folder / entry["file"]
                    writing.append((entry, writer.submit(_write, save, path)))
                    summary.made += 1
                elif "error" in entry:
                    ledger.record(entry)
                while len(writing) > (_AHEAD if pixels is not None else 0):
                    _settle(writing, ledger)
                tell(entry["key"], through)
            while writing:
                _settle(writing, ledger)
        finally:
            ledger.close()
        ledger.finish()
    return summary


def _settle(writing: deque[tuple[dict[str, Any], Future[None]]], ledger: Ledger) -> None:
    entry, done = writing.popleft()
    done.result()
    ledger.record(entry)


def _write(save: Callable[[Path], None], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path)


def _decoded(
    model: FeatUp,
    sources: Sequence[str | Path],
    extraction: Extraction,
    ledger: Ledger,
    pool: ThreadPoolExecutor,
    summary: Summary,
) -> Iterator[tuple[dict[str, Any], Tensor | None]]:
    """Every item's entry, with its pixels where it is to be computed."""
    waiting: deque[tuple[dict[str, Any], Future[Tensor] | None]] = deque()

    def ready() -> tuple[dict[str, Any], Tensor | None]:
        entry, future = waiting.popleft()
        if future is None:
            return entry, None
        try:
            return entry, future.result()
        except Exception as error:
            reason = failure_reason(error)
            if reason is None:
                raise
            failed = {"key": entry["key"], "sha256": entry["sha256"], "error": reason}
            summary.failures.append((entry["key"], reason))
            return failed, None

    for item in list_items(sources):
        waiting.append(_begin(item, model, extraction, ledger, pool, summary))
        if len(waiting) > _AHEAD:
            yield ready()
    while waiting:
        yield ready()


def _begin(
    item: Item | Damaged,
    model: FeatUp,
    extraction: Extraction,
    ledger: Ledger,
    pool: ThreadPoolExecutor,
    summary: Summary,
) -> tuple[dict[str, Any], Future[Tensor] | None]:
    """Start to decode an item, unless it is done or cannot be read."""
    if isinstance(item, Damaged):
        summary.failures.append((item.key, item.reason))
        return {"key": item.key, "error": item.reason}, None
    try:
        content = item.read()
    except OSError as error:
        reason = failure_reason(error) or str(error)
        summary.failures.append((item.key, reason))
        return {"key": item.key, "error": reason}, None
    entry = {
        "key": item.key,
        "sha256": content_hash(content),
        "file": f"{item.key}.safetensors",
    }
    if ledger.entries.get(item.key) == entry and (ledger.folder / entry["file"]).is_file():
        summary.kept += 1
        return entry, None
    return entry, pool.submit(model.preprocess, content, extraction.size)


def _compute(model: FeatUp, x: Tensor, extraction: Extraction) -> Callable[[Path], None]:
    """Make what is stored of one image; return what stores it."""
    with torch.inference_mode():
        lazy = model.lazy(x)
        if extraction.kind == "lazy":
            return lazy.save
        dtype = getattr(torch, extraction.dtype)
        if extraction.head is None:
            stored = lazy.full(dtype)[0]
        else:
            head = extraction.head
            stored = lazy.project(head.weight.to(x), head.bias.to(x))[0].to(dtype)
        stored = stored.cpu().contiguous()
    facts = {"format": "upfeat-features", "upfeat_version": __version__, "kind": extraction.kind}
    return lambda path: write_tensors(path, {"features": stored}, facts)


def read_extracted(path: str | Path, upsampler: Upsampler) -> UpsampledFeatures:
    """Read lazy features of one item; the whole map, points, crops and heads are made from them.

    Args:
        path: ``KEY.safetensors``.
        upsampler: the one that they were made with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    return UpsampledFeatures.load(path, upsampler)
