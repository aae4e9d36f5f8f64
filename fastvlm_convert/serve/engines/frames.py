"""Messages between the server and its workers: a JSON header, then the bytes of arrays. Nothing is unpickled.

A frame is the lengths of the header (uint32) and of the payload (uint64), both big-endian, then the header
and the payload. The header's `arrays` has dtype and shape of each array, whose bytes follow in that order.
"""

import asyncio
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import numpy as np

MAX_HEADER: Final = 1 << 20
MAX_PAYLOAD: Final = 1 << 31  # a hundred pictures of 2048 pixels
_LENGTHS: Final = struct.Struct(">IQ")
_DTYPES: Final = ("float32", "int64")
_CHUNK: Final = 1 << 18  # bytes that are written before others get their turn


class FrameError(Exception):
    """What came is no frame: the other side is broken, or something else writes to the pipe."""


@dataclass(frozen=True)
class Frame:
    """A message.

    Attributes:
        kind: What it is about.
        fields: Values that JSON can hold.
        arrays: float32 or int64, of any shape.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[np.ndarray, ...] = ()


def encode(frame: Frame) -> list[memoryview]:
    """The bytes of a frame, in parts that lie where the arrays lie."""
    arrays = [np.ascontiguousarray(array) for array in frame.arrays]
    described = [[str(array.dtype), array.shape] for array in frame.arrays]
    header = json.dumps({"kind": frame.kind, "fields": frame.fields, "arrays": described}).encode()
    payload = sum(array.nbytes for array in arrays)
    if len(header) > MAX_HEADER or payload > MAX_PAYLOAD:
        raise FrameError(f"a frame of {len(header)} + {payload} bytes is too long")
    head = memoryview(_LENGTHS.pack(len(header), payload) + header)
    return [head, *(array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes)]


def _lengths(head: bytes) -> tuple[int, int]:
    header, payload = _LENGTHS.unpack(head)
    if header > MAX_HEADER or payload > MAX_PAYLOAD:
        raise FrameError(f"a frame of {header} + {payload} bytes is too long")
    return header, payload


def _decode(header: bytes, payload: bytes | bytearray) -> Frame:
    try:
        value = json.loads(header)
        kind, fields, described = value["kind"], value["fields"], value["arrays"]
        arrays, offset = [], 0
        for dtype, shape in described:
            if dtype not in _DTYPES or min(shape, default=0) < 0:
                raise FrameError(f"an array of {dtype} and shape {shape} in a frame")
            count = math.prod(shape)
            arrays.append(np.frombuffer(payload, dtype, count, offset).reshape(shape))
            offset += arrays[-1].nbytes
    except (ValueError, KeyError, TypeError) as error:
        raise FrameError(f"a frame that is damaged: {error}") from error
    if offset != len(payload):
        raise FrameError(f"arrays of {offset} bytes in a payload of {len(payload)}")
    return Frame(kind, fields, tuple(arrays))


async def write_frame(writer: asyncio.StreamWriter, frame: Frame) -> None:
    """Send a frame without holding up the event loop.

    Raises:
        ConnectionError: The other side is gone.
    """
    for part in encode(frame):
        for start in range(0, len(part), _CHUNK):
            writer.write(part[start : start + _CHUNK])
            await writer.drain()


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None where the other side ended, even within one.

    Raises:
        FrameError: What came is no frame.
    """
    try:
        header, payload = _lengths(await reader.readexactly(_LENGTHS.size))
        return _decode(await reader.readexactly(header), await reader.readexactly(payload))
    except asyncio.IncompleteReadError:
        return None


def send_frame(stream: BinaryIO, frame: Frame) -> None:
    """Send a frame from a thread."""
    parts: Sequence[memoryview] = encode(frame)
    for part in parts:
        stream.write(part)
    stream.flush()


def receive_frame(stream: BinaryIO) -> Frame | None:
    """The next frame, in a thread; None where the other side ended, even within one.

    Raises:
        FrameError: What came is no frame.
    """
    head = _read(stream, _LENGTHS.size)
    if head is None:
        return None
    lengths = _lengths(bytes(head))
    header = _read(stream, lengths[0])
    payload = _read(stream, lengths[1])
    return None if header is None or payload is None else _decode(bytes(header), payload)


def _read(stream: BinaryIO, size: int) -> bytearray | None:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]  # binary files have it
        if not count:
            return None
        filled += count
    return buffer
