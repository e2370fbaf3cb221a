"""Measurement of a model's properties from its outputs for a few blank images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from upfeat.backbones.outputs import (
    Ambiguous,
    Layer,
    Layout,
    NoFeatures,
    concatenate,
    recognise,
    select,
)
from upfeat.types import Size

_SIZES = (224, 256, 512, 384, 518, 448, 336, 112, 64, 32)
"""Sides to try, pixels: the sizes that models of one size are commonly made for come first."""

_DIVISIBLE = 64
"""Number of pixels that the strides of most models divide."""


@dataclass(frozen=True)
class Question:
    """A model to be probed, and its properties that are known already.

    Attributes:
        call: the model, a function from an image to an output of any kind.
        name: name of the model, for messages.
        like: a tensor on the device and of the dtype that images must have.
        layers: numbers or keys of entries to select from the output; see :func:`select`.
        layout: layout of the output; ``None`` to infer it.
        prefix_tokens: number of class and register tokens; ``None`` to infer it.
        stride: pixels per cell; ``None`` to measure it.
        sizes: image sizes to try before the common sizes.
        channels: bands of the images.
    """

    call: Callable[[Tensor], object]
    name: str
    like: Tensor
    layers: Sequence[Layer] | None = None
    layout: str | None = None
    prefix_tokens: int | None = None
    stride: int | None = None
    sizes: Sequence[Size] = ()
    channels: int = 3


@dataclass(frozen=True)
class Answer:
    """Measured properties of a model.

    Attributes:
        embed_dim: number of channels.
        stride: pixels per cell of the finest map.
        size: (height, width) of an image that the model takes.
        layouts: layout of every selected tensor.
        any_size: True if the model takes images of other sizes too.
        padding: pixels by which each axis of an image must be enlarged to give one cell for every
            stride: the overhang of patches that are larger than their cell.
        multiple: the sides of images must be multiples of this number, a multiple of the stride.
    """

    embed_dim: int
    stride: int
    size: Size
    layouts: Sequence[Layout] = field(default_factory=list)
    any_size: bool = True
    padding: int = 0
    multiple: int = 1


class _NoStride(NoFeatures):
    """The stride of a model whose cells do not divide the image cannot be measured."""


@torch.no_grad()
def probe(question: Question) -> Answer:
    """Run the model on blank images and infer its properties from the shapes of its outputs.

    Raises:
        ValueError: the model takes none of the sizes tried, its output is no feature map, or its
            stride is no whole number.
    """
    side, output = _first_size(question)
    tensors = select(output, question.layers, question.name)
    if len(tensors) > 1 and side % _DIVISIBLE:
        answer = _answer_at(question, math.ceil(side / _DIVISIBLE) * _DIVISIBLE)
        if answer is not None:
            return answer
    layouts = [_recognise(question, one, side, index) for index, one in enumerate(tensors)]
    if all(layout.cells == 1 for layout in layouts):
        side, layouts, tensors = _not_pooled(question, side)
    maps = [
        one.read(tensor, (side, side), question.name)
        for one, tensor in zip(layouts, tensors, strict=True)
    ]
    features = concatenate(maps)
    cells = features.shape[2]
    answer = Answer(features.shape[1], question.stride or side // cells, (side, side), layouts)
    if answer.stride * cells != side:
        return _with_overlap(question, answer, cells)
    answer, rounded = _sizes_taken(question, answer)
    if rounded:  # the last cell is partly outside: 240 pixels are 8 cells of 32, not of 30
        try:
            return _with_overlap(question, answer, cells)
        except _NoStride:
            pass
    return answer


def _answer_at(question: Question, side: int) -> Answer | None:
    """Answer by a side that the strides of several maps divide; ``None`` if the model refuses it.

    At 240 pixels, 8 cells of 32 look like cells of 30, and maps could not be put on one grid.
    """
    try:
        answer = probe(replace(question, sizes=[(side, side)]))
    except ValueError:
        return None
    divided = all(one.side % one.cells == 0 for one in answer.layouts)
    return answer if answer.any_size and divided and answer.size == (side, side) else None


def _with_overlap(question: Question, answer: Answer, cells: int) -> Answer:
    """Complete the answer for a model whose cells do not divide the square image."""
    side, layout = answer.size[0], answer.layouts[0]
    # A small image, 4 cells to a side, takes a fraction of the time, but not every model takes it.
    small = 4 * math.ceil(side / cells)
    for start in (small, side):
        try:
            stride, padding = _overlap(question, answer.layouts, side, cells, start)
        except _NoStride:
            if start == side:
                raise
            continue
        if question.stride not in (None, stride):
            raise ValueError(
                f"{question.name}: stride={question.stride} was given, but its cells are {stride} "
                "pixels apart; check its embed_dim and stride"
            )
        layouts = [layout._replace(cells=1, side=stride, padding=padding)]
        found = replace(answer, stride=stride, layouts=layouts, padding=padding)
        found, _ = _sizes_taken(question, found)
        if found.any_size or start == side:
            return found
    raise AssertionError


def read(question: Question, layouts: Sequence[Layout], x: Tensor) -> Tensor:
    """Compute the features of an image, (B, C, h, w), by a model whose layouts are known."""
    tensors = select(question.call(x), question.layers, question.name)
    return _joined(question, layouts, tensors, x)


def _joined(
    question: Question, layouts: Sequence[Layout], tensors: Sequence[Tensor], x: Tensor
) -> Tensor:
    """Join the selected tensors of an image to a map (B, C, h, w)."""
    size = (x.shape[2], x.shape[3])
    maps = [
        one.read(tensor, size, question.name) for one, tensor in zip(layouts, tensors, strict=True)
    ]
    return concatenate(maps)


def _check_channels(question: Question, answer: Answer, tensors: Sequence[Tensor]) -> None:
    """Refuse (B, C, N) taken for tokens (B, N, C): its last axis changes with the image."""
    tensor = tensors[0]
    if answer.layouts[0].kind != "tokens" or len(tensors) > 1 or tensor.dim() != 3:
        return
    if tensor.shape[2] != answer.embed_dim:
        raise ValueError(
            f"{question.name} returned {tuple(tensor.shape)}, and {answer.embed_dim} on the last "
            "axis for another image size: its axes are (B, C, N); give a function that returns "
            "(B, N, C), as .mT does"
        )


def _blank(question: Question, size: Size) -> Tensor:
    like = question.like
    return torch.zeros(1, question.channels, *size, device=like.device, dtype=like.dtype)


def _first_size(question: Question) -> tuple[int, object]:
    """Return the first square size that the model takes, and the model's output for it."""
    sides = [max(size) for size in question.sizes]
    first: Exception | None = None
    tried = list(dict.fromkeys([*sides, *_SIZES]))
    for side in tried:
        output, error = _attempt(question, (side, side))
        if error is None:
            return side, output
        first = first or error
    reason = f"{type(first).__name__}: {_line(first)}"
    refused = f"got {question.channels} channels" in reason
    fix = "input_size= that it takes, or for one that is no square, a function that resizes the "
    fix += "image to it and the map to a square"
    fix = "in_channels=, the bands that it takes" if refused else fix
    raise NoFeatures(
        f"{question.name} takes none of the image sizes tried ({', '.join(map(str, tried))}); at "
        f"{tried[0]} it says {reason}; give {fix}"
    ) from first


