"""Training of an upsampler on a folder of photographs: the loop around the steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from upfeat import locks
from upfeat.backbones import Backbone, load_backbone
from upfeat.backbones.base import require_colours
from upfeat.bounds import check_callback, flag
from upfeat.training.config import TrainConfig
from upfeat.training.folder import RunFolder
from upfeat.training.loading import GUARD, load_parts
from upfeat.training.photographs import Listing, Photographs
from upfeat.training.processes import Processes, processes
from upfeat.training.record import OnStep, Record, StepReport, writer_class
from upfeat.training.trainer import Trainer
from upfeat.training.validation import normalised, validate
from upfeat.upsamplers import Upsampler
from upfeat.visualize import comparison

BackboneLike = str | Backbone | Callable[[Tensor], Tensor]


def train(
    backbone: BackboneLike | Sequence[BackboneLike],
    photos: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> Upsampler:
    """Train an upsampler by multi-view consistency (FeatUp, section 3).

    The run's folder contains settings, log, checkpoints and, at the end, ``upsampler/``, which
    :meth:`Upsampler.from_pretrained` reads. A run that was interrupted in any way continues with
    ``resume=True``, with the same results as without the interruption. Processes started by
    torchrun divide every step among them.

    Args:
        backbone: backbone whose features are to be upsampled: a name, a :class:`Backbone`, or a
            module or function to wrap as a backbone. It is not trained. If several are given, each
            step draws one, and the upsampler is trained for all of them.
        photos: folder of photographs, searched recursively.
        config: settings; ``None`` for the default recipe. Without ``out``, only the trained
            upsampler is kept, and an interrupted training is lost.
        resume: resume the run in ``config.out``; begin a run if there is none.
        on_step: called after every step, in the first process.

    Returns:
        The trained upsampler, on the CPU in eval mode: with the weights of the best validation if
        there was any, else of the last step.

    Raises:
        FileNotFoundError: there is no such folder of photographs.
        TypeError: an argument has another type.
        ValueError: a setting or photograph cannot be used, ``config.out`` contains another run or
            is being written by another process, or features or loss became NaN or infinite (the
            last checkpoint is kept).
        OSError: a file could not be written; earlier checkpoints are kept.
        KeyboardInterrupt: the run was stopped by SIGINT, SIGTERM or SIGHUP, after a checkpoint.
    """
    config = TrainConfig() if config is None else config
    _check_kinds(photos, config, on_step)
    resume = flag("resume", resume)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            "upfeat.train was called again by a process that loads photographs, since that runs "
            f"the script anew; {GUARD}"
        )
    if config.out is None:
        return _train_in_passing(backbone, photos, config, resume, on_step)
    if config.tensorboard:
        writer_class()  # is installed, or nothing is written
    folder = RunFolder(config)
    backbones = _load_backbones(backbone)
    several = backbone if isinstance(backbone, list | tuple) else [backbone]
    names = [one for one in several if isinstance(one, str)]
    with (
        torch.inference_mode(False),  # in a notebook, gradients may be off for all cells
        torch.enable_grad(),
        processes(config.device) as group,
        _held(folder, group),
        _placed(backbones, group.device),
    ):
        trainer = Trainer(backbones, config, group)
        listing, state = group.on_main(
            lambda: folder.start(
                config,
                backbones,
                photos,
                resume=resume,
                names=names if len(names) == len(several) else None,
                check=trainer.check_state,
            )
        )
        if state is not None:
            trainer.load_state(state)
        if group.is_main:
            for line in (listing.summary(), _patience(config, listing), *trainer.cautions()):
                if line is not None:
                    warnings.warn(line, stacklevel=2)
        with _interruption() as interrupted:
            _Loop(trainer, listing, folder, on_step, interrupted).run()
        trainer.finish()
        group.on_main(lambda: _export(trainer, folder))
    return trainer.upsampler.cpu().eval()


def _patience(config: TrainConfig, listing: Listing) -> str | None:
    """Return a warning about patience without photographs to validate on."""
    if config.patience is None or listing.validation:
        return None
    return (
        f"patience={config.patience} has no effect, as no photograph is held out of "
        f"{len(listing.train)}; give --validation-images"
    )


def _check_kinds(photos: object, config: object, on_step: object) -> None:
    if not isinstance(photos, str | os.PathLike):
        raise TypeError(f"photos is of type {type(photos).__name__}; give the path of a folder")
    if not isinstance(config, TrainConfig):
        raise TypeError(
            f"config is of type {type(config).__name__}; give a TrainConfig, as "
            "TrainConfig.from_mapping makes of names and values"
        )
    check_callback("on_step", on_step)


def _train_in_passing(
    backbone: BackboneLike | Sequence[BackboneLike],
    photos: str | Path,
    config: TrainConfig,
    resume: bool,
    on_step: OnStep | None,
) -> Upsampler:
    """Train in a temporary folder."""
    if resume:
        raise ValueError("resume=True needs out=, the folder of the run to go on with")
    with tempfile.TemporaryDirectory(prefix="upfeat-train-") as folder:
        # No intermediate checkpoint, since the folder is removed and no run could resume from it.
        passing = replace(config, out=Path(folder) / "run", checkpoint_every=config.steps + 1)
        return train(backbone, photos, passing, on_step=on_step)


class _Loop:
    """Loop of steps, with validation, log and checkpoints."""

    def __init__(
        self,
        trainer: Trainer,
        listing: Listing,
        folder: RunFolder,
        on_step: OnStep | None,
        interrupted: threading.Event,
    ) -> None:
        config = trainer.config
        self.trainer, self.folder, self.config = trainer, folder, config
        self.processes: Processes = trainer.processes
        self.on_step, self.interrupted = on_step, interrupted
        size = config.photo_size
        self.photographs = Photographs(
            listing.folder, listing.train, size, config.crop, config.seed
        )
        self.held_out = Photographs(listing.folder, listing.validation, size, "short_side", None)
        self.digest = listing.digest()
        self.saved_at = trainer.step

    def run(self) -> None:
        """Run all remaining steps.

        Raises:
            KeyboardInterrupt: a process received a signal to stop; a checkpoint was written.
        """
        with self._record() as record:
            for parts in self._batches():
                report = self._step(parts)
                if record is not None:
                    self._write(record, report)
                stop = self._asked_to_stop()
                due = self.trainer.step % self.config.checkpoint_every == 0
                if due or stop or self.trainer.finished:
                    self._save()
                if self.on_step is not None and record is not None:
                    self.on_step(report)
                if self.trainer.finished:
                    return
                if stop:
                    raise KeyboardInterrupt

    def _batches(self) -> Iterator[list[Tensor]]:
        """Yield this process's parts of each remaining step."""
        trainer, config = self.trainer, self.config
        if trainer.finished:
            return
        count = len(trainer.shares)
        images = load_parts(
            self.photographs,
            first=trainer.step,
            last=config.steps,
            batch=config.batch_size,
            shares=trainer.shares,
            workers=_workers(config, self.processes),
        )
        while True:
            parts = list(islice(images, count))
            if not parts:
                return
            yield parts

    def _step(self, parts: list[Tensor]) -> StepReport:
        trainer, config = self.trainer, self.config
        rate, backbone = trainer.learning_rate(), trainer.backbones[trainer.draw_backbone()].name
        validation: dict[str, float] = {}
        try:
            losses = trainer.train_step(parts, self._names())
            due = trainer.step % config.validate_every == 0 or trainer.step == config.steps
            if due and len(self.held_out):
                validation = self.processes.on_main(self._validate)
                trainer.judge(validation)
        except ValueError as error:
            raise ValueError(f"{error}; {self._last_checkpoint()}") from None
        return StepReport(
            step=trainer.step,
            steps=config.steps,
            images=config.batch_size,
            backbone=backbone,
            losses=losses,
            learning_rate=rate,
            validation=validation,
        )

    def _names(self) -> list[list[str]]:
        """Return the names of the next step's photographs, one list for each part."""
        first = self.trainer.step * self.config.batch_size
        numbers = range(first, first + self.config.batch_size)
        return [
            [self.photographs.name(number) for number in numbers[share]]
            for share in self.trainer.shares
        ]

    def _validate(self) -> dict[str, float]:
        trainer = self.trainer
        objectives = [trainer.objective(index) for index in range(len(trainer.backbones))]
        return validate(objectives, trainer.backbones, self.held_out, self.config)

    def _write(self, record: Record, report: StepReport) -> None:
        record.write(report)
        if report.validation and self.config.tensorboard:
            record.show(self._picture(), report.step)

    @torch.no_grad()
    def _picture(self) -> Any:
        """Draw the features of the first held-out photograph before and after upsampling."""
        trainer, backbone = self.trainer, self.trainer.backbones[0]
        x = normalised(self.held_out[0][None], backbone)
        features = backbone(x)
        trainer.upsampler.eval()
        upsampled = trainer.upsampler(features, trainer.upsampler.guidance_from(x, backbone))
        trainer.upsampler.train()
        image = backbone.denormalize(x)[0].cpu()
        label = trainer.upsampler.name.replace("_", " ")
        return comparison(image, features[0].cpu(), upsampled[0].cpu(), label=label)

    def _asked_to_stop(self) -> bool:
        """Return whether any process was interrupted, so that all stop after the same step."""
        own = torch.tensor([float(self.interrupted.is_set())], device=self.processes.device)
        return float(self.processes.mean(own)) > 0

    def _save(self) -> None:
        trainer = self.trainer

        def write() -> None:
            data = {"config": self.config.to_json(), "photographs": self.digest}
            try:
                self.folder.checkpoints.write({**trainer.state(), **data})
            except ValueError as error:
                raise ValueError(f"{error}; {self._last_checkpoint()}") from None

        self.processes.on_main(write)
        self.saved_at = trainer.step

    def _last_checkpoint(self) -> str:
        if not self.saved_at:
            return "there is no checkpoint yet"
        return f"the last checkpoint is that of step {self.saved_at}"

    @contextmanager
    def _record(self) -> Iterator[Record | None]:
        """Open the record in the first process; ``None`` in the others."""
        if not self.processes.is_main:
            yield None
            return
        with Record(
            self.folder,
            log_every=self.config.log_every,
            tensorboard=self.config.tensorboard,
            first=self.trainer.step,
        ) as record:
            yield record


