"""Entry point of evaluations, which writes results and a report to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from upfeat import locks
from upfeat.backbones import Backbone
from upfeat.bounds import check_callback, flag, path_of, shown
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

    Work of an interrupted run with the same data, weights and settings is reused from ``out``.

    Args:
        task: a name from :func:`upfeat.evaluation.tasks.list_tasks`, or a subclass of
            :class:`Task`.
        folder: folder of the data: photographs with labels (``seg``) or depth maps (``depth``),
            pairs of photographs (``correspondence``), videos as folders of frames
            (``propagation``), or photographs alone.
        out: folder for results, created if need be. ``out/cache`` contains prepared images and
            finished rows, and may be deleted afterwards.
        upsamplers: one or more upsamplers, each a name, folder, checkpoint or object as for
            ``upfeat.load``, or "implicit", which fits every image. ``None`` for
            :data:`upfeat.evaluation.harness.BASELINES` and the backbone's default.
        backbone: backbone whose features are upsampled; ``None`` for ``efficientnet_lite0``, for
            the task ``cam`` at the stride of its classifier's features.
        config: settings of the evaluation; ``None`` for the defaults.
        layout: layout of the data on disk: ``folder``, ``coco_stuff``, ``coco_stuff27``,
            ``ade20k``, ``cityscapes``, ``voc``, ``nyuv2``, ``spair`` or ``davis``.
        device: device of the backbone, upsamplers and probes. Scores are repeatable to the last
            digit on the CPU alone.
        overwrite: replace a ``results.json`` or ``report.html`` in ``out`` even if no evaluation
            wrote it.
        on_step: called with the progress.

    Raises:
        FileNotFoundError: the data or an upsampler does not exist.
        TypeError: ``task`` or ``config`` has another type.
        ValueError: nothing can be scored, an argument is wrong, or ``out`` cannot be written, for
            example because another process writes to it.
    """
    kind = find_task(task) if isinstance(task, str) else task
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise TypeError(f"task={shown(task)} is no task; give a name or a subclass of Task")
    if not isinstance(config, EvalConfig | None):
        raise TypeError(f"config={shown(config)} is no EvalConfig; give EvalConfig(size=…, …)")
    out, folder = path_of("out", out), path_of("folder", folder)
    check_callback("on_step", on_step)
    overwrite = flag("overwrite", overwrite)
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
