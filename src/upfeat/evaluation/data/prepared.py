"""Photographs resized for an evaluation, stored on disk with their features and targets.

Every photograph is resized once, to 8 bits per channel like a saved picture, and its features are
extracted once for all upsamplers. The name of a file is a digest of everything that it was computed
from. Hence an interrupted run continues where it stopped, and files of changed inputs are not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import machine
from upfeat.backbones import Backbone
from upfeat.evaluation.data.folders import Dataset, Problem, Sample
from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.failures import failure_reason
from upfeat.provenance import identify_backbone, source_digest
from upfeat.storage import read_tensors, write_tensors

DECISIVE = (__name__, "upfeat.evaluation.data.layouts", "upfeat.evaluation.data.videos")
"""Modules, with all their imports, on whose code the content of prepared images depends."""

OnStep = Callable[[str, int, int], None]
"""Callback for progress: name of the work, number of items done, number of all items."""


@dataclass(frozen=True)
class Prepared:
    """One photograph ready to be evaluated.

    Attributes:
        name: name of the sample.
        image: (3, H, W) uint8, the resized photograph.
        features: (C, h, w) float32, coarse features of the image.
        target: (H, W) class indices or depths at the image's size; ``None`` for unlabelled images.
    """

    name: str
    image: Tensor
    features: Tensor
    target: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image, pixels."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def label(self) -> Tensor:
        """Target of a labelled image."""
        assert self.target is not None
        return self.target


@dataclass(frozen=True)
class PreparedSet:
    """Prepared photographs on disk, read one at a time.

    Attributes:
        names: names of the samples.
        files: one file for each sample.
        device: device to which tensors are moved.
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

    def subset(self, indices: Sequence[int]) -> PreparedSet:
        """Return the photographs with the given indices alone."""
        names = [self.names[index] for index in indices]
        return PreparedSet(names, [self.files[index] for index in indices], self.device)

    @property
    def digest(self) -> str:
        """Digest of the names and the contents of all images; scores depend on both."""
        listed = zip(self.names, (path.stem for path in self.files), strict=True)
        return hashlib.sha256(json.dumps(list(listed)).encode()).hexdigest()


def normalised(image: Tensor, backbone: Backbone) -> Tensor:
    """Normalise an image for the backbone: (3, H, W) uint8 -> (1, 3, H, W) float32."""
    return (image[None].float() / 255 - backbone.mean) / backbone.std


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a random generator that depends on a seed and a name, not on the order of work."""
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
    """Prepare samples that are not prepared already; failures are added to the dataset's problems.

    Args:
        dataset: dataset of the samples, which reads them; its ``problems`` are extended.
        samples: samples of one split.
        backbone: backbone that extracts the features.
        size: length of the images' shorter side, pixels.
        cache: existing folder for the files.
        label: name of this work for ``on_step``.
        on_step: called with the progress.

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
        # Outside the try block, because a failure to write is not a problem of the sample.
        if tensors is not None:
            write_tensors(path, tensors, {"sample": sample.name})
        names.append(sample.name)
        files.append(path)
    if on_step is not None:
        on_step(label, len(samples), len(samples))
    return PreparedSet(names, files, device)


def read_whole(path: Path) -> dict[str, Tensor] | None:
    """Read the tensors of a cached file; ``None`` if the file is missing or incomplete."""
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
    # The estimate includes upsampling: at most five copies of the channels, and the network.
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
    """Resize a target (H, W) by nearest neighbour, since class indices cannot be averaged."""
    resized = F.interpolate(target[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    known = resized != IGNORE_INDEX if target.dtype == torch.uint8 else torch.isfinite(resized)
    if int(known.sum()) < 2:
        raise ValueError("fewer than two labelled pixels remain at the evaluation size")
    return resized.to(target.dtype).contiguous()


def _without_paths(reason: str, sample: Sample) -> str:
    for path in (sample.image, sample.target):
        reason = reason.removeprefix(f"{path}: ")
    return reason
