"""Evaluations as users call them: results and a report on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from upfeat import locks
from upfeat.backbones import Backbone
from upfeat.bounds import shown
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.prepared import OnStep
from upfeat.evaluation.harness import score
from upfeat.evaluation.named import Named
from upfeat.evaluation.report.page import write_report
from upfeat.evaluation.results import FORMAT, Results
from upfeat.evaluation.task import Task
from upfeat.evaluation.tasks import find_task
from upfeat.marks import REPORT
from upfeat.outputs import Inputs, check_output
from upfeat.storage import sweep


def evaluate(
    task: str | type[Task],
    folder: str | Path,
    out: str | Path,
    *,
    upsamplers: Named | Sequence[Named] | None = None,
    backbone: str | Backbone | None = None,
    config: EvalConfig | None = None,
    layout: str = "folder",
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Results:
    """Compare upsamplers on a dataset; write ``results.json`` and ``report.html``.

    What is already in ``out`` from an interrupted run with the same data, weights and settings is
    used again.

    Args:
        task: one of :func:`upfeat.evaluation.tasks.list_tasks`, or a class of one's own.
        folder: the data: photographs with labels (``seg``) or depth maps (``depth``), or
            photographs alone.
        out: folder for results, made if need be; ``out/cache`` holds prepared images and finished
            rows, and may be deleted afterwards.
        upsamplers: one or more names, folders, checkpoints or upsamplers, as ``upfeat.load`` takes
            them; and "implicit", which fits every image. ``None`` for
            :data:`upfeat.evaluation.harness.BASELINES` and the backbone's default.
        backbone: its features are upsampled; ``None`` for ``efficientnet_lite0``, and for ``cam``
            at the stride that its classifier reads.
        config: settings.
        layout: how the data lies on disk: ``folder``, ``coco_stuff``, ``ade20k``, ``cityscapes``,
            ``voc`` or ``nyuv2``.
        device: where backbone, upsamplers and probes run. Digits repeat on the CPU; elsewhere they
            may differ in the last places.
        overwrite: replace a ``results.json`` or ``report.html`` in ``out`` that no evaluation
            wrote.
        on_step: is told of progress.

    Raises:
        FileNotFoundError: the data or an upsampler is not there.
        TypeError: task or config is something else.
        ValueError: nothing can be scored, an argument is wrong, or ``out`` cannot be written, as
            another process does.
    """
    kind = find_task(task) if isinstance(task, str) else task
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise TypeError(f"task={shown(task)} is no task; give a name or a subclass of Task")
    if not isinstance(config, EvalConfig | None):
        raise TypeError(f"config={shown(config)} is no EvalConfig; give EvalConfig(size=…, …)")
    out = Path(out)
    read = [upsamplers] if isinstance(upsamplers, Named) else upsamplers or ()
    inputs = Inputs(one for one in read if isinstance(one, str | Path))
    for name, format_name in (("results.json", FORMAT), ("report.html", REPORT)):
        check_output(out / name, inputs, format_name, overwrite=overwrite)
    with locks.hold_folder(out):
        sweep(out)
        sweep(out / "cache")
        results = score(
            kind,
            folder,
            out,
            upsamplers=upsamplers,
            backbone=backbone,
            config=config,
            layout=layout,
            device=device,
            on_step=on_step,
        )
        results.write(out / "results.json")
        write_report(results, out / "report.html", kind)
    return results
