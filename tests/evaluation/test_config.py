"""Settings of an evaluation, and settings as data in general."""

import argparse
import json
import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upfeat.evaluation import EvalConfig
from upfeat.settings import (
    Choice,
    Number,
    Whole,
    add_flags,
    check,
    documented,
    setting,
    settings_of,
    table,
)
from upfeat.strict_json import read_value

HOSTILE = [
    *(True, "many", "64", b"1", [], {}, (), object(), math.nan, math.inf, -1, 10**30, 10**5000),
    *(1e300, 1j, np.True_, torch.ones(2), ["own", "own"], [1], {"own"}),
]


@pytest.mark.parametrize("name", [field.name for field in fields(EvalConfig)])
def test_hostile_values_of_every_setting(name):
    for value in HOSTILE:
        with pytest.raises(ValueError, match=name) as raised:
            EvalConfig(**{name: value})
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 250


def test_values_come_back_in_their_types():
    config = EvalConfig(seeds=2.0, protocols=["own"], max_train=np.int64(3))
    assert (config.seeds, config.protocols, config.max_train) == (2, ("own",), 3)
    assert type(config.max_train) is type(config.seeds) is int
    again = EvalConfig(**json.loads(json.dumps(config.to_json())))
    assert again == config


@given(st.integers(0, 30), st.integers(1, 200))
def test_pictures_are_spread_over_the_list(pictures, count):
    chosen = EvalConfig(pictures=pictures).choose_pictures(count)
    assert len(chosen) == min(pictures, count)
    assert chosen == sorted(set(chosen))
    assert all(0 <= index < count for index in chosen)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@documented
@dataclass(frozen=True)
class Walk:
    """Settings of a walk."""

    steps: int = setting(10, "how far to go, `None` is no number", Whole(1, 99))
    pace: float = setting(1.0, "in km/h", Number(0, 10, above=True, text=True), operational=True)
    where: str = setting("up", "which way", Choice(("up", "down")))
    gear: dict = setting({"rope": 1}, "what to take", lambda name, value: value, flag=False)
    undeclared: int = 3

    def __post_init__(self):
        check(self)


def test_one_declaration_gives_check_flag_docstring_and_row():
    declared = settings_of(Walk)
    assert list(declared) == ["steps", "pace", "where", "gear"]
    assert [one.operational for one in declared.values()] == [False, True, False, False]
    assert "        steps: how far to go, `None` is no number." in Walk.__doc__
    assert table(Walk).splitlines()[2:] == [
        "| `steps` | `10` | how far to go, `None` is no number |",
        "| `pace` | `1.0` | in km/h |",
        "| `where` | `'up'` | which way |",
        "| `gear` | `{'rope': 1}` | what to take |",
    ]
    parser = argparse.ArgumentParser()
    add_flags(parser, Walk)
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--steps", "3"])) == {"steps": "3"}
    help_text = " ".join(parser.format_help().split())
    assert "how far to go, None is no number (default: 10)" in help_text
    with pytest.raises(SystemExit):
        parser.parse_args(["--gear", "rope"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 100}, "steps=100 must be 99 or less"),
        ({"pace": 0}, "pace=0 must be a number above 0"),
        ({"pace": "fast"}, "pace='fast' must be a number above 0"),
        ({"where": "dwn"}, "where: .*did you mean down"),
    ],
)
def test_checks_are_those_that_were_declared(settings, words):
    with pytest.raises(ValueError, match=words):
        Walk(**settings)


def test_checked_values_are_kept_and_defaults_are_not_shared():
    first, second = Walk(steps=3.0, pace="2.5"), Walk()
    assert (first.steps, first.pace, first.undeclared) == (3, 2.5, 3)
    assert type(first.steps) is int
    assert first.gear == second.gear
    assert first.gear is not second.gear


@pytest.mark.parametrize("value", [[1, "é"], 3, None, "text", {"a": {"b": []}}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_any_json_is_read_with_or_without_its_mark(tmp_path, value, encoding):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
    assert read_value(path) == value
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_value(tmp_path)
    with pytest.raises(ValueError, match="larger than 0 KiB"):
        read_value(path, largest=0)
