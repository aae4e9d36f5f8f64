import numpy as np
import pytest

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import BundleError
from tests.bundles import load_graph, open_bundle
from tests.exporters.onnx.conftest import Variant


def test_every_id_gives_its_row(variant: Variant):
    table = open_checkpoint(variant.checkpoint).weights["decoder.embed_tokens.weight"].array()
    stored = table.astype(variant.settings.embed.storage).astype(np.float32)
    found = open_bundle(variant.bundle).session.embed(np.arange(len(table)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored)


def test_a_table_cut_to_the_tokenizer_has_a_row_for_the_image_token(variants):
    """Clients look `<image>` up before they overwrite its rows; ONNX Runtime fails on a missing one."""
    bundle = variants("cut").bundle
    loaded = open_bundle(bundle)
    assert loaded.tokenizer.image_token_id == 432
    np.testing.assert_array_equal(loaded.session.embed(np.array([432])), np.zeros((1, 64), np.float32))
    rows = {t.name: list(t.dims) for t in load_graph(bundle, "embed").graph.initializer}
    assert rows["embed_tokens_weight"] == [433, 64]
    head = {t.name: list(t.dims) for t in load_graph(bundle, "decoder").graph.initializer}
    assert head["lm_head_weight"] == [432, 64]  # the table is padded, the head is not
    with pytest.raises(BundleError):
        loaded.session.embed(np.array([433]))
