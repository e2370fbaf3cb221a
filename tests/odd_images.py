"""Odd image files, written from scratch, with the pixels that they show."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 20, 3)).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (12, 20, 4)).astype(np.uint16)
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def png(values, colour, depth, extra=b""):
    """A PNG of (H, W, bands) with the given colour type and depth."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    kind = ">u2" if depth == 16 else "u1"
    rows = b"".join(b"\0" + row.astype(kind).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


def shallow_png(values, depth, extra=b""):
    """A grey PNG of (H, W) of 2 or 4 bits, W a multiple of four."""
    count = 8 // depth
    shifts = depth * np.arange(count - 1, -1, -1)
    packed = (values.reshape(len(values), -1, count).astype(int) << shifts).sum(2)
    content = png(packed[..., None], 0, 8, extra)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    return content[:8] + png_chunk(b"IHDR", header) + content[33:]


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(values, *, photometric=2, extra=None, orientation=1, order="<", tags=()):
    """An uncompressed TIFF of (H, W, bands)."""
    bits, bands = 8 * values.dtype.itemsize, values.shape[2]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = [
        (256, 4, [values.shape[1]]),
        (257, 4, [values.shape[0]]),
        (258, 3, [bits] * bands),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [8]),
        (274, 3, [orientation]),
        (277, 3, [bands]),
        (278, 4, [values.shape[0]]),
        (279, 4, [len(data)]),
        (284, 3, [1]),
        *([] if extra is None else [(338, 3, list(extra))]),
        (339, 3, [kind] * bands),
        *tags,
    ]
    place = 8 + len(data) + len(data) % 2
    blob, directory = b"", struct.pack(order + "H", len(entries))
    after = place + 2 + 12 * len(entries) + 4
    for tag, type_, content in entries:
        packed = (
            content
            if isinstance(content, bytes)
            else struct.pack(f"{order}{len(content)}{'H' if type_ == 3 else 'I'}", *content)
        )
        count = len(content)
        if len(packed) > 4:
            field, blob = (
                struct.pack(order + "I", after + len(blob)),
                blob + packed + b"\0" * (len(packed) % 2),
            )
        else:
            field = packed.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, type_, count) + field
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, place)
    return start + data + b"\0" * (len(data) % 2) + directory + b"\0" * 4 + blob


def profile(space, columns=P3, gamma=2.2):
    """A matrix profile of a display ("RGB "), or one of greys ("GRAY")."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + b"\0" * 78
    tags = [
        (b"desc", text),
        (b"cprt", b"text\0\0\0\0made up\0"),
        (b"wtpt", xyz((0.9642, 1, 0.8249))),
    ]
    if space == "GRAY":
        tags += [(b"kTRC", curve)]
    else:
        tags += [(k, xyz(c)) for k, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)]
        tags += [(k, curve) for k in (b"rTRC", b"gTRC", b"bTRC")]
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s12s4s4sI4s4sQI",
        *(offset + len(body), b"lcms", 0x02400000, b"mntr", space.encode(), b"XYZ ", b"\0" * 12),
        *(b"acsp", b"APPL", 0, b"none", b"none", 0, 0),
    )
    head += fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head.ljust(128, b"\0") + table + body


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def linear_srgb(values):
    """Light of sRGB values in [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(light):
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def to_linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def p3_to_srgb(values, linear=lambda values: values**2.2):
    """Display P3 (of gamma 2.2) in [0, 1] to sRGB by the textbook's matrices."""
    srgb = np.array(
        [
            [0.4360747, 0.3850649, 0.1430804],
            [0.2225045, 0.7168786, 0.0606169],
            [0.0139322, 0.0971045, 0.7141733],
        ]
    )
    return from_linear(linear(values) @ np.array(P3) @ np.linalg.inv(srgb).T)


def frames(kind):
    one = Image.fromarray(COLOUR).quantize(64) if kind == "GIF" else Image.fromarray(COLOUR)
    other = Image.new(one.mode, one.size)
    return one, saved(one, kind, save_all=True, append_images=[other])