def _export(trainer: Trainer, folder: RunFolder) -> None:
    try:
        trainer.upsampler.save_pretrained(folder.upsampler)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder.upsampler}: weights not written ({error}); they are in the checkpoint, and "
            "--resume writes them again"
        ) from None
    best = {key: trainer.best[key] for key in ("step", "scores") if key in trainer.best}
    outcome = {"state": "finished", "steps": trainer.step, "validation": best or None}
    if trainer.upsampler.origin is not None:  # a published checkpoint, with its licence
        outcome["origin"] = trainer.upsampler.origin
    folder.finish(outcome)


def _load_backbones(backbone: BackboneLike | Sequence[BackboneLike]) -> list[Backbone]:
    several = backbone if isinstance(backbone, list | tuple) else [backbone]
    if not several:
        raise ValueError("backbone=[] is empty; give one or more")
    loaded = [load_backbone(one) for one in several]  # pyright: ignore[reportArgumentType]
    for one in loaded:
        require_colours(one, "training")
    return loaded


@contextmanager
def _held(folder: RunFolder, group: Processes) -> Iterator[None]:
    """Lock the folder, in the first process on behalf of all."""
    with ExitStack() as stack:
        group.on_main(lambda: stack.enter_context(locks.hold_folder(folder.path)))
        yield


@contextmanager
def _placed(backbones: list[Backbone], device: torch.device) -> Iterator[None]:
    """Put backbones on the device and in eval mode; restore device and mode at the end."""
    before = [(backbone.mean.device, backbone.training) for backbone in backbones]
    for backbone in backbones:
        backbone.to(device).eval()
    try:
        yield
    finally:
        for backbone, (place, training) in zip(backbones, before, strict=True):
            backbone.to(place).train(training)


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Set the event that is yielded at the first signal to stop, so that a step is completed.

    The signals are SIGINT, SIGTERM and SIGHUP (a closed terminal). A second signal has its usual
    effect. Ignored signals stay ignored, as in the background of a script. Outside the main thread,
    no signals are handled.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {one: handler for one, handler in before.items() if handler is not signal.SIG_IGN}

    def stop(number: int, frame: object) -> None:
        event.set()
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers(config: TrainConfig, group: Processes) -> int:
    if config.workers is not None:
        return config.workers
    return min(8, os.cpu_count() or 1) if group.device.type == "cuda" else 0
