"""``upfeat train``: training of an upsampler for a backbone on a folder of photographs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import list2cmdline
from typing import TYPE_CHECKING, Any

from upfeat.bounds import shown
from upfeat.cli.choices import (
    BACKBONE_HELP,
    DEFAULT_BACKBONE,
    add_layer,
    folder_of,
    name_of,
    path_of,
    with_layers,
)
from upfeat.cli.streams import say
from upfeat.settings import add_flags, check_each, settings_of
from upfeat.training.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress

    from upfeat.training import StepReport

HELP = "Train an upsampler for a backbone on a folder of photographs."
EXAMPLE = (
    "  upfeat train photos/ -o runs/x\n"
    "  upfeat train -o runs/x --resume\n"
    "  upfeat train photos/ -o runs/y --config recipe.yaml --steps 500 --upsampler jbu_stack\n"
    "  torchrun --nproc-per-node 2 -m upfeat train photos/ -o runs/z"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "photos",
        type=path_of,
        nargs="?",
        help="folder of photographs, searched recursively; with --resume, needed only if the run's "
        "folder of photographs has moved",
    )
    parser.add_argument(
        "-o", "--output", type=folder_of, required=True, metavar="FOLDER", help="folder of the run"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the folder, however it was stopped, with its original settings; "
        "settings given again must equal them",
    )
    parser.add_argument(
        "--backbone",
        type=name_of,
        nargs="+",
        metavar="NAME",
        help=f"{BACKBONE_HELP} (default: {DEFAULT_BACKBONE}); several: train one upsampler for all",
    )
    add_layer(parser)
    parser.add_argument(
        "--config",
        type=path_of,
        metavar="FILE",
        help="YAML or JSON file of settings, named like the flags with _ for -; flags override it",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"recipe to start from: {', '.join(PRESETS)} (reference: the published recipe)",
    )
    settings = parser.add_argument_group(
        "settings (see docs/guides/training.md)", "The defaults are those without --preset."
    )
    add_flags(settings, TrainConfig)
    settings.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the upsampler, such as radius=2 (repeatable)",
    )
    settings.add_argument(
        "--tensorboard",
        action="store_true",
        default=argparse.SUPPRESS,
        help="also write scalars and pictures for TensorBoard",
    )


def execute(options: argparse.Namespace) -> int:
    """Train; after an interruption, print the command that resumes the run."""
    from upfeat.training import train

    backbone, photos, config = _plan(options)
    progress = _Progress(config.steps)
    try:
        with progress:
            train(backbone, photos, config, resume=options.resume, on_step=progress.show)
    except KeyboardInterrupt:
        if _is_main():
            print(f"upfeat train: interrupted{_next(options, progress.step)}", file=sys.stderr)
        return 130
    if _is_main():
        say(f"{options.output / 'upsampler'}  {progress.outcome()}".rstrip())
    return 0


def _next(options: argparse.Namespace, step: int) -> str:
    """Say where a run was interrupted, and how to go on; ``step`` is 0 if it is not known."""
    if not (options.output / "run.json").is_file():
        return " before the run began; there is nothing to resume, start it again"
    output = str(options.output)
    output = list2cmdline([output]) if os.name == "nt" else shlex.quote(output)
    command = f"upfeat train -o {output} --resume goes on"
    return f" after step {step}; {command}" if step else f"; {command}"


def _plan(options: argparse.Namespace) -> tuple[str | list[str], Path, TrainConfig]:
    """Return backbone, photographs and settings; a resumed run supplies those not given."""
    from upfeat.training.started import read_started

    given, source = _settings(options)
    given["out"] = options.output
    backbone, photos = given.pop("backbone", None), options.photos
    run = read_started(options.output) if options.resume else None
    if run is None:
        config = TrainConfig.from_mapping(given, source=source)
    else:
        config = run.merge(given, source)
        backbone, photos = backbone or run.backbone, photos or run.photos
        if backbone is None:
            raise ValueError(
                f"{options.output}: was started with a backbone of the caller's own; go on with it "
                "by upfeat.train(backbone, photos, config, resume=True)"
            )
    if photos is None and options.resume:
        raise ValueError(f"{options.output}: holds no run to resume; name the folder of one")
    if photos is None:
        raise ValueError("photos: give the folder of photographs, as upfeat train photos/ -o RUN")
    _check_weights(config.upsampler)
    return backbone or DEFAULT_BACKBONE, photos, config


def _check_weights(upsampler: str) -> None:
    from upfeat.upsamplers import create_upsampler, list_upsamplers

    if upsampler in list_upsamplers() and not [*create_upsampler(upsampler).parameters()]:
        raise ValueError(
            f"upsampler={upsampler!r} has no weights to train; use it as it is, or train detail, "
            "neighbourhood or jbu_stack"
        )


def _settings(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Merge the settings file with the flags, which override it; return the source's name too."""
    from upfeat.training.settings_file import read_settings

    settings: dict[str, Any] = {}
    source = "flags"
    if options.config is not None:
        settings = read_settings(options.config)
        source = str(options.config)
        check_each(source, TrainConfig, settings)
        settings.pop("out", None)  # of the run that wrote the file; -o is given
        if "backbone" in settings:
            _check_names(source, settings["backbone"])
    for name in ("preset", "backbone"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.layer is not None:
        named = settings.get("backbone", DEFAULT_BACKBONE)
        several = [named] if isinstance(named, str) else named
        settings["backbone"] = [with_layers(one, options.layer) for one in several]
    for name in settings_of(TrainConfig):
        if hasattr(options, name):
            settings[name] = _value(str(getattr(options, name)))
    if options.option:
        others = settings.get("upsampler_options", {})
        given = dict(_pair(text) for text in options.option)
        # Anything but a dictionary is left for the check of the settings to refuse.
        settings["upsampler_options"] = {**others, **given} if isinstance(others, dict) else others
    return settings, source


def _check_names(source: str, backbone: Any) -> None:
    names = backbone if isinstance(backbone, list) else [backbone]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: backbone={shown(backbone)} must be a name or several")


def _value(text: str) -> Any:
    """Convert a text to a number, ``None`` or a boolean if possible; else return the text."""
    plain = {"none": None, "true": True, "false": False}
    if text.lower() in plain:
        return plain[text.lower()]
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return text


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--option {text}: give NAME=VALUE, as radius=2")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, _value(value)


def _is_main() -> bool:
    """Return whether this process prints: rank 0 of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


class _Progress:
    """Progress bar with losses, speed and time left; invisible where stderr is no terminal."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self.bar: Progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or not _is_main(),
        )
        self.task = self.bar.add_task("reading photographs", total=steps)
        self.step = 0
        self.images = 1
        self.validation: dict[str, float] = {}

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def show(self, report: StepReport) -> None:
        """Update the bar after one step."""
        if self.step == 0:
            # A resumed run's speed must be measured from the step at which it resumes.
            self.bar.reset(self.task, total=report.steps, completed=report.step - 1)
        self.step = report.step
        self.validation = report.validation or self.validation
        speed = self.bar.tasks[0].speed
        parts = [f"loss {report.losses['loss']:.4f}"]
        if self.validation:
            parts.append(f"held-out error {self.validation['error']:.4f}")
        if speed:
            parts.append(f"{speed * report.images:.1f} images/s")
        self.bar.update(self.task, completed=report.step, description="  ".join(parts))

    def outcome(self) -> str:
        """Return the last held-out error as text; empty without validation."""
        if not self.validation:
            return ""
        return f"held-out error {self.validation['error']:.4f}"
