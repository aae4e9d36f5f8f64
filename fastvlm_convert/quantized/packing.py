"""Small integers packed into bytes: a little-endian stream of bits, a row at a time.

4 bits: two values a byte, the lower nibble first. 6 bits: four values in three bytes. 8 bits: as they are.
"""

import numpy as np

from fastvlm_convert.arithmetic import ceil_div

_WORDS = {4: (2, 1), 6: (4, 3), 8: (1, 1)}  # bits -> values and bytes of the smallest whole group


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` values."""
    return ceil_div(columns * bits, 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack rows.

    Args:
        values: uint8 [rows, columns], each below 2^bits.
        bits: 4, 6 or 8.

    Returns:
        uint8 [rows, packed_columns(columns, bits)]; bits after the last value are zero.
    """
    if bits == 8:
        return values
    if bits == 4:  # four times faster than through words
        padded = np.pad(values, ((0, 0), (0, 1))) if values.shape[1] % 2 else values
        return padded[:, 0::2] | (padded[:, 1::2] << 4)
    count, width = _WORDS[bits]
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % count))).reshape(rows, -1, count)
    words = np.zeros(padded.shape[:2], "<u4")
    for i in range(count):
        words |= padded[..., i].astype("<u4") << np.uint32(bits * i)
    content = words.view(np.uint8).reshape(rows, -1, 4)[..., :width].reshape(rows, -1)
    return np.ascontiguousarray(content[:, : packed_columns(columns, bits)])


def unpack(content: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The values that `pack` was given.

    Args:
        content: uint8 [rows, packed_columns(columns, bits)].
        bits: 4, 6 or 8.
        columns: Values of a row.

    Returns:
        uint8 [rows, columns].
    """
    if bits == 8:
        return content
    count, width = _WORDS[bits]
    rows = len(content)
    padded = np.pad(content, ((0, 0), (0, -content.shape[1] % width))).reshape(rows, -1, width)
    words = np.zeros(padded.shape[:2], np.uint32)
    for i in range(width):
        words |= padded[..., i].astype(np.uint32) << np.uint32(8 * i)
    values = np.empty((*words.shape, count), np.uint8)
    for i in range(count):
        values[..., i] = (words >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :columns])
