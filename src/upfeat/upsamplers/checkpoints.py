"""Loading of published upsamplers from the checkpoint files of their authors.

The upsampler in a file is recognised by the names of the tensors, whatever the file's name. Only
tensors are read; code in a file is never run. :func:`write_checkpoint` converts such a file to
safetensors, with a record of its source.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.bounds import path_of, shown
from upfeat.normalization import IMAGENET
from upfeat.storage import read_tensors, write_tensors
from upfeat.strict_json import parse_object
from upfeat.tensor_checks import fault_in_memory
from upfeat.upsamplers.anyup import AnyUp
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.blueprint import build
from upfeat.upsamplers.featup_checkpoint import featup_state
from upfeat.upsamplers.jafar import JAFAR
from upfeat.upsamplers.jbu import JBUStack
from upfeat.upsamplers.layouts import LAYOUTS, SHARED, Layout
from upfeat.upsamplers.naf import NAF
from upfeat.upsamplers.tensor_files import file_digest, is_safetensors, load_pickled
from upfeat.upsamplers.uplift import UPLiFT

logger = logging.getLogger(__name__)

_FORMAT = "upfeat-upsampler-1"


_FEATUP = ("FeatUp", "mhamilton723/FeatUp", "MIT")
_FEATUP_MARK = "upsampler.up1.range_temp"


def load_checkpoint(path: str | Path, *, sha256: str | None = None) -> Upsampler:
    """Read an upsampler, recognised by its tensors' names, from a file; in eval mode and frozen.

    The method and the licence are logged at INFO level and stored in the upsampler's ``origin``.

    Args:
        path: a PyTorch or safetensors file with AnyUp, JAFAR, NAF, UPLiFT or FeatUp as published,
            or a file that :func:`write_checkpoint` wrote.
        sha256: expected SHA-256 of the file, 64 hexadecimal digits; ``None`` for no check.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another hash, is incomplete, contains more than tensors or none of
            these upsamplers, or some tensors are missing, of other shapes, or not finite.
    """
    path, expected = Path(path), None if sha256 is None else _hash(sha256)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    digest = file_digest(path)
    if expected not in (None, digest):
        raise ValueError(
            f"{path}: its sha256 is {digest}, not {expected}; it is another file than the one "
            "expected, or a damaged one"
        )
    content, facts = read_tensors(path) if is_safetensors(path) else (load_pickled(path), {})
    if facts.get("format") == _FORMAT:
        upsampler, about = _own(path, content, facts)
    else:
        upsampler, about = _published(path, content)
    size = sum(parameter.numel() for parameter in upsampler.parameters())
    upsampler.origin = f"{about}; {size:,} parameters; {path.name}, sha256 {digest}"
    logger.info("%s: %s", path, upsampler.origin)
    return upsampler.eval().requires_grad_(False)


def _hash(sha256: str) -> str:
    """Check that an argument is a hash, as ``sha256sum`` prints it in small letters."""
    text = str(sha256).strip().lower()
    if re.fullmatch("[0-9a-f]{64}", text) is None:
        raise ValueError(f"sha256={shown(sha256)} must be 64 hexadecimal digits")
    return text


def write_checkpoint(
    source: str | Path, target: str | Path, *, sha256: str | None = None
) -> dict[str, str]:
    """Convert a checkpoint to a safetensors file that records its provenance.

    Args:
        source: a file that :func:`load_checkpoint` reads.
        target: the file to write; an existing file is replaced whole or not at all.
        sha256: hash that the source must have, as in :func:`load_checkpoint`.

    Returns:
        The metadata of the written file: method, settings, source, licence.

    Raises:
        FileNotFoundError: ``source``, or the folder of ``target``, does not exist.
        ValueError: as :func:`load_checkpoint`, or ``source`` and ``target`` are the same file.
    """
    source, target = path_of("source", source), path_of("target", target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the file that is read; name another one")
    upsampler = load_checkpoint(source, sha256=sha256)
    facts = {
        "format": _FORMAT,
        "upsampler": upsampler.name,
        "config": json.dumps(upsampler.config()),
        "about": str(upsampler.origin).partition(";")[0],
        "source": source.name,
        "source_sha256": file_digest(source),
        "upfeat_version": __version__,
    }
    if is_safetensors(source):  # converted again, it keeps the source of the first conversion
        earlier = read_tensors(source)[1]
        if earlier.get("format") == _FORMAT:
            facts |= {name: earlier.get(name, "") for name in ("source", "source_sha256")}
    state = {name: value.contiguous() for name, value in upsampler.state_dict().items()}
    write_tensors(target, state, facts)
    return facts


def _own(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> tuple[Upsampler, str]:
    """Build an upsampler, and describe it, from a file that :func:`write_checkpoint` wrote."""
    classes: dict[str, type[Upsampler]] = {
        cls.name: cls for cls in (AnyUp, JAFAR, NAF, UPLiFT, JBUStack)
    }
    try:
        cls = classes[facts["upsampler"]]
        config = parse_object(facts["config"], "config")
        # Compare shapes first, on the meta device: a damaged config must not allocate more memory
        # than the file's tensors need.
        empty = build(cls, config, "config", values=False).state_dict()
        for name, tensor in empty.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"{name} is missing or of another shape than its config implies")
        upsampler = build(cls, config, "config")
        if isinstance(upsampler, JBUStack):
            upsampler.mean, upsampler.std = IMAGENET
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its description is damaged ({error!s:.300})") from None
    # The file uses our names; None stands for the whole tensor (see _names).
    names = {name: (name, None) for name in upsampler.state_dict()}
    _fill(path, facts["upsampler"], upsampler, state, names)
    return upsampler, facts.get("about", facts["upsampler"])


def _published(path: Path, content: dict[str, Any]) -> tuple[Upsampler, str]:
    """Build an upsampler, and describe it, from a file with tensors by published names."""
    found = _dictionaries(content)
    models = [model for state in found for model in _models(state)]
    if len(models) > 1:
        labels = ", ".join(model.label for model in models)
        raise ValueError(
            f"{path}: holds {len(models)} upsamplers ({labels}); save one model's state_dict alone"
        )
    if models and models[0].layout is None:
        stack_state, embed_dim = featup_state(path, models[0].tensors)
        upsampler = build(JBUStack, {"embed_dim": embed_dim}, path)
        upsampler.mean, upsampler.std = IMAGENET  # every published stack was trained with it
        names = {name: (name, None) for name in upsampler.state_dict()}
        _fill(path, "FeatUp", upsampler, stack_state, names)
        return upsampler, _describe(*_FEATUP)
    if models:
        layout, tensors = models[0].layout, models[0].tensors
        assert layout is not None
        try:
            with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced
                upsampler = layout.make(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        _fill(path, layout.label, upsampler, tensors, _names(layout, upsampler))
        return upsampler, _describe(layout.label, layout.repository, layout.licence)
    known = ", ".join(["FeatUp", *(layout.label for layout in LAYOUTS)])
    unknown = [name for state in found for name in state]
    raise ValueError(
        f"{path}: none of its {len(unknown)} tensors is one that {known} is known by"
        + (f" (they are {', '.join(unknown[:3])}, …)" if unknown else "")
    )


def _describe(label: str, repository: str, licence: str) -> str:
    return f"{label} (layout of {repository}, whose published weights are {licence})"


class _Model(NamedTuple):
    """An upsampler that was recognised among tensors."""

    label: str
    layout: Layout | None
    """``None`` for FeatUp."""
    tensors: dict[str, Tensor]
    """Tensors by published names."""


def _models(state: dict[str, Tensor]) -> Iterator[_Model]:
    """Upsamplers that one dictionary of tensors contains, each by its mark."""
    if _FEATUP_MARK in state:
        yield _Model(_FEATUP[0], None, state)
    for layout in LAYOUTS:
        for mark in state:
            if f".{mark}".endswith(f".{layout.mark}"):
                prefix = mark.removesuffix(layout.mark)
                tensors = {
                    name.removeprefix(prefix): value
                    for name, value in state.items()
                    if name.startswith(prefix)
                }
                yield _Model(layout.label, layout, tensors)


def _dictionaries(content: dict[str, Any]) -> list[dict[str, Tensor]]:
    """All dictionaries of tensors in a file, outermost first: training scripts nest them."""
    found, waiting, seen = [], [content], set()
    while waiting:
        state = waiting.pop(0)
        if id(state) in seen:  # a pickle may contain itself
            continue
        seen.add(id(state))
        tensors = {
            name: value
            for name, value in state.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        found += [tensors] if tensors else []
        waiting += [value for value in state.values() if isinstance(value, dict)]
    return found


def _names(layout: Layout, upsampler: Upsampler) -> dict[str, tuple[str, int | None]]:
    """Map our names to published names and, for a shared tensor, the number of the third used."""
    names: dict[str, tuple[str, int | None]] = {}
    for ours in upsampler.state_dict():
        theirs = ours
        for pattern, replacement in layout.names.items():
            theirs = re.sub(pattern, replacement, theirs)
        part = None
        if theirs in SHARED:
            part = 0 if ".query." in ours else 1
        names[ours] = (theirs, part)
    return names


def _fill(
    path: Path,
    label: str,
    upsampler: Upsampler,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, tuple[str, int | None]],
) -> None:
    """Copy a file's tensors into an upsampler.

    Args:
        path: the file, for error messages.
        label: name of the method, for error messages.
        upsampler: upsampler to fill.
        tensors: tensors by the names in the file.
        names: by our names, the name in the file and the third that is used (see :func:`_names`).

    Raises:
        ValueError: tensors are missing, of another shape, not finite, or of another model.
    """
    state: dict[str, Tensor] = {}
    faults = []
    for ours, expected in upsampler.state_dict().items():
        theirs, part = names[ours]
        value = tensors.get(theirs)
        shape = tuple(expected.shape)
        if part is not None:
            shape = (3 * shape[0], *shape[1:])
        if value is None:
            faults.append(f"{theirs} is missing")
        elif tuple(value.shape) != shape:
            faults.append(f"{theirs} is {tuple(value.shape)}, not {shape}")
        elif (fault := fault_in_memory(value)) is not None:
            faults.append(f"{theirs} {fault}")
        elif not bool(torch.isfinite(value).all()):
            faults.append(f"{theirs} holds NaN or infinity")
        else:
            state[ours] = value.float() if part is None else value.float().chunk(3)[part]
    if faults:
        faults = list(dict.fromkeys(faults))
        rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{path}: not {label} as published: {'; '.join(faults[:3])}{rest}")
    unread = sorted(set(tensors) - {theirs for theirs, _ in names.values()})
    # Counters of batch norms have no effect.
    unread = [name for name in unread if not name.endswith(".num_batches_tracked")]
    # Unread tensors of cross_decode act on the values of the attention, which are not used here;
    # any other unread tensor belongs to another model.
    strangers = [name for name in unread if not name.startswith("cross_decode.")]
    if strangers:
        rest = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise ValueError(
            f"{path}: not {label} as published: it also holds {strangers[0]}{rest}; two "
            "checkpoints in one file? Save one model's state_dict alone"
        )
    if unread:
        logger.info("%s: left unread: %s", path, ", ".join(unread))
    try:
        upsampler.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
