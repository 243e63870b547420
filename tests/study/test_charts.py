"""Scatter plots: scales that are true, labels that do not cover each other."""

import itertools
import math
import random
import struct
import zlib
from base64 import b64decode

import pytest

from regard.study import png
from regard.study.charts import Point, scatter


def points(values):
    return [Point(f"method-{i}", "#123456", x, y, 0.5, "") for i, (x, y) in enumerate(values)]


def value_at(pixel, ticks, log):
    """Read a value off an axis by its two outermost ticks."""
    (p0, l0), (p1, l1) = ticks[0], ticks[-1]
    v0, v1 = (float(label.replace(",", "")) for label in (l0, l1))
    if log:
        return math.exp(math.log(v0) + (pixel - p0) / (p1 - p0) * (math.log(v1) - math.log(v0)))
    return v0 + (pixel - p0) / (p1 - p0) * (v1 - v0)


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([(10, 3.3), (45, 3.4), (45, 5.7)], False),
        ([(10, 12), (90, 15_000), (91, 30)], True),
        ([(1, 9.0), (2, 9.0)], False),
    ],
)
def test_marks_stand_where_the_ticks_say(values, log):
    plot = scatter("t", "x", "y", points(values))
    assert 3 <= len(plot.x.ticks) <= 8
    assert len(plot.y.ticks) >= 3
    for mark, (x, y) in zip(plot.marks, values, strict=True):
        assert value_at(mark.x, plot.x.ticks, False) == pytest.approx(x, rel=1e-6)
        assert value_at(mark.y, plot.y.ticks, log) == pytest.approx(y, rel=1e-6)
        assert plot.left <= mark.x <= plot.right
        assert plot.top <= mark.y <= plot.bottom


def box(mark):
    width = 6.9 * len(mark.point.label)
    left = mark.text_x if mark.anchor == "start" else mark.text_x - width
    return left, left + width, mark.text_y - 7, mark.text_y + 7


@pytest.mark.parametrize("seed", range(10))
def test_labels_stay_apart_and_inside(seed):
    rng = random.Random(seed)
    values = [(rng.choice([10, 45, 45.1]), rng.uniform(3.3, 3.5)) for _ in range(8)]
    plot = scatter("t", "x", "y", points(values))
    boxes = [box(mark) for mark in plot.marks]
    for a, b in itertools.combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
    for left, right, top, bottom in boxes:
        assert plot.left <= left
        assert right <= plot.right
        assert plot.top - 8 <= top
        assert bottom <= plot.bottom + 8


def test_pictures_are_png_with_the_mass_in_their_colours():
    rows = [[0.0, 1e-9, 1e-4], [0.01, 1.0, 0.5]]
    data = b64decode(png.data_uri(rows).removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        chunks[kind] = body
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    assert tuple(chunks[b"PLTE"][:3]) == png.NOTHING
    pixels = zlib.decompress(chunks[b"IDAT"])
    nothing, least, smallest, middle, all_of_it, half = *pixels[1:4], *pixels[5:8]
    assert nothing == 0
    assert least == smallest == 1
    assert smallest < middle < half < all_of_it == 255
