"""JPEG restart markers: pictures rewritten with them, without loss, and parts cut out of such pictures undecoded.

Entropy-coded data can be read from its start alone, and reading it is most of what a JPEG picture costs. Behind a
restart marker it starts anew: with one every few blocks, what lies beside, above and below a crop is left out before
anything is decoded. An index in the header says where they are, so that nobody has to look for them.

Source: ITU-T T.81, Annex B for the markers, Annex F for the Huffman coding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SOF, SOF_OTHER, DHT, DRI, SOS, EOI, RST = (0xC0, 0xC1), range(0xC2, 0xD0), 0xC4, 0xDD, 0xDA, 0xD9, 0xD0
APP, INDEX = 0xE9, b"FASTJEPA\0"  # an application's segment with the length of each interval, and how ours begin
MOST = 32_000  # lengths in one segment of an index
ALONE = {0x00, 0x01, 0xFF, *range(0xD0, 0xDA)}  # no marker, or one that has no length
BAND = 1 << 15  # blocks that are coded at a time, which bounds the memory taken
SPAN, SPANS = 16, (16, 128)  # pixels between markers: wished for, and allowed; docs/input.md has what they cost
DC, AC = 256, 0  # where a component's symbols begin in its table of codes
ZRL, EOB = 0xF0, 0x00  # 16 zeros; nothing but zeros up to the end of the block
MAX_DC = 2047  # the largest difference that 8-bit pictures may have
NUMBERS = (RST + (np.arange(1 << 16) & 7)).astype(np.uint8)  # of markers, one after the other
BITS = np.array([i.bit_length() for i in range(MAX_DC + 1)])
ZIGZAG = np.array(sorted(range(64), key=lambda i: (sum(divmod(i, 8)), i // 8 if sum(divmod(i, 8)) % 2 else i % 8)))
# Markers change the steps of DC, and a picture's own tables may lack one: those of T.81, Tables K.3 and K.4, have all.
DC_TABLES = {
    0: (bytes((0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0)), bytes(range(12))),
    1: (bytes((0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)), bytes(range(12))),
}


class Component(NamedTuple):
    """Sampling factors, and the numbers of the tables for DC and AC."""

    across: int
    down: int
    dc: int
    ac: int


class Layout(NamedTuple):
    """Of a JPEG picture in one sequential scan: its size and that of an MCU in pixels, how many MCUs there are.

    `interval` is in MCUs, 0 without markers; `sof` and `sos` are where these segments begin in the picture's bytes,
    `scan` where the entropy-coded data does. `index` has the bytes of each interval, its marker's too, as big-endian
    uint16; nothing if the picture has no index.
    """

    width: int
    height: int
    mcu_width: int
    mcu_height: int
    columns: int
    rows: int
    interval: int
    components: tuple[Component, ...]
    sof: int
    sos: int
    scan: int
    index: bytes = b""


class Cut(NamedTuple):
    """A part of a picture as a JPEG picture, and (left, top, width, height) of it in the whole."""

    data: bytes
    left: int
    top: int
    width: int
    height: int


def read_layout(data: bytes) -> Layout | None:
    """The layout of a picture; None for one that is no such JPEG or whose header has faults."""
    frame, interval, index = None, 0, b""
    try:
        for kind, at, body in _segments(data):
            if kind in SOF:
                frame = at, body
            elif kind == DRI:
                interval = int.from_bytes(body[:2], "big")
            elif _is_index(kind, body):
                index += body[len(INDEX) :]
            elif kind == SOS:
                found = _layout(*frame, at, body, interval) if frame else None
                return found._replace(index=index) if found and index else found
            elif kind in SOF_OTHER and kind != DHT:
                return None
    except (IndexError, KeyError, ValueError):
        pass
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, place and contents of each segment up to where the entropy-coded data begins.

    Raises:
        ValueError: markers without a length, or bytes that fill up: a decoder reads on behind them, which nothing here
            has to.
    """
    at, kind = 2, 0
    while kind != SOS and data[at] == 0xFF:
        kind, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in ALONE or size < 2:
            raise ValueError(f"marker {kind:#x}")
        yield kind, at, data[at + 4 : at + 2 + size]
        at += 2 + size


