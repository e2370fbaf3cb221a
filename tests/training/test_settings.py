"""Every setting does something, is written down, and is asked for again by a resumed run."""

import json
from dataclasses import fields

import pytest
from training.small import SIZE, Cells, log, small_config, weights, write_photographs

import upfeat
from upfeat import WrappedBackbone
from upfeat.training import TrainConfig
from upfeat.training.config import OPERATIONAL

NEIGHBOURHOOD = {
    "upsampler": "neighbourhood",
    "upsampler_options": {"query_dim": 8, "levels": 2},
}
DETAIL = {
    "upsampler": "detail",
    "upsampler_options": {"query_dim": 8, "levels": 2, "width": 4},
    "source_size": 40,
}

CHANGES = {
    "upsampler": ("neighbourhood", {"upsampler_options": {}}),
    "upsampler_options": ({"radius": 2, "n_stages": 2}, {}),
    "frozen": (["neighbourhood"], DETAIL),
    "back_projections": (1, NEIGHBOURHOOD),
    "steps": (3, {}),
    "batch_size": (3, {}),
    "views": (3, {}),
    "size": (24, {}),
    "source_size": (40, {}),
    "crop": ("native", {}),
    "max_pad": (2, {}),
    "max_zoom": (3, {"zoom_probability": 1}),
    "zoom_probability": (0, {}),
    "flip_probability": (0, {}),
    "downsampler": ("simple", {}),
    "downsampler_size": (4, {}),
    "saliency_dropout": (0, {}),
    "projection_dim": (None, {}),
    "crf_weight": (10, {}),
    "tv_weight": (10, {}),
    "magnitude_weight": (10, {}),
    "detail_weight": (10, {**DETAIL, "steps": 4}),
    "mix_share": (0, DETAIL),
    "standardize": (True, {}),
    "colour_jitter": (0.5, {}),
    "mixed_normalization": (True, {}),
    "learning_rate": (1e-2, {}),
    "schedule": ("cosine", {}),
    "clip": (1e-9, {"learning_rate": 1e-1}),
    "clip_steps": (0, {}),
    "seed": (1, {}),
    "validation_images": (5, {}),
    "validate_every": (1, {"learning_rate": 1e-1, "steps": 3}),
}
"""Another value of each setting that decides weights, and what must go with it."""
WITHIN_ROUNDING = {"accumulate", "precision"}
ONLY_LATER = {"patience"}  # tests/training/test_train.py sees it end a run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    write_photographs(folder / "photos", size=(40, 56))
    return folder


def backbone():
    """One whose images are not normalised by ImageNet's statistics."""
    return WrappedBackbone(Cells(), probe_size=SIZE, mean=[0.5] * 3, std=[0.3] * 3)


def result(run):
    """The finished upsampler: its weights and settings."""
    return weights(run), (run / "upsampler" / "config.json").read_text()


def trained(place, name, **settings):
    """The folder of a run; each is trained once."""
    out = place / name
    if not out.exists():
        settings = {"steps": 2, **settings}
        upfeat.train(backbone(), place / "photos", small_config(out, **settings))
    return out


def test_every_setting_is_tried():
    decide = {field.name for field in fields(TrainConfig)} - OPERATIONAL
    assert set(CHANGES) | WITHIN_ROUNDING | ONLY_LATER == decide


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_the_weights_and_is_asked_for_again(place, name):
    value, along = CHANGES[name]
    kind = along.get("upsampler", "plain") + "".join(sorted(along))
    before, after = trained(place, kind, **along), trained(place, name, **{**along, name: value})
    assert result(before) != result(after)
    for written in ("config.json", "run.json"):
        content = json.loads((after / written).read_text())
        assert content.get("config", content)[name] == value
    config = small_config(after, **{"steps": 2, **along})
    with pytest.raises(ValueError, match=rf"the run to resume differs: .*{name}: .* there, .* her"):
        upfeat.train(backbone(), place / "photos", config, resume=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 1},
        {"checkpoint_every": 1, "keep": 1},
        {"log_every": 2},
        {"device": "cpu", "checkpoint_every": 100},
    ],
    ids=str,
)
def test_settings_of_the_work_change_no_bit(place, settings):
    assert set(settings) <= OPERATIONAL
    before, after = trained(place, "plain"), trained(place, str(settings), **settings)
    assert weights(before) == weights(after)
    lines = log(after).splitlines()
    assert set(lines) <= set(log(before).splitlines())
    assert len(lines) == 2 // settings.get("log_every", 1)
    checkpoints = list((after / "checkpoints").iterdir())
    assert len(checkpoints) == settings.get("keep", len(checkpoints))


@pytest.mark.parametrize(
    ("step", "error"),
    [*((step, KeyboardInterrupt) for step in range(1, 6)), (1, OSError), (4, OSError)],
)
def test_a_run_that_stops_after_any_step_ends_alike(place, tmp_path, step, error):
    """A wish to stop is kept by a checkpoint; an error goes back to the last one."""
    whole = trained(place, "six", steps=6)

    def stop(report):
        if report.step == step:
            raise error("halt")

    config = small_config(tmp_path / "run", steps=6)
    with pytest.raises(error):
        upfeat.train(backbone(), place / "photos", config, on_step=stop)
    done = []
    upfeat.train(
        backbone(), place / "photos", config, resume=True,
        on_step=lambda report: done.append(report.step),
    )  # fmt: skip
    assert done == list(range(done[0], 7))
    assert done[0] <= step + 1
    assert weights(tmp_path / "run") == weights(whole)
    assert log(tmp_path / "run") == log(whole)
