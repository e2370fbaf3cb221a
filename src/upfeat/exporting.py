"""Export of models and upsamplers to files that run without this package: ONNX and PT2."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from upfeat._version import __version__
from upfeat.backbones.libraries import import_library
from upfeat.bounds import MOST_CHANNELS, instance, path_of, whole
from upfeat.guided import Guided
from upfeat.heads import SavedHead, load_head
from upfeat.model import FeatUp
from upfeat.portable.form import FixedForm, Form, form_of
from upfeat.portable.formats import (
    READERS,
    WRITERS,
    check_format,
    quiet_exporter,
    without_questions,
    without_unused,
)
from upfeat.portable.model import PortableModel, PortableUpsampler
from upfeat.provenance import digest, identify_backbone, identify_upsampler
from upfeat.scales import SecondScale
from upfeat.storage import replacing
from upfeat.types import Size
from upfeat.upsamplers import Upsampler
from upfeat.upsamplers.checks import check_output_size
from upfeat.upsamplers.detail import FINER
from upfeat.upsamplers.head import Head

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-4
"""Largest error of a file's output, as a fraction of the output's largest magnitude."""

GIVE_SIZE = "give size=(height, width), --size WIDTHxHEIGHT"
"""Advice for models that cannot be exported for any size, in Python and on the command line."""

_LOG = logging.getLogger("upfeat.export")


def export(
    model: FeatUp | Upsampler,
    path: str | Path,
    *,
    format: str | None = None,
    head: SavedHead | str | Path | tuple[Tensor, Tensor | None] | None = None,
    size: Size | None = None,
    stride: int = 1,
    channels: int | None = None,
) -> dict[str, str]:
    """Write a model to a file that runs with PyTorch or an ONNX run-time, without this package.

    The file accepts any batch size, height and width. It is tested at two sizes other than that of
    the trace, and is kept only if its output agrees with the model's.

    Args:
        model: a model of :func:`upfeat.load`, or an upsampler; on the CPU. A model's file has the
            input ``image``, (B, 3, H, W), normalised with the backbone's mean and std. An
            upsampler's file has the inputs ``features``, (B, C, h, w), and ``guidance``,
            (B, 3, H, W), normalised with the upsampler's mean and std; and, if the upsampler was
            trained on early layers, ``hidden``, (B, D, h', w'), which
            :meth:`upfeat.Backbone.with_hidden` returns.
        path: the file to write, ``.onnx`` or ``.pt2``.
        format: "onnx" or "pt2"; ``None`` to infer it from the suffix of ``path``.
        head: a linear head that ``upfeat probe`` trained, its file, or weight (K, C) and bias (K,);
            the output is then (B, K, …).
        size: (height, width) of the only images that the file accepts, for models that cannot be
            exported for any size; ``None`` for any size.
        stride: image pixels per output pixel, on both axes.
        channels: number C of feature channels, for an upsampler that accepts any number.

    Returns:
        The file's metadata: mean and std, stride, channels, sizes, the largest measured error, and
        names and digests of the backbone, the upsampler and the head.

    Raises:
        FileNotFoundError: the folder or the head's file does not exist.
        ValueError: the format is unknown; a library is not installed (the message names the extra);
            the model cannot be exported (the message has the reason and a fix); or the file's
            output differs from the model's.

    Example::

        facts = upfeat.export(upfeat.load("efficientnet_lite0"), "model.onnx")
        facts["smallest_side"]  # "32"
    """
    path = path_of("path", path)
    kind = check_format(path, format)
    stride = whole("stride", stride)
    channels = whole("channels", channels, 1, MOST_CHANNELS, optional=True)
    if size is not None:
        size = check_output_size(size, "size")
    if kind == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            import_library(library, extra="onnx")
    task = _Task(model, head, size=size, stride=stride, channels=channels)
    facts = {"format": f"upfeat-export-1 {kind}", **task.facts()}
    program = task.trace()
    with replacing(path) as temporary:
        WRITERS[kind](program, temporary, facts, task.names, task.stride)
        error = _measure(task, READERS[kind](temporary))
        facts["largest_error"] = f"{error:.1e}"
    _LOG.info("%s: largest error %s", path, facts["largest_error"])
    return facts


class _Task:
    """One export: the module to trace, example inputs, and the model's output for comparison."""

    def __init__(
        self,
        model: FeatUp | Upsampler,
        head: SavedHead | str | Path | tuple[Tensor, Tensor | None] | None,
        *,
        size: Size | None,
        stride: int,
        channels: int | None,
    ) -> None:
        if not isinstance(model, FeatUp | Upsampler):
            raise TypeError(f"model is a {type(model).__name__}; give what upfeat.load returns")
        self.model, self.size, self.stride = model, size, stride
        self.upsampler = model.upsampler if isinstance(model, FeatUp) else model
        self.head, self.head_facts = _read_head(head, model)
        self.names: list[str] = ["image"] if isinstance(model, FeatUp) else ["features", "guidance"]
        self._check()
        if isinstance(model, FeatUp):
            self.cells, self.channels = model.backbone.stride, model.embed_dim
            self.bands = model.backbone.in_channels
            self.module: nn.Module = PortableModel(model, self.head, stride)
            form = self.module.form
        else:
            self.cells, self.bands = 8, 3
            self.channels = getattr(model, "embed_dim", None) or channels
            if self.channels is None:
                raise ValueError(
                    f"{model.name} takes any number of channels; give channels=C, those of the "
                    "features to come"
                )
            if model.wants_hidden:
                self.names.append("hidden")
            form = form_of(model, self.head)
            self.module = PortableUpsampler(form, stride)
        assert isinstance(form, Form)
        network = model.backbone.origin if isinstance(model, FeatUp) else None
        if size is None and network is not None and getattr(network, "fit", None) == "tile":
            raise ValueError(
                f"{network.name} takes one size of images and is tiled over others, which "
                f"cannot be exported for any size; {GIVE_SIZE}, or load the backbone with "
                'fit="resize"'
            )
        if size is None and isinstance(form, FixedForm):
            raise ValueError(
                f"{self.upsampler.name} cannot be exported for any size: what a pixel sees is a "
                f"table of one size; {GIVE_SIZE}"
            )
        self.least = max(2 * self.cells, form.least_side, stride)
        if isinstance(model, FeatUp) and isinstance(model.backbone, Guided):
            guide = model.backbone.guide
            self.least = max(self.least, 2 * guide.step * guide.stride)
        one = max(self.cells if isinstance(model, FeatUp) else 1, stride)
        if size is not None and min(size) < one:
            raise ValueError(
                f"size={size} (height, width) must be at least {one} pixels on each side: one cell "
                "of features, and one pixel of the output"
            )

    def _check(self) -> None:
        """Check that the model can be exported at all.

        Raises:
            ValueError: it cannot; the message has the fix.
        """
        model = self.model
        first = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
        if first.device.type != "cpu":
            raise ValueError(f"model is on {first.device}; export it from the CPU: model.cpu()")
        if isinstance(model, FeatUp):
            if any(isinstance(one, SecondScale) for one in model.backbone.modules()):
                raise ValueError(
                    f"a model with passes={model.passes:g} cannot be exported; use passes=1"
                )
            if model.backbone.in_channels != 3 and model.bands is None:
                raise ValueError(
                    f"{model.backbone.name} takes {model.backbone.in_channels} bands, whose "
                    "decorrelation cannot be exported; give upfeat.load(bands=…), three of them"
                )
        dtypes = {one.dtype for one in self.upsampler.parameters()}
        if dtypes - {torch.float32}:
            raise ValueError("the upsampler is not in float32; export model.float()")

    def facts(self) -> dict[str, str]:
        """Metadata needed to run the file, and names and digests of its origin."""
        model, upsampler, weight = self.model, self.upsampler, self.head.weight
        assert not isinstance(weight, slice)
        normalization = upsampler.normalization
        facts: dict[str, str] = {
            "made_by": f"upfeat {__version__}, torch {torch.__version__}",
            "inputs": ", ".join(self.names),
            "upsampler": upsampler.name,
            "upsampler_identity": identify_upsampler(upsampler),
            "channels": str(self.channels),
            "output_channels": str(self.channels if weight is None else len(weight)),
            "output_stride": str(self.stride),
        }
        if isinstance(model, FeatUp):
            normalization = model.backbone.normalization
            facts |= {"backbone": model.backbone.name, "stride": str(model.backbone.stride)}
            facts["backbone_identity"] = identify_backbone(model.backbone)
            facts["backbone_sha256"] = digest(model.backbone)
            if model.early:
                guide = model.backbone.guide if isinstance(model.backbone, Guided) else None
                facts["early_layers_of"] = (guide or model.backbone).name
        if normalization is not None:
            facts |= {"mean": json.dumps(normalization.mean), "std": json.dumps(normalization.std)}
        if self.size is None:
            facts["smallest_side"] = str(self.least)
        else:
            facts["size"] = json.dumps(list(self.size))
        return facts | self.head_facts

    def inputs(self, size: Size, batch: int = 1) -> tuple[Tensor, ...]:
        """Example inputs: smooth random images, and for an upsampler random features."""
        generator = torch.Generator().manual_seed(size[0] * size[1])
        coarse = torch.randn(batch, self.bands, 9, 11, generator=generator)
        image = nn.functional.interpolate(coarse, size=size, mode="bicubic")
        image = image + 0.1 * torch.randn(image.shape, generator=generator)
        if isinstance(self.model, FeatUp):
            return (image,)
        grid = (max(size[0] // self.cells, 1), max(size[1] // self.cells, 1))
        features = torch.randn(batch, self.channels or 1, *grid, generator=generator)
        if "hidden" not in self.names:
            return features, image
        finer, channels = (FINER * grid[0], FINER * grid[1]), getattr(self.model, "hidden_dim", 1)
        return features, image, torch.randn(batch, channels, *finer, generator=generator)

    @torch.no_grad()
    def expected(self, inputs: Sequence[Tensor]) -> Tensor:
        """Output of the original model for the inputs, to compare the file's output with."""
        image = inputs[min(1, len(inputs) - 1)]
        size = (image.shape[2] // self.stride, image.shape[3] // self.stride)
        if isinstance(self.model, FeatUp):
            features, hidden = self.model._seen(image)
            features, guidance = self.model._inputs(features, image)
        else:
            features, guidance, hidden = [*inputs, None][:3]
        assert features is not None
        assert guidance is not None
        grid = (features.shape[2], features.shape[3])
        kernels = self.upsampler.prepare_with(guidance, grid, size, features, hidden)
        return self.upsampler.render(kernels, self.upsampler.mix(features), head=self.head)

    def trace(self) -> torch.export.ExportedProgram:
        """Trace the module, for any size or for one.

        Raises:
            ValueError: the module cannot be traced.
        """
        any_size = self.size is None
        # Different sides that are no multiples of the stride, lest the tracer assume either.
        size = self.size or (4 * self.cells + 3, 5 * self.cells + 1)
        if any_size:
            size = (max(size[0], self.least), max(size[1], self.least))
        inputs = self.inputs(size, batch=2)
        dim = torch.export.Dim.DYNAMIC  # pyright: ignore[reportAttributeAccessIssue]
        free = {2: dim, 3: dim} if any_size else {}
        shapes = tuple({0: dim, **free} for _ in inputs)
        if any_size:
            least, image = dim(min=self.least), min(1, len(inputs) - 1)
            shapes = (*shapes[:image], {0: dim, 2: least, 3: least}, *shapes[image + 1 :])
        try:
            with torch.no_grad(), without_questions(), quiet_exporter():
                program = torch.export.export(
                    self.module,
                    inputs,
                    dynamic_shapes=shapes,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            return without_unused(_without_conditions(program))
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ValueError:
        label = self.upsampler.name
        if isinstance(self.model, FeatUp):
            label = f"{self.model.backbone.name} + {label}"
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if self.size is not None:
            return ValueError(f"{label} cannot be exported ({type(error).__name__}: {reason})")
        return ValueError(
            f"{label} cannot be exported for any size ({type(error).__name__}: {reason}); "
            f"{GIVE_SIZE} of the images to come"
        )


def _without_conditions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove assertions on sizes from a program, such as that a batch is not of size 1.

    The tracer derives them from its example inputs. Runs at other sizes check the file instead.
    """
    conditions = {"_assert_scalar.default", "sym_constrain_range_for_size.default"}
    for node in list(program.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in conditions:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _measure(task: _Task, run: Callable[[Sequence[Tensor]], Tensor]) -> float:
    """Measure the largest error of a file, as a fraction of the model's largest magnitude.

    A file for any size is measured at two sizes that it was not traced with.

    Raises:
        ValueError: the error is too large, or the file cannot be run.
    """
    cells, least = task.cells, task.least
    fix = "" if task.size else f"; {GIVE_SIZE} of the images to come"
    sizes = [(3 * cells, 6 * cells), (7 * cells + cells // 2 + 1, 3 * cells - 1)]
    found = 0.0
    for batch, (height, width) in enumerate(sizes if task.size is None else [task.size], start=1):
        size = task.size or (max(height, least), max(width, least))
        inputs = task.inputs(size, batch)
        expected = task.expected(inputs)
        try:
            out = run(inputs)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"the exported file does not run at {size}: {reason}{fix}") from error
        if out.shape != expected.shape:
            raise ValueError(
                f"the exported file gives {tuple(out.shape)} at {size}, not "
                f"{tuple(expected.shape)}{fix}"
            )
        error = float((out - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        found = max(found, error)
        if not error < TOLERANCE:
            raise ValueError(
                f"the exported file differs from the model by {error:.1e} at {size}{fix}"
            )
    return found


def _read_head(
    head: SavedHead | str | Path | tuple[Tensor, Tensor | None] | None, model: FeatUp | Upsampler
) -> tuple[Head, dict[str, str]]:
    """Read a head and its metadata for the exported file.

    Raises:
        TypeError: it is no head.
        ValueError: the head does not fit the model.
    """
    if head is None:
        return Head(), {}
    if isinstance(head, str | Path):
        label, head = str(head), load_head(head)
    else:
        label = "head"
    facts: dict[str, str] = {}
    if isinstance(head, SavedHead):
        if isinstance(model, FeatUp):
            head.check_backbone(model.backbone, label)
        facts = {"head_kind": head.kind, "head_names": json.dumps(head.names)}
        head = head.weight, head.bias
    if not isinstance(head, tuple) or len(head) != 2:
        raise TypeError(
            f"head is of type {type(head).__name__}; give a SavedHead, its file, or (weight, bias)"
        )
    weight, bias = head
    instance("weight of head", weight, Tensor, "give a tensor")
    if bias is not None:
        instance("bias of head", bias, Tensor, "give a tensor")
    channels = getattr(model, "embed_dim", None) or weight.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(
            f"{label}: weight is {tuple(weight.shape)}; give (K, {channels}), one row per output"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{label}: bias is {tuple(bias.shape)}; give ({len(weight)},)")
    return Head(weight.float(), None if bias is None else bias.float()), facts
