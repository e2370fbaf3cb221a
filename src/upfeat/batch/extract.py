"""Extraction of a set of images into a folder with one file for each image."""

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
from upfeat.bounds import check_callback, flag, instance, path_of, paths_of
from upfeat.engines import Engine, map_with_ray, map_with_threads
from upfeat.failures import failure_reason
from upfeat.features import UpsampledFeatures
from upfeat.locks import hold_folder, lock_file
from upfeat.machine import available_memory, parse_memory, readable
from upfeat.model import FeatUp
from upfeat.outputs import Inputs, file_digest, unified
from upfeat.storage import sweep
from upfeat.upsamplers import Upsampler

LOCAL = Engine()

OnItem = Callable[[str, int], None]
"""Callback (key, count) after each item: the item's key and the number of items processed."""


@dataclass
class Summary:
    """Outcome of an extraction.

    Attributes:
        made: number of items computed.
        kept: number of items whose files existed already.
        failures: (key, reason) of each item that failed.
    """

    made: int = 0
    kept: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def extract(
    model: FeatUp,
    sources: str | Path | Sequence[str | Path],
    folder: str | Path,
    extraction: Extraction,
    *,
    engine: Engine = LOCAL,
    overwrite: bool = False,
    max_memory: str | int | None = None,
    on_item: OnItem | None = None,
) -> Summary:
    """Compute features of every image of a set and write them to a folder.

    Each image gets a file ``KEY.safetensors``; ``manifest.json`` lists all files with their hashes,
    and the images that failed with reasons. An interrupted run continues where it stopped. The
    result is the same, byte for byte, for every engine and number of workers. A worker decodes,
    computes and writes one image at a time, so with several workers these steps overlap.

    Args:
        model: backbone and upsampler.
        sources: folders and files, one or several; see :func:`upfeat.batch.items.list_items`.
        folder: folder of the results; made if it does not exist.
        extraction: kind and settings of each image's result.
        engine: where images are processed; workers of a cluster must reach ``folder``.
        overwrite: replace results that were made with other settings.
        max_memory: memory bound of each process, as "2GB" or in bytes; ``None`` for the machine's
            memory. An image waits until the images before it leave enough; an image that exceeds
            the bound alone fails.
        on_item: called after each image; see :data:`OnItem`.

    Returns:
        Numbers of images computed and kept, and the failures.

    Raises:
        FileNotFoundError: a source does not exist.
        TypeError: an argument has another type.
        ValueError: the folder contains results of other settings, or another process is writing
            it; or ``max_memory`` is no amount, or less than the process uses already.
        OSError: the disk is full or cannot be written; finished results are kept.
    """
    folder, sources = path_of("folder", folder), paths_of("sources", sources)
    instance("model", model, FeatUp, "give a model, as upfeat.load() makes one")
    instance("extraction", extraction, Extraction, 'give an Extraction, as Extraction("lazy")')
    instance("engine", engine, Engine, 'give an Engine, as Engine("local", workers=2)')
    check_callback("on_item", on_item)
    overwrite = flag("overwrite", overwrite)
    summary = Summary()
    tell = on_item or (lambda key, through: None)
    bound = None if max_memory is None else parse_memory(max_memory)
    with hold_folder(folder):
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
            # An explicit close: images in progress must end before the folder's lock is released.
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
    """Remove temporary files of processes that were killed while writing."""
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
    """Create the makers of one process's workers, which share one memory budget."""
    shared = {
        "overwrite": overwrite,
        "budget": _budget(bound),
        "activations": partial(activation_bytes, model.backbone),
    }
    return [
        Maker(replica, extraction, folder, inputs, **shared) for replica in replicate(model, count)
    ]


def _budget(bound: int | None) -> Budget:
    """Create the memory budget for images: the bound less memory in use, or most of free memory.

    Raises:
        ValueError: the process uses more than its bound already.
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
    """Yield entry and content of every item that is not done; items that fail have no content."""
    # The lock's file is known by this name, too, where the system ignores case.
    alike: set[str] | None = set() if lock_file(ledger.folder).with_name(".LOCK").exists() else None
    for item in list_items(sources):
        if isinstance(item, Damaged):
            yield {"key": item.key, "error": item.reason}, None
            continue
        if alike is not None:
            if unified(item.key) in alike:
                reason = "another item has this name but for case; here their files are the same"
                yield {"key": item.key, "error": reason}, None
                continue
            alike.add(unified(item.key))
        try:
            content = item.read()
        # A list may contain names that are no image files, or are of files beyond the memory.
        except (OSError, ValueError, MemoryError) as error:
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
    """Return whether an item is recorded, and its file exists as recorded.

    Files that were changed after the record are hashed; of the others, the length is compared.
    """
    before = ledger.entries.get(entry["key"], {})
    path = ledger.folder / entry["file"]
    if before.get("file") != entry["file"] or not path.is_file():
        return False
    found, whole = path.stat(), before.get("size", 0)
    same = found.st_size == whole
    if same and found.st_mtime_ns > ledger.recorded_ns:
        same = file_digest(path) == before.get("file_sha256")
    if not same and found.st_size <= whole:
        path.unlink()  # a recorded file that a power cut has truncated, or that is damaged
    return same and entry.items() <= before.items()


def read_extracted(path: str | Path, upsampler: Upsampler) -> UpsampledFeatures:
    """Read the lazy features of one item, from which the whole map, points or crops are computed.

    Args:
        path: path of the item's file, ``KEY.safetensors``.
        upsampler: the upsampler that the features were extracted with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file contains no lazy features, or was made with another upsampler.
    """
    return UpsampledFeatures.load(path, upsampler)
