"""Matrices of attention mass as small PNG pictures."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence

#: from nothing over little to all of the mass; dark to light, so that it reads on light and dark pages alike
_ANCHORS = ((48, 18, 104), (99, 26, 128), (170, 48, 116), (229, 89, 83), (252, 160, 80), (252, 244, 190))
_LEVELS = 255
#: mass that is shown as the darkest colour above nothing; colours are logarithmic from here to 1
SMALLEST = 1e-4
NOTHING = (30, 34, 44)  # exactly zero: not attended to, or not there any more


def data_uri(rows: Sequence[Sequence[float]]) -> str:
    """A picture of one pixel per entry (0 to 1), as a ``data:`` URI."""
    height, width = len(rows), len(rows[0])
    pixels = b"".join(b"\0" + bytes(_level(mass) for mass in row) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    palette = bytes(channel for colour in (NOTHING, *colours(_LEVELS)) for channel in colour)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*part)
        for part in ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def colours(count: int) -> list[tuple[int, int, int]]:
    """`count` colours from least to most mass."""
    found = []
    for i in range(count):
        at = i / (count - 1) * (len(_ANCHORS) - 1)
        first = min(int(at), len(_ANCHORS) - 2)
        low, high, part = _ANCHORS[first], _ANCHORS[first + 1], at - first
        found.append(tuple(round(a + part * (b - a)) for a, b in zip(low, high, strict=True)))
    return found  # type: ignore[return-value]


def colour(mass: float) -> tuple[int, int, int]:
    """Red, green and blue of a mass, as `data_uri` shows it."""
    level = _level(mass)
    return colours(_LEVELS)[level - 1] if level else NOTHING


def _level(mass: float) -> int:
    """Index in the palette: 0 for nothing, 1.._LEVELS logarithmically for the rest."""
    if mass <= 0:
        return 0
    part = 1 + math.log10(mass) / -math.log10(SMALLEST)
    return 1 + round(min(1.0, max(0.0, part)) * (_LEVELS - 1))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
