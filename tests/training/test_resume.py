"""A run that is stopped in any way ends as if it had not been."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from training.children import KILLED_RUN
from training.small import log, small_backbone, small_config, weights, write_photographs

import upfeat
from upfeat.training import TrainConfig

CHILDREN = Path(__file__).with_name("children.py")


def run_children(*arguments, timeout=200):
    """Run ``children.py``; its failures are shown."""
    tests = str(CHILDREN.parent.parent)
    paths = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHILDREN), *(str(one) for one in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(photos, backbone, tmp_path, times):
    upfeat.train(backbone, photos, small_config(tmp_path / "whole", **KILLED_RUN))
    run_children("killed", photos, tmp_path / "run", times, 7)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


# Windows has no signal of a closed terminal.
HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


@pytest.fixture
def heeded_signals():
    """Signals are not ignored, as they are in the background of a script and by ``nohup``."""
    ways = dict.fromkeys([signal.SIGTERM, *HANGUP], signal.SIG_DFL)
    ways[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, way) for number, way in ways.items()}
    yield
    for number, way in before.items():
        signal.signal(number, way)


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *HANGUP])
def test_interrupted(photos, backbone, tmp_path, number):
    upfeat.train(backbone, photos, small_config(tmp_path / "whole"))

    def interrupt(report):
        if report.step == 3:
            os.kill(os.getpid(), number)

    config = small_config(tmp_path / "run", checkpoint_every=100)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        upfeat.train(backbone, photos, config, on_step=interrupt)
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step-00000004.ckpt"
    ]
    upfeat.train(backbone, photos, config, resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_an_ignored_signal_stays_ignored(photos, backbone, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        kill = lambda _: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        upfeat.train(backbone, photos, small_config(tmp_path / "run", steps=2), on_step=kill)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_that_goes_on_is_not_finished(photos, backbone, tmp_path):
    def state():
        return json.loads((tmp_path / "run" / "run.json").read_text())["state"]

    config = small_config(tmp_path / "run", steps=2)
    upfeat.train(backbone, photos, config)
    assert state() == "finished"
    seen = []
    longer = small_config(tmp_path / "run", steps=3)
    upfeat.train(backbone, photos, longer, resume=True, on_step=lambda _: seen.append(state()))
    assert seen == ["running"]
    assert state() == "finished"


def test_damaged_checkpoint_falls_back_to_the_one_before(photos, backbone, tmp_path):
    upfeat.train(backbone, photos, small_config(tmp_path / "run"))
    expected = weights(tmp_path / "run"), log(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:2000])
    steps = []
    with pytest.warns(UserWarning, match="step-00000006.ckpt: damaged"):
        upfeat.train(
            backbone,
            photos,
            small_config(tmp_path / "run"),
            resume=True,
            on_step=lambda report: steps.append(report.step),
        )
    assert steps == [5, 6]
    assert (weights(tmp_path / "run"), log(tmp_path / "run")) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite_falls_back_too(photos, backbone, tmp_path, value):
    upfeat.train(backbone, photos, small_config(tmp_path / "run"))
    expected = weights(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.ckpt"
    state = torch.load(newest, weights_only=True)
    state["objectives"]["0.upsampler.stages.1.sigma_spatial"].fill_(value)
    torch.save(state, newest)
    with pytest.warns(UserWarning, match=r"stages.1.sigma_spatial holds NaN or infinity"):
        upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)
    assert weights(tmp_path / "run") == expected


def test_checkpoints_of_another_kind_are_damaged(photos, backbone, tmp_path):
    upfeat.train(backbone, photos, small_config(tmp_path / "run", keep=1))
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.ckpt"
    for content, words in (([1], "another format"), ({"format": "upfeat-train-1"}, "lacks")):
        torch.save(content, newest)
        with (
            pytest.warns(UserWarning, match=words),
            pytest.raises(ValueError, match="all 1 checkpoints are damaged"),
        ):
            upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)


def _without_objectives(state):
    state["objectives"].clear()


def _without_a_weight(state):
    del state["objectives"]["0.upsampler.stages.1.sigma_spatial"]


def _with_a_stranger(state):
    state["objectives"]["0.other"] = torch.zeros(1)


def _of_another_shape(state):
    state["objectives"]["0.upsampler.stages.1.sigma_spatial"] = torch.zeros(2)


def _beyond_sense(state):
    state["objectives"]["0.upsampler.stages.1.sigma_spatial"] = torch.tensor(1e30)


def _without_the_best(state):
    state["best"] = {"step": 6, "scores": {"error": 1.0}, "weights": {}}


def _of_another_optimiser(state):
    state["optimizer"] = {}


def _with_other_moments(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_objectives, "objectives lacks 0.upsampler"),
        (_without_a_weight, "objectives lacks 0.upsampler.stages.1.sigma_spatial"),
        (_with_a_stranger, "objectives holds 0.other"),
        (_of_another_shape, r"sigma_spatial is \(2,\), not \(\)"),
        (_beyond_sense, r"objectives: 0.upsampler.stages.1.sigma_spatial holds 1e\+30"),
        (_without_the_best, "best lacks stages"),
        (_of_another_optimiser, "optimizer lacks param_groups"),
        (_with_other_moments, r"optimizer.0.exp_avg is \(2, 3\)"),
    ],
)
def test_a_checkpoint_of_other_weights_falls_back_too(photos, backbone, tmp_path, damage, words):
    upfeat.train(backbone, photos, small_config(tmp_path / "run"))
    expected = weights(tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    state = torch.load(newest, weights_only=True)
    damage(state)
    torch.save(state, newest)
    with pytest.warns(
        UserWarning, match=rf"00000006.ckpt: damaged \(.*{words}.*one before is used"
    ):
        upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)
    assert weights(tmp_path / "run") == expected
    older.unlink()
    torch.save(state, newest)
    with (
        pytest.warns(UserWarning, match=words),
        pytest.raises(ValueError, match=r"all 1 checkpoints are damaged.*remove the run's"),
    ):
        upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)


def test_all_checkpoints_damaged(photos, backbone, tmp_path):
    upfeat.train(backbone, photos, small_config(tmp_path / "run"))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="all 2 checkpoints are damaged"),
    ):
        upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)


def test_resuming_a_finished_run_gives_its_weights(photos, backbone, tmp_path):
    first = upfeat.train(backbone, photos, small_config(tmp_path / "run"))
    again = upfeat.train(backbone, photos, small_config(tmp_path / "run"), resume=True)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert one.equal(other)


def test_resuming_nothing_begins(photos, backbone, tmp_path):
    upfeat.train(backbone, photos, small_config(tmp_path / "run", steps=1), resume=True)
    assert (tmp_path / "run" / "upsampler").is_dir()


def test_two_at_once(photos, tmp_path):
    """The second is told who holds the folder; the first goes on as if alone."""
    told = []

    def second():
        other = small_config(tmp_path / "run", seed=1)
        for resume in (False, True):
            with pytest.raises(ValueError) as refused:
                upfeat.train(small_backbone(), photos, other, resume=resume)
            told.append(str(refused.value))

    def during(report):
        if report.step == 2:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    upfeat.train(small_backbone(), photos, small_config(tmp_path / "run"), on_step=during)
    upfeat.train(small_backbone(), photos, small_config(tmp_path / "alone"))
    assert len(told) == 2
    for line in told:
        assert f"is being written by process {os.getpid()} on {socket.gethostname()} since" in line
        assert "\n" not in line
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    assert files(tmp_path / "run") == files(tmp_path / "alone")


def test_settings_of_a_run(photos, tmp_path):
    config = small_config(tmp_path / "run", seed=5)
    upfeat.train(small_backbone(), photos, config)
    again = TrainConfig.of_run(tmp_path / "run", keep=7)
    assert again == small_config(tmp_path / "run", seed=5, keep=7)
    upfeat.train(small_backbone(), photos, again, resume=True)
    with pytest.raises(FileNotFoundError, match="no such file"):
        TrainConfig.of_run(tmp_path / "none")
    with pytest.raises(ValueError, match="did you mean keep"):
        TrainConfig.of_run(tmp_path / "run", kepe=7)


def test_a_run_may_go_further(photos, backbone, tmp_path):
    whole = small_config(tmp_path / "whole", validation_images=0)
    upfeat.train(backbone, photos, whole)
    upfeat.train(backbone, photos, small_config(tmp_path / "run", steps=4, validation_images=0))
    upfeat.train(backbone, photos, small_config(tmp_path / "run", validation_images=0), resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    history = json.loads((tmp_path / "run" / "upsampler" / "training.json").read_text())
    assert history["config"]["steps"] == history["steps"] == 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    photos = write_photographs(folder / "photos")
    upfeat.train(small_backbone(), photos, small_config(folder / "run", steps=2))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1, "views": 3}, "differs: views: 2 there, 3 here; seed: 0 there, 1 here; give"),
        ({"steps": 1}, "steps: 2 there, 1 here"),
        ({"schedule": "cosine", "steps": 9}, "steps: 2 there, 9 here; schedule: 'constant' there"),
    ],
)
def test_other_settings(finished, changes, words):
    config = small_config(finished / "run", **{"steps": 2, **changes})
    with pytest.raises(ValueError, match=words):
        upfeat.train(small_backbone(), finished / "photos", config, resume=True)


def test_settings_that_change_no_result_may_differ(finished):
    config = small_config(finished / "run", steps=2, workers=1, keep=5, checkpoint_every=7)
    upfeat.train(small_backbone(), finished / "photos", config, resume=True)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "backbone: Cells there, Cells here of the same name with other weights"),
        ({"channels": 3, "stride": 4}, "Cells here of the same name"),
    ],
)
def test_another_backbone(finished, other, words):
    config = small_config(finished / "run", steps=2)
    with pytest.raises(ValueError, match=words):
        upfeat.train(small_backbone(**other), finished / "photos", config, resume=True)


def test_another_function_of_the_same_name(photos, tmp_path):
    for factor, raised in ((1, nullcontext()), (2, pytest.raises(ValueError, match="backbone: f"))):

        def f(x, factor=factor):
            return factor * torch.nn.functional.avg_pool2d(x, 8)

        backbone = upfeat.WrappedBackbone(f, probe_size=32)
        with raised:
            upfeat.train(backbone, photos, small_config(tmp_path / "run", steps=1), resume=True)


def test_other_photographs(photos, tmp_path):
    config = small_config(tmp_path / "run", steps=1)
    upfeat.train(small_backbone(), photos, config)
    (photos / "00.jpg").unlink()
    (photos / "new.png").write_bytes((photos / "01.png").read_bytes())
    (photos / "03.png").write_bytes((photos / "01.png").read_bytes())
    words = r"1 added \(new.png\), 1 gone \(00.jpg\), 1 of another size \(03.png\)"
    with pytest.raises(ValueError, match=words):
        upfeat.train(small_backbone(), photos, config, resume=True)
