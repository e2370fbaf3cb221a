"""The items of a set: keys that stay in the folder of results, damage that is told and no more."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upfeat.batch.items import Damaged, Item, content_hash, list_items
from upfeat.engines import Engine


def _png(seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


def _tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _keys(items):
    return [item.key for item in items if isinstance(item, Item)]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("a.png", "a.png"),
        ("./a.png", "a.png"),
        ("sub/b.png", "sub/b.png"),
        ("sub/../a.png", "sub/a.png"),
        ("../beside/c.png", "beside/c.png"),
        ("..../..../d.png", "..../..../d.png"),
        ("....//d.png", "..../d.png"),
        ("ü b–c.png", "ü b–c.png"),
        ("-dash.png", "-dash.png"),
    ],
)
def test_keys_of_a_list_stay_inside(tmp_path, line, key):
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "list.txt").write_text(f"# photographs\n\n  {line}  \n", encoding="utf-8")
    file = folder / line
    (folder / "sub").mkdir()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_png())
    (item,) = list_items([folder / "list.txt"])
    assert item.key == key
    assert item.read() == _png()


def test_absolute_names_of_a_list_lose_their_root(tmp_path):
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'a.png'}\n")
    (item,) = list_items([tmp_path / "list.txt"])
    assert item.key == (tmp_path / "a.png").as_posix().lstrip("/")
    assert item.read() == _png()


def test_lists_name_what_they_cannot_give(tmp_path):
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "list.txt").write_text("a.png\nnone.png\na.png\n")
    first, second, third = list_items([tmp_path / "list.txt"])
    assert first.read() == _png()
    with pytest.raises(FileNotFoundError):
        second.read()
    assert third.key == "a.png (2)"
    assert "is in the set already" in third.reason
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    with pytest.raises(ValueError, match=r"list\.txt: no list of names in UTF-8"):
        list(list_items([tmp_path / "list.txt"]))


def test_folders_are_listed_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a/z.png", "a/b/c.png", ".hidden.png", "a/.h/x.png", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(_png())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    *items, gone = list_items([tmp_path])
    assert _keys(items) == ["a/b/c.png", "a/z.png", "b.png"]
    with pytest.raises(FileNotFoundError):
        gone.read()
    (tmp_path / "gone.png").unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other: no image file in this folder"):
        list(list_items([tmp_path / "other"]))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        list(list_items([tmp_path / "nowhere"]))


def test_linked_folders_are_searched_once_and_never_in_circles(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("photos/a.png", "photos/b/c.png", "elsewhere/d.png", "elsewhere/e/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(_png())
    for name, target in (("again", photos), ("inside", photos / "b"), ("out", elsewhere)):
        (photos / name).symlink_to(target)
    (photos / "z").symlink_to(elsewhere / "e")  # searched within elsewhere already
    (elsewhere / "back").symlink_to(photos)
    (elsewhere / "self").symlink_to(elsewhere)
    (elsewhere / "around").symlink_to(tmp_path)
    keys = ["a.png", "b/c.png", "out/d.png", "out/e/f.png"]
    assert _keys(list_items([photos])) == keys


def test_links_in_archives_are_told(tmp_path):
    """They hold no image; those of a folder packed with hard links are all but the first."""
    (tmp_path / "a.png").write_bytes(_png())
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.add(tmp_path / name, name)
    first, link = list_items([tmp_path / "s.tar"])
    assert first.read() == _png()
    assert link.key == "s.tar/b.png"
    assert link.reason.startswith("is a link to a.png; pack copies")


def test_folders_of_one_name_cannot_be_told_apart(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "photos").mkdir(parents=True)
        (tmp_path / parent / "photos" / "a.png").write_bytes(_png())
    sources = [tmp_path / "one" / "photos", tmp_path / "two" / "photos"]
    with pytest.raises(ValueError, match="has the same name as"):
        list(list_items(sources))


def test_members_of_archives_that_would_leave_or_double_are_damaged(tmp_path):
    members = [("x/a.png", _png(1)), ("../out.png", _png()), ("x/a.png", _png(2)), ("n.txt", b"n")]
    good, out, twice = list_items([_tar(tmp_path / "s.tar", members)])
    assert (good.key, good.read()) == ("s.tar/x/a.png", _png(1))
    assert out == Damaged("s.tar/../out.png", "leads out of the archive")
    assert twice.key == "s.tar/x/a.png (2)"
    assert "is in the set already" in twice.reason


def test_members_of_one_name_in_other_spellings_are_one(tmp_path):
    """Both would be written to the same file."""
    names = ("./x/a.png", "x/a.png", "x//a.png", "/x/a.png", "x/./a.png")
    members = [(name, _png(number)) for number, name in enumerate(names)]
    members += [("x/._a.png", b"of macOS"), (".trash/b.png", _png(9))]  # hidden
    first, *others = list_items([_tar(tmp_path / "s.tar", members)])
    assert (first.key, first.read()) == ("s.tar/x/a.png", _png(0))
    assert [item.key for item in others] == [f"s.tar/x/a.png ({n})" for n in range(2, 6)]


def test_a_name_that_comes_twice_keeps_its_first_item(tmp_path):
    """Results are named by it: the second would be written over the first."""
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(_png(number))
    (tmp_path / "one" / "list.txt").write_text("a.png\n")
    sources = [tmp_path / "two" / "a.png", tmp_path / "one" / "list.txt", tmp_path / "one/a.png"]
    first, *others = list_items(sources)
    assert first.read() == _png(1)
    assert [item.key for item in others] == ["a.png (2)", "a.png (3)"]
    assert all(isinstance(item, Damaged) for item in others)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_of_any_editor_are_read(tmp_path, mark):
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "list.txt").write_bytes(mark + b"a.png\r\n")
    (item,) = list_items([tmp_path / "list.txt"])
    assert (item.key, item.read()) == ("a.png", _png())


def test_sources_without_an_image_are_told(tmp_path):
    (tmp_path / "list.txt").write_text("# none\n\n")
    with pytest.raises(ValueError, match=r"list\.txt: holds no name of an image"):
        list(list_items([tmp_path / "list.txt"]))
    assert list(list_items([_tar(tmp_path / "s.tar", [("n.txt", b"n")])])) == [
        Damaged("s.tar", "holds no image")
    ]


def test_an_archive_cut_off_anywhere_gives_whole_items_and_then_says_so(tmp_path):
    members = [(f"{n}.png", _png(n)) for n in range(3)]
    content = _tar(tmp_path / "s.tar", members).read_bytes()
    ends = [512 * (1 + -(-len(data) // 512)) for _, data in members]
    for cut in (0, 1, 300, 512, 600, ends[0], ends[0] + 100, sum(ends[:2]), sum(ends) - 400):
        (tmp_path / "s.tar").write_bytes(content[:cut])
        items = list(list_items([tmp_path / "s.tar"]))
        whole = [item for item in items if isinstance(item, Item)]
        assert [item.read() for item in whole] == [_png(n) for n in range(len(whole))]
        # Cut where a member ends, the archive only lacks its end mark.
        if cut not in (ends[0], sum(ends[:2])):
            assert isinstance(items[-1], Damaged), cut


def test_contents_are_told_apart():
    frames = [np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)]
    found = {content_hash(content) for content in (b"", b"a", *frames)}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "spark"}, 'engine="spark" must be local or ray'),
        ({"workers": 0}, "workers=0 must be 1 or more"),
        ({"workers": 1.5}, r"workers=1\.5 must be a whole number"),
        ({"workers": 10**20}, "must be 65536 or less"),
        ({"address": "host:1"}, "address='host:1' is for engine=\"ray\""),
    ],
)
def test_engines_name_what_they_do_not_take(options, words):
    with pytest.raises(ValueError, match=words):
        Engine(**options)


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no /dev/null on this system")
def test_a_link_to_a_device_is_told(tmp_path):
    """/dev/zero would be read for ever, into memory; /dev/null is as good here."""
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "b.png").symlink_to("/dev/null")
    first, second = list_items([tmp_path])
    assert first.read() == _png()
    with pytest.raises(ValueError, match=r"b\.png: a pipe or a device, not a file"):
        second.read()


@pytest.mark.parametrize("name", ["b\\..\\..\\a.png", "b/c\\..\\..\\a.png", "../a.png"])
def test_names_lead_out_by_no_separator(tmp_path, name):
    """Windows takes both for separators, and an archive may be written anywhere."""
    found = list(list_items([_tar(tmp_path / "set.tar", [(name, _png())])]))
    assert [one.reason for one in found] == ["leads out of the archive"]
