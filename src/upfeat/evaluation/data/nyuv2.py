"""The labelled part of NYUv2, in the file that its authors distribute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from upfeat.bounds import indices
from upfeat.evaluation.data.folders import Dataset, Sample, existing, split_randomly
from upfeat.evaluation.data.targets import checked_depth
from upfeat.failures import one_line
from upfeat.optional import import_optional
from upfeat.types import times

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FILE = "nyu_depth_v2_labeled.mat"
_SPLITS = "splits.mat"
_FIELD_OF_VIEW = 63.3  # degrees: 640 pixels at a focal length of 518.9 pixels


def read_nyuv2(folder: Path, split_seed: int) -> Dataset:
    """Read the labelled part of NYUv2; see :mod:`upfeat.evaluation.data.layouts`."""
    path = existing(folder / _FILE)
    h5py = import_optional("h5py", f"{path}: is an HDF5 file; to read it, pip install h5py")
    try:
        file = h5py.File(path, "r")
        images, depths = file["images"], file["depths"]
        count, shape, depth_shape = len(images), tuple(images.shape), tuple(depths.shape)
        fits = images.dtype == np.uint8 and depths.dtype.kind == "f" and shape[1] == 3
    except Exception as error:  # h5py trusts the file, so any error can follow
        raise ValueError(f"{path}: not the labelled NYUv2 file ({one_line(error)})") from None
    if depth_shape[:1] != shape[:1]:
        raise ValueError(f"{path}: holds {count} images but {depth_shape[0]} depth maps")
    if not fits or len(shape) != 4 or depth_shape[1:] != shape[2:]:
        raise ValueError(
            f"{path}: not the labelled NYUv2 file: its images are {times(shape)} of "
            f"{images.dtype}, its depths {times(depth_shape)} of {depths.dtype}"
        )

    # MATLAB stores columns first: (N, 3, W, H) and (N, W, H).
    def image(sample: Sample) -> Tensor:
        pixels = np.ascontiguousarray(images[sample.index].transpose(0, 2, 1))
        return torch.from_numpy(pixels).float() / 255

    def depth(sample: Sample) -> NDArray[np.float32]:
        return checked_depth(np.ascontiguousarray(depths[sample.index].T), 1.0)

    def identify(sample: Sample) -> bytes:
        return images[sample.index].tobytes() + depths[sample.index].tobytes()

    samples = [Sample(f"{index + 1:04d}", path, path, index) for index in range(count)]
    if (folder / _SPLITS).is_file():
        train, test = _read_split(folder / _SPLITS, samples)
    else:
        train, test = split_randomly(samples, seed=split_seed)
    return Dataset(
        "nyuv2", train, test, [], depth, image, identify=identify, field_of_view=_FIELD_OF_VIEW
    )


def _read_split(path: Path, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Read the official split: image numbers from 1, in a file of MATLAB's older format."""
    matlab = import_optional(
        "scipy.io.matlab",
        f"{path}: is a MATLAB file; to read it, pip install scipy; or remove it, for a random "
        "split",
    )
    try:
        content = matlab.loadmat(path)
        listed = [sorted(content[name].flatten().tolist()) for name in ("trainNdxs", "testNdxs")]
    except Exception as error:  # SciPy trusts the file's header, so any error can follow
        raise ValueError(f"{path}: not the official split of NYUv2 ({one_line(error)})") from None
    train, test = (indices(numbers, 1, len(samples)) for numbers in listed)
    if not train or not test or len({*train, *test}) < len(train) + len(test):
        raise ValueError(
            f"{path}: not the official split of NYUv2: it must list images 1 to {len(samples)}, "
            "each once at most"
        )
    return [samples[number - 1] for number in train], [samples[number - 1] for number in test]
