"""Compiled kernels as PyTorch operators, with gradients and support by ``torch.compile``.

A compiled backend has plain functions for its operators and for their gradients. This module
registers each as an operator of ``torch.ops.upfeat``, with a shape rule and an autograd rule, so
that ``torch.compile``, ``torch.export`` and ``opcheck`` treat it as any other operator. Names end
in the backend's name, since several backends can run on the same tensor. Gradients that will be
differentiated again are computed by the eager backend.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from upfeat.backends import eager
from upfeat.backends.cpu import operators as cpu
from upfeat.backends.triton import operators as triton
from upfeat.geometry import cells_of_window
from upfeat.transforms import is_transformed, recorded_gradients

_LIBRARY = torch.library.Library("upfeat", "DEF")

_PLACE = [f"SymInt[] {name}" for name in ("output_size", "origin", "grid_size", "grid_origin")]
"""Options that place tensors as windows of an output and of a grid."""

WINDOWED: dict[str, list[str]] = {
    "adaptive_conv2d": [],
    "joint_bilateral_upsample": [],
    "neighbourhood_upsample": _PLACE,
}
"""Operators of (values, weights) that are linear in both, with their options."""

WEIGHTS = {
    "bilateral_weights": (["keys", "temperature", "sigma_spatial"], ["int radius"]),
    "neighbourhood_weights": (
        ["queries", "keys", "temperature", "sigma"],
        ["int radius", *_PLACE],
    ),
}
"""Operators that compute weights, with their tensors and their options."""

UNKEPT = ("neighbourhood_attention", "neighbourhood_mean_weights")
"""Operators that compute neighbourhood weights and return only sums or means, not the weights."""


def _windowed(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register a windowed operator and its gradient."""
    name, options = f"{operator}_{backend}", WINDOWED[operator]
    forward: Callable[..., Tensor] = getattr(module, operator)
    backward = getattr(module, f"{operator}_backward")
    arguments = ", ".join(["Tensor values", "Tensor weights", *options])
    needs = ", ".join(["bool need_values", "bool need_weights", *options])
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.define(
        f"{name}_backward(Tensor grad, Tensor values, Tensor weights, {needs}) -> (Tensor, Tensor)"
    )

    def run_backward(
        grad: Tensor,
        values: Tensor,
        weights: Tensor,
        need_values: bool,
        need_weights: bool,
        *chosen: Any,
    ) -> tuple[Tensor, Tensor]:
        # An operator can return tensors only: gradients that are not needed are empty.
        found = backward(grad, values, weights, need_values, need_weights, *chosen)
        return tuple(values.new_empty(0) if one is None else one for one in found)  # type: ignore[return-value]

    def fake(values: Tensor, weights: Tensor, *_: Any) -> Tensor:
        return _empty_output(values, weights)

    def fake_backward(
        grad: Tensor,
        values: Tensor,
        weights: Tensor,
        need_values: bool,
        need_weights: bool,
        *_: Any,
    ) -> tuple[Tensor, Tensor]:
        return (
            torch.empty_like(values) if need_values else values.new_empty(0),
            torch.empty_like(weights) if need_weights else values.new_empty(0),
        )

    def gradients(grad: Tensor, tensors: Any, options: Any, need: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.upfeat, f"{name}_backward")(grad, *tensors, *need, *options)

    _implement(name, forward, fake)
    _implement(f"{name}_backward", run_backward, fake_backward)
    return _differentiable(operator, name, 2, gradients)


