"""Tar archives that are damaged, or say more than they hold."""

import io
import tarfile

import pytest

from upfeat.batch.items import Damaged, list_items


def _tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("a.txt", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
    return bytearray(content.getvalue())


def _with_header(content, start, place, data):
    content[start + place : start + place + len(data)] = data
    head = content[start : start + 512]
    head[148:156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(head)
    return bytes(content)


@pytest.mark.parametrize("start", [0, 1024])
@pytest.mark.parametrize("size", [b"\x80\0\0\0\x7f" + b"\xff" * 7, b"77777777777\0", b"\xff" * 12])
def test_an_archive_that_claims_more_than_it_has_ends(tmp_path, start, size):
    (tmp_path / "set.tar").write_bytes(_with_header(_tar(), start, 124, size))
    found = list(list_items([tmp_path / "set.tar"]))
    assert isinstance(found[-1], Damaged)
    assert "archive" in found[-1].reason


def test_an_archive_does_not_end_at_a_damaged_header(tmp_path):
    """tarfile stops there in silence, and the images behind it would be missing."""
    content = _tar()
    content[1024 + 150] ^= 1  # of the second header's checksum
    (tmp_path / "set.tar").write_bytes(content)
    assert [one.reason for one in list_items([tmp_path / "set.tar"])] == ["the archive is damaged"]


def test_an_archive_is_read_past_a_sparse_file_and_links_with_sizes(tmp_path):
    content = _tar()
    head = io.BytesIO()
    with tarfile.open(fileobj=head, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("sparse.png")
        member.pax_headers = {"GNU.sparse.map": "0,1,1099511627776,0"} | {
            "GNU.sparse.size": str(1 << 40)
        }
        archive.addfile(member)
        link = tarfile.TarInfo("c.txt")
        link.type, link.linkname, link.size = tarfile.LNKTYPE, "a.txt", 1 << 30
        archive.addfile(link)
    used = len(head.getvalue().rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "set.tar").write_bytes(head.getvalue()[:used] + content)
    found = list(list_items([tmp_path / "set.tar"]))
    assert [(one.key, type(one).__name__) for one in found] == [
        ("set.tar/sparse.png", "Damaged"),
        ("set.tar/b.png", "Item"),
    ]
    assert "sparse file" in found[0].reason


def test_extended_headers_of_any_size_are_damage(tmp_path):
    for kind in b"xgLK":
        content = _with_header(_tar(), 0, 156, bytes([kind]))
        huge = _with_header(bytearray(content), 0, 124, b"\x80\0\0\0\xff" + b"\xff" * 7)
        (tmp_path / "set.tar").write_bytes(huge)
        assert all(isinstance(one, Damaged) for one in list_items([tmp_path / "set.tar"]))
