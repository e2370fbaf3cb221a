"""A device that this machine does not have, for tests: it computes on the CPU, but strictly.

Its tensors say that they are on MPS. As there, float64 and operations with tensors of the CPU are
errors. Python's calls of PyTorch's functions are intercepted, not the operators inside them.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps", 0)
_OUTER = ("__get__", "__set__", "dim", "size", "stride", "numel", "element_size", "data_ptr")
_OUTER += ("is_floating_point", "is_complex", "is_inference", "__len__", "__hash__", "_parse_to")
# Indices, a number to write, and a source to copy may be on the CPU.
_MIXED = ("__getitem__", "__setitem__", "copy_", "_has_compatible_shallow_copy_type")


class There(torch.Tensor):
    """A tensor of the device; ``here`` has its values."""

    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # Reached only from inside PyTorch, such as by nn.Parameter.
        found = function(*tree_map(_here, args), **tree_map(_here, kwargs or {}))
        return tree_map(lambda x: There(x) if type(x) is torch.Tensor else x, found)


class PretendDevice(TorchFunctionMode):
    """Context in which the device exists."""

    def __enter__(self):
        self._before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(self._before)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        there = [x for x in leaves if isinstance(x, There)]
        named = [x.type for x in leaves if isinstance(x, torch.device)]
        if name in _OUTER or not (there or "mps" in named):
            return function(*args, **kwargs)
        if name == "requires_grad_":
            there[0].here.requires_grad_(*args[1:], **kwargs)
            return function(*args, **kwargs)
        moves = name in ("to", "cpu", "numpy", "tolist", "type_as")
        strange = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, There)]
        if there and not moves and name not in _MIXED and any(x.dim() for x in strange):
            raise RuntimeError(f"{name}: tensors are on both devices")
        found = function(*tree_map(_here, args), **tree_map(_here, kwargs))
        if name in ("cpu", "numpy", "tolist") or (name == "to" and self._leaves(args, named)):
            return found
        same = {id(x.here): x for x in there}
        return tree_map(lambda x: same[id(x)] if id(x) in same else self._there(x, name), found)

    @staticmethod
    def _leaves(args, named):
        """Return whether ``to`` moves a tensor to the CPU."""
        like = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else None
        if like is not None:
            return not isinstance(like, There)
        return "cpu" in named or "cpu" in args[1:]

    def _there(self, x, name):
        if not isinstance(x, torch.Tensor) or isinstance(x, There):
            return x
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{name}: the device has no float64")
        return There(x.detach() if isinstance(x, torch.nn.Parameter) else x)


def _here(x):
    if isinstance(x, torch.device) and x.type == "mps":
        return torch.device("cpu")
    return x.here if isinstance(x, There) else x
