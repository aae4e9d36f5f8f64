import json
from pathlib import Path

import jinja2.sandbox
import numpy as np
import pytest
from tokenizers import Tokenizer

from fastvlm_convert.bundle.folder import new_folder
from fastvlm_convert.errors import OutputError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export
from fastvlm_convert.prompt import QWEN_2
from tests.bundles import FP16, export_bundle, recipe
from tests.checkpoints import GOLDEN, HF, LLAVA, edit_json, golden_cases, tree_state

CASES = [case for case in golden_cases() if case.name in (LLAVA, HF)]
PROMPTS = {
    name: [case["prompt"] for case in json.loads((GOLDEN / name / "golden.json").read_text())["cases"]]
    for name in (LLAVA, HF)
}


def read(bundle: Path, name: str):
    return json.loads((bundle / name).read_text())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, fp32_bundle):
    hf = export_bundle(GOLDEN / HF / "checkpoint", tmp_path_factory.mktemp("hf") / "bundle")
    return {LLAVA: fp32_bundle, HF: hf}


class TestConfig:
    """What transformers.js and Apple's app need of config.json."""

    def test_it_is_apples_flat_form(self, bundles):
        for bundle in bundles.values():  # also for the checkpoint in transformers' nested form
            config = read(bundle, "config.json")
            config.pop("transformers.js_config")
            assert config == {
                "architectures": ["LlavaQwen2ForCausalLM"],
                "model_type": "llava_qwen2",
                "hidden_act": "silu",
                "hidden_size": 64,
                "intermediate_size": 176,
                "max_position_embeddings": 2048,
                "mm_hidden_size": 256,
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_tower": "mobileclip_l_256",
                "image_aspect_ratio": "pad",
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
                "tie_word_embeddings": True,
                "vocab_size": 512,
                "bos_token_id": 429,
                "eos_token_id": [431, 429],
                "pad_token_id": 429,
                "image_token_index": 432,
            }

    def test_transformers_js_is_told_the_precision_of_every_graph(self, fp32_bundle, fp16_bundle):
        stems = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        settings = read(fp32_bundle, "config.json")["transformers.js_config"]
        assert settings["dtype"] == dict.fromkeys(stems, "fp32")
        assert settings["kv_cache_dtype"] == {"fp32": "float32"}
        settings = read(fp16_bundle, "config.json")["transformers.js_config"]
        assert settings["dtype"] == dict.fromkeys(stems, "fp16")
        assert settings["kv_cache_dtype"] == {"fp16": "float16"}

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("name", ["fp32", "fp16"])
    def test_exactly_the_data_files_that_exist_are_declared(self, tmp_path, name, shared):
        settings = recipe(name, onnx={"shared_table": shared})
        bundle = export_bundle(GOLDEN / LLAVA / "checkpoint", tmp_path / "bundle", settings)
        declared = read(bundle, "config.json")["transformers.js_config"]["use_external_data_format"]
        there = {p.name.removesuffix("_data") for p in (bundle / "onnx").glob("*.onnx_data")}
        assert declared == dict.fromkeys(there, 1)
        assert len(there) == (2 if shared else 3)

    def test_it_says_what_was_exported_rather_than_what_the_checkpoint_says(self, llava, tmp_path):
        edit_json(llava / "config.json", {"tie_word_embeddings": False, "vocab_size": 999})
        settings = recipe(common={"image_size": 320, "image_mode": "crop"})
        config = read(export_bundle(llava, tmp_path / "bundle", settings), "config.json")
        assert config["tie_word_embeddings"] is True
        assert config["vocab_size"] == 512
        assert config["mm_vision_tower"] == "mobileclip_l_320"
        assert config["image_aspect_ratio"] == "square"


def test_generation_is_greedy_whatever_the_checkpoint_says(bundles):
    """The checkpoint's own would make clients sample, with a repetition penalty."""
    assert read(GOLDEN / LLAVA / "checkpoint", "generation_config.json")["do_sample"] is True
    for bundle in bundles.values():
        assert read(bundle, "generation_config.json") == {
            "do_sample": False,
            "max_new_tokens": 256,
            "eos_token_id": [431, 429],
            "pad_token_id": 429,
        }