def _weights(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register an operator that computes weights, and the gradients of all its tensors.

    The first tensor has the height and width of the weights; the first option is the radius.
    """
    tensors, options = WEIGHTS[operator]
    name, count = f"{operator}_{backend}", len(tensors)
    forward: Callable[..., Tensor] = getattr(module, operator)
    backward = getattr(module, f"{operator}_backward")
    arguments = ", ".join([*(f"Tensor {tensor}" for tensor in tensors), *options])
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    found = ", ".join(["Tensor"] * count)
    _LIBRARY.define(f"{name}_backward(Tensor grad, {arguments}) -> ({found})")

    def run_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found = backward(grad, *inputs)
        return tuple(
            torch.as_tensor(one, dtype=of.dtype, device=of.device)
            for one, of in zip(found, inputs[:count], strict=True)
        )

    def fake(*inputs: Any) -> Tensor:
        image, radius = inputs[0], inputs[count]
        return image.new_empty((image.shape[0], (2 * radius + 1) ** 2, *image.shape[2:]))

    def fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in inputs[:count])

    def gradients(grad: Tensor, tensors: Any, options: Any, need: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.upfeat, f"{name}_backward")(grad, *tensors, *options)

    _implement(name, forward, fake)
    _implement(f"{name}_backward", run_backward, fake_backward)
    return _differentiable(operator, name, count, gradients)


def _attention(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register window attention and its gradients."""
    name = f"{operator}_{backend}"
    tensors = "Tensor queries, Tensor keys, Tensor values"
    options = "SymInt[] rows, SymInt[] columns, int heads, float scale, SymInt[] blocks"
    _LIBRARY.define(f"{name}({tensors}, {options}) -> Tensor")
    _LIBRARY.define(
        f"{name}_backward(Tensor grad, {tensors}, {options}, bool[] needed) -> "
        "(Tensor, Tensor, Tensor)"
    )

    def run_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found = module.window_attention_backward(grad, *inputs)
        return tuple(grad.new_empty(0) if one is None else one for one in found)

    def fake(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        return _empty_output(values, queries)

    def fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty_like(tensor) if need else grad.new_empty(0)
            for tensor, need in zip(inputs[:3], inputs[-1], strict=True)
        )

    def gradients(grad: Tensor, tensors: Any, options: Any, need: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.upfeat, f"{name}_backward")(grad, *tensors, *options, need)

    _implement(name, module.window_attention, fake)
    _implement(f"{name}_backward", run_backward, fake_backward)
    return _differentiable(operator, name, 3, gradients)


def _stage(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register the fused inference of one JBU stage; it has no gradient."""
    name = f"{operator}_{backend}"
    _LIBRARY.define(f"{name}(Tensor features, Tensor guidance, Tensor[] parameters) -> Tensor")

    def run(features: Tensor, guidance: Tensor, parameters: list[Tensor]) -> Tensor:
        return module.jbu_stage(features, guidance, *parameters)

    def fake(features: Tensor, guidance: Tensor, parameters: list[Tensor]) -> Tensor:
        return _empty_output(features, guidance)

    _implement(name, run, fake)
    return getattr(torch.ops.upfeat, name)


def _pyramid(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register the inference of a neighbourhood upsampler's encoder; it has no gradient."""
    name = f"{operator}_{backend}"
    _LIBRARY.define(
        f"{name}(Tensor guidance, Tensor[] parameters, SymInt[] window, bool unit) -> Tensor"
    )

    def fake(guidance: Tensor, parameters: list[Tensor], window: list[int], unit: bool) -> Tensor:
        shape = (guidance.shape[0], len(parameters[1]), *window[2:])
        return torch.empty(
            shape, dtype=guidance.dtype, device=guidance.device, memory_format=torch.channels_last
        )

    _implement(name, module.pyramid_queries, fake)
    return getattr(torch.ops.upfeat, name)


def _pyramid_means(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register the operator for means of queries over cells; it has no gradient."""
    name = f"{operator}_{backend}"
    options = "SymInt[] grid_size, SymInt[] cells"
    _LIBRARY.define(f"{name}(Tensor guidance, Tensor[] parameters, {options}) -> Tensor")

    def fake(
        guidance: Tensor, parameters: list[Tensor], grid_size: list[int], cells: list[int]
    ) -> Tensor:
        return guidance.new_empty((guidance.shape[0], len(parameters[1]), *cells[2:]))

    _implement(name, module.pyramid_means, fake)
    return getattr(torch.ops.upfeat, name)


def _neighbourhood(backend: str, module: ModuleType, operator: str) -> Callable[..., Tensor]:
    """Register one of the :data:`UNKEPT` operators; it has no gradient."""
    name, sums = f"{operator}_{backend}", operator == "neighbourhood_attention"
    tensors, options = WEIGHTS["neighbourhood_weights"]
    given = [f"Tensor {tensor}" for tensor in (["features", *tensors] if sums else tensors)]
    _LIBRARY.define(f"{name}({', '.join([*given, *options])}, Tensor? lengths=None) -> Tensor")

    def fake_sum(features: Tensor, queries: Tensor, *_: Any) -> Tensor:
        return _empty_output(features, queries)

    def fake_means(queries: Tensor, *rest: Any) -> Tensor:
        radius, output_size, origin, grid_size = rest[3:7]
        cells = cells_of_window(queries.shape[2:], output_size, origin, grid_size)
        return queries.new_empty((queries.shape[0], (2 * radius + 1) ** 2, *cells))

    _implement(name, getattr(module, operator), fake_sum if sums else fake_means)
    return getattr(torch.ops.upfeat, name)


def _differentiable(
    operator: str, name: str, count: int, gradients: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    """Register the gradients of an operator's first ``count`` arguments, and return the operator.

    ``gradients`` has the arguments grad, tensors, options, and whether each gradient is needed.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, without = list(ctx.needs_input_grad[:count]), (None for _ in ctx.options)
        if torch.is_grad_enabled():
            return (*_by_eager(operator, ctx, grad), *without)
        found = gradients(grad, ctx.saved_tensors, ctx.options, needed)
        parts = (one if need else None for one, need in zip(found, needed, strict=True))
        return (*parts, *without)

    torch.library.register_autograd(
        f"upfeat::{name}", differentiate, setup_context=save, lib=_LIBRARY
    )
    return getattr(torch.ops.upfeat, name)


def _by_eager(operator: str, ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Compute the gradients of an operator's tensors such that autograd records them."""

    def forward(*tensors: Tensor) -> Tensor:
        return getattr(eager, operator)(*tensors, *ctx.options)

    tensors = ctx.saved_tensors
    return recorded_gradients(forward, tensors, ctx.needs_input_grad[: len(tensors)], grad)


def _implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"upfeat::{name}", fake, lib=_LIBRARY)


def _outside_transforms(check: Callable[..., str | None]) -> Callable[..., str | None]:
    """Make a ``can_run`` check also refuse tensors of ``torch.func``, and those with tangents."""

    def checked(*arguments: Any) -> str | None:
        if any(is_transformed(one) for one in arguments if isinstance(one, Tensor)):
            return "torch.func transforms and forward derivatives run on the eager backend"
        return check(*arguments)

    return checked


def _empty_output(values: Tensor, like: Tensor) -> Tensor:
    """Allocate (B, C, H, W) in the memory format of ``values``, as the kernels do."""
    channels_last = not values.is_contiguous() and values.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*values.shape[:2], *like.shape[2:])
    return torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=layout)


OPERATORS = {
    **dict.fromkeys(WINDOWED, _windowed),
    **dict.fromkeys(WEIGHTS, _weights),
    **dict.fromkeys(UNKEPT, _neighbourhood),
    "window_attention": _attention,
    "jbu_stage": _stage,
    "pyramid_queries": _pyramid,
    "pyramid_means": _pyramid_means,
}
"""Functions that register each operator a compiled backend may have, by the operator's name."""


def _as_backend(backend: str, module: ModuleType) -> SimpleNamespace:
    """Make a backend of a module's operators, each registered with PyTorch."""
    found = SimpleNamespace(unavailable_reason=module.unavailable_reason)
    for operator, register in OPERATORS.items():
        if hasattr(module, operator):
            setattr(found, operator, register(backend, module, operator))
        if check := getattr(module, f"can_run_{operator}", None):
            setattr(found, f"can_run_{operator}", _outside_transforms(check))
    return found


CPU = _as_backend("cpu", cpu)
TRITON = _as_backend("triton", triton)
