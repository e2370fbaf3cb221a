"""Options of backbones are refused by name; outputs that hold nothing say what they are."""

import logging
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hostile import refuses
from torch import nn
from torch.nn import functional as F

import upfeat
from upfeat.backbones.outputs import select

TEXTS = {"name": (str,), "layout": (), "fit": (), "device": (int,), "dtype": ()}
NUMBERS = ("embed_dim", "stride", "in_channels", "input_size", "probe_size", "prefix_tokens")


@pytest.mark.parametrize("option", [*TEXTS, *NUMBERS, "mean", "std", "layer"])
def test_hostile_values_of_every_option_are_refused_by_its_name(option, caplog):
    caplog.set_level(logging.CRITICAL)
    kinds = TEXTS.get(option, (int,) if option == "prefix_tokens" else ())

    def load(**options):
        upfeat.load_backbone(nn.Conv2d(3, 6, 8, 8), **options)

    refuses(load, option, kinds)
    with pytest.raises(ValueError, match="prefix_tokens=-1 must be 0 or more"):
        load(prefix_tokens=-1)


MAP, TOKENS, POOLED = torch.zeros(1, 6, 4, 4), torch.zeros(1, 17, 6), torch.zeros(1, 6)
Pair = namedtuple("Pair", "pooled maps")


@pytest.mark.parametrize(
    ("output", "picked"),
    [
        (MAP, MAP),
        ([POOLED, MAP], MAP),
        ([TOKENS, MAP], MAP),  # the last of a list
        (Pair(POOLED, MAP), MAP),
        ([POOLED, [POOLED, MAP]], MAP),
        ({"logits": POOLED, "anything": MAP}, MAP),
        ({"out": MAP, "aux": TOKENS}, MAP),
        ({"x_norm_patchtokens": MAP, "last_hidden_state": TOKENS}, MAP),
        ({"features": None, "x": MAP}, MAP),
        ({"features": [POOLED, MAP], "x": TOKENS}, MAP),
        (OrderedDict(a=MAP, mask=MAP.bool(), ids=MAP.long()), MAP),
        (SimpleNamespace(last_hidden_state=MAP, pooler_output=POOLED), MAP),
    ],
)
def test_what_holds_the_features_is_found(output, picked):
    (found,) = select(output, None, "net")
    assert found is picked


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "net returned a NoneType, not features"),
        (3.0, "net returned a float, not features"),
        ("text", "net returned a str, not features"),
        (np.zeros((1, 6, 4, 4)), "net returned a ndarray, not features"),
        (SimpleNamespace(logits=POOLED), "net returned a SimpleNamespace, not features"),
        ([], "in which there are no spatial features"),
        ([POOLED, 3], r"\{0: \(1, 6\), 1: int\}, in which there are no spatial features"),
        ({"logits": POOLED}, r"\{logits: \(1, 6\)\}, in which there are no spatial features"),
        ({"mask": MAP.bool()}, "in which there are no spatial features"),
        ({"a": MAP, "b": TOKENS}, "several maps: choose by layer=, one or a list of 'a', 'b'"),
    ],
)
def test_what_holds_no_features_is_described(output, words):
    with pytest.raises(ValueError, match=words):
        select(output, None, "net")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([5], "net: layer=5 does not exist; there are 2, 0 to 1"),
        (["mpa"], 'net: layer "mpa" is unknown; did you mean map'),
        (["pair"], "net: layer='pair' is a list, not a tensor"),
    ],
)
def test_layers_that_are_not_there_are_named(layers, words):
    output = {"map": MAP, "pair": [MAP, TOKENS]}
    with pytest.raises(ValueError, match=words):
        select(output, layers, "net")
    assert select(output, ["map", 0, -2], "net") == [MAP] * 3


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (lambda x: x.mean((2, 3)), {}, r"a pooled vector or logits, not features .* layer="),
        (lambda x: x.mean(), {}, "not features"),
        (lambda x: x.flatten(2).mT[:, :99], {}, r"99 tokens form no square grid; give prefix_to"),
        (
            lambda x: F.avg_pool2d(x, 8),
            {"layout": "tokens"},
            r"returned a tensor of shape \(1, 3, ",
        ),
        (lambda x: F.avg_pool2d(x, 8).flatten(2).mT, {"layout": "NCHW"}, "of shape"),
        (
            lambda x: F.pad(F.avg_pool2d(x, 8).flatten(2).mT, (0, 0, 1, 0)),
            {"prefix_tokens": 2},
            "tokens form no square grid; give prefix_tokens=",
        ),
        (lambda x: F.avg_pool2d(x, (8, 16)), {}, "cells, which is no whole stride"),
        (lambda x: F.interpolate(x, scale_factor=2.0), {}, "cells, which is no whole stride"),
        (lambda x: F.avg_pool2d(x, 8) if x.shape[2] < 9 else 1 / 0, {}, "ZeroDivisionError: divis"),
        (lambda x: x.mean((2, 3))[..., None, None], {}, "pooled"),
    ],
)
def test_functions_that_are_no_backbone_say_why(function, options, words):
    with pytest.raises(ValueError, match=words) as refused:
        upfeat.load_backbone(function, name="mine", **options)
    assert str(refused.value).startswith("mine")
    assert "\n" not in str(refused.value)


def test_classes_that_forget_the_initialiser_of_their_base_are_told():
    class Mine(upfeat.Backbone):
        def __init__(self):
            self.embed_dim, self.stride = 3, 8

        def extract(self, x):
            return F.avg_pool2d(x, 8)

    class Ours(upfeat.Bilinear):
        def __init__(self):
            self.embed_dim = None

    with pytest.raises(ValueError, match=r"Mine.__init__ does not call .*; call it there first"):
        Mine()
    with pytest.raises(ValueError, match=r"upsampler is a Ours whose __init__ .*; call it there"):
        upfeat.FeatUp(nn.Conv2d(3, 6, 8, 8), Ours())
