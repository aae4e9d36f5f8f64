import json
import re

import pytest
from tokenizers import Tokenizer

from fastvlm_convert.checkpoint.tokenizer import read_tokenizer, tokenizer_json
from fastvlm_convert.errors import TokenizerError
from fastvlm_convert.prompt import QWEN_2, Text
from tests.checkpoints import HF, LLAVA, SETS, edit_json, golden_cases, golden_checkpoint

BEFORE = QWEN_2.opening + QWEN_2.user_before
AFTER = QWEN_2.user_after + QWEN_2.generation
TEXTS = [
    "What is this?",
    "  two  spaces and\ttabs\n\nlines\r\n",
    "I'm sure they'll've 12345 reasons; 3.14!",
    "Grüße, 你好, नमस्ते, 🎨 and e\u0301",
    "<|im_start|>user\nhello<|im_end|>",
    "",
]


def drop_from_vocab(folder, *tokens):
    """Take tokens out of Apple's vocabulary; ids close up, and merges that need them go too."""
    vocab = json.loads((folder / "vocab.json").read_text())
    kept = [t for t in sorted(vocab, key=vocab.get) if not any(x in t for x in tokens)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(kept)}))
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = [m for m in lines if not any(x in m for x in tokens)]
    (folder / "merges.txt").write_text("\n".join(merges))
    added = {t: len(kept) + i for i, t in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_ids_and_text_are_those_of_the_original(case):
    tokenizer = golden_checkpoint(case.name).tokenizer
    assert tokenizer.encode(BEFORE) == case.ids_before_image
    assert tokenizer.encode(f"\n{case.question}{AFTER}") == case.ids_after_image
    assert tokenizer.decode(case.greedy_token_ids) == case.greedy_text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_both_layouts_encode_alike_and_decode_back(text):
    apple, transformers = (golden_checkpoint(name).tokenizer for name in (LLAVA, HF))
    ids = apple.encode(text)
    assert ids == transformers.encode(text)
    plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "").replace("e\u0301", "\u00e9")
    assert apple.decode(ids) == plain  # NFC; special tokens are left out


def test_special_tokens():
    for name in SETS:
        tokenizer = golden_checkpoint(name).tokenizer
        assert (tokenizer.end_of_text_id, tokenizer.end_of_turn_id) == (429, 431)
        assert tokenizer.image_token_id == 432  # one more than the last; Apple's files have no such token
        assert tokenizer.num_tokens == 433
        assert tokenizer.largest_text_id == 431
        assert tokenizer.encode("<image>") == [432]
        assert tokenizer.decode([432, 429, 430, 431]) == ""


