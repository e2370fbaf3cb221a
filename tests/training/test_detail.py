"""Training of the detail: running regressions, the loss, and whole runs."""

import json

import pytest
import torch
from training.small import log, small_config, weights

import upfeat
from upfeat.training import TrainConfig
from upfeat.training.recipes.detail import DetailTarget, RunningRegression

SMALL = {"query_dim": 8, "levels": 2, "width": 4, "depth": 1}
DETAIL = {
    "upsampler": "detail",
    "upsampler_options": SMALL,
    "frozen": ["neighbourhood"],
    "detail_weight": 1.0,
    "back_projections": None,
}
untrained_start = pytest.mark.filterwarnings("ignore:frozen=.*without a start")


def same(value):
    return value


def test_a_running_regression_is_least_squares_over_all_it_was_shown():
    torch.manual_seed(0)
    inputs, true, noise = torch.randn(4, 3, 20, 20), torch.randn(3, 3), torch.randn(4, 3, 20, 20)
    outputs = torch.einsum("oi,bihw->bohw", true, inputs) + 2 + 0.1 * noise
    regression = RunningRegression(3)
    assert not regression.ready
    for pair in zip(inputs.split(1), outputs.split(1), strict=True):
        regression.show(*pair)
    assert not regression.ready  # nothing counts before the step is over
    regression.absorb(same)
    torch.testing.assert_close(regression(inputs), outputs, rtol=0, atol=0.7)
    assert (regression(inputs) - outputs).square().mean() < 0.013
    deviation = outputs.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(regression.deviation().float(), deviation)


def test_what_is_shown_counts_from_the_next_step_on():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 3, 9, 9).unbind(0)
    regression = RunningRegression(3)
    regression.show(a, b)
    regression.absorb(same)
    before = regression(a)
    regression.show(b, a)
    assert torch.equal(regression(a), before)
    regression.absorb(same)
    assert not torch.equal(regression(a), before)
    again = RunningRegression(3)
    again.load_state_dict(regression.state_dict())
    assert torch.equal(again(a), regression(a))


def test_more_channels_than_samples_and_dead_channels_are_no_trouble():
    inputs, outputs = torch.randn(1, 6, 1, 2), torch.randn(1, 6, 1, 2)
    inputs[:, 2], outputs[:, 3] = 0, 5
    regression = RunningRegression(6)
    regression.show(inputs, outputs)
    regression.absorb(same)
    assert torch.isfinite(regression(inputs)).all()
    assert (regression.deviation() > 0).all()


