"""A run from photographs to weights, and everything that may go wrong on the way."""

import errno
import json
import multiprocessing
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from published_reference import published_state
from training.small import log, small_backbone, small_config, weights

import upfeat
from upfeat.training import checkpoint, loading
from upfeat.training.objective import Objective
from upfeat.training.photographs import Photographs
from upfeat.training.validation import validate


def lines(folder):
    return [json.loads(line) for line in log(folder).splitlines()]


def test_a_run_leaves_weights_with_their_history(photos, backbone, tmp_path):
    out = tmp_path / "run"
    trained = upfeat.train(backbone, photos, small_config(out))
    assert not trained.training
    found = upfeat.Upsampler.from_pretrained(out / "upsampler")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, found.state_dict()[name])
    history = json.loads((out / "upsampler" / "training.json").read_text())
    assert history["photographs"]["images"] == 8
    assert len(history["photographs"]["digest"]) == 64
    assert history["config"]["steps"] == 6
    assert history["backbones"][0]["name"] == "Cells"
    assert set(history["validation"]["scores"]) == {"reconstruction", "error"}
    assert history["versions"]["torch"] == torch.__version__
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(out) if "validation" in line] == [3, 6]


def test_the_same_seed_gives_the_same_run_and_leaves_the_global_one_alone(
    photos, backbone, tmp_path
):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        upfeat.train(backbone, photos, small_config(tmp_path / name, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((weights(tmp_path / name), log(tmp_path / name)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_needs_no_gradients_around_it(photos, backbone, tmp_path, mode):
    upfeat.train(backbone, photos, small_config(tmp_path / "plain"))
    with mode():
        upfeat.train(backbone, photos, small_config(tmp_path / "without"))
    assert weights(tmp_path / "without") == weights(tmp_path / "plain")


def test_without_a_folder_only_the_upsampler_is_kept(photos, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    kept = upfeat.train(backbone, photos, small_config(tmp_path / "run"))
    passing = upfeat.train(backbone, photos, small_config(None))
    assert not list((tmp_path / "temporary").iterdir())
    assert all(
        torch.equal(value, passing.state_dict()[name]) for name, value in kept.state_dict().items()
    )


def test_training_starts_from_shipped_weights(photos, backbone, tmp_path):
    name = "neighbourhood_universal"
    changes = {"upsampler": name, "upsampler_options": {}, "steps": 1, "learning_rate": 1e-12}
    config = small_config(tmp_path / "run", **changes)
    trained = upfeat.train(backbone, photos, config)
    for key, value in upfeat.load_upsampler(name).state_dict().items():
        torch.testing.assert_close(trained.state_dict()[key], value)
    with pytest.raises(ValueError, match="are for the name of a class; neighbourhood_universal is"):
        upfeat.train(
            backbone, photos, small_config(None, upsampler=name, upsampler_options={"radius": 1})
        )


@pytest.mark.parametrize("name", ["early_detail", "early_detail_efficientnet_lite0"])
def test_networks_of_early_layers_are_not_trained_by_views(photos, backbone, tmp_path, name):
    config = small_config(tmp_path / "run", upsampler=name, upsampler_options={})
    with pytest.raises(ValueError, match=f"'{name}' is not taught by views but by benchmarks"):
        upfeat.train(backbone, photos, config)
    assert not (tmp_path / "run").exists()


def test_back_projection_is_for_the_finished_upsampler(photos, backbone, tmp_path):
    common = {"upsampler": "neighbourhood", "upsampler_options": {}}
    runs = {}
    for count in (0, 2):
        out = tmp_path / str(count)
        runs[count] = upfeat.train(
            backbone, photos, small_config(out, back_projections=count, **common)
        )
        assert runs[count].back_projections == count
        assert upfeat.Upsampler.from_pretrained(out / "upsampler").back_projections == count
    for name, value in runs[0].state_dict().items():
        assert torch.equal(value, runs[2].state_dict()[name])


@pytest.mark.parametrize("size", [8, 15])
def test_an_image_of_one_cell_is_refused(photos, backbone, tmp_path, size):
    with pytest.raises(ValueError, match=f"size={size} is less than two cells of Cells .* 16"):
        upfeat.train(backbone, photos, small_config(tmp_path / "run", size=size))
    assert not (tmp_path / "run").exists()
    upfeat.train(backbone, photos, small_config(tmp_path / "run", size=16, steps=1))


def test_features_that_do_not_vary_are_no_scale(backbone, tmp_path):
    (tmp_path / "grey").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 40), (90 + index, 90, 90)).save(tmp_path / "grey" / f"{index}.png")
    config = small_config(tmp_path / "run", validation_images=1)
    with pytest.raises(ValueError, match="do not vary within the 1 held-out"):
        upfeat.train(backbone, tmp_path / "grey", config)


def test_workers_change_nothing(photos, backbone, tmp_path):
    for workers in (0, 2):
        config = small_config(tmp_path / str(workers), workers=workers, steps=4)
        upfeat.train(backbone, photos, config)
    assert weights(tmp_path / "0") == weights(tmp_path / "2")
    assert log(tmp_path / "0") == log(tmp_path / "2")


def test_a_script_without_a_guard_is_told_so(photos, backbone, tmp_path, monkeypatch):
    """Where processes are not forked, each that loads photographs runs the script anew."""
    config = small_config(tmp_path / "run", workers=1, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
        with pytest.raises(ValueError, match=r'called again .* `if __name__ == "__main__":`'):
            upfeat.train(backbone, photos, config)
    assert not (tmp_path / "run").exists()

    def ended(loader):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(loading.DataLoader, "__iter__", ended)
    with pytest.raises(ValueError, match=r'has ended .* `if __name__ == "__main__":`'):
        upfeat.train(backbone, photos, config)


def test_training_lowers_the_loss_and_leaves_the_backbone_alone(photos, backbone, tmp_path):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    config = small_config(tmp_path / "run", steps=60, learning_rate=1e-2, clip_steps=0)
    upfeat.train(backbone, photos, config)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("upsampler", ["jbu_stack", "bilinear"])
def test_several_backbones_share_one_upsampler(photos, tmp_path, upsampler):
    backbones = [small_backbone(), small_backbone(channels=5, stride=4, seed=1)]
    options = {"radius": 1, "n_stages": 2} if upsampler == "jbu_stack" else {}
    config = small_config(tmp_path / "run", upsampler=upsampler, upsampler_options=options)
    trained = upfeat.train(backbones, photos, config)
    assert getattr(trained, "embed_dim", None) is None
    for one in backbones:
        x = torch.zeros(1, 3, 32, 32)
        assert trained(one(x), x).shape == (1, one.embed_dim, 32, 32)


def test_saved_weights_can_be_trained_further(photos, backbone, tmp_path):
    upfeat.train(backbone, photos, small_config(tmp_path / "a"))
    start = small_config(
        tmp_path / "b", upsampler=str(tmp_path / "a" / "upsampler"), upsampler_options={}, steps=1
    )
    upfeat.train(backbone, photos, start)
    assert weights(tmp_path / "b") != weights(tmp_path / "a")


def test_steps_are_reported(photos, backbone, tmp_path):
    reports = []
    config = small_config(
        tmp_path / "run", schedule="cosine", learning_rate=0.1, crf_weight=1e-3, tv_weight=0.1
    )
    upfeat.train(backbone, photos, config, on_step=reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [bool(report.validation) for report in reports] == [False, False, True] * 2
    assert {"loss", "reconstruction", "crf", "tv"} <= set(reports[0].losses)
    rates = [report.learning_rate for report in reports]
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * k / 6)) for k in range(6)])


def test_the_best_weights_are_kept_and_patience_ends_a_run(photos, backbone, tmp_path):
    # Steps this large only make it worse after the first few.
    config = small_config(
        tmp_path / "run", steps=40, learning_rate=3.0, clip_steps=0, validate_every=1, patience=3
    )
    reports = []
    trained = upfeat.train(backbone, photos, config, on_step=reports.append)
    errors = [report.validation["error"] for report in reports]
    best = int(np.argmin(errors))
    assert len(errors) == best + 4 < 40
    history = json.loads((tmp_path / "run" / "run.json").read_text())
    assert history["validation"]["step"] == best + 1
    short = small_config(tmp_path / "short", **{**changes(config), "steps": best + 1})
    again = upfeat.train(backbone, photos, short)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def changes(config):
    return {
        name: getattr(config, name)
        for name in ("learning_rate", "clip_steps", "validate_every", "patience")
    }


def test_accumulated_parts_give_the_gradient_of_the_whole(photos, backbone, tmp_path):
    # Nothing drawn for the loss, so that only the division can make a difference.
    still = {
        "max_pad": 0,
        "zoom_probability": 0,
        "flip_probability": 0,
        "projection_dim": None,
        "saliency_dropout": 0,
        "upsampler": "bilinear",
        "upsampler_options": {},
        "batch_size": 4,
    }
    for parts in (1, 4):
        upfeat.train(
            backbone, photos, small_config(tmp_path / str(parts), accumulate=parts, **still)
        )
    whole, divided = lines(tmp_path / "1"), lines(tmp_path / "4")
    for one, other in zip(whole, divided, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_tensorboard_gets_scalars_and_pictures(photos, backbone, tmp_path):
    pytest.importorskip("tensorboard")
    upfeat.train(backbone, photos, small_config(tmp_path / "run", tensorboard=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "validation/error", "learning_rate"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["features"]


def test_training_starts_from_a_published_checkpoint(photos, backbone, tmp_path):
    torch.manual_seed(0)
    published = upfeat.JAFAR(6)
    torch.save(published_state(published), tmp_path / "jafar.pth")
    config = small_config(
        tmp_path / "run", upsampler=str(tmp_path / "jafar.pth"), upsampler_options={}, steps=1
    )
    trained = upfeat.train(backbone, photos, config)
    assert trained.origin.startswith("trained from JAFAR (")
    told = json.loads((tmp_path / "run" / "upsampler" / "training.json").read_text())
    assert told["origin"] == trained.origin
    steps = [
        float((new - old).abs().max())
        for new, old in zip(
            trained.state_dict().values(), published.state_dict().values(), strict=True
        )
    ]
    assert 0 < max(steps) < 0.02


class TestBadInput:
    def test_without_tensorboard_nothing_is_written_or_changed(
        self, photos, backbone, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
        config = small_config(tmp_path / "run", steps=1)
        for resume in (False, True):
            with pytest.raises(ValueError, match="tensorboard=True needs TensorBoard"):
                upfeat.train(backbone, photos, replace(config, tensorboard=True), resume=resume)
            assert resume or not (tmp_path / "run").exists()
            upfeat.train(backbone, photos, config, resume=True)

    def test_settings_of_another_upsampler(self, photos, backbone, tmp_path):
        config = small_config(tmp_path / "run", mix_share=0.5)
        with pytest.raises(ValueError, match=r"mix_share=0\.5 is of the detail upsampler alone"):
            upfeat.train(backbone, photos, config)

    def test_validation_of_weights_that_diverged(self, photos, backbone, tmp_path):
        config = small_config(tmp_path / "run")
        objective = Objective(upfeat.load_upsampler("bilinear"), 6, 8, config)
        torch.nn.init.constant_(objective.uncertainty.bias, 200)
        held_out = Photographs(photos, ["00.jpg"], 32, "short_side", None)
        with pytest.raises(ValueError, match=r"learning_rate=0.001 may be too large"):
            validate([objective], [backbone], held_out, config)

    def test_patience_without_validation(self, photos, backbone, tmp_path):
        config = small_config(tmp_path / "run", steps=1, patience=2, validation_images=0)
        with pytest.warns(UserWarning, match="patience=2 has no effect"):
            upfeat.train(backbone, photos, config)

    def test_another_run_is_not_overwritten(self, photos, backbone, tmp_path):
        upfeat.train(backbone, photos, small_config(tmp_path / "run", steps=1))
        before = weights(tmp_path / "run")
        with pytest.raises(ValueError, match="holds a run already; go on with it by --resume"):
            upfeat.train(backbone, photos, small_config(tmp_path / "run", steps=1))
        assert weights(tmp_path / "run") == before

    def test_nothing_to_resume_without_a_folder(self, photos, backbone):
        with pytest.raises(ValueError, match="resume=True needs out="):
            upfeat.train(backbone, photos, small_config(None), resume=True)

    def test_folder_that_cannot_be_made(self, photos, backbone, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="file/run: cannot be written"):
            upfeat.train(backbone, photos, small_config(tmp_path / "file" / "run"))

    def test_output_without_a_grid(self, photos, tmp_path):
        with pytest.raises(ValueError, match=r"returned a tensor of shape \(1,\)"):
            upfeat.train(lambda x: torch.zeros(len(x)), photos, small_config(tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"upsampler": "jbu_stak"}, "did you mean jbu_stack"),
            ({"upsampler_options": {"raduis": 2}}, "did you mean radius"),
            ({"upsampler_options": {"embed_dim": 7}}, "expects 7 channels but Cells has 6"),
            ({"device": "tpu9"}, 'device="tpu9" cannot be used'),
            ({"validation_images": 10}, "leaves none of the 10 photographs"),
            ({"size": 41}, r"10 smaller than 41×41 pixels\); give larger ones, or a smaller size"),
        ],
    )
    def test_settings_that_do_not_fit(self, photos, backbone, tmp_path, changes, words):
        with pytest.raises(ValueError, match=words):
            upfeat.train(backbone, photos, small_config(tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    def test_features_that_are_nan_name_step_and_photograph(self, photos, tmp_path):
        Image.new("RGB", (48, 40), "white").save(photos / "white.png")

        def dazzled(x):
            features = torch.nn.functional.avg_pool2d(x, 8)
            return torch.where(x.mean((1, 2, 3), keepdim=True) > 2, torch.nan, features)

        blind = upfeat.WrappedBackbone(dazzled, probe_size=32)
        config = small_config(tmp_path / "run", steps=20, validation_images=0, checkpoint_every=1)
        with pytest.raises(
            ValueError, match=r"step \d+: NaN .* features of dazzled, from white"
        ) as raised:
            upfeat.train(blind, photos, config)
        step = int(str(raised.value).split(":")[0].removeprefix("step "))
        kept = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", 2).newest()
        assert (0 if kept is None else kept["step"]) == step - 1
        if kept is not None:
            assert f"last checkpoint is that of step {step - 1}" in str(raised.value)

    @pytest.mark.parametrize("power", [-30, 40])
    def test_trainings_follow_the_unit_of_the_features(self, photos, tmp_path, power):
        """A stack learns the same; its constant, which is in the features' unit, is as large."""
        made = []
        for unit in (2.0 ** (power // 2), 2.0**power):
            torch.manual_seed(0)
            network = torch.nn.Conv2d(3, 6, 8, stride=8)
            for one in network.parameters():
                one.data *= unit
            config = small_config(
                tmp_path / f"run{unit}", upsampler="jbu_stack", downsampler="attention", steps=4,
                upsampler_options={"n_stages": 2, "radius": 1},
            )  # fmt: skip
            made.append(upfeat.train(upfeat.load_backbone(network), photos, config))
        plain, scaled = made
        assert plain.channel_mix.bias.abs().max() > 0
        expected = {name: value.detach() for name, value in plain.named_parameters()}
        expected["channel_mix.bias"] *= 2.0 ** (power - power // 2)
        for name, value in scaled.named_parameters():
            assert torch.equal(value, expected[name]), name

    def test_loss_that_overflows_names_step_and_photographs(self, photos, tmp_path):
        def shouting(x):  # at photographs, of which there are several at once
            return torch.nn.functional.avg_pool2d(x, 8) * (1 if len(x) == 1 else 1e25)

        loud = upfeat.WrappedBackbone(shouting, probe_size=32)
        with pytest.raises(ValueError, match=r"step 1: NaN .* the loss, from \d\d\..*, \d\d\."):
            upfeat.train(loud, photos, small_config(tmp_path / "run"))

    def test_full_disk_keeps_the_checkpoint_before(self, photos, backbone, tmp_path, monkeypatch):
        upfeat.train(backbone, photos, small_config(tmp_path / "whole"))
        write = checkpoint.write_bytes
        calls = []

        def full(path, content):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, content)

        monkeypatch.setattr(checkpoint, "write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device.*resume from that of step 2"):
            upfeat.train(backbone, photos, small_config(tmp_path / "run"))
        upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)
        assert weights(tmp_path / "run") == weights(tmp_path / "whole")
        assert log(tmp_path / "run") == log(tmp_path / "whole")

    def test_full_disk_at_the_start(self, photos, backbone, tmp_path, monkeypatch):
        def full(path, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("upfeat.training.folder.write_bytes", full)
        with pytest.raises(OSError, match=r"not written .No space left on device.: .*config.json"):
            upfeat.train(backbone, photos, small_config(tmp_path / "run"))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_photograph_that_vanishes(self, photos, backbone, tmp_path, workers):
        def vanish(report):
            for path in photos.iterdir():
                path.unlink()

        config = small_config(tmp_path / "run", validation_images=0, workers=workers, steps=20)
        with pytest.raises(OSError, match=r"^[^\n]*changed since training started[^\n]*$"):
            upfeat.train(backbone, photos, config, on_step=vanish)
