"""Photographs, a backbone and settings that train in a fraction of a second."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from upfeat import WrappedBackbone
from upfeat.training import TrainConfig

SIZE = 32


def write_photographs(folder, count=10, size=(40, 48)):
    """Blotches of colour, in JPEG and PNG by turns."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 255, (5, 6, 3)).astype(np.uint8)
        image = Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return folder


class Cells(nn.Module):
    """Six channels of 8×8 cells."""

    def __init__(self, channels=6, stride=8, seed=0):
        super().__init__()
        self.convolution = nn.Conv2d(3, channels, stride, stride)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.convolution.weight.normal_(0, 0.1, generator=generator)
            self.convolution.bias.zero_()

    def forward(self, x):
        return self.convolution(x).tanh()


def small_backbone(**options):
    return WrappedBackbone(Cells(**options), probe_size=SIZE)


def small_config(out, **changes):
    settings = {
        "upsampler": "jbu_stack",
        "upsampler_options": {"radius": 1, "n_stages": 2},
        "source_size": None,
        "steps": 6,
        "batch_size": 2,
        "views": 2,
        "size": SIZE,
        "max_pad": 4,
        "projection_dim": 4,
        "crf_weight": 0,  # its thousand points cost more than all the rest
        "downsampler": "attention",
        "standardize": False,
        "colour_jitter": 0,
        "max_zoom": 2,
        "zoom_probability": 0.5,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "clip_steps": 1,
        "checkpoint_every": 2,
        "validation_images": 2,
        "validate_every": 3,
        "out": out,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


def weights(folder):
    return (folder / "upsampler" / "model.safetensors").read_bytes()


def log(folder):
    return (folder / "losses.jsonl").read_text()