def test_the_files_it_came_from():
    apple, transformers = (golden_checkpoint(name).tokenizer for name in (LLAVA, HF))
    assert [p.name for p in apple.files] == [
        "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    ]  # fmt: skip
    assert [p.name for p in transformers.files] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", SETS)
def test_tokenizer_json_holds_the_same_tokenizer(name, tmp_path):
    original = golden_checkpoint(name).tokenizer
    content = tokenizer_json(original)
    assert content == tokenizer_json(read_tokenizer(golden_checkpoint(name).path))
    (tmp_path / "tokenizer.json").write_bytes(content)
    again = read_tokenizer(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for sample in TEXTS:
        assert again.encode(sample) == original.encode(sample)
        assert plain.encode(sample).ids == original.encode(sample)
    assert again.image_token_id == original.image_token_id
    assert tokenizer_json(again) == content


def test_tokenizer_json_depends_on_the_content_alone(llava):
    before = tokenizer_json(read_tokenizer(llava))
    vocab = json.loads((llava / "vocab.json").read_text())
    (llava / "vocab.json").write_text(json.dumps(dict(reversed(vocab.items())), indent=3))
    assert tokenizer_json(read_tokenizer(llava)) == before


def test_a_character_outside_the_alphabet_is_an_error(llava):
    drop_from_vocab(llava, "q", "\u00c3")  # the letter q, and the first byte of most accented letters
    tokenizer = read_tokenizer(llava)
    assert tokenizer.decode(tokenizer.encode("what is this?")) == "what is this?"
    for text, char in (("a quiz", "q"), ("caf\u00e9", "\u00e9")):
        with pytest.raises(TokenizerError, match=f"cannot express '{char}'"):
            tokenizer.encode(text)


def test_the_alphabet_is_that_of_normalized_text(llava):
    drop_from_vocab(llava, "\u00cc")  # first byte of a combining accent, which NFC composes away
    tokenizer = read_tokenizer(llava)
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "caf\u00e9"
    with pytest.raises(TokenizerError, match="cannot express"):
        tokenizer.encode("q\u0301")  # there is no such letter to compose


def test_special_tokens_that_a_user_types_are_text():
    tokenizer = golden_checkpoint(HF).tokenizer
    typed = "a <|im_end|> b <image>"
    ids = tokenizer.encode_texts([Text(typed)])
    assert tokenizer.decode(ids) == typed
    assert not {tokenizer.end_of_turn_id, tokenizer.image_token_id} & set(ids)
    around = [Text("<|im_start|>user\n", True), Text(typed), Text("<|im_end|>\n", True)]
    mixed = tokenizer.encode_texts(around)
    assert mixed.count(tokenizer.end_of_turn_id) == 1
    plain = Tokenizer.from_str(tokenizer.backend.to_str())
    plain.encode_special_tokens = True  # the library's own way to read them as text
    assert ids == plain.encode(typed).ids


def test_what_was_typed_joins_the_format_as_in_the_original():
    """The format's line break and a typed one become one token, as where all is encoded at once."""
    tokenizer = golden_checkpoint(HF).tokenizer
    plain = Tokenizer.from_str(tokenizer.backend.to_str())
    for typed in ("\n\nWhat?", "  What?", "What?\n\n", "e\u0301"):
        texts = [Text("<|im_start|>user\n", True), Text(typed), Text("<|im_end|>\n", True)]
        assert tokenizer.encode_texts(texts) == plain.encode(f"<|im_start|>user\n{typed}<|im_end|>\n").ids


def test_special_tokens_need_no_letters(llava):
    drop_from_vocab(llava, "|", "_", "<")
    tokenizer = read_tokenizer(llava)
    assert tokenizer.encode("<|im_start|>") == [tokenizer.end_of_turn_id - 1]
    with pytest.raises(TokenizerError, match=r"cannot express '\|'"):
        tokenizer.encode("a|b")


def test_an_added_token_that_is_not_special_is_shown(llava):
    edit_json(llava / "tokenizer_config.json", remove=["added_tokens_decoder"])
    edit_json(llava / "added_tokens.json", {"<tool>": 432})
    config = {"432": {"content": "<tool>", "special": False, "normalized": False}}
    edit_json(llava / "tokenizer_config.json", {"added_tokens_decoder": config})
    tokenizer = read_tokenizer(llava)
    ids = tokenizer.encode("<tool>hello<|im_end|>")
    assert ids[0] == 432
    assert tokenizer.decode(ids) == "<tool>hello"
    assert tokenizer.image_token_id == 433


def test_settings_of_somebodys_training_batches_are_dropped(hf):
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    (hf / "tokenizer.json").write_text(json.dumps(raw))
    text = "How many circles are there?"
    assert read_tokenizer(hf).encode(text) == golden_checkpoint(HF).tokenizer.encode(text)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def delete(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def without_token(token):
    def change(folder):
        edit_json(folder / "added_tokens.json", remove=[token])
        delete("tokenizer_config.json")(folder)

    return change


REFUSED = {
    "no merges": (delete("merges.txt"), "'merges.txt' is missing"),
    "no vocabulary": (delete("vocab.json"), "'vocab.json' is missing"),
    "no files at all": (delete("vocab.json", "merges.txt"), "'vocab.json' is missing"),
    "vocabulary is no JSON": (write("vocab.json", b"a b c"), "not valid JSON"),
    "vocabulary is a list": (write("vocab.json", b"[]"), "expected a JSON object"),
    "vocabulary of text": (write("vocab.json", b'{"a": "0"}'), "maps 'a' to '0'"),
    "negative id": (write("vocab.json", b'{"a": -1}'), "maps 'a' to -1"),
    "absurd id": (write("vocab.json", b'{"a": 1099511627776}'), "maps 'a' to 1099511627776"),
    "half a character": (write("vocab.json", b'{"\\ud800": 1}'), "must map tokens to ids"),
    "a merge of one": (
        write("merges.txt", b"#version: 0.2\nh\n"),
        "line 2 is no merge of two known tokens: 'h'",
    ),
    "a merge of three": (write("merges.txt", b"h e l\n"), "line 1 is no merge"),
    "a merge of unknown tokens": (write("merges.txt", b"h zzzz\n"), "line 1 is no merge"),
    "merges are not UTF-8": (write("merges.txt", b"\xff\xfe\n"), "cannot read"),
    "merges are a directory": (
        lambda f: (delete("merges.txt")(f), (f / "merges.txt").mkdir()),
        "cannot read: it is a folder, not a file",
    ),
    "merges are a link to nothing": (
        lambda f: (delete("merges.txt")(f), (f / "merges.txt").symlink_to("gone.txt")),
        "cannot read: it is a link to gone.txt, which is missing",
    ),
    "two tokens with one id": (
        lambda f: edit_json(f / "vocab.json", {"zz": 7}),
        "the tokens .* and 'zz' both have id 7",
    ),
    "two added tokens with one id": (
        lambda f: edit_json(
            f / "tokenizer_config.json",
            {"added_tokens_decoder": {"429": {"content": "<a>"}, "0429": {"content": "<b>"}}},
        ),
        "the tokens '<a>' and '<b>' both have id 429",
    ),
    "added id not next": (
        lambda f: (edit_json(f / "added_tokens.json", {"<x>": 500}), delete("tokenizer_config.json")(f)),
        "added token '<x>' should have id 500 but follows the vocabulary as 432",
    ),
    "added id as text": (write("added_tokens.json", b'{"<x>": "432"}'), "maps '<x>' to '432'"),
    "added half a character": (write("added_tokens.json", b'{"\\ud800": 432}'), "must map tokens to ids"),
    "malformed added_tokens_decoder": (
        write("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        "malformed added_tokens_decoder",
    ),
    "added token without content": (
        write("tokenizer_config.json", b'{"added_tokens_decoder": {"429": {}}}'),
        "malformed added_tokens_decoder",
    ),
    "tokenizer config is no JSON": (write("tokenizer_config.json", b"{"), "not valid JSON"),
    "no end of turn": (without_token("<|im_end|>"), r"the tokenizer has no '<\|im_end\|>'"),
    "tokenizer.json is no JSON": (write("tokenizer.json", b"{"), "not valid JSON"),
    "tokenizer.json is not UTF-8": (write("tokenizer.json", b"\xff"), "not valid JSON"),
    "tokenizer.json of nothing": (write("tokenizer.json", b"{}"), "not a tokenizer.json of byte-pair"),
    "tokenizer.json of words": (
        write("tokenizer.json", b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}'),
        "not a tokenizer.json of byte-pair",
    ),
    "tokenizer.json that makes the library panic": (
        write(
            "tokenizer.json",
            b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]],'
            b' "continuing_subword_prefix": "####"}}',
        ),
        "not a tokenizer.json of byte-pair",
    ),
    "tokenizer.json without its parts": (
        write("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        "not a tokenizer.json: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_files_are_refused(case, llava):
    damage, message = REFUSED[case]
    damage(llava)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_tokenizer(llava)
    assert str(llava) in str(caught.value)


def test_a_tokenizer_json_with_two_tokens_on_one_id_is_refused(hf):
    raw = json.loads((hf / "tokenizer.json").read_text())
    token = next(token for token, number in raw["model"]["vocab"].items() if number == 7)
    for change in (
        lambda value: value["model"]["vocab"].update(zz=7),
        lambda value: value["added_tokens"].append(value["added_tokens"][0] | {"id": 7, "content": "zz"}),
    ):
        changed = json.loads(json.dumps(raw))
        change(changed)
        (hf / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(TokenizerError, match=f"the tokens '{re.escape(token)}' and 'zz' both have id 7"):
            read_tokenizer(hf)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_files_as_windows_editors_write_them_are_read(encoding, llava):
    """With a byte-order mark, in UTF-16, with CRLF."""
    before = read_tokenizer(llava)
    for name in ("merges.txt", "vocab.json", "tokenizer_config.json", "added_tokens.json"):
        text = (llava / name).read_text(encoding="utf-8").replace("\n", "\r\n")
        mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
        (llava / name).write_bytes(mark + text.encode(encoding))
    after = read_tokenizer(llava)
    text = "<|im_start|>user\nHow many circles are there?<|im_end|>"
    assert after.encode(text) == before.encode(text)
    assert after.num_tokens == before.num_tokens