def _attempt(question: Question, size: Size) -> tuple[object, Exception | None]:
    """Return the model's output and ``None``, or ``None`` and the error that it raises."""
    try:
        return question.call(_blank(question, size)), None
    except Exception as error:  # a user's module may raise anything
        return None, error


def _line(error: Exception | None) -> str:
    return (str(error).strip() or "nothing").splitlines()[0][:200]


def _recognise(question: Question, tensor: Tensor, side: int, index: int = 0) -> Layout:
    """Infer the layout of a tensor; an oblong image decides where a square image is ambiguous."""
    known = {"layout": question.layout, "prefix_tokens": question.prefix_tokens}
    try:
        return recognise(tensor, side, question.name, **known)  # pyright: ignore[reportArgumentType]
    except Ambiguous:
        output, _ = _attempt(question, (side, 2 * side))
        if output is None:
            raise
        shape = select(output, question.layers, question.name)[index].shape
        kind = "NCHW" if shape[3] == 2 * shape[2] else "NHWC"
        return recognise(tensor, side, question.name, layout=kind)


def _not_pooled(question: Question, side: int) -> tuple[int, list[Layout], list[Tensor]]:
    """Probe again at twice the side, at which a map, unlike a pooled vector, has several cells."""
    try:
        output = question.call(_blank(question, (2 * side, 2 * side)))
        tensors = select(output, question.layers, question.name)
        layouts = [_recognise(question, one, 2 * side, index) for index, one in enumerate(tensors)]
        if any(layout.cells > 1 for layout in layouts):
            return 2 * side, layouts, tensors
    except Exception:  # the model takes one size only
        pass
    raise ValueError(
        f"{question.name} returns one cell for an image of {side}×{side}: a pooled vector, not "
        "features (B, C, h, w); give layer= (the name of the module before the pooling), or a "
        "function that returns the map before it"
    )


