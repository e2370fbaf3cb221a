"""Features of a set of images into a folder: one file for each, exactly once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from upfeat import machine
from upfeat.activations import activation_bytes
from upfeat.batch.budget import Budget
from upfeat.batch.extraction import Extraction
from upfeat.batch.items import Damaged, content_hash, list_items
from upfeat.batch.ledger import Ledger
from upfeat.batch.maker import Entry, Maker, Task
from upfeat.batch.replicas import replicate
from upfeat.engines import Engine, map_with_ray, map_with_threads
from upfeat.failures import failure_reason
from upfeat.features import UpsampledFeatures
from upfeat.locks import hold
from upfeat.machine import available_memory, parse_memory, readable
from upfeat.model import FeatUp
from upfeat.outputs import Inputs
from upfeat.storage import sweep
from upfeat.upsamplers import Upsampler

LOCAL = Engine()

OnItem = Callable[[str, int], None]
"""Is told the key of an item and how many are through."""


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
    max_memory: str | int | None = None,
    on_item: OnItem | None = None,
) -> Summary:
    """Compute features of every image of a set.

    Each gets a file ``KEY.safetensors``; ``manifest.json`` lists them with their hashes, and bad
    ones with reasons. A run that was cut off goes on where it stopped, and its result is the same,
    byte for byte, whatever the engine and however many its workers. Every worker takes an image
    from decoding to writing, so that all three go on at the same time.

    Args:
        model: backbone and upsampler.
        sources: see :func:`upfeat.batch.items.list_items`.
        folder: where results go.
        extraction: what is made of every image.
        engine: where it is made; workers of a cluster must see ``folder``.
        overwrite: replace what was made with other settings.
        max_memory: that each process may hold, as "2GB" or bytes; ``None`` for what the machine
            has. Images wait for each other, one that is too large alone is listed as bad.
        on_item: is told of progress.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: the folder holds features of other settings, or is being written by another
            process; or ``max_memory`` is no amount, or less than the process holds already.
        OSError: the disk is full or cannot be written; what is done is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    tell = on_item or (lambda key, through: None)
    bound = None if max_memory is None else parse_memory(max_memory)
    with hold(folder):
        _sweep(folder)
        ledger = Ledger(folder, extraction.settings(model), overwrite=overwrite)
        tasks = _tasks(sources, ledger, summary)
        settings = {"overwrite": overwrite, "bound": bound}
        make = partial(_makers, model, extraction, folder, Inputs(sources), **settings)
        if engine.name == "local":
            results = map_with_threads(make(engine.threads), tasks)
        else:
            results = map_with_ray(engine, lambda: make(1)[0], tasks)
        try:
            # Closed, not left to the collector: what is under way ends before the lock is let go.
            with closing(results):
                for entry in results:
                    _note(entry, ledger, summary)
                    tell(entry["key"], summary.made + summary.kept + len(summary.failures))
        finally:
            ledger.close()
            _sweep(folder)
        ledger.finish()
    return summary


def _note(entry: Entry, ledger: Ledger, summary: Summary) -> None:
    ledger.record(entry)
    if "error" in entry:
        summary.failures.append((entry["key"], entry["error"]))
    else:
        summary.made += 1


def _sweep(folder: Path) -> None:
    """Remove what killed processes were writing."""
    for place, _, _ in os.walk(folder):
        sweep(Path(place))


def _makers(
    model: FeatUp,
    extraction: Extraction,
    folder: Path,
    inputs: Inputs,
    count: int,
    *,
    overwrite: bool,
    bound: int | None,
) -> list[Maker]:
    """Makers for the workers of one process, which share its memory."""
    shared = {
        "overwrite": overwrite,
        "budget": _budget(bound),
        "activations": partial(activation_bytes, model.backbone),
    }
    return [
        Maker(replica, extraction, folder, inputs, **shared) for replica in replicate(model, count)
    ]


def _budget(bound: int | None) -> Budget:
    """Bytes that the images of this process may take.

    Raises:
        ValueError: the process holds more than its bound already.
    """
    if bound is None:
        free = available_memory()
        return Budget(math.inf if free is None else 0.9 * free)
    held = machine.resident_memory() or 0
    if held >= bound:
        raise ValueError(
            f'max_memory="{readable(bound)}" is less than the {readable(held)} that the process '
            "holds before the first image; give more"
        )
    return Budget(bound - held)


def _tasks(sources: Sequence[str | Path], ledger: Ledger, summary: Summary) -> Iterator[Task]:
    """Entry and content of every item that is not done."""
    for item in list_items(sources):
        if isinstance(item, Damaged):
            yield {"key": item.key, "error": item.reason}, None
            continue
        try:
            content = item.read()
        except (OSError, ValueError) as error:  # a list may name anything
            yield {"key": item.key, "error": failure_reason(error)}, None
            continue
        entry = {"key": item.key, "sha256": content_hash(content)}
        entry["file"] = f"{item.key}.safetensors"
        if _is_done(entry, ledger):
            summary.kept += 1
        else:
            ledger.begin(item.key)
            yield entry, content


def _is_done(entry: Entry, ledger: Ledger) -> bool:
    """Return whether an item is recorded, and its file there in its whole length."""
    before = ledger.entries.get(entry["key"], {})
    path = ledger.folder / entry["file"]
    if before.get("file") != entry["file"] or not path.is_file():
        return False
    size, whole = path.stat().st_size, before.get("size", 0)
    if size < whole:
        path.unlink()  # what a power cut left of ours
    return size == whole and entry.items() <= before.items()


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
