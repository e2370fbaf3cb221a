"""Folders of photographs: what is taken, what is skipped, and which pixels are seen."""

import numpy as np
import pytest
import torch
from odd_images import profile, tiff
from PIL import Image

from upfeat.images import read_image
from upfeat.randomness import derive, global_stream, stream
from upfeat.training.loading import load_parts
from upfeat.training.photographs import Photographs, list_photographs, read_window


def noise(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    )


def ramp(size):
    """Red tells the column, green the row."""
    rows, columns = np.indices(size)
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def name(index):
    return f"{index:02}.{'png' if index % 2 else 'jpg'}"


def test_folders_below_are_searched_in_order(photos):
    (photos / "b").mkdir()
    (photos / "01.png").rename(photos / "b" / "x.PNG")
    (photos / ".hidden").mkdir()
    (photos / "02.jpg").rename(photos / ".hidden" / "02.jpg")
    (photos / "notes.txt").write_text("no photograph")
    names = list_photographs(photos, 32).train
    assert names == [f"{i:02}.{'png' if i % 2 else 'jpg'}" for i in (0, *range(3, 10))] + [
        "b/x.PNG"
    ]


def test_damaged_and_small_ones_are_skipped_and_named(photos):
    (photos / "00.jpg").write_bytes((photos / "00.jpg").read_bytes()[:400])
    (photos / "01.png").write_bytes((photos / "01.png").read_bytes()[:200])
    (photos / "02.jpg").write_bytes(b"nonsense")
    (photos / "04.jpg").write_bytes(b"")
    noise((31, 90)).save(photos / "03.png")
    listing = list_photographs(photos, 32)
    assert [one.name for one in listing.skipped] == [
        f"0{i}.{'png' if i % 2 else 'jpg'}" for i in range(5)
    ]
    assert listing.skipped[3].reason == "90×31 pixels, smaller than 32"
    summary = listing.summary()
    assert summary.startswith("5 of 10 photographs skipped: 00.jpg: ")
    assert "\n" not in summary
    assert summary.endswith("and 2 more, listed in run.json")
    assert [one["name"] for one in listing.to_json()["skipped"]] == [
        one.name for one in listing.skipped
    ]


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "pgm", "heic"])
def test_every_kind_of_image_is_taken_or_named(photos, suffix):
    path = photos / f"z.{suffix}"
    image = noise((40, 40)).convert("L")
    if suffix == "heic":
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(60))
    else:
        image.save(path, format="PPM" if suffix == "pgm" else "JPEG")
    listing = list_photographs(photos, 32)
    assert (path.name in listing.train) == (suffix != "heic")
    assert [one.name for one in listing.skipped] == [path.name] * (suffix == "heic")


def test_links_to_missing_files_are_named(photos):
    (photos / "z.jpg").symlink_to(photos / "none.jpg")
    assert [one.name for one in list_photographs(photos, 32).skipped] == ["z.jpg"]


@pytest.mark.parametrize("values", [255.0, float("nan"), 100000])
def test_values_without_a_meaning_are_skipped_before_training(photos, values):
    content = np.zeros((40, 40), np.int32 if isinstance(values, int) else np.float32)
    content[3, 4] = values
    Image.fromarray(content).save(photos / "z.tif")
    (skipped,) = list_photographs(photos, 32).skipped
    assert skipped.name == "z.tif"
    assert "max_value" in skipped.reason


def test_folders_without_a_photograph_that_can_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_photographs(tmp_path / "none", 32)
    with pytest.raises(ValueError, match="holds no photographs"):
        list_photographs(tmp_path, 32)
    (tmp_path / "a.jpg").write_bytes(b"nonsense")
    with pytest.raises(FileNotFoundError, match="is a file"):
        list_photographs(tmp_path / "a.jpg", 32)
    with pytest.raises(ValueError, match=r"none of its 1 photographs can be read; a.jpg: not an"):
        list_photographs(tmp_path, 32)
    noise((20, 20)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"1 smaller than 32×32 pixels, 1 damaged\); give larger"):
        list_photographs(tmp_path, 32)


def test_a_twentieth_is_held_out(tmp_path):
    for index in range(45):
        noise((8, 8), index).save(tmp_path / f"{index:02}.png")
    listing = list_photographs(tmp_path, 8, held_out=None, seed=3)
    assert len(listing.validation) == 2
    assert sorted(listing.train + listing.validation) == [f"{i:02}.png" for i in range(45)]
    assert listing.validation == list_photographs(tmp_path, 8, held_out=2, seed=3).validation
    assert listing.validation != list_photographs(tmp_path, 8, held_out=2, seed=4).validation
    assert list_photographs(tmp_path, 8, held_out=0).validation == []