def _overlap(
    question: Question, layouts: Sequence[Layout], side: int, cells: int, start: int
) -> tuple[int, int]:
    """Measure stride and padding of a model whose cells do not divide the image.

    The patches of such a model overlap, or the last cells extend beyond the image. The stride is
    the number of pixels that adds one cell. The padding is the least with which an image of n
    strides has n cells; half of it on either side puts each cell's patch around the cell's centre.

    Args:
        question: see :func:`probe`.
        layouts: the layout of the model's output.
        side: side of a square image that the model takes, pixels.
        cells: cells along each side of that image.
        start: side of the image to measure at, pixels.
    """

    def least(length: int, wanted: int, most: int) -> int:
        """Return the least number of pixels beyond ``length`` that give ``wanted`` cells."""
        low, high = -1, most
        if count(length + high) < wanted:
            raise refusal
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if count(length + middle) >= wanted else (middle, high)
        return high

    def count(length: int) -> int:
        x = _blank(question, (length, length))
        tensor = select(question.call(x), question.layers, question.name)[0]
        return _recognise(question, tensor, length).cells

    refusal = _NoStride(
        f"{question.name} turns {side}×{side} pixels into {cells}×{cells} cells, which is no whole "
        "stride; give stride=, a probe_size that it divides, or a function that resizes its map"
    )
    if len(layouts) > 1:
        raise _NoStride(f"{str(refusal).partition(';')[0]}; give one layer")
    try:
        most, first = 3 * math.ceil(side / cells), count(start)
        stride = least(start, first + 2, most) - least(start, first + 1, most)
        length = start - start % stride
        padding = least(length, length // stride, 4 * stride)
    except Exception as error:  # a user's module may raise anything at another size
        raise refusal from error
    return stride, padding


def _sizes_taken(question: Question, answer: Answer) -> tuple[Answer, bool]:
    """Complete an answer by ``any_size``, tested on an oblong image, and ``multiple``.

    Returns:
        The answer, and whether the model takes oblong images but makes another number of cells than
        the stride says.
    """
    stride, side = answer.stride, answer.size[0]
    coarsest = max(one.side // one.cells for one in answer.layouts)
    rounded = False
    for multiple in dict.fromkeys((coarsest, 2 * coarsest, 3 * coarsest, math.lcm(32, stride), 64)):
        if multiple % stride:
            continue
        short = max(side // 2 // multiple, 1 if multiple >= 32 else 2) * multiple
        # One side is longer than before: tables of positions may suffice for smaller images only,
        # and a wrong stride shows where there are more cells. The number of cells must be another
        # one, which a model that arranges them in a square would refuse.
        size = (short, (2 * side // multiple + 1) * multiple)
        blank = _blank(question, (size[0] + answer.padding, size[1] + answer.padding))
        try:
            tensors = select(question.call(blank), question.layers, question.name)
        except Exception:  # a user's module may raise anything
            continue
        _check_channels(question, answer, tensors)
        try:
            features = _joined(question, answer.layouts, tensors, blank)
        except (RuntimeError, ValueError):  # outputs of other shapes than before
            continue
        if tuple(features.shape[2:]) == (size[0] // stride, size[1] // stride):
            return replace(answer, multiple=multiple, any_size=True), False
        rounded = True
    return replace(answer, multiple=stride, any_size=False), rounded
