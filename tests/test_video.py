"""Videos of features: one basis for all frames, frames as they come, and what flickers."""

import dataclasses
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import upfeat
from upfeat.cli import main
from upfeat.frames import DamagedVideo, VideoWriter, count_frames, read_frames
from upfeat.heads import SavedHead, describe_backbone
from upfeat.marks import VIDEO, kind_of
from upfeat.outputs import make_folder
from upfeat.video import VideoSettings, render_video, write_report

av = pytest.importorskip("av")


def model():
    torch.manual_seed(0)
    return upfeat.load(torch.nn.Conv2d(3, 6, 8, 8), upsampler="detail")


def scene(index, size=(48, 65)):
    """A disc that moves over a pattern that does not."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([rows * 4, columns * 3, (rows // 8 + columns // 8) % 2 * 90 + 60], axis=2)
    inside = (rows - 14) ** 2 + (columns - 8 - 2 * index) ** 2 < 36
    pixels[inside] = (240, 40, 40)
    return pixels.clip(0, 255).astype(np.uint8)


def write_clip(path, count=8, size=(48, 65), make=scene):
    with VideoWriter(path, Fraction(10)) as writer:
        for index in range(count):
            writer.add(make(index, size), None)
    return path


def plain_clip(path, sizes=((48, 64),), count=6):
    """A video that says nothing of us."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = sizes[0]
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(index, sizes[0]))))
        container.mux(stream.encode())
    return Path(path)


