"""Lower the embedding that onnxruntime-genai runs: look ids up, then put image features in their places."""

import numpy as np

from fastvlm_convert.exporters.onnx.embed import Table, look_up
from fastvlm_convert.exporters.onnx.graph import Graph
from fastvlm_convert.io_names import (
    BATCH,
    IMAGE_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    NUM_IMAGE_TOKENS,
    SEQUENCE,
)


def build_merge(graph: Graph, table: Table, shape: tuple[int, int], image_token_id: int) -> None:
    """Add look-up and merge to a graph.

    The features replace the rows of `<image>` in order, and there must be as many of one as of the other.
    Without any, as after the prompt, `<image>` is a token like the others: a model may answer with it.

    Args:
        graph: An empty graph.
        table: Where the table lies.
        shape: Its rows and its width, the decoder's hidden size.
        image_token_id: Id of `<image>`.
    """
    width = shape[1]
    ids = graph.input(INPUT_IDS, "int64", [BATCH, SEQUENCE])
    features = graph.input(IMAGE_FEATURES, "float32", [NUM_IMAGE_TOKENS, width])
    graph.output(INPUTS_EMBEDS, "float32", [BATCH, SEQUENCE, width])
    text = look_up(graph, "text_embeds", ids, table, shape)
    token = graph.constant("image_token_id", np.array(image_token_id, np.int64))
    is_image = graph.op("Equal", "is_image", [ids, token])
    count = graph.op("Shape", "num_features", [features], start=0, end=1)
    has_features = graph.cast(count, "bool", "has_features")
    is_replaced = graph.op("And", "is_replaced", [is_image, has_features])
    places = graph.op(
        "Transpose", "places", [graph.op("NonZero", "places_by_axis", [is_replaced])], perm=[1, 0]
    )
    graph.op("ScatterND", INPUTS_EMBEDS, [text, places, features])
