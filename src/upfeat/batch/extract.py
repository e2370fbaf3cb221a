"""Features of a set of images into a folder: one file for each, exactly once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.batch.engines import Engine, map_with_ray
from upfeat.batch.items import Damaged, content_hash, list_items
from upfeat.batch.ledger import Ledger
from upfeat.failures import failure_reason
from upfeat.features import UpsampledFeatures
from upfeat.heads import SavedHead, describe_backbone
from upfeat.lazy_files import FORMAT as LAZY
from upfeat.locks import hold
from upfeat.marks import FEATURES
from upfeat.model import FeatUp
from upfeat.outputs import Inputs, check_output
from upfeat.provenance import digest
from upfeat.storage import write_tensors
from upfeat.upsamplers import Upsampler

LOCAL = Engine()
KINDS = ("lazy", "features", "head")
_AHEAD = 4
"""Images decoded before they are needed, and files that wait to be written."""

Entry = dict[str, Any]
Save = Callable[[Path], None]
OnItem = Callable[[str, int], None]
"""Is told the key of an item and how many are through."""


@dataclass(frozen=True)
class Extraction:
    """Recipe of the results of every image.

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
    """Outcome of a set.

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
    engine: Engine = LOCAL,
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
        engine: where it is made; workers of a cluster must see ``folder``.
        overwrite: replace what was made with other settings.
        on_item: is told of progress.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: the folder holds features of other settings, or is being written by another
            process.
        OSError: the disk is full or cannot be written; what is done is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    tell = on_item or (lambda key, through: None)
    with hold(folder):
        ledger = Ledger(folder, extraction.settings(model), overwrite=overwrite)
        tasks = _tasks(sources, ledger, summary)
        maker = Maker(model, extraction, folder, Inputs(sources), overwrite=overwrite)
        if engine.name == "local":
            results = maker(tasks)
        else:
            results = map_with_ray(engine, lambda: maker.one, tasks)
        try:
            for entry in results:
                ledger.record(entry)
                if "error" in entry:
                    summary.failures.append((entry["key"], entry["error"]))
                else:
                    summary.made += 1
                tell(entry["key"], summary.made + summary.kept + len(summary.failures))
        finally:
            ledger.close()
        ledger.finish()
    return summary


def _tasks(
    sources: Sequence[str | Path], ledger: Ledger, summary: Summary
) -> Iterator[tuple[Entry, Any]]:
    """Entry and content of every item that is not done."""
    for item in list_items(sources):
        if isinstance(item, Damaged):
            yield {"key": item.key, "error": item.reason}, None
            continue
        try:
            content = item.read()
        except OSError as error:
            yield {"key": item.key, "error": failure_reason(error)}, None
            continue
        entry = {"key": item.key, "sha256": content_hash(content)}
        entry["file"] = f"{item.key}.safetensors"
        if ledger.entries.get(item.key) == entry and (ledger.folder / entry["file"]).is_file():
            summary.kept += 1
        else:
            yield entry, content


class Maker:
    """Makes and writes the files of items."""

    def __init__(
        self,
        model: FeatUp,
        extraction: Extraction,
        folder: Path,
        inputs: Inputs,
        *,
        overwrite: bool = False,
    ) -> None:
        """Keep what makes them, and what must not be written over."""
        self._model, self._extraction, self._folder = model, extraction, folder
        self._inputs, self._overwrite = inputs, overwrite

    def one(self, task: tuple[Entry, Any]) -> Entry:
        """Make one item from beginning to end."""
        return next(self([task]))

    def __call__(self, tasks: Iterable[tuple[Entry, Any]]) -> Iterator[Entry]:
        """Make items while others are decoded and written; yield their entries in order."""
        decoding: deque[tuple[Entry, Future[Tensor] | None]] = deque()
        writing: deque[Future[Entry]] = deque()
        with ThreadPoolExecutor(_AHEAD) as decoders, ThreadPoolExecutor(1) as writer:
            ahead = iter(tasks)
            while True:
                while len(decoding) < _AHEAD and (task := next(ahead, None)) is not None:
                    decoding.append((task[0], self._decode(decoders, *task)))
                if not decoding and not writing:
                    return
                if decoding:
                    entry, pixels = decoding.popleft()
                    writing.append(writer.submit(self._finish, *self._compute(entry, pixels)))
                while writing and (len(writing) > _AHEAD or not decoding):
                    yield writing.popleft().result()

    def _decode(
        self, pool: ThreadPoolExecutor, entry: Entry, content: Any
    ) -> Future[Tensor] | None:
        if "error" in entry:
            return None
        return pool.submit(self._model.preprocess, content, self._extraction.size)

    def _compute(self, entry: Entry, pixels: Future[Tensor] | None) -> tuple[Entry, Save | None]:
        """Return a function that stores an item, or the reason why there is nothing to store."""
        if pixels is None:
            return entry, None
        try:
            return entry, _compute(self._model, pixels.result(), self._extraction)
        except Exception as error:
            reason = failure_reason(error)
            if reason is None:
                raise
            return {"key": entry["key"], "sha256": entry["sha256"], "error": reason}, None

    def _finish(self, entry: Entry, save: Save | None) -> Entry:
        if save is not None:
            path = self._folder / entry["file"]
            kind = LAZY if self._extraction.kind == "lazy" else FEATURES
            try:
                check_output(path, self._inputs, kind, overwrite=self._overwrite)
            except ValueError as error:
                return {"key": entry["key"], "sha256": entry["sha256"], "error": str(error)}
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path)
        return entry


def _compute(model: FeatUp, x: Tensor, extraction: Extraction) -> Save:
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
    facts = {"format": FEATURES, "upfeat_version": __version__, "kind": extraction.kind}
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