def place(path, a, b, c, d):
    """Have an MP4 file show the pixel (x, y) at (a·x + c·y, b·x + d·y)."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one = 1 << 16
    assert struct.unpack_from(">5i", content, matrix) == (one, 0, 0, 0, one)
    struct.pack_into(">5i", content, matrix, a * one, b * one, 0, c * one, d * one)
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov"])
def test_frames_survive_writing_with_their_times(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    times = [Fraction(0), Fraction(1, 10), Fraction(1, 4), Fraction(1, 2)]
    with VideoWriter(path, Fraction(10)) as writer:
        for index, time in enumerate(times):
            writer.add(scene(index), time)
    frames = list(read_frames(path))
    assert count_frames(path) == len(frames) == 4
    assert frames[0].pixels.shape == (48, 66, 3)  # of 65 columns
    assert [float(frame.time) for frame in frames] == pytest.approx(
        [float(time) for time in times], abs=0.002
    )
    error = np.abs(frames[2].pixels[:, :65].astype(int) - scene(2))
    assert error.mean() < 12
    assert kind_of(path) == VIDEO


@pytest.mark.parametrize(
    ("times", "written"),
    [
        ((None, None, None), (0, 0.1, 0.2)),  # at the rate
        ((1, 0.5, None, 0.25, 3), (1, 1.1, 1.2, 1.3, 3)),  # never back
        ((-1, -0.5, 0, 0.5), (0, 0.1, 0.2, 0.5)),  # never before the beginning
        ((5, 6), (5, 6)),
    ],
)
def test_times_only_go_on(tmp_path, times, written):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, Fraction(10)) as writer:
        for index, time in enumerate(times):
            writer.add(scene(index), None if time is None else Fraction(time))
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx(written, abs=1e-3)
    from_begin = [time - written[0] for time in written]  # recordings may begin at any time
    assert [float(one.time) for one in read_frames(path)] == pytest.approx(from_begin, abs=1e-3)


@pytest.mark.parametrize("size", [(9, 33), (8, 8), (47, 48), (16, 301)])
def test_frames_of_any_size_are_shown_whole(tmp_path, size):
    """Encoders take even sides: an odd one is read with one row or column more."""
    even = tuple(side + side % 2 for side in size)
    clip, out = write_clip(tmp_path / "a.mkv", 1, size), tmp_path / "out.mkv"
    frame = next(read_frames(clip)).pixels
    assert frame.shape == (*even, 3)
    assert np.abs(frame[: size[0], : size[1]].astype(int) - scene(0, size)).mean() < 20
    report = render_video(model(), clip, out)
    assert (report.frames, report.size) == (1, even)
    # Of one frame, nothing can be compared.
    assert (report.still, report.image, report.drift, report.flicker) == (0, None, None, None)
    assert next(read_frames(out)).pixels.shape == (even[0], 2 * even[1], 3)


def test_names_with_colons_and_percents_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("10:00").mkdir()
    clip = plain_clip("clip.mp4", count=2).replace("12:30:00 100%03d.mp4")
    assert len(list(read_frames(clip))) == count_frames(clip) == 2
    out = Path("10:00/out.mp4")
    assert render_video(model(), clip, out).frames == 2
    assert [one.name for one in Path("10:00").iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 0}, "size=0 must be 1 or more"),
        ({"size": "64"}, "size='64' must be a whole number"),
        ({"sample": 0}, "sample=0 must be 1 or more"),
        ({"sample": 2.5}, "sample=2.5 must be a whole number"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        VideoSettings(**settings)


def test_all_frames_share_one_basis(tmp_path):
    """A frame that returns gets the colours that it had, whatever was in between."""
    order = (0, 9, 3, 0)
    clip = write_clip(tmp_path / "a.mkv", 4, make=lambda index, size: scene(order[index], size))
    out = tmp_path / "out.mkv"
    report = render_video(model(), clip, out, VideoSettings(beside=False))
    frames = [frame.pixels.astype(int) for frame in read_frames(out)]
    assert report.frames == len(frames) == 4
    assert report.size == (48, 66)
    assert np.abs(frames[0] - frames[3]).mean() < 4
    assert np.abs(frames[0] - frames[1]).mean() > 2 * np.abs(frames[0] - frames[3]).mean()


def test_the_frame_stands_beside_its_features(tmp_path):
    clip, out = write_clip(tmp_path / "a.mp4"), tmp_path / "out.mp4"
    assert render_video(model(), clip, out).frames == 8
    frame = next(read_frames(out)).pixels
    assert frame.shape == (48, 132, 3)
    assert np.abs(frame[:, :65].astype(int) - scene(0)).mean() < 16


def test_what_does_not_move_does_not_flicker(tmp_path):
    still = write_clip(tmp_path / "still.mp4", make=lambda index, size: scene(0, size))
    moving = write_clip(
        tmp_path / "moving.mp4",
        make=lambda index, size: np.random.default_rng(index)
        .integers(0, 255, (*size, 3), dtype=np.uint8),
    )  # fmt: skip
    calm = render_video(model(), still, tmp_path / "calm.mp4")
    assert calm.still > 0.9
    assert calm.drift < 0.1
    assert calm.drift_coarse < 0.1
    assert calm.flicker < 5
    wild = render_video(model(), moving, tmp_path / "wild.mp4")
    assert wild.still == 0
    assert wild.drift is wild.drift_coarse is wild.flicker is wild.image is None


def test_drift_is_that_of_all_channels(tmp_path, monkeypatch):
    """Features that change where the image does not: random directions tell how much, roughly."""
    clip = write_clip(tmp_path / "a.mkv", 6, make=lambda index, size: scene(0, size))
    made_by, number = model(), [0]
    plain = made_by.backbone.extract

    def drifting(x):
        number[0] += 1
        noise = torch.randn(6, 1, 1, generator=torch.Generator().manual_seed(number[0]))
        return plain(x) + 0.3 * noise

    monkeypatch.setattr(made_by.backbone, "extract", drifting)
    report = render_video(made_by, clip, tmp_path / "out.mkv")
    # A constant of the whole grid comes through upsampling as it is.
    assert report.drift == pytest.approx(report.drift_coarse, rel=0.5)
    assert report.drift_coarse > 0.1


def test_classes_of_a_head(tmp_path):
    made_by = model()
    head = SavedHead(
        torch.randn(3, 6), torch.zeros(3), ["x", "y", "z"], "classes",
        describe_backbone(made_by.backbone), "detail",
    )  # fmt: skip
    clip, out = write_clip(tmp_path / "a.mp4"), tmp_path / "out.mp4"
    report = render_video(made_by, clip, out, VideoSettings(head=head))
    assert 0 <= report.flicker < 0.2
    with pytest.raises(ValueError, match="says values, not classes"):
        VideoSettings(head=dataclasses.replace(head, kind="values"))


def test_the_command_and_its_report(tmp_path, capsys):
    clip, out = plain_clip(tmp_path / "a.mp4"), tmp_path / "out.mp4"
    arguments = ["video", str(clip), "-o", str(out), "--report", str(tmp_path / "r.json")]
    assert main([*arguments, "--upsampler", "bilinear", "--size", "32"]) == 0
    assert "6 frames of 43×32" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["frames"] == 6
    assert main([*arguments, "--upsampler", "nearest", "--size", "32", "--alone"]) == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.mp4", "no such file"),
        ("text.mp4", "not a video, or a truncated one"),
        ("short.mp4", "not a video, or a truncated one"),
        ("sound.mp4", "has no video stream"),
        (".", "is a folder, not a video"),
    ],
)
def test_bad_videos_are_one_line(tmp_path, capsys, name, reason):
    (tmp_path / "text.mp4").write_text("no video")
    whole = plain_clip(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert main(["video", str(tmp_path / name), "-o", str(tmp_path / "out.mp4")]) == 2
    printed = capsys.readouterr().err
    assert reason in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out.mp4").exists()


def test_outputs_of_others_are_kept(tmp_path, capsys):
    clip, other = plain_clip(tmp_path / "a.mp4"), plain_clip(tmp_path / "b.mp4")
    before = other.read_bytes()
    for output, reason in (
        (clip, "is the input"),
        (other, "was not made by upfeat"),
        (tmp_path / "out.gif", "must end in one of"),
    ):
        assert main(["video", str(clip), "-o", str(output)]) == 2
        printed = capsys.readouterr().err
        assert reason in printed
        assert len(printed.splitlines()) == 1
    assert other.read_bytes() == before


def test_a_video_that_is_damaged_later_ends_there(tmp_path, monkeypatch):
    clip = plain_clip(tmp_path / "a.mp4")

    def damaged(path):
        for number, frame in enumerate(read_frames(path)):
            if number == 3:
                raise DamagedVideo(f"{path}: damaged after frame 3")
            yield frame

    monkeypatch.setattr("upfeat.video.read_frames", damaged)
    report = render_video(model(), clip, tmp_path / "out.mp4")
    assert report.frames == 3
    assert report.damage.endswith("damaged after frame 3")
    write_report(tmp_path / "r.json", report)
    assert "damaged" in json.loads((tmp_path / "r.json").read_text())["damage"]


def test_nothing_is_left_of_a_video_that_fails(tmp_path, monkeypatch):
    clip = plain_clip(tmp_path / "a.mp4")
    make_folder(tmp_path / "out")

    def failing(self, pixels, time, aspect):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoWriter, "add", failing)
    with pytest.raises(OSError, match="No space left"):
        render_video(model(), clip, tmp_path / "out" / "b.mp4")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [
        (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
        (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0),
    ],
)  # fmt: skip
def test_frames_are_turned_upright(tmp_path, a, b, c, d):
    """And flipped, if they are mirrored."""
    clip = plain_clip(tmp_path / "a.mp4", count=1)
    plain = next(read_frames(clip)).pixels
    place(clip, a, b, c, d)
    y, x = np.mgrid[: plain.shape[0], : plain.shape[1]]
    columns, rows = a * x + c * y, b * x + d * y
    rows, columns = rows - rows.min(), columns - columns.min()
    expected = np.empty((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    expected[rows, columns] = plain
    assert np.array_equal(next(read_frames(clip)).pixels, expected)


def test_frames_have_the_features_of_photographs(tmp_path):
    """A video without loss, extracted, and its frames as photographs."""
    (tmp_path / "frames").mkdir()
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 51, 67, "bgr0"
        for index in range(3):
            pixels = scene(index, (51, 67))
            Image.fromarray(pixels).save(tmp_path / "frames" / f"{index:06d}.png")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    for source in ("clip.mkv", "frames"):
        assert main(["extract", str(tmp_path / source), "-o", str(tmp_path / f"of {source}")]) == 0
    for index in range(3):
        frame, photograph = (
            load_file(tmp_path / f"of {name}.safetensors")
            for name in (f"clip.mkv/clip.mkv/{index:06d}", f"frames/{index:06d}.png")
        )
        assert frame.keys() == photograph.keys()
        assert all(torch.equal(frame[name], photograph[name]) for name in frame)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_video_lasts_until_the_end_of_its_last_frame(tmp_path, suffix):
    """At a varying frame rate too, so that players show all frames."""
    path = tmp_path / f"clip{suffix}"
    with VideoWriter(path, Fraction(10)) as writer:
        for index, time in enumerate((0, 0.1, 0.15, 0.9, 2, 2.02)):
            writer.add(scene(index), Fraction(time))
    with av.open(str(path)) as container:
        assert container.duration / av.time_base == pytest.approx(2.12, abs=0.01)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("size", [(64, 64), (720, 1280)])
def test_colours_do_not_depend_on_what_a_player_assumes(tmp_path, suffix, size):
    """They are marked as BT.709, and are so by its equations."""
    colour = np.array([200, 40, 90], np.uint8)
    with VideoWriter(tmp_path / f"clip{suffix}", Fraction(10)) as writer:
        writer.add(np.broadcast_to(colour, (*size, 3)).copy(), None)
    with av.open(str(tmp_path / f"clip{suffix}")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (1, 1)
    red, green, blue = colour / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    differences = [128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
    expected = [16 + 219 * luma, *differences]
    planes = [
        np.asarray(plane).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes
    ]
    for plane, value in zip(planes, expected, strict=True):
        assert plane.mean() == pytest.approx(value, abs=2)


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_keep_their_shape(tmp_path, turned):
    clip, out = tmp_path / "a.mp4", tmp_path / "out.mp4"
    with VideoWriter(clip, Fraction(10)) as writer:
        for index in range(2):
            writer.add(scene(index, (48, 64)), None, Fraction(4, 3))
    if turned:
        place(clip, 0, -1, 1, 0)
    aspect = Fraction(3, 4) if turned else Fraction(4, 3)
    assert next(read_frames(clip)).aspect == aspect
    render_video(model(), clip, out, VideoSettings(size=24))
    assert next(read_frames(out)).aspect == aspect


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile private.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nprivate.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n",
    ],
    ids=["concat", "HLS", "SDP"],
)
def test_a_video_refers_to_no_other_file(tmp_path, content):
    plain_clip(tmp_path / "private.mp4")
    (tmp_path / "list.mp4").write_text(content)
    for read in (count_frames, lambda path: next(read_frames(path))):
        with pytest.raises(DamagedVideo, match=r"list\.mp4: not a video"):
            read(tmp_path / "list.mp4")