def test_detail_learns_what_the_enlarged_image_shows():
    """Features that are colours: what a coarse cell lacks can be read off the image."""
    torch.manual_seed(0)
    up = upfeat.DetailUpsampler(3, query_dim=8, levels=2, width=16, depth=1)
    target = DetailTarget(3)
    optimiser = torch.optim.Adam(up.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        image = torch.nn.functional.interpolate(torch.randn(4, 3, 16, 16), 64, mode="bicubic")
        pooled = [torch.nn.functional.adaptive_avg_pool2d(image, n) for n in (4, 8)]
        kernels = up.prepare(image, (4, 4), (64, 64))
        loss = target(up, kernels, *pooled)
        optimiser.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimiser.step()
        target.absorb(same)
        losses.append(float(loss.detach()))
    assert losses[0] == 0  # nothing was known of the drift yet
    assert sum(losses[-5:]) < 0.5 * sum(losses[2:7])


@untrained_start
def test_a_run_trains_what_is_not_frozen_and_keeps_a_share_of_the_mix(photos, backbone, tmp_path):
    made = {}
    for share in (1.0, 0.25):
        config = small_config(tmp_path / str(share), mix_share=share, **DETAIL)
        made[share] = upfeat.train(backbone, photos, config)
    first = upfeat.train(backbone, photos, small_config(tmp_path / "one", **DETAIL, steps=1))
    whole, part = (made[share].channel_mix.weight for share in made)
    assert whole.abs().max() > 0
    torch.testing.assert_close(part, 0.25 * whole)
    for name, value in first.neighbourhood.state_dict().items():
        assert torch.equal(value, made[1.0].neighbourhood.state_dict()[name])
    assert made[1.0].detail.weight.abs().max() > 0
    found = json.loads((tmp_path / "0.25" / "upsampler" / "training.json").read_text())
    assert found["config"]["frozen"] == ["neighbourhood"]
    assert "detail" in json.loads(log(tmp_path / "1.0").splitlines()[-1])


@untrained_start
def test_a_resumed_run_ends_with_the_same_weights(photos, backbone, tmp_path):
    changes = {**DETAIL, "schedule": "constant", "mix_share": 0.5}
    upfeat.train(backbone, photos, small_config(tmp_path / "whole", **changes))
    out = tmp_path / "cut"

    def stop(report):
        if report.step == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        upfeat.train(backbone, photos, small_config(out, **changes), on_step=stop)
    upfeat.train(backbone, photos, small_config(out, **changes), resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert log(out) == log(tmp_path / "whole")


@pytest.fixture
def steps(tmp_path):
    """A folder of trained neighbourhood steps."""
    made = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=2)
    made.save_pretrained(tmp_path / "steps")
    return str(tmp_path / "steps")


@pytest.mark.parametrize("part", ["neighbourhood", "neighbourhood.encoder"])
def test_freezing_untrained_steps_is_said(photos, backbone, tmp_path, part):
    config = small_config(tmp_path / "run", **{**DETAIL, "steps": 1, "frozen": [part]})
    with pytest.warns(UserWarning, match="give --option start=neighbourhood_") as caught:
        upfeat.train(backbone, photos, config)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_without_a_target_the_detail_learns_from_views_and_that_is_said(photos, backbone, tmp_path):
    changes = {**DETAIL, "upsampler_options": {**SMALL, "depth": 0}, "frozen": []}
    config = small_config(tmp_path / "run", **{**changes, "detail_weight": 0.0})
    with pytest.warns(UserWarning, match="detail_weight=0: .*give --detail-weight 1") as caught:
        trained = upfeat.train(backbone, photos, config)
    assert len(caught) == 1
    assert trained.detail.weight.abs().max() > 0
    assert trained.channel_mix.weight.abs().max() > 0


def test_nothing_is_said_where_nothing_is_amiss(photos, backbone, tmp_path, steps):
    # Warnings are errors.
    options = {**SMALL, "start": steps}
    for name, changes in (
        ("start", {**DETAIL, "upsampler_options": options}),
        ("all", {**DETAIL, "frozen": []}),
        ("other", {}),
    ):
        upfeat.train(backbone, photos, small_config(tmp_path / name, **{**changes, "steps": 1}))
    again = {**DETAIL, "upsampler": str(tmp_path / "start" / "upsampler"), "upsampler_options": {}}
    upfeat.train(backbone, photos, small_config(tmp_path / "again", **{**again, "steps": 1}))


def test_settings_that_do_not_fit_are_refused(photos, backbone, tmp_path):
    for changes, words in (
        ({"detail_weight": 1.0}, "detail_weight=1 is of the detail upsampler alone; give 0"),
        ({"frozen": ["enc"]}, r'frozen: part "enc" is unknown'),
    ):
        with pytest.raises(ValueError, match=words):
            upfeat.train(backbone, photos, small_config(tmp_path / "run", **changes))
    config = small_config(tmp_path / "run", **DETAIL)
    with pytest.raises(ValueError, match="detail_weight=1 trains the detail of one backbone; give"):
        upfeat.train([backbone, backbone], photos, config)
    for changes in ({"frozen": "neighbourhood"}, {"mix_share": 2}, {"detail_weight": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            TrainConfig(**changes)