class TestPreprocessing:
    def test_padding_is_spelled_so_that_every_client_pads(self, fp32_bundle):
        config = read(fp32_bundle, "preprocessor_config.json")
        assert config["processor_class"] == "LlavaProcessor"
        assert config["image_processor_type"] == "CLIPImageProcessor"
        assert config["size"] == {"shortest_edge": 256, "longest_edge": 256}
        assert config["crop_size"] == {"height": 256, "width": 256}
        assert config["resample"] == 1
        assert all(config[key] is True for key in ("do_resize", "do_center_crop", "do_rescale"))
        assert config["rescale_factor"] == 1 / 255
        assert (config["image_mean"], config["image_std"]) == ([0.0] * 3, [1.0] * 3)

    def test_cropping_is_transformers_own(self, tmp_path):
        settings = recipe(common={"image_mode": "crop", "image_size": 320})
        bundle = export_bundle(GOLDEN / LLAVA / "checkpoint", tmp_path / "bundle", settings)
        config = read(bundle, "preprocessor_config.json")
        assert config["size"] == {"shortest_edge": 320}
        assert config["crop_size"] == {"height": 320, "width": 320}
        assert config["resample"] == 3
        assert load_manifest(bundle).contract.image_mode == "crop"

    def test_the_processor_counts_one_token_a_patch(self, fp32_bundle):
        config = read(fp32_bundle, "processor_config.json")
        assert config["processor_class"] == "LlavaProcessor"
        assert config["image_token"] == "<image>"
        assert (config["patch_size"], config["num_additional_image_tokens"]) == (64, 0)


