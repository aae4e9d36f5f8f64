"""Lower the embedding table: token ids to rows."""

from fastvlm_convert.exporters.coreml.graph import Graph, Lengths
from fastvlm_convert.exporters.coreml.values import FLEXIBLE, Value
from fastvlm_convert.exporters.coreml.weights import dense
from fastvlm_convert.io_names import INPUT_IDS, INPUTS_EMBEDS
from fastvlm_convert.quantized.weight import AnyWeight


def store_table(graph: Graph, table: AnyWeight) -> Value:
    """The table, which a tied head shares, in the dtype in which the head computes."""
    return dense(graph, "embed_tokens_weight", [table], graph.dtype("lm_head"))


def build_embed(graph: Graph, table: AnyWeight, chunk: int) -> None:
    """Add the look-up to a graph.

    Args:
        graph: An empty graph.
        table: The table, [rows, hidden].
        chunk: Tokens of a call at most.
    """
    ids = graph.input(INPUT_IDS, "int32", (1, FLEXIBLE), lengths=Lengths(1, chunk, is_range=True))
    matrix = store_table(graph, table)
    rows = graph.plain_op("gather", INPUTS_EMBEDS, x=matrix, indices=ids, axis=0, validate_indices=False)
    graph.output(rows)
