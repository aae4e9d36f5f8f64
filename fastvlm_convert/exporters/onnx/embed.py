"""Lower the embedding table: token ids to rows."""

from collections.abc import Iterator

import numpy as np

from fastvlm_convert.exporters.job import stored_chunks
from fastvlm_convert.exporters.onnx.data import Region
from fastvlm_convert.exporters.onnx.fused import StoredAffine, rows_of_stored, store_affine
from fastvlm_convert.exporters.onnx.graph import Graph, num_bytes
from fastvlm_convert.io_names import BATCH, INPUT_IDS, INPUTS_EMBEDS, SEQUENCE
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
        return rows_of_stored(graph, name, ids, table)
    matrix = graph.external("embed_tokens_weight", graph.storage, shape, table)
    if graph.storage == "float32":
        return graph.op("Gather", name, [matrix, ids], axis=0)
    return graph.cast(graph.op("Gather", "embed_rows", [matrix, ids], axis=0), "float32", name)
