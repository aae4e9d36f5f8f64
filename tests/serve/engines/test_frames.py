"""Frames between the server and its workers."""

import asyncio
import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastvlm_convert.serve.engines.frames import (
    MAX_HEADER,
    MAX_PAYLOAD,
    Frame,
    FrameError,
    encode,
    read_frame,
    receive_frame,
    send_frame,
)

ARRAYS = st.one_of(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, min_side=0), elements=st.floats(width=32)),
    hnp.arrays(np.int64, hnp.array_shapes(max_dims=1, min_side=0)),
)
FIELDS = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()))
FRAMES = st.builds(Frame, st.text(), FIELDS, st.lists(ARRAYS, max_size=4).map(tuple))


def same(one: Frame | None, other: Frame) -> bool:
    assert one is not None
    assert (one.kind, one.fields) == (other.kind, other.fields)
    assert [a.shape for a in one.arrays] == [a.shape for a in other.arrays]
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.arrays, other.arrays, strict=True))


@given(st.lists(FRAMES, max_size=3))
def test_frames_come_as_they_were_sent(frames):
    stream = io.BytesIO()
    for frame in frames:
        send_frame(stream, frame)
    stream.seek(0)
    assert all(same(receive_frame(stream), frame) for frame in frames)
    assert receive_frame(stream) is None

    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(stream.getvalue())
        reader.feed_eof()
        for frame in frames:
            assert same(await read_frame(reader), frame)
        assert await read_frame(reader) is None

    asyncio.run(read())


def test_parts_of_a_transposed_array_are_sent_in_its_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    stream = io.BytesIO()
    send_frame(stream, Frame("x", {}, (array,)))
    stream.seek(0)
    frame = receive_frame(stream)
    assert frame is not None
    assert frame.arrays[0].tolist() == array.tolist()


@given(st.data())
def test_a_frame_that_is_cut_off_is_the_end(data):
    whole = b"".join(encode(Frame("piece", {"text": "a"}, (np.ones(3, np.float32),))))
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert receive_frame(io.BytesIO(whole[:cut])) is None


def head(header: int, payload: int) -> bytes:
    return struct.pack(">IQ", header, payload)


@pytest.mark.parametrize(
    "data",
    [
        head(MAX_HEADER + 1, 0),
        head(2, MAX_PAYLOAD + 1),
        b"hello, this is a library that prints",
        head(2, 0) + b"{}",
        head(4, 0) + b"nope",
        head(3, 0) + b"[1]",
        head(46, 0) + b'{"kind": "x", "fields": {}, "arrays": [[1,2]]}',
        head(56, 0) + b'{"kind": "x", "fields": {}, "arrays": [["object", [0]]]}',
        head(58, 4) + b'{"kind": "x", "fields": {}, "arrays": [["float32", [99]]]}abcd',
        head(58, 4) + b'{"kind": "x", "fields": {}, "arrays": [["float32", [-1]]]}abcd',
        head(41, 4) + b'{"kind": "x", "fields": {}, "arrays": [] }abcd',
    ],
)
def test_what_is_no_frame_is_an_error(data):
    with pytest.raises(FrameError):
        receive_frame(io.BytesIO(data))


def test_too_much_is_not_sent():
    with pytest.raises(FrameError):
        encode(Frame("x", {"text": "a" * MAX_HEADER}))


@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_else(data):
    stream = io.BytesIO(head(len(data) // 2, len(data) - len(data) // 2) + data)
    with contextlib.suppress(FrameError):
        receive_frame(stream)
