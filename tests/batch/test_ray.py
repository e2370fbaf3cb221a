"""Two workers of a local Ray: the same files, also when one of them is killed."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("ray")

from batch.test_extract import encoded, model, tree

from upfeat.batch import Engine, Extraction, extract


@contextmanager
def one_killed(begun):
    """Kill one worker of Ray as soon as ``begun()`` says that there are results."""
    psutil = pytest.importorskip("psutil")
    killed = []

    def kill():
        for _ in range(2400):
            time.sleep(0.05)
            if begun():
                break
        for process in psutil.Process().children(recursive=True):
            if "_Worker" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()
    assert killed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("phase", ["parts", "tiles"])
def test_a_killed_worker_loses_no_tile(tmp_path, phase):
    """Two workers of Ray write the bytes of one process with one thread, also when one dies."""
    pytest.importorskip("rasterio")
    pytest.importorskip("zarr", "3.0")
    from raster.test_raster import picture, tiny, upsample, write

    path = write(tmp_path / "scene.tif", picture(400, 700), nodata=20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calm = upsample(path, tmp_path / "calm.zarr", tiny())
    finally:
        torch.set_num_threads(threads)
    partial, engine = tmp_path / "out.zarr.partial", Engine("ray", workers=2)
    begun = {
        "parts": lambda: len(list(partial.glob("parts/*.safetensors"))) > 2,
        "tiles": lambda: any(partial.glob("features/c/**/[0-9]*/*")),
    }
    with one_killed(begun[phase]):
        out = upsample(path, tmp_path / "out.zarr", tiny(), engine=engine)
    assert tree(out) == tree(calm)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_worker_loses_nothing(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(40):
        (photos / f"{seed:03d}.png").write_bytes(encoded(seed, (160, 160)))
    (photos / "bad.png").write_text("no picture")
    calm = extract(model(), [photos], tmp_path / "calm", Extraction())
    engine = Engine("ray", workers=2)
    with one_killed(lambda: len(list((tmp_path / "out").glob("*.safetensors"))) > 5):
        summary = extract(model(), [photos], tmp_path / "out", Extraction(), engine=engine)
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
