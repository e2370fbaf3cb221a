"""Two workers of a local Ray: the same files, also when one of them is killed."""

import os
import signal
import threading
import time

import pytest

pytest.importorskip("ray")

from batch.test_extract import encoded, model, tree

from upfeat.batch import Engine, Extraction, extract


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_worker_loses_nothing(tmp_path):
    psutil = pytest.importorskip("psutil")
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(40):
        (photos / f"{seed:03d}.png").write_bytes(encoded(seed, (160, 160)))
    (photos / "bad.png").write_text("no picture")
    calm = extract(model(), [photos], tmp_path / "calm", Extraction())
    killed = []

    def kill():
        """Kill one worker once files appear."""
        for _ in range(600):
            time.sleep(0.05)
            if len(list((tmp_path / "out").glob("*.safetensors"))) > 5:
                break
        for process in psutil.Process().children(recursive=True):
            if "_Worker" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    engine = Engine("ray", workers=2)
    summary = extract(model(), [photos], tmp_path / "out", Extraction(), engine=engine)
    killer.join()
    assert killed
    assert (summary.made, len(summary.failures)) == (calm.made, 1) == (40, 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        extract(
            model(),
            [tmp_path / "a.png"],
            tmp_path / "out",
            Extraction(),
            engine=Engine("ray", address="127.0.0.1:1"),
        )
