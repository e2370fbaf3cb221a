"""Files of linear heads, which name the backbone whose features the head was trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.backbones import Backbone
from upfeat.bounds import instance, path_of, shown
from upfeat.provenance import digest
from upfeat.storage import read_tensors, write_tensors
from upfeat.strict_json import parse_object
from upfeat.types import shapes_repr

__all__ = [
    "SavedHead",
    "describe_backbone",
    "load_head",
    "save_head",
]

FORMAT = "upfeat-head-1"
KINDS = ("classes", "values")


@dataclass(frozen=True, eq=False)
class SavedHead:
    """A linear head with the meaning of its outputs.

    Attributes:
        weight: (K, C) float32.
        bias: (K,) float32.
        names: names of the K outputs.
        kind: "classes" if the outputs are logits, the largest of which is the class, or "values" if
            they are numbers to use directly.
        backbone: :func:`describe_backbone` of the backbone whose features the head was trained on.
        upsampler: name of the upsampler that the head was trained with; others can be used too.
    """

    weight: Tensor
    bias: Tensor
    names: list[str]
    kind: str
    backbone: dict[str, str]
    upsampler: str

    __repr__ = shapes_repr

    def identity(self) -> str:
        """SHA-256 of weight, bias, kind and names."""
        found = hashlib.sha256(json.dumps([self.kind, *self.names]).encode())
        for tensor in (self.weight, self.bias):
            values = tensor.detach().float().cpu().contiguous().numpy()
            found.update(f"{tuple(tensor.shape)}".encode() + values.tobytes())
        return found.hexdigest()

    def check_backbone(self, backbone: Backbone, label: str) -> None:
        """Check that a backbone is the one that the head was trained on.

        Args:
            backbone: backbone whose features the head is to be applied to; its
                :attr:`~upfeat.Backbone.origin` counts.
            label: name of the head, for error messages.

        Raises:
            ValueError: it is another backbone, or has other weights or normalisation.
        """
        now = describe_backbone(backbone.origin)
        other = [name for name in now if self.backbone.get(name) != now[name]]
        if not other and self.weight.shape[1] == backbone.embed_dim:
            return
        if not other:
            raise ValueError(
                f"{label}: a damaged head: its weight is of {self.weight.shape[1]} channels, and "
                f"{backbone.name} has {backbone.embed_dim}"
            )
        if "name" in other:
            raise ValueError(
                f"{label}: was trained on features of {self.backbone.get('name')}, not of "
                f"{backbone.name}; give that backbone, or train a head for this one (upfeat probe)"
            )
        raise ValueError(
            f"{label}: was trained on {backbone.name} with another {', '.join(other)}; train a "
            "head for this one (upfeat probe)"
        )


def describe_backbone(backbone: Backbone) -> dict[str, str]:
    """Properties on which a backbone's features depend, as strings by name.

    Raises:
        TypeError: ``backbone`` is no :class:`upfeat.Backbone`, for example a whole model.
    """
    instance("backbone", backbone, Backbone, "give model.backbone, or load_backbone(…)")
    return {
        "name": backbone.name,
        "embed_dim": str(backbone.embed_dim),
        "stride": str(backbone.stride),
        "normalization": f"{backbone.mean.flatten().tolist()} {backbone.std.flatten().tolist()}",
        "weights": digest(backbone),
    }


def save_head(path: str | Path, head: SavedHead) -> None:
    """Write a head to a safetensors file, completely or not at all.

    Raises:
        OSError: writing failed.
        TypeError: weight or bias is not a tensor, names are no texts, or the backbone is not
            described by texts.
        ValueError: weight, bias and names do not match, a value is NaN or infinite, or there is no
            such kind.
    """
    path = path_of("path", path)
    instance("head", head, SavedHead, "give a SavedHead(weight, bias, names, …)")
    names = head.names if isinstance(head.names, list | tuple) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names={shown(head.names)} must be a list of texts")
    told = head.backbone if isinstance(head.backbone, dict) else {None: None}
    if not all(isinstance(one, str) for one in (*told, *told.values(), head.upsampler)):
        raise TypeError(
            "backbone must be describe_backbone(model.backbone), and upsampler the name of one"
        )
    _check(head, f"{path}: not written", "no head")
    metadata = {
        "format": FORMAT,
        "upfeat_version": __version__,
        "kind": head.kind,
        "names": json.dumps(head.names),
        "backbone": json.dumps(head.backbone, sort_keys=True),
        "upsampler": head.upsampler,
    }
    tensors = {"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}
    write_tensors(path, tensors, metadata)


def load_head(path: str | Path) -> SavedHead:
    """Read a head from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a head, or is damaged.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a head; upfeat probe trains one")
    try:
        names = json.loads(metadata["names"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its names are no list of texts")
        head = SavedHead(
            tensors["weight"],
            tensors["bias"],
            names,
            metadata["kind"],
            parse_object(metadata["backbone"], "backbone"),
            metadata["upsampler"],
        )
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a damaged head ({error!s:.300})") from None
    _check(head, str(path), "a damaged head")
    return replace(head, weight=head.weight.float(), bias=head.bias.float())


def _check(head: SavedHead, label: str, fault: str) -> None:
    weight, bias, names = head.weight, head.bias, head.names
    for name, one in (("weight", weight), ("bias", bias)):
        if not isinstance(one, Tensor):
            raise TypeError(f"{name} is of type {type(one).__name__}; give a tensor")
    fits = weight.dim() == 2 and bias.shape == weight.shape[:1] and len(names) == len(weight) > 0
    if not fits or not weight.is_floating_point() or not bias.is_floating_point():
        raise ValueError(
            f"{label}: {fault}: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, "
            f"{len(names)} names"
        )
    if not bool(torch.isfinite(weight.float()).all() and torch.isfinite(bias.float()).all()):
        raise ValueError(f"{label}: holds NaN or infinity")
    if head.kind not in KINDS:
        raise ValueError(f"{label}: kind={shown(head.kind)} must be classes or values")
