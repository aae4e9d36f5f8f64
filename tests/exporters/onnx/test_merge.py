"""The embedding that onnxruntime-genai runs, against embed_tokens and NumPy."""

import numpy as np
import onnxruntime
import pytest

from fastvlm_convert.manifest import load_manifest
from tests.bundles import external_regions, graph_path, load_graph
from tests.exporters.onnx.conftest import Variant


@pytest.fixture
def embed(variant: Variant):
    """Embeds ids by one of the two graphs: `embed(ids)` looks up, `embed(ids, features)` merges."""
    look_up, merge = (
        onnxruntime.InferenceSession(graph_path(variant.bundle, "embed", function))
        for function in ("main", "merge")
    )

    def run(ids, features=None):
        if features is None:
            return look_up.run(None, {"input_ids": ids})[0]
        return merge.run(None, {"input_ids": ids, "image_features": features})[0]

    return run


@pytest.fixture
def image(variant: Variant) -> int:
    return load_manifest(variant.bundle).contract.image_token_id


def some(count: int, like: np.ndarray) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, like.shape[-1])).astype(np.float32)


def test_features_take_the_places_of_the_image_token_in_order(embed, image):
    """Also where an image stands first or last, and where rows of a batch have different numbers of them."""
    ids = np.array([[image, 3, 4, image, image, 5], [6, image, 7, 8, 9, image]])
    rows = embed(ids)
    features = some(5, rows)
    expected = rows.copy()
    expected[ids == image] = features
    np.testing.assert_array_equal(embed(ids, features), expected)


def test_without_features_the_image_token_is_a_token(embed, image):
    """As after the prompt: a model may answer with it, and embed_tokens has a row for it."""
    ids = np.array([[image], [7]])
    rows = embed(ids)
    np.testing.assert_array_equal(embed(ids, some(0, rows)), rows)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_features_than_of_image_tokens_is_an_error(embed, image, count, capfd):
    ids = np.array([[3, image, image, 4]])
    with pytest.raises(Exception, match="ScatterND"):
        embed(ids, some(count, embed(ids)))
    capfd.readouterr()  # ONNX Runtime prints the error, too


def test_the_table_is_that_of_embed_tokens(variant: Variant):
    """The same regions of the same file: nothing is stored twice."""
    own, merged = (
        external_regions(load_graph(variant.bundle, "embed", function)) for function in ("main", "merge")
    )
    assert own == merged
    assert len(own) == 1
    manifest = load_manifest(variant.bundle)
    files = [manifest.artifact("onnx", "embed", function).files for function in ("main", "merge")]
    assert files[0][1] == files[1][1]
    small = manifest.files[files[1][0]].size
    assert small < 4000
