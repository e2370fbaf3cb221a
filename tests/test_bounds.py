"""Values are let through as they are, or refused by name."""

import math

import numpy as np
import pytest
import torch

from upfeat.bounds import choice, flag, number, whole
from upfeat.strict_json import parse_object, read_object


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float64(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind(value):
    found = whole("n", value, 3, 3)
    assert found == 3
    assert type(found) is int


def test_none_only_where_it_is_allowed():
    assert whole("n", None, optional=True) is None
    with pytest.raises(ValueError, match="n=None must be a whole number"):
        whole("n", None)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "n=0 must be 1 or more"),
        (8, "n=8 must be 7 or less"),
        (2.5, "n=2.5 must be a whole number"),
        (True, "n=True must be a whole number"),
        (np.True_, "must be a whole number"),
        (torch.tensor(True), "must be a whole number"),
        ("3", "n='3' must be a whole number"),
        (math.nan, "n=nan must be a whole number"),
        (math.inf, "n=inf must be a whole number"),
        ("x" * 1000, "…"),
        (10**1000, "must be 7 or less"),
    ],
)
def test_what_is_no_whole_number(value, words):
    with pytest.raises(ValueError, match=words) as raised:
        whole("n", value, 1, 7)
    assert len(str(raised.value)) < 120


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (-1, {"low": 0}, "x=-1 must be a number of at least 0"),
        (0, {"low": 0, "above": True}, "x=0 must be a number above 0"),
        (5, {"low": 0, "high": 4}, "x=5 must be a number of at most 4"),
        (4, {"low": 0, "high": 4, "below": True}, "x=4 must be a number below 4"),
        (2, {"low": 0, "high": 1}, "x=2 must be a number from 0 to 1"),
        (math.nan, {}, "x=nan must be a finite number"),
        (math.inf, {"low": 0}, "x=inf must be a finite number of at least 0"),
        (-math.inf, {"high": 3}, "x=-inf must be a number of at most 3"),
        ("1", {}, "x='1' must be a finite number"),
        (True, {}, "x=True must be"),
        (np.True_, {}, "must be a finite"),
        (1j, {}, "x=1j must be"),
        (10**400, {}, "must be a finite number"),
        (None, {}, "x=None must be"),
    ],
)
def test_what_is_no_number_in_bounds(value, bounds, words):
    with pytest.raises(ValueError, match=words):
        number("x", value, **bounds)


def test_numbers_as_text_where_files_write_them_so():
    assert number("x", "1e-3", 0, 1, text=True) == 1e-3
    assert number("x", 1, 0, 1) == 1.0
    with pytest.raises(ValueError, match="x='nan' must be"):
        number("x", "nan", 0, 1, text=True)


def test_flags_and_names():
    assert flag("f", False) is False
    for value in (0, 1, "true", None):
        with pytest.raises(ValueError, match="must be true or false"):
            flag("f", value)
    assert choice("c", "blue", ["blue", "red"]) == "blue"
    for value in ("bleu", None, [], {}):
        with pytest.raises(ValueError, match=r'c: value ".*" is unknown'):
            choice("c", value, ["blue", "red"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 3}}', '"c" is given twice'),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' * 200_000, "nested too deeply"),
        ("[1]", "holds list, not an object"),
        ("3", "holds int"),
        ("", "not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not JSON"),
    ],
)
def test_json_of_which_nothing_is_guessed(text, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_object(text, "x.json")
    assert str(raised.value).startswith("x.json: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_files_are_bounded(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}' + " " * 100)
    assert read_object(path) == {"a": 1}
    with pytest.raises(ValueError, match="larger than"):
        read_object(path, largest=50)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not JSON"):
        read_object(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_object(tmp_path / "none.json")
