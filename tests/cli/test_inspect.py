import json

import pytest
import torch

from tests.checkpoints import GOLDEN, HF, LLAVA, SHARDED, edit_json, edit_tensors, read_tensors, tree_state
from tests.cli.conftest import CHECKPOINT


def test_table(cli):
    result = cli("inspect", CHECKPOINT)
    assert (result.code, result.err) == (0, "")
    for fact in (
        "llava_qwen2",
        "256 pixels",
        "16",
        "vocab.json, merges.txt",
        "431, 429",
        "not found",
        "tied",
    ):
        assert fact in result.out
    assert "unused" in result.out


def test_document(cli):
    result = cli("inspect", CHECKPOINT, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["schema_version"], document["command"], document["status"]) == (1, "inspect", "passed")
    assert document["layout"] == "llava_qwen2"
    assert document["vision"]["image_size"] == 256
    assert document["vision"]["image_mode"] == "pad"
    assert document["vision"]["num_image_tokens"] == 16
    assert [s["depth"] for s in document["vision"]["stages"]] == [1, 1, 2, 1, 1]
    assert [s["width"] for s in document["vision"]["stages"]] == [8, 16, 32, 64, 128]
    decoder = document["decoder"]
    assert (decoder["hidden_size"], decoder["num_layers"], decoder["num_heads"]) == (64, 2, 4)
    assert (decoder["num_kv_heads"], decoder["head_dim"], decoder["tied"]) == (2, 16, True)
    assert decoder["kv_cache_bytes_per_token_float16"] == 2 * 2 * 2 * 2 * 16
    assert document["tokenizer"]["eos_token_ids"] == [431, 429]
    assert document["tokenizer"]["image_token_id"] == 432
    assert "vocab.json" in document["tokenizer"]["files"]
    assert document["license"] is None
    assert any("head.proj" in name for name in document["unused_tensors"])
    assert document["disagreements"] == []
    unused = set(document["unused_tensors"])
    tensors = read_tensors(CHECKPOINT)
    assert unused < set(tensors)
    used = sum(tensor.numel() for name, tensor in tensors.items() if name not in unused)
    assert sum(document["parameters"].values()) == used
    assert sum(document["stored_bytes"].values()) == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("name", "layout", "tokenizer", "dtype", "tied"),
    [
        (LLAVA, "llava_qwen2", "vocab.json", "float32", True),
        (HF, "fast_vlm", "tokenizer.json", "float32", True),
        (SHARDED, "llava_qwen2", "vocab.json", "bfloat16", False),
    ],
)
def test_both_layouts(cli, name, layout, tokenizer, dtype, tied):
    document = cli("inspect", GOLDEN / name / "checkpoint", "--json").document
    assert document["layout"] == layout
    assert tokenizer in document["tokenizer"]["files"]
    assert set(document["stored_bytes"]) == {dtype, "int64"}  # BatchNorm counts batches
    assert document["decoder"]["tied"] is tied


def test_what_contradicts_the_tensors_is_reported(cli, llava):
    edit_json(llava / "config.json", {"num_hidden_layers": 24, "tie_word_embeddings": False})
    document = cli("inspect", llava, "--json").document
    assert document["disagreements"] == [
        {"key": "num_hidden_layers", "config": 24, "tensors": 2},
        {"key": "tie_word_embeddings", "config": False, "tensors": True},
    ]
    shown = cli("inspect", llava).out
    assert "num_hidden_layers is 24, the tensors say 2" in shown


def test_unused_tensors_are_listed(cli, llava):
    edit_tensors(llava, {"model.odd.weight": torch.zeros(3)})
    assert "model.odd.weight" in cli("inspect", llava, "--json").document["unused_tensors"]


def test_the_license_is_named(cli, llava):
    (llava / "LICENSE").write_text("MIT")
    assert cli("inspect", llava, "--json").document["license"] == "LICENSE"
    assert "LICENSE" in cli("inspect", llava).out


def test_nothing_is_written(cli, llava):
    before = tree_state(llava)
    cli("inspect", llava)
    cli("inspect", llava, "--json")
    assert tree_state(llava) == before


def test_brackets_in_a_path_are_shown_as_they_are(cli, llava, tmp_path):
    moved = llava.rename(tmp_path / "my [bold]model[")
    assert "my [bold]model[" in cli("inspect", moved).out
    assert json.loads(cli("inspect", moved, "--json").out)["checkpoint"] == str(moved)


def test_a_config_of_no_numbers_is_still_valid_json(cli, llava):
    """Python's json module reads and writes NaN, which JSON does not have."""
    text = (llava / "config.json").read_text().replace("{", '{"head_dim": NaN, ', 1)
    (llava / "config.json").write_text(text.replace('"mm_hidden_size": 256', '"mm_hidden_size": 1e999'))
    result = cli("inspect", llava, "--json")
    assert result.code == 0

    def refuse(name):
        raise AssertionError(name)

    document = json.loads(result.out, parse_constant=refuse)
    assert {"key": "head_dim", "config": None, "tensors": 16} in document["disagreements"]
