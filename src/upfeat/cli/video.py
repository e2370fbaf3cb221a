"""``upfeat video``: rendering of a video's features, with a report of their stability."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from upfeat.cli.choices import (
    add_backbone,
    add_early,
    add_passes,
    add_upsampler,
    load_with_head,
    path_of,
)
from upfeat.cli.streams import say

if TYPE_CHECKING:
    from upfeat.video import VideoReport

HELP = "Render a video's features, with the same colours in all frames; report their stability."
EXAMPLE = (
    "  upfeat video clip.mp4 -o out.mp4\n"
    "  upfeat video clip.mp4 -o out.mp4 --size 360 --alone --report stability.json\n"
    "  upfeat video clip.mp4 -o classes.mp4 --head probe.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("video", type=path_of, help="video file that FFmpeg can read")
    parser.add_argument(
        "-o",
        "--output",
        type=path_of,
        required=True,
        metavar="FILE",
        help="video to write, without sound: .mp4, .mov, .mkv or .webm",
    )
    add_backbone(parser)
    add_upsampler(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side first (default: the video's own size)",
    )
    add_passes(parser, "frame")
    add_early(parser)
    parser.add_argument("--head", type=path_of, metavar="FILE", help="show this head's classes")
    parser.add_argument(
        "--alone", action="store_true", help="show features only, without the frame next to them"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="frames on which the colours are fitted (default: 16)",
    )
    parser.add_argument("--report", type=path_of, metavar="FILE", help="write stability as JSON")
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that upfeat did not write (never an input file)",
    )


def execute(options: argparse.Namespace) -> int:
    """Render the video; the exit code is 2 if the video could not be read to its end."""
    from upfeat.cli.console import note_unused, progress_bar
    from upfeat.frames import count_frames
    from upfeat.marks import VIDEO
    from upfeat.outputs import Inputs, prepare_output
    from upfeat.video import VideoSettings, render_video, write_report

    inputs = Inputs([options.video, options.head, options.backbone, options.upsampler])
    prepare_output(options.output, inputs, VIDEO, overwrite=options.overwrite)
    if options.report is not None:
        kind = f"{VIDEO}-report"
        prepare_output(options.report, inputs, kind, overwrite=options.overwrite)
        if options.report.resolve() == options.output.resolve():
            raise ValueError(f"--report {options.report} is the video to write; give another file")
    count_frames(options.video)  # raises for an unreadable video before the model is loaded
    model, head = load_with_head(options)
    settings = VideoSettings(size=options.size, beside=not options.alone, head=head)
    if options.sample is not None:
        settings = replace(settings, sample=options.sample)
    if head is not None:
        note_unused("video", options, ["sample"], "with --head")
    with progress_bar() as progress:
        task = progress.add_task(options.video.name, total=None)
        report = render_video(
            model,
            options.video,
            options.output,
            settings,
            overwrite=options.overwrite,
            on_frame=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.report is not None:
        write_report(options.report, report)
    say(f"{options.output}  {describe(report, classes=head is not None)}")
    if report.damage is not None:
        say(f"upfeat video: error: {report.damage}; the result ends there", error=True)
    return 2 if report.damage is not None else 0


def describe(report: VideoReport, *, classes: bool) -> str:
    """Summarise a report in one line."""
    height, width = report.size
    text = f"{report.frames} frames of {width}×{height}"
    if report.flicker is None or report.drift is None or report.drift_coarse is None:
        return f"{text}; nothing stands still, so that stability cannot be told"
    flicker = f"{report.flicker:.2%} change class" if classes else f"flicker {report.flicker:.1f}"
    return (
        f"{text}; where nothing moves ({report.still:.0%}): drift of features "
        f"{report.drift:.1%} (coarse {report.drift_coarse:.1%}), {flicker}, of the image "
        f"{report.image:.1f} of 255"
    )
