"""Bad input of the operators: every argument is named with its value, and NaN is never lost."""

import numpy as np
import pytest
import torch

from upfeat import functional
from upfeat.backends import dispatch


def _calls():
    """An operator, its tensors by name, and what else it takes."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=draw)

    grid, fine = noise(1, 4, 4, 5), noise(1, 4, 6, 7)
    taps = noise(1, 9, 6, 7)
    cells = {"rows": [0] * 6 + [4] * 6, "columns": [0] * 7 + [5] * 7}
    return {
        "adaptive_conv2d": ({"padded": noise(1, 3, 8, 9), "weights": taps}, {}),
        "joint_bilateral_upsample": ({"features": grid, "weights": taps}, {}),
        "neighbourhood_upsample": ({"features": grid, "weights": taps}, {}),
        "bilateral_weights": ({"keys": fine}, {"temperature": 0.8, "sigma_spatial": 0.6}),
        "neighbourhood_weights": (
            {"queries": fine, "keys": grid},
            {"temperature": 0.8, "sigma": 0.6, "radius": 1},
        ),
        "window_attention": ({"queries": fine, "keys": grid, "values": noise(1, 3, 4, 5)}, cells),
    }


CALLS = _calls()
TENSORS = [(name, label) for name, (tensors, _) in CALLS.items() for label in tensors]
BACKENDS = [name for name, reason in dispatch.availability().items() if reason is None]


def _call(name, backend="auto", **changes):
    tensors, options = CALLS[name]
    return getattr(functional, name)(**{**tensors, **options, **changes}, backend=backend)


@pytest.mark.parametrize(("name", "label"), TENSORS)
@pytest.mark.parametrize(
    "make", [np.asarray, list, lambda _: None, str], ids=["array", "list", "none", "text"]
)
def test_what_is_no_tensor_is_refused_by_name(name, label, make):
    value = make(CALLS[name][0][label])
    with pytest.raises(TypeError, match=rf"^{label} is of type {type(value).__name__}; give a ten"):
        _call(name, **{label: value})


@pytest.mark.parametrize(("name", "label"), TENSORS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.int(), r"torch\.int32; convert it with \.float"),
        (lambda x: x > 0, r"torch\.bool"),
        (lambda x: x.to(torch.complex64), r"torch\.complex64"),
        (lambda x: x.to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
        (lambda x: x.to_sparse(), r"torch\.sparse_coo; convert it with \.to_dense"),
        (lambda x: x[0], "4 dimensions"),
        (lambda x: x[None], "4 dimensions"),
    ],
)
def test_tensors_that_cannot_be_computed_with_are_refused_by_name(name, label, change, words):
    with pytest.raises(ValueError, match=rf"^{label} (is|must have) {words}"):
        _call(name, **{label: change(CALLS[name][0][label])})


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none_gives_none_on_every_backend(name, backend):
    empty = {label: tensor[:0] for label, tensor in CALLS[name][0].items()}
    assert _call(name, backend, **empty).shape == (0, *_call(name).shape[1:])


@pytest.mark.parametrize(("name", "label"), TENSORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_lost(name, label, backend):
    for place in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 3, 4)):
        x = CALLS[name][0][label].clone()
        x[place] = torch.nan
        wrong = torch.isnan(_call(name, "reference", **{label: x}))
        assert wrong.any()
        assert torch.isnan(_call(name, backend, **{label: x}))[wrong].all()


BAD = [
    ("bilateral_weights", {"radius": -1}, "radius=-1 must be 0 or more"),
    ("bilateral_weights", {"radius": 1.5}, r"radius=1\.5 must be a whole number"),
    ("bilateral_weights", {"radius": "3"}, "radius='3' must be a whole number"),
    ("bilateral_weights", {"radius": None}, "radius=None must be a whole number"),
    ("bilateral_weights", {"radius": 2**40}, "radius=1099511627776 must be 127 or less"),
    ("bilateral_weights", {"temperature": "a"}, "temperature='a' must be a finite number"),
    ("bilateral_weights", {"temperature": None}, "temperature=None"),
    ("bilateral_weights", {"temperature": float("nan")}, "temperature=nan"),
    ("bilateral_weights", {"temperature": torch.ones(3)}, r"temperature is .*\(3,\); give one"),
    ("bilateral_weights", {"sigma_spatial": 0}, "sigma_spatial=0 must not be 0"),
    ("bilateral_weights", {"sigma_spatial": float("inf")}, "sigma_spatial=inf"),
    ("neighbourhood_weights", {"radius": 0}, "radius=0 must be 1 or more"),
    ("neighbourhood_weights", {"radius": True}, "radius=True must be a whole number"),
    ("neighbourhood_weights", {"sigma": 0.0}, r"sigma=0\.0 must not be 0"),
    ("neighbourhood_weights", {"sigma": torch.ones(2)}, r"sigma is .*give one real number"),
    ("neighbourhood_weights", {"sigma": torch.tensor(1j)}, "sigma is torch.complex64"),
    ("neighbourhood_upsample", {"window": (0, 0, 6)}, r"window=\(0, 0, 6\) must be 4 whole"),
    ("neighbourhood_upsample", {"window": (0.0, 0, 6, 7)}, "window=.* must be 4 whole numbers"),
    ("neighbourhood_upsample", {"window": "abcd"}, "window='abcd' must be 4 whole numbers"),
    ("neighbourhood_upsample", {"window": (-1, 0, 6, 7)}, "does not lie in the output of 6×7"),
    ("neighbourhood_upsample", {"window": (0, 0, 5, 7)}, "weights are 6×7 but window is 5×7"),
    ("neighbourhood_upsample", {"output_size": 12}, "output_size=12 must be 2 whole numbers"),
    ("neighbourhood_upsample", {"output_size": (6, 7, 8)}, "output_size=.* must be 2 whole"),
    ("neighbourhood_upsample", {"grid_size": (4,)}, "grid_size=.* must be 2 whole numbers"),
    ("neighbourhood_upsample", {"cells": (0, 0, 4)}, "cells=.* must be 4 whole numbers"),
    ("neighbourhood_upsample", {"cells": (1, 0, 4, 5)}, "does not lie in the grid of 4×5"),
    ("window_attention", {"heads": 0}, "heads=0 must be 1 or more"),
    ("window_attention", {"heads": 1.5}, r"heads=1\.5 must be a whole number"),
    ("window_attention", {"heads": 3}, "multiple of heads=3"),
    ("window_attention", {"blocks": 3}, "blocks=3 must be whole numbers"),
    ("window_attention", {"blocks": []}, r"blocks=\[\] must be 1 numbers of channels"),
    ("window_attention", {"scale": "a"}, "scale='a' must be a finite number"),
    ("window_attention", {"scale": float("nan")}, "scale=nan must be a finite number"),
    ("window_attention", {"rows": None}, "rows=None must be whole numbers"),
    ("window_attention", {"rows": [0.0] * 12}, "rows=.* must be whole numbers"),
    ("window_attention", {"rows": [0]}, "rows has 1 numbers"),
    ("window_attention", {"columns": [0] * 14}, "columns holds the cells 0 to 0"),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD)
def test_every_option_is_named_with_its_value(name, change, words):
    with pytest.raises(ValueError, match=words):
        _call(name, **change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_are_numbers_or_tensors_of_one(backend):
    expected = _call("bilateral_weights", backend)
    for kind in (np.float64, torch.tensor, lambda x: torch.tensor([[x]]), np.array):
        changes = {"temperature": kind(0.8), "sigma_spatial": kind(0.6), "radius": np.int64(3)}
        torch.testing.assert_close(_call("bilateral_weights", backend, **changes), expected)


@pytest.mark.parametrize("backend", ["auto", "reference", "eager"])
def test_cells_that_a_window_reads_must_be_there(backend):
    """A pixel reads radius cells on either side of its own, which ``cells`` must include."""
    features, keys = torch.rand(1, 2, 3, 5), torch.rand(1, 4, 3, 5)
    place = {"output_size": (32, 48), "grid_size": (8, 12), "backend": backend}
    window, cells = (8, 16, 4, 4), (1, 3, 3, 5)  # pixels of cell (2, 4), of radius 1 and 2
    weights = torch.rand(1, 9, 4, 4)
    full = functional.neighbourhood_upsample(features, weights, window=window, cells=cells, **place)
    assert full.shape == (1, 2, 4, 4)
    for moved in ((2, 3, 3, 5), (1, 4, 3, 5), (0, 3, 3, 5), (1, 0, 3, 5)):
        with pytest.raises(
            ValueError, match=r"features are of the cells .*reads cells=\(1, 3, 3, 3\)"
        ):
            functional.neighbourhood_upsample(
                features, weights, window=window, cells=moved, **place
            )
    with pytest.raises(ValueError, match=r"keys are of the cells .*reads cells=\(0, 2, 5, 5\)"):
        functional.neighbourhood_weights(
            torch.rand(1, 4, 4, 4), keys, 1.0, 1.0, window=window, cells=cells, **place
        )
