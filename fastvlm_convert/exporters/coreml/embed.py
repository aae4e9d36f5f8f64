"""Lower the embedding table: token ids to rows."""

from collections.abc import Sequence

import numpy as np

from fastvlm_convert.exporters.coreml.graph import Graph, Lengths
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value
from fastvlm_convert.exporters.coreml.weights import dense_rows
from fastvlm_convert.io_names import INPUT_IDS, INPUTS_EMBEDS
from fastvlm_convert.quantized.weight import AnyWeight


def store_table(graph: Graph, table: AnyWeight) -> list[Value]:
    """The table, which a tied head shares, in the dtype in which the head computes; in parts if too long."""
    return dense_rows(graph, "embed_tokens_weight", table, graph.dtype("lm_head"))


def build_embed(graph: Graph, table: AnyWeight, chunk: int) -> None:
    """Add the look-up to a graph.

    Args:
        graph: An empty graph.
        table: The table, [rows, hidden].
        chunk: Tokens of a call at most.
    """
    ids = graph.input(INPUT_IDS, "int32", (1, FLEXIBLE), lengths=Lengths(1, chunk, is_range=True))
    parts = store_table(graph, table)
    if len(parts) == 1:
        graph.output(_look_up(graph, INPUTS_EMBEDS, parts[0], ids))
    else:
        graph.output(_look_up_in_parts(graph, parts, ids))


def _look_up(graph: Graph, name: str, table: Value, ids: Value) -> Value:
    return graph.plain_op("gather", name, x=table, indices=ids, axis=0, validate_indices=False)


def _look_up_in_parts(graph: Graph, parts: Sequence[Value], ids: Value) -> Value:
    """Every part's nearest row for every id; the last part that begins at or before an id has its own."""
    column = graph.plain_op("reshape", "id_column", x=ids, shape=[1, FLEXIBLE, 1])
    found, first = None, 0
    for i, part in enumerate(parts):
        is_last, most = i == len(parts) - 1, part.shape[0] - 1
        local = graph.plain_op("add", f"ids_from_{first}", x=ids, y=np.int32(-first))
        local = graph.plain_op("maximum", f"ids_not_below_{first}", x=local, y=np.int32(0))
        local = graph.plain_op("minimum", f"ids_within_{first}", x=local, y=np.int32(most))
        rows = _look_up(graph, f"rows_from_{first}", part, local)
        if found is None:
            found = rows
        else:
            is_there = graph.plain_op("less_equal", f"is_from_{first}", x=np.int32(first), y=column)
            name = INPUTS_EMBEDS if is_last else f"rows_up_to_{first + most}"
            found = graph.plain_op("select", name, cond=is_there, a=rows, b=found)
        first += part.shape[0]
    assert found is not None
    return found