@functools.lru_cache(maxsize=64)  # pictures of a data set have much in common
def _layout(sof: int, frame: bytes, sos: int, scan: bytes, interval: int) -> Layout | None:
    bits, count = frame[0], frame[5]
    height, width = (int.from_bytes(frame[i : i + 2], "big") for i in (1, 3))
    if bits != 8 or not width or not height or not count or scan[0] != count:  # 0 is also where a component is apart
        return None
    factors = {frame[i]: divmod(frame[i + 1], 16) for i in range(6, 6 + 3 * count, 3)}
    tables = {scan[i]: divmod(scan[i + 1], 16) for i in range(1, 1 + 2 * count, 2)}
    if count == 1:  # an MCU is one block, whatever its factors are
        factors = dict.fromkeys(factors, (1, 1))
    components = tuple(Component(*factors[name], *table) for name, table in tables.items())
    mcu_width, mcu_height = 8 * max(c.across for c in components), 8 * max(c.down for c in components)
    if not all(c.across and c.down for c in components) or len(components) != count:
        return None
    size = (width, height, mcu_width, mcu_height, -(-width // mcu_width), -(-height // mcu_height))
    return Layout(*size, interval, components, sof, sos, sos + 4 + len(scan))


def cut(data: bytes, left: int, top: int, right: int, bottom: int) -> Cut | None:
    """The smallest JPEG picture with the pixels of a part of `data` in it that can be had without decoding.

    None where nothing can be left out: without restart markers, with ones that are not at the same places in every row,
    or with faults. Colours at its edges, where they are stored at half the size, may differ from those of the whole.
    """
    found = read_layout(data)
    if found is None or not found.interval or found.columns % found.interval:
        return None
    spans, span = found.columns // found.interval, found.interval * found.mcu_width
    first, last = max(0, left // span), min(-(-right // span), spans)
    upper, lower = max(0, top // found.mcu_height), min(-(-bottom // found.mcu_height), found.rows)
    rows, across = lower - upper, last - first
    if rows < 1 or across < 1 or rows * across == found.rows * spans:
        return None
    markers = _indexed(found) if found.index else _markers(data, found.scan, spans * found.rows)
    if len(markers) != 1 + spans * found.rows or data[markers[-1] : markers[-1] + 2] != bytes((0xFF, EOI)):
        return None
    # Each row with the marker behind it is copied as it is, then the markers are numbered anew.
    begins = markers[upper * spans + first : lower * spans : spans] + 2
    behind = markers[1:].reshape(found.rows, spans)[upper:lower, first:last]
    ends = behind[:, -1] + 2
    x, y = first * span, upper * found.mcu_height
    width, height = min(last * span, found.width) - x, min(lower * found.mcu_height, found.height) - y
    head = bytearray(data[: found.scan])
    head[found.sof + 5 : found.sof + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    made = bytearray().join((head, *map(data.__getitem__, map(slice, begins.tolist(), ends.tolist()))))
    places = (behind + (len(head) + np.cumsum(ends - begins) - ends)[:, None]).ravel()
    body, before = np.frombuffer(made, np.uint8), _numbers(found.rows * spans).reshape(found.rows, spans)
    kinds = before[upper:lower, first:last].ravel()[:-1]
    if not (body[places] == 0xFF).all() or not np.array_equal(body[places[:-1] + 1], kinds):
        return None  # the index is of another picture, or this has faults
    body[places + 1] = _numbers(rows * across)
    made[-1] = EOI
    return Cut(bytes(made), x, y, width, height)


def _is_index(kind: int, body: bytes) -> bool:
    return kind == APP and body.startswith(INDEX)


def _indexed(found: Layout) -> np.ndarray:
    """As `_markers`, of a picture with an index; whether that is right is not looked at."""
    lengths = np.frombuffer(found.index, ">u2", len(found.index) // 2)
    if lengths.min(initial=2) < 2:  # not even a marker
        return np.empty(0, np.int64)
    return np.cumsum(np.concatenate(([found.scan - 2], lengths)))


def _markers(data: bytes, scan: int, count: int) -> np.ndarray:
    """Where the markers behind `count` intervals are, and before them all scan - 2; empty if they are not in order."""
    body = np.frombuffer(data, np.uint8, offset=scan)
    at = np.flatnonzero(body[:-1] == 0xFF)
    kinds = body[at + 1]
    real = np.flatnonzero(kinds)
    kinds = kinds[real]
    right = len(kinds) == count and kinds[-1] == EOI and np.array_equal(kinds[:-1], _numbers(count - 1))
    return np.concatenate(([scan - 2], scan + at[real])) if right else np.empty(0, np.int64)


def _numbers(count: int) -> np.ndarray:
    return NUMBERS[:count] if count <= len(NUMBERS) else np.resize(NUMBERS, count)


def with_markers(head: bytes, planes: Sequence[np.ndarray]) -> bytes | None:
    """A picture of these coefficients with restart markers, at the same places in every row of MCUs.

    Between two lie `SPAN` pixels, or about as many: their number divides a row. None where `head` is of another kind or
    a coefficient is too large.

    Shapes: head, a JPEG picture with the header wanted and without markers; planes, the quantised coefficients of each
    component, int16 [rows of blocks, blocks in a row, 64], a block's row by row.
    """
    found = read_layout(head)
    if found is None or found.interval or len(found.components) != len(planes):
        return None
    choices = [n for n in range(1, found.columns) if not found.columns % n and _allowed(n * found.mcu_width)]
    interval = min(choices, key=lambda n: abs(n * found.mcu_width - SPAN), default=found.columns)
    tables = dict(_tables(head)) | DC_TABLES
    codes = _codes(tables, found.components)
    rows = max(1, BAND // (found.columns * sum(c.across * c.down for c in found.components)))
    scans: list[bytes] = []
    for upper in range(0, found.rows, rows):
        band = found._replace(rows=min(rows, found.rows - upper))
        parts = [p[upper * c.down : (upper + rows) * c.down] for p, c in zip(planes, found.components, strict=True)]
        number = upper * found.columns // interval
        if (scan := _scan(band, parts, codes, interval, number)) is None:
            return None
        scans += [bytes((0xFF, RST + (number - 1) % 8)), scan] if upper else [scan]
    defined = b"".join(bytes((number,)) + counts + symbols for number, (counts, symbols) in tables.items())
    *before, start = [(k, body) for k, _, body in _segments(head) if k != DHT and not _is_index(k, body)]
    scan = b"".join((*scans, bytes((0xFF, EOI))))
    index = _index(scan, found.columns * found.rows // interval)
    segments = (*before, (DHT, defined), (DRI, interval.to_bytes(2, "big")), *index, start)
    return b"".join((head[:2], *(_segment(*segment) for segment in segments), scan))


def _index(scan: bytes, count: int) -> Iterator[tuple[int, bytes]]:
    """Segments that say how long each of `count` intervals of entropy-coded data is; none where one is too long."""
    lengths = np.diff(_markers(scan, 0, count))
    if lengths.max() < 1 << 16:
        for first in range(0, count, MOST):
            yield APP, INDEX + lengths[first : first + MOST].astype(">u2").tobytes()


def _scan(band: Layout, planes: Sequence[np.ndarray], codes: np.ndarray, interval: int, number: int) -> bytes | None:
    """Entropy-coded data of some rows of MCUs, markers from `number` on; None with too large a coefficient."""
    blocks, owner = _in_order(band, planes)
    steps = np.empty(len(blocks), np.int32)  # from the DC of a component's block to that of its next
    for component in range(len(planes)):
        mine = np.flatnonzero(owner == component)
        levels = blocks[mine, 0].astype(np.int32).reshape(band.columns * band.rows // interval, -1)
        steps[mine] = np.diff(levels, axis=1, prepend=0).ravel()
    if np.abs(steps).max() > MAX_DC or np.abs(blocks[:, 1:].astype(np.int32)).max(initial=0) > MAX_DC // 2:
        return None
    return _encode(blocks[:, 1:], steps, owner, codes, len(blocks) * interval // (band.columns * band.rows), number)


def _segment(kind: int, body: bytes) -> bytes:
    return bytes((0xFF, kind)) + (2 + len(body)).to_bytes(2, "big") + body


def _allowed(span: int) -> bool:
    return SPANS[0] <= span <= SPANS[1]


def _in_order(found: Layout, planes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks as the scan has them, int16 [blocks, 64] in zigzag, and the number of the component that each is of.

    An MCU is whole at the picture's edges too: blocks beyond have the DC of the last before them and nothing else.
    """
    parts, owner = [], []
    for number, (component, plane) in enumerate(zip(found.components, planes, strict=True)):
        high, wide = found.rows * component.down, found.columns * component.across
        plane = plane[:high, :wide]
        rows, columns, _ = plane.shape
        whole = np.pad(plane, ((0, high - rows), (0, wide - columns), (0, 0)), mode="edge")
        whole[rows:, :, 1:] = whole[:, columns:, 1:] = 0
        whole = whole.reshape(found.rows, component.down, found.columns, component.across, 64)[..., ZIGZAG]
        parts.append(whole.transpose(0, 2, 1, 3, 4).reshape(found.rows * found.columns, -1, 64))
        owner += [number] * parts[-1].shape[1]
    return np.concatenate(parts, axis=1).reshape(-1, 64), np.tile(owner, found.rows * found.columns)


def _encode(
    levels: np.ndarray, steps: np.ndarray, owner: np.ndarray, codes: np.ndarray, interval: int, number: int
) -> bytes:
    """Entropy-coded data, with a marker after every `interval` blocks but the last, from `number` on.

    Shapes: levels [blocks, 63] of AC; steps [blocks] of DC; owner [blocks], the component of each; codes [components,
    symbols, 2], the bits of each symbol and how many they are.
    """
    count = len(levels)
    block, place = np.nonzero(levels)
    level = levels[block, place].astype(np.int32)
    fresh = np.diff(block, prepend=-1) > 0  # the first level of its block
    zeros = np.diff(place, prepend=-1) - 1
    zeros[fresh] = place[fresh]
    skips = zeros >> 4

    # Of each block: its DC; for each level the sixteens of zeros before it and itself; EOB, unless the last level has
    # the last place; and at the end of an interval the bits that fill its last byte.
    ended = np.ones(count, bool)
    ended[block[place == 62]] = False
    last = np.arange(1, count + 1) % interval == 0
    taken = np.bincount(block, 1 + skips, count).astype(np.int64)
    end = np.cumsum(1 + taken + ended + last)
    begin = end - (1 + taken + ended + last)
    before = np.cumsum(taken) - taken  # of levels and sixteens, in earlier blocks
    at = begin[block] + np.cumsum(1 + skips) - before[block]  # of each level
    far = np.flatnonzero(skips)
    skipped = np.repeat(at[far] - skips[far], skips[far]) + np.arange(skips.sum())
    skipped -= np.repeat(np.cumsum(skips[far]) - skips[far], skips[far])

    symbols = np.full(end[-1], EOB)
    values, tables = np.zeros(end[-1], np.int64), np.repeat(owner, 1 + taken + ended + last)
    symbols[begin], values[begin] = DC + BITS[np.abs(steps)], steps
    symbols[at], values[at] = AC + (zeros & 15) * 16 + BITS[np.abs(level)], level
    symbols[skipped] = ZRL
    bits = np.where(symbols == ZRL, 0, symbols & 15)
    values += np.where(values < 0, (1 << bits) - 1, 0)
    code, size = np.moveaxis(codes[tables, symbols], -1, 0)
    code, size = (code << bits) | values, size + bits

    closing = end[last] - 1
    size[closing] = 0
    used = np.diff(np.cumsum(size)[closing], prepend=0)
    size[closing] = -used % 8
    code[closing] = (1 << size[closing]) - 1
    return _stuffed(_packed(code, size), np.cumsum((used + 7) // 8)[:-1], number)


def _packed(code: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Codes of up to 27 bits, one after the other: uint8, the bits in all over 8."""
    end = np.cumsum(size)
    start = end - size
    byte, window = start >> 3, code << (40 - (start & 7) - size)  # which of the five bytes it may lie in
    made = np.zeros(end[-1] // 8 + 5)
    for lane in range(5):
        made += np.bincount(byte + lane, (window >> (32 - 8 * lane)) & 0xFF, len(made))
    return made[: end[-1] // 8].astype(np.uint8)


def _stuffed(data: np.ndarray, places: np.ndarray, number: int) -> bytes:
    """`data` with a zero after each 0xFF and a restart marker before each of `places`, from `number` on."""
    room = 1 + (data == 0xFF)
    room[places - 1] += 2
    end = np.cumsum(room)
    made = np.zeros(end[-1], np.uint8)
    made[end - room] = data
    made[end[places - 1] - 2], made[end[places - 1] - 1] = 0xFF, _numbers(number % 8 + len(places))[number % 8 :]
    return made.tobytes()


def _tables(head: bytes) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
    """Each Huffman table: its number, 16 more for AC; how many codes there are of each length, and their symbols."""
    for kind, _, body in _segments(head):
        while kind == DHT and body:
            count = sum(body[1:17])
            yield body[0], (body[1:17], body[17 : 17 + count])
            body = body[17 + count :]


def _codes(tables: dict[int, tuple[bytes, bytes]], components: Sequence[Component]) -> np.ndarray:
    """int64 [components, symbols, 2]: the bits of each symbol and how many they are."""
    codes = np.zeros((len(components), DC + 16, 2), np.int64)
    for made, component in zip(codes, components, strict=True):
        for base, number in ((AC, 16 + component.ac), (DC, component.dc)):
            counts, symbols = tables[number]
            value, remaining = 0, iter(symbols)
            for size, count in enumerate(counts, 1):
                for _ in range(count):
                    made[base + next(remaining)] = value, size
                    value += 1
                value <<= 1
    return codes
