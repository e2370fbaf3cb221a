"""Names: registered once, suggested where mistyped."""

import doctest

import pytest

import upfeat
from upfeat import registry
from upfeat.registry import Registry


class Square:
    name = "square"


def test_examples_of_the_docstring_run():
    assert doctest.testmod(registry).failed == 0


def test_a_name_is_taken_once():
    shapes = Registry[type]("shape")
    shapes.register(Square)
    shapes.register(Square)  # as when a module is loaded again
    with pytest.raises(ValueError, match='shape "square" is registered already'):
        shapes.register(type("Other", (), {"name": "square"}))


def test_every_upsampler_class_is_listed_where_it_is_defined():
    from upfeat.upsamplers.base import UPSAMPLERS

    unlisted = set(UPSAMPLERS) - set(upfeat.list_upsamplers())
    # Files have the weights of the published ones; others are of one backbone.
    assert all(UPSAMPLERS[name].published_by or UPSAMPLERS[name].wants_hidden for name in unlisted)
    assert all(cls.name == name for name, cls in UPSAMPLERS.items())