def rendered(bundle: Path, messages: list[dict], generate: bool = True) -> str:
    """The chat template as transformers renders it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(read(bundle, "tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, add_generation_prompt=generate)


class TestPrompt:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_template_gives_the_golden_prompt_for_text(self, bundles, case):
        content = f"<image>\n{case.question}"
        prompt = rendered(bundles[case.name], [{"role": "user", "content": content}])
        assert prompt == PROMPTS[case.name][case.index]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_template_gives_the_golden_prompt_for_parts(self, bundles, case):
        content = [{"type": "image"}, {"type": "text", "text": case.question}]
        prompt = rendered(bundles[case.name], [{"role": "user", "content": content}])
        assert prompt == PROMPTS[case.name][case.index]

    def test_template_takes_several_turns_and_a_system_message(self, fp32_bundle):
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What?"},
        ]
        assert rendered(fp32_bundle, turns, generate=False) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract_states_the_golden_prompt(self, bundles, case):
        contract = load_manifest(bundles[case.name]).contract
        assert contract.prompt == QWEN_2.single_turn
        assert contract.prompt.format(question=case.question) == PROMPTS[case.name][case.index]


class TestTokenizer:
    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("special", [True, False])
    def test_the_whole_prompt_gives_the_golden_ids(self, bundles, case, special):
        """As clients do it: the prompt as one string, `<image>` in it."""
        tokenizer = Tokenizer.from_file(str(bundles[case.name] / "tokenizer.json"))
        prompt = PROMPTS[case.name][case.index]
        ids = tokenizer.encode(prompt, add_special_tokens=special).ids
        assert ids == [*case.ids_before_image, 432, *case.ids_after_image]
        assert tokenizer.decode(case.greedy_token_ids) == case.greedy_text

    def test_both_files_agree_on_the_added_tokens(self, bundles):
        for bundle in bundles.values():
            added = read(bundle, "tokenizer.json")["added_tokens"]
            config = read(bundle, "tokenizer_config.json")
            assert {t["content"]: t["id"] for t in added} == {
                "<|endoftext|>": 429, "<|im_start|>": 430, "<|im_end|>": 431, "<image>": 432,
            }  # fmt: skip
            assert all(t["special"] for t in added)
            assert config["added_tokens_decoder"] == {
                str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in added
            }
            assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
            assert config["tokenizer_class"] == "Qwen2Tokenizer"
            assert config["model_max_length"] == 2048
            assert config["split_special_tokens"] is False


class TestLicense:
    APPLE = "Apple Machine Learning Research Model License Agreement\n\nDisclaimer: ...\n"

    def test_it_is_copied_with_a_notice_of_what_was_changed(self, llava, tmp_path):
        (llava / "LICENSE_MODEL").write_text(self.APPLE)
        result = export(llava, tmp_path / "bundle", recipe=recipe(FP16), targets=["onnx"])
        assert result.manifest.source.license == "LICENSE_MODEL"
        assert (result.bundle / "LICENSE_MODEL").read_text() == self.APPLE
        notice = (result.bundle / "NOTICE").read_text()
        assert notice.startswith("Apple Machine Learning Research Model is licensed under the Apple Machine ")
        assert "its license is in LICENSE_MODEL" in notice
        assert "float16 (image encoder, projector), float16 (embedding) and float16 (decoder)" in notice
        assert "recipe 'fp16'" in notice
        assert {"LICENSE_MODEL", "NOTICE"} <= set(result.manifest.files)
        assert not any("license" in warning for warning in result.warnings)

    def test_another_license_gets_no_line_of_apples(self, llava, tmp_path):
        (llava / "LICENSE").write_text("MIT License\n")
        bundle = export_bundle(llava, tmp_path / "bundle")
        assert (bundle / "LICENSE").read_text() == "MIT License\n"
        assert "Apple" not in (bundle / "NOTICE").read_text()

    def test_without_one_there_is_a_warning(self, llava, tmp_path):
        result = export(llava, tmp_path / "bundle", recipe=recipe(), targets=["onnx"])
        assert result.manifest.source.license == "not_found"
        assert any("has no license file" in warning for warning in result.warnings)
        assert not (result.bundle / "NOTICE").exists()


class TestNewFolder:
    def write(self, output: Path, error: type[BaseException] | None, meanwhile: Path | None = None) -> None:
        with new_folder(output, False, []) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "a").write_text("1")
            if meanwhile is not None:
                meanwhile.parent.mkdir()
                meanwhile.write_text("theirs")
            if error is not None:
                raise error

    def test_it_appears_whole(self, tmp_path):
        output = tmp_path / "new" / "deep" / "bundle"
        with new_folder(output, False, []) as folder:
            (folder / "a").write_text("1")
            assert not output.exists()
            assert folder.parent == output.parent
            assert folder.name.endswith(".partial")
        assert tree_state(tmp_path).keys() == {"new/deep/bundle/a"}
        assert output.stat().st_mode & 0o777 == 0o755

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_nothing_is_left_after_an_error(self, tmp_path, error):
        output = tmp_path / "new" / "deep" / "bundle"
        with pytest.raises(error):
            self.write(output, error)
        assert list(tmp_path.iterdir()) == []

    def test_parents_that_were_there_stay(self, tmp_path):
        (tmp_path / "kept").mkdir()
        with pytest.raises(ValueError, match="x"), new_folder(tmp_path / "kept" / "b", False, []):
            raise ValueError("x")
        assert [p.name for p in tmp_path.iterdir()] == ["kept"]

    def test_a_full_disk_is_an_error_for_the_user(self, tmp_path):
        with (
            pytest.raises(OutputError, match="cannot write: No space left on device"),
            new_folder(tmp_path / "bundle", False, []),
        ):
            raise OSError(28, "No space left on device")
        assert list(tmp_path.iterdir()) == []

    def test_an_output_that_appears_meanwhile_is_not_replaced(self, tmp_path):
        output = tmp_path / "bundle"
        with pytest.raises(OutputError, match="another run has made the output meanwhile; nothing was repl"):
            self.write(output, None, meanwhile=output / "b")
        assert tree_state(tmp_path).keys() == {"bundle/b"}

    def test_the_old_one_returns_when_the_new_one_cannot_take_its_place(
        self, tmp_path, fp32_bundle, monkeypatch
    ):
        output = export_bundle(GOLDEN / LLAVA / "checkpoint", tmp_path / "bundle")
        before = tree_state(output)
        rename = Path.rename

        def fail(self, target):
            if self.name.endswith(".partial"):
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OutputError, match="Input/output error"), new_folder(output, True, []):
            pass
        assert tree_state(output) == before
        assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_image_tokens_of_the_contract(bundles):
    contract = load_manifest(bundles[LLAVA]).contract
    assert (contract.image_size, contract.num_image_tokens, contract.image_token_id) == (256, 16, 432)
    assert np.sqrt(contract.num_image_tokens) * 64 == contract.image_size
