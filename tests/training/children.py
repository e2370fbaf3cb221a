"""Runs in processes of their own, to be killed or to train together. Run by the tests.

Children are forked from one process that has imported everything, before any of it has run.
"""

import argparse
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.optim import NAdam
from training.small import small_backbone, small_config

from upfeat.training import checkpoint, train
from upfeat.training.photographs import Photographs, list_photographs
from upfeat.training.processes import processes
from upfeat.training.trainer import Trainer

KILLED_RUN = {"steps": 30, "checkpoint_every": 1, "validate_every": 5}


def killed(photos, out, times, seed):
    """Train; be killed ``times`` times, at random moments or half way through a write."""
    draw = random.Random(seed)
    deaths = 0
    for attempt in range(times):
        half_way = draw.randrange(1, 4) if attempt % 3 == 1 else None
        child = fork(lambda half_way=half_way: run(photos, out, half_way))
        if half_way is None:
            time.sleep(draw.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
        deaths += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert deaths >= times // 3, f"only {deaths} of {times} runs were cut short"
    wait([fork(lambda: run(photos, out, None))])


def run(photos, out, half_way):
    if half_way is not None:
        die_in_write(half_way)
    train(small_backbone(), photos, small_config(out, **KILLED_RUN), resume=True)


def die_in_write(number):
    """Kill this process when it has written half of its ``number``-th checkpoint."""
    calls = []

    def write(path, content):
        calls.append(path)
        if len(calls) < number:
            original(path, content)
            return
        Path(path.parent, f".upfeat-{os.getpid()}-half.ckpt").write_bytes(
            content[: len(content) // 2]
        )
        os.kill(os.getpid(), signal.SIGKILL)

    original, checkpoint.write_bytes = checkpoint.write_bytes, write


def together(photos, out):
    """Divide the same work in several ways: one step's gradients, and whole runs."""
    for name, count, accumulate in (("one", 1, 1), ("two", 2, 1), ("four", 2, 2)):
        start(count, lambda name=name, parts=accumulate: one_step(photos, out / name, parts))
    for name, count, accumulate in (("alone", 1, 2), ("shared", 2, 1)):
        start(count, lambda name=name, parts=accumulate: whole_run(photos, out / name, parts))
        start(
            count,
            lambda name=name, parts=accumulate: whole_run(
                photos, out / f"{name}-detail", parts, upsampler="detail", detail_weight=1.0,
                upsampler_options={"query_dim": 8, "levels": 2, "width": 4, "depth": 1},
            ),
        )  # fmt: skip


def start(count, work):
    """Do ``work`` in ``count`` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = []
    for rank in range(count):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        children.append(fork(work))
    wait(children)


def whole_run(photos, out, accumulate, **changes):
    config = small_config(out, batch_size=4, accumulate=accumulate, **changes)
    train(small_backbone(), photos, config)


def one_step(photos, out, accumulate):
    """Nothing is drawn for the loss, so that the division of the batch is all that differs."""
    config = small_config(
        out, batch_size=4, accumulate=accumulate, upsampler="neighbourhood", upsampler_options={},
        max_pad=0, zoom_probability=0, flip_probability=0, projection_dim=None, saliency_dropout=0,
        clip_steps=0,
    )  # fmt: skip
    with processes(None) as group:
        trainer = Trainer([small_backbone()], config, group)
        listing = list_photographs(photos, config.size)
        images = Photographs(listing.folder, listing.train, config.size, "short_side", 0)
        parts = [
            torch.stack([images[k] for k in range(*share.indices(4))]) for share in trainer.shares
        ]
        trainer.train_step(parts, [["?"] * len(part) for part in parts])
        if group.is_main:
            torch.save([one.grad for one in trainer.parameters], out)


def fork(work):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(children):
    """For all of them; fail if one did."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"children ended with {codes}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The first optimiser imports half of PyTorch: once here, not in every child.
    NAdam([torch.zeros(1, requires_grad=True)])
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("numbers", type=int, nargs="*")
    options = parser.parse_args()
    actions = {"killed": killed, "together": together}
    actions[options.what](options.photos, options.out, *options.numbers)
