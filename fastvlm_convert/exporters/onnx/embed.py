"""Lower the embedding table: token ids to rows."""

from collections.abc import Iterator

import numpy as np

from fastvlm_convert.exporters.job import stored_chunks
from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.fused import StoredAffine, store_affine
from fastvlm_convert.exporters.onnx.graph import Graph, num_bytes
from fastvlm_convert.io_names import BATCH, INPUT_IDS, INPUTS_EMBEDS, SEQUENCE
from fastvlm_convert.quantized.packing import packed_columns
from fastvlm_convert.quantized.weight import AnyWeight, QuantizedWeight
from fastvlm_convert.weights.source import Weight

Table = Region | StoredAffine


def store_table(graph: Graph, table: AnyWeight, rows: int) -> Table:
    """Write a table to a graph's data file, followed by zero rows up to `rows`.

    Clients look up `<image>` before they overwrite its rows with image features, so that id needs a row;
    a table cut to the tokenizer's size has none. A head that shares the table reads fewer rows of it.
    """
    if isinstance(table, QuantizedWeight):
        return store_affine(graph, table, rows)
    assert isinstance(table, Weight), "ONNX has no palettes"

    def chunks() -> Iterator[np.ndarray]:
        yield from table.chunks()
        if rows > table.shape[0]:
            yield np.zeros((rows - table.shape[0], table.shape[1]), np.float32)

    length = num_bytes(graph.storage, (max(rows, table.shape[0]), table.shape[1]))
    stored = stored_chunks(chunks(), graph.storage, "embed_tokens", graph.on_bytes)
    return graph.data.append(stored, length)


def build_embed(graph: Graph, table: Table, shape: tuple[int, int]) -> None:
    """Add the look-up to a graph.

    Args:
        graph: An empty graph.
        table: Where the table lies.
        shape: Its rows and its width, the decoder's hidden size.
    """
    ids = graph.input(INPUT_IDS, "int64", [BATCH, SEQUENCE])
    graph.output(INPUTS_EMBEDS, "float32", [BATCH, SEQUENCE, shape[1]])
    look_up(graph, INPUTS_EMBEDS, ids, table, shape)


def look_up(graph: Graph, name: str, ids: str, table: Table, shape: tuple[int, int]) -> str:
    """Rows of a table, float32.

    Args:
        graph: A graph whose storage is the table's.
        name: Of the result, [batch_size, sequence_length, width].
        ids: Which rows, int64 [batch_size, sequence_length].
        table: Where the table lies.
        shape: Its rows and its width.
    """
    if isinstance(table, StoredAffine):
        return _dequantized_rows(graph, name, ids, table)
    matrix = graph.external("embed_tokens_weight", graph.storage, shape, table)
    if graph.storage == "float32":
        return graph.op("Gather", name, [matrix, ids], axis=0)
    return graph.cast(graph.op("Gather", "embed_rows", [matrix, ids], axis=0), "float32", name)


def _dequantized_rows(graph: Graph, name: str, ids: str, stored: StoredAffine) -> str:
    """Look rows of integers up and make them floats: exactly what the engine's integers stand for.

    Not ONNX Runtime's GatherBlockQuantized, which does the same: its WebGPU build for browsers has no kernel
    for that one, whatever provider runs. The parts do it everywhere, and no slower.
    """
    scheme, blocks = stored.scheme, stored.blocks
    q = _integers(graph, "embed_tokens_q", ids, stored.q, (stored.rows, stored.columns), scheme.bits)
    in_blocks = graph.constant("in_blocks", np.array([0, 0, blocks, stored.block_size], np.int64))
    q = graph.op("Reshape", "embed_q_blocks", [q, in_blocks])
    last = graph.constant("last_axis", np.array([-1], np.int64))
    if stored.zero_point is None:
        zero = graph.constant("middle", np.array([scheme.middle], np.float32))
    else:
        shape = (stored.rows, blocks)
        zero = _integers(graph, "embed_tokens_zero_point", ids, stored.zero_point, shape, scheme.bits)
        zero = graph.op("Unsqueeze", "embed_zero_point_blocks", [zero, last])
    scales = graph.external("embed_tokens_scale", "float16", (stored.rows, blocks), stored.scale)
    scale = graph.cast(
        graph.op("Gather", "embed_scale", [scales, ids], axis=0), "float32", "embed_scale_float32"
    )
    scale = graph.op("Unsqueeze", "embed_scale_blocks", [scale, last])
    centered = graph.op("Sub", "embed_centered", [q, zero])
    floats = graph.op("Mul", "embed_blocks", [centered, scale])
    in_rows = graph.constant("in_rows", np.array([0, 0, stored.columns], np.int64))
    return graph.op("Reshape", name, [floats, in_rows])


def _integers(graph: Graph, name: str, ids: str, region: Region, shape: tuple[int, int], bits: int) -> str:
    """Rows of packed integers, looked up and unpacked; float32 [batch_size, n, columns].

    Args:
        graph: The graph.
        name: Of the table.
        ids: int64 [batch_size, n].
        region: Where the table lies.
        shape: Rows and columns of the table.
        bits: Of an integer; two of 4 bits share a byte, the first in its low half.
    """
    rows, columns = shape
    num_bytes = packed_columns(columns, bits)
    packed = graph.external(name, "uint8", (rows, num_bytes), region)
    row = graph.op("Gather", f"{name}_rows", [packed, ids], axis=0)
    if bits == 4:
        mask = graph.constant("low_half", np.array([15], np.uint8))
        shift = graph.constant("four_bits", np.array([4], np.uint8))
        last = graph.constant("last_axis", np.array([-1], np.int64))
        halves = [
            graph.op("BitwiseAnd", f"{name}_low", [row, mask]),
            graph.op("BitShift", f"{name}_high", [row, shift], direction="RIGHT"),
        ]
        apart = [graph.op("Unsqueeze", f"{half}_apart", [half, last]) for half in halves]
        pairs = graph.op("Concat", f"{name}_pairs", apart, axis=-1)
        flat = graph.constant(f"{name}_flat", np.array([0, 0, 2 * num_bytes], np.int64))
        row = graph.op("Reshape", f"{name}_unpacked", [pairs, flat])
        if columns % 2:  # the last half of a row's last byte is empty
            zero, end = (
                graph.constant(n, np.array([v], np.int64))
                for n, v in (("first", 0), (f"{name}_end", columns))
            )
            row = graph.op("Slice", f"{name}_cut", [row, zero, end, last])
    return graph.cast(row, "float32", f"{name}_float32")
