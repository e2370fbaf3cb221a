"""Photographs brought to the evaluation size with their features and targets, kept on disk.

Every photograph is resized once (to 8 bits a channel, as a saved picture would be) and goes through
the backbone once; all upsamplers share the result. Files are named by what they were made from, so
an interrupted run goes on where it stopped and a changed input is never mistaken for the old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import machine
from upfeat.backbones import Backbone
from upfeat.evaluation.data.folders import IGNORE_INDEX, Dataset, Problem, Sample
from upfeat.failures import failure_reason
from upfeat.provenance import identify_backbone, source_digest
from upfeat.storage import read_tensors, write_tensors

DECISIVE = (__name__, "upfeat.evaluation.data.layouts")
"""Modules that decide what a prepared image is, with all that they import."""

OnStep = Callable[[str, int, int], None]
"""Told of progress: what is being done, how many are done, of how many."""


@dataclass(frozen=True)
class Prepared:
    """One photograph ready to be evaluated.

    Attributes:
        name: of the sample.
        image: (3, H, W) uint8.
        features: (C, h, w) float32, of that image.
        target: (H, W) class indices or depths at the image's size; ``None`` where there are none.
    """

    name: str
    image: Tensor
    features: Tensor
    target: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def label(self) -> Tensor:
        """The target, which must be there."""
        assert self.target is not None
        return self.target


@dataclass(frozen=True)
class PreparedSet:
    """Prepared photographs on disk, read one at a time.

    Attributes:
        names: of the samples.
        files: one for each.
        device: where tensors are put.
    """

    names: list[str]
    files: list[Path]
    device: torch.device

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Prepared:
        tensors, _ = read_tensors(self.files[index])
        there = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return Prepared(self.names[index], there["image"], there["features"], there.get("target"))

    def __iter__(self) -> Iterator[Prepared]:
        return (self[index] for index in range(len(self)))

    @property
    def digest(self) -> str:
        """Digest of the names and the content of all of them: both decide scores."""
        listed = zip(self.names, (path.stem for path in self.files), strict=True)
        return hashlib.sha256(json.dumps(list(listed)).encode()).hexdigest()


def normalised(image: Tensor, backbone: Backbone) -> Tensor:
    """(3, H, W) uint8 -> (1, 3, H, W) as the backbone takes it."""
    return (image[None].float() / 255 - backbone.mean) / backbone.std


def named_generator(seed: int, name: str) -> torch.Generator:
    """Randomness that depends on a seed and a name, not on the order of work."""
    found = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(found[:7], "big"))


def prepare(
    dataset: Dataset,
    samples: list[Sample],
    backbone: Backbone,
    size: int,
    cache: Path,
    *,
    label: str,
    on_step: OnStep | None = None,
) -> PreparedSet:
    """Prepare samples, or find them prepared; those that cannot be are named in the problems.

    Args:
        dataset: knows how to read them; its ``problems`` grow.
        samples: of one split.
        backbone: makes the features.
        size: length of the shorter side, pixels.
        cache: existing folder for the files.
        label: what progress calls this.
        on_step: is told of progress.

    Raises:
        OSError: ``cache`` cannot be written.
    """
    device = backbone.mean.device
    made_by = f"{identify_backbone(backbone)}|{device.type}|{source_digest(*DECISIVE)}"
    names, files = [], []
    for done, sample in enumerate(samples):
        if on_step is not None:
            on_step(label, done, len(samples))
        try:
            content = hashlib.sha256(dataset.identify(sample)).hexdigest()
            recipe = (
                f"{content}|{dataset.name}|{dataset.classes}|{dataset.reading}|{size}|{made_by}"
            )
            path = cache / f"{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.safetensors"
            known = read_whole(path) is not None
            tensors = None if known else _prepare_one(dataset, sample, backbone, size)
        except Exception as error:
            reason = failure_reason(error)
            if reason is None:
                raise
            dataset.problems.append(Problem(sample.name, _without_paths(reason, sample)))
            continue
        if tensors is not None:  # a disk that cannot be written is no sample's fault
            write_tensors(path, tensors, {"sample": sample.name})
        names.append(sample.name)
        files.append(path)
    if on_step is not None:
        on_step(label, len(samples), len(samples))
    return PreparedSet(names, files, device)


def read_whole(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file of the cache; ``None`` where it is missing or not whole."""
    try:
        return read_tensors(path)[0]
    except (FileNotFoundError, ValueError):
        return None


def _prepare_one(
    dataset: Dataset, sample: Sample, backbone: Backbone, size: int
) -> dict[str, Tensor]:
    pixels = dataset.read_image(sample)
    read = dataset.read_target(sample)
    if read is not None and tuple(read.shape) != tuple(pixels.shape[1:]):
        raise ValueError(
            f"the label is {read.shape[0]}×{read.shape[1]} pixels but the image "
            f"{pixels.shape[1]}×{pixels.shape[2]} (height×width)"
        )
    # What upsamplers will make of it counts too: five copies of a channel at most, and the network.
    own = (pixels.shape[1], pixels.shape[2])
    machine.check_fits(sample.image, own, size, 20 * backbone.embed_dim + 400)
    with torch.no_grad():
        x = backbone.denormalize(backbone.preprocess(pixels, size, align=True)) * 255
        image = x[0].round().to(torch.uint8)  # (3, H, W)
        features = backbone(normalised(image, backbone))[0]
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{backbone.name} gives features that are not finite")
    tensors = {"image": image.contiguous(), "features": features.float().contiguous()}
    if read is not None:
        tensors["target"] = _resize_target(torch.from_numpy(read), (image.shape[1], image.shape[2]))
    return tensors


def _resize_target(target: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) -> size, each pixel the value at its centre: indices cannot be averaged."""
    resized = F.interpolate(target[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    known = resized != IGNORE_INDEX if target.dtype == torch.uint8 else torch.isfinite(resized)
    if int(known.sum()) < 2:
        raise ValueError("fewer than two labelled pixels remain at the evaluation size")
    return resized.to(target.dtype).contiguous()


def _without_paths(reason: str, sample: Sample) -> str:
    for path in (sample.image, sample.target):
        reason = reason.removeprefix(f"{path}: ")
    return reason