def test_every_epoch_sees_every_photograph_once_in_another_order(photos):
    names = list_photographs(photos, 32).train
    samples = Photographs(photos, names, 32, "short_side", 0)
    epochs = [[samples.name(10 * epoch + k) for k in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == names for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    fixed = Photographs(photos, names, 32, "short_side", None)
    assert [fixed.name(k) for k in range(10)] == names


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_the_samples_of_each_step(photos, workers):
    samples = Photographs(photos, list_photographs(photos, 32).train, 32, "mixed", 0)
    before = torch.get_rng_state()
    shares = [slice(0, 2), slice(4, 6)]
    parts = load_parts(samples, first=2, last=5, batch=6, shares=shares, workers=workers)
    expected = [
        [6 * step + k for k in range(*share.indices(6))] for step in (2, 3, 4) for share in shares
    ]
    for part, numbers in zip(parts, expected, strict=True):
        assert torch.equal(part, torch.stack([samples[number] for number in numbers]))
        assert not part.is_shared()  # containers may have too little shared memory
    assert torch.equal(torch.get_rng_state(), before)


class TestWindow:
    def test_native_is_a_copy_of_pixels(self, tmp_path):
        noise((50, 70)).save(tmp_path / "a.png")
        whole = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
        for seed in range(5):
            window = read_window(tmp_path / "a.png", 32, "native", stream(seed))
            places = whole.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 19, 39, 32, 32)
            assert (places == window[:, None, None]).all(-1).all(-1).all(0).any()

    def test_short_side_spans_it_and_moves_along_the_other(self, tmp_path):
        ramp((64, 128)).save(tmp_path / "a.png")
        starts = set()
        for seed in range(8):
            window = read_window(tmp_path / "a.png", 32, "short_side", stream(seed)).float()
            assert window[1, 0].mean() < 2
            assert window[1, -1].mean() > 61
            assert (window[0, :, -1] - window[0, :, 0]).mean() == pytest.approx(62, abs=2)
            starts.add(int(window[0, 0, 0]))
        assert len(starts) > 4

    def test_middle_without_a_generator(self, tmp_path):
        ramp((64, 128)).save(tmp_path / "a.png")
        window = read_window(tmp_path / "a.png", 64)
        assert window[0, 0].tolist() == list(range(32, 96))

    def test_mixed_lies_between(self, tmp_path):
        ramp((120, 120)).save(tmp_path / "a.png")
        spans = []
        for seed in range(30):
            window = read_window(tmp_path / "a.png", 30, "mixed", stream(seed)).float()
            spans.append(float(window[0, 0, -1] - window[0, 0, 0]) * 30 / 29)
        assert 29 <= min(spans) < 45
        assert 90 < max(spans) <= 121

    def test_jpeg_read_coarsely_looks_like_one_read_fully(self, tmp_path):
        small = Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (6, 8, 3)).astype(np.uint8)
        )
        small.resize((800, 600), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
        Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
        coarse, fine = (read_window(tmp_path / f"a.{kind}", 48).float() for kind in ("jpg", "png"))
        assert (coarse - fine).abs().max() < 6

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
    def test_every_mode(self, tmp_path, mode):
        image = (
            Image.new("I;16", (40, 40), 30000) if mode == "I;16" else noise((40, 40)).convert(mode)
        )
        kind = "jpg" if mode == "CMYK" else "png"
        image.save(tmp_path / f"a.{kind}")
        window = read_window(tmp_path / f"a.{kind}", 32, "native", stream(0))
        assert window.shape == (3, 32, 32)
        assert window.dtype == torch.uint8

    @pytest.mark.parametrize(("mode", "space"), [("RGB", "RGB "), ("L", "GRAY")])
    def test_colours_are_those_that_every_other_command_sees(self, tmp_path, mode, space):
        path = tmp_path / "a.png"
        image = noise((40, 40)).convert(mode)
        image.save(path, icc_profile=profile(space, gamma=1.4))
        found = read_window(path, 40).float()
        assert (found - (read_image(path) * 255)).abs().max() <= 1
        without = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert (found - without).abs().max() > 10

    def test_deep_grey_that_is_stored_inverted(self, tmp_path):
        values = np.linspace(0, 65535, 1600).reshape(40, 40, 1).astype(np.uint16)
        (tmp_path / "a.tif").write_bytes(tiff(values, photometric=0))
        found = read_window(tmp_path / "a.tif", 32, "native").float()
        assert (found - (read_image(tmp_path / "a.tif") * 255)[:, 4:36, 4:36]).abs().max() <= 1
        assert found[0, 0, 0] > found[0, -1, -1]

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned a quarter clockwise
        ramp((32, 64)).save(tmp_path / "a.png", exif=exif)
        window = read_window(tmp_path / "a.png", 32)
        assert window[0, :, 0].tolist() == list(range(16, 48))

    def test_too_small(self, tmp_path):
        noise((31, 64)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="64×31 pixels, smaller than 32"):
            read_window(tmp_path / "a.png", 32)


def test_streams_differ_by_name_and_the_global_one_is_restored():
    seeds = {
        derive(0, "a", 1),
        derive(0, "a", 2),
        derive(0, "b", 1),
        derive(1, "a", 1),
        derive(0, "a1"),
    }
    assert len(seeds) == 5
    assert torch.equal(
        torch.rand(4, generator=stream(0, "a")), torch.rand(4, generator=stream(0, "a"))
    )
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with global_stream(torch.device("cpu"), 0, "dropout"):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)
