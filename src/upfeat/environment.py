"""Installed versions and runnable backends, for ``upfeat info`` and bug reports."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from upfeat._version import __version__
from upfeat.backbones import list_backbones
from upfeat.backends import dispatch
from upfeat.upsamplers import list_upsamplers

_LIBRARIES = (
    *("numpy", "pillow", "safetensors", "torchvision", "timm", "transformers", "open_clip_torch"),
    *("rasterio", "zarr", "av", "ray", "onnx", "onnxruntime", "gradio"),
)


def describe() -> dict[str, list[str]]:
    """Versions, devices and names of models by section, each section a list of lines."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return {
        "upfeat": [__version__],
        "python": [python],
        "torch": [f"{torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"],
        "libraries": libraries(),
        "devices": devices(),
        "kernels": [
            f"{name}: {'available' if reason is None else reason}"
            for name, reason in dispatch.availability().items()
        ],
        "backbones": list_backbones(),
        "upsamplers": list_upsamplers(),
    }


def libraries() -> list[str]:
    """Versions of the libraries that read images and models; without the optional ones missing."""
    found = []
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def counted(number: int, noun: str) -> str:
    """Number and noun, such as "1 thread" or "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def devices() -> list[str]:
    """Names of the available devices, with their hardware."""
    found = [f"cpu ({torch.backends.cpu.get_cpu_capability()})"]
    found += [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        for index in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
