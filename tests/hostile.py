"""Values that are no good for any number, name or path, in one list."""

import math

import numpy as np
import torch

HOSTILE = [
    True, 0, -1, 2.5, b"1", {}, object(), math.nan, math.inf, 10**30, np.True_, torch.ones(2),
    [[8]], (1, None), "many",
]  # fmt: skip


def refuses(call, name, kinds=(), **options):
    """Check that a call refuses hostile values of an argument in one line that has its name.

    Args:
        call: takes the argument by name.
        name: of the argument.
        kinds: types of values that are good ones, or not hostile here.
        options: the other arguments.
    """
    for value in HOSTILE:
        if type(value) in kinds:
            continue
        try:
            call(**{**options, name: value})
        except (TypeError, ValueError) as error:
            message = str(error)
        else:
            raise AssertionError(f"{name}={value!r} was taken")
        assert name in message, (value, message)
        assert "\n" not in message, value
        assert len(message) < 400, value


def fault(function, **arguments):
    """The message of the ``ValueError`` that a call raises; ``None`` without one."""
    try:
        function(**arguments)
    except ValueError as error:
        return str(error)
    return None
