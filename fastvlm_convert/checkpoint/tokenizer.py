"""The tokenizer a checkpoint brings, as one `tokenizers.Tokenizer` whatever files it comes in."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fastvlm_convert.checkpoint.files import read_json
from fastvlm_convert.errors import TokenizerError, shown
from fastvlm_convert.io_names import IMAGE_TOKEN
from fastvlm_convert.prompt import Text
from fastvlm_convert.regular_file import MAX_TEXT_BYTES, is_there, read_text
from fastvlm_convert.weights.file_tensors import AGAIN

# Qwen2's split of text before byte-pair encoding (transformers, models/qwen2/tokenization_qwen2.py).
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TURN, _END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
_MAX_ID = 1 << 24
_TOKENIZER = "tokenizer.json"
_APPLE_FILES = ("vocab.json", "merges.txt")
_OPTIONAL_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class TextTokenizer:
    """Encodes and decodes text, and knows the tokens that a prompt needs.

    Attributes:
        backend: The tokenizer itself, with `<image>` as a special token.
        files: The files it was read from.
        image_token_id: Id of `<image>`. It is a placeholder: no embedding of it is ever used.
        end_of_turn_id: Id of `<|im_end|>`.
        end_of_text_id: Id of `<|endoftext|>`.
    """

    backend: Tokenizer
    files: tuple[Path, ...]
    image_token_id: int
    end_of_turn_id: int
    end_of_text_id: int
    _byte_level: Any = field(
        default_factory=lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        repr=False,
    )

    @cached_property
    def _vocabulary(self) -> set[str]:
        return set(self.backend.get_vocab())

    @cached_property
    def _special(self) -> dict[str, AddedToken]:
        """Tokens that only a prompt's format may write, by what they look like."""
        added = self.backend.get_added_tokens_decoder().values()
        return {token.content: token for token in added if token.special}

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added if token.special}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _taken_whole(self) -> re.Pattern[str] | None:
        """Added tokens of ordinary text, which is not split into bytes there."""
        added = self.backend.get_added_tokens_decoder().values()
        plain = [re.escape(token.content) for token in added if not token.special]
        return re.compile("|".join(plain)) if plain else None

    @property
    def num_tokens(self) -> int:
        """Ids in use, `<image>` included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def largest_text_id(self) -> int:
        """The largest id that text is encoded with, the placeholder `<image>` aside."""
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return max(i for i in ids if i != self.image_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of the prompt's format: special tokens in it are tokens.

        Raises:
            TokenizerError: The vocabulary lacks a byte of the text (byte-pair encoding would drop it), or it
                is no text.
        """
        return self.encode_texts([Text(text, is_format=True)])

    def encode_texts(self, texts: Sequence[Text]) -> list[int]:
        """Token ids of texts that stand side by side; nothing is added before or after.

        Where no special token stands between, byte-pair encoding joins what the format wrote and what a
        user typed, as it does in the original code. A special token that a user typed is ordinary text.

        Raises:
            TokenizerError: The vocabulary lacks a byte of a text (byte-pair encoding would drop it), or it is
                no text.
        """
        ids: list[int] = []
        run = ""
        strips = False  # whether the special token before the run takes the space behind it
        for text in texts:
            pieces = self._special_pattern.split(text.content) if text.is_format else [text.content]
            for piece in pieces:
                token = self._special.get(piece) if text.is_format else None
                if token is None:
                    run += piece
                    continue
                ids += self._encode_run(run.rstrip() if token.lstrip else run, strips)
                ids.append(self._special_ids[piece])
                run, strips = "", token.rstrip
        return ids + self._encode_run(run, strips)

    def _encode_run(self, run: str, strips: bool) -> list[int]:
        """Ids of text between special tokens."""
        run = run.lstrip() if strips else run
        if not run:
            return []
        if not _is_text(run):
            hint = "is it in the encoding that your terminal says?"
            raise TokenizerError("the text holds half of a character", where=self.files[0].parent, hint=hint)
        plain = run if self._taken_whole is None else self._taken_whole.sub("", run)
        if self.backend.normalizer is not None:
            plain = self.backend.normalizer.normalize_str(plain)
        for char in dict.fromkeys(plain):
            symbols = "".join(s for s, _ in self._byte_level.pre_tokenize_str(char))
            if not set(symbols) <= self._vocabulary:
                raise TokenizerError(
                    f"the tokenizer cannot express {char!r}",
                    where=self.files[0].parent,
                    hint="this checkpoint was trained on a smaller alphabet; rephrase the question",
                )
        return list(self.backend.encode(run, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens; ids beyond the vocabulary decode to nothing."""
        return str(self.backend.decode(ids, skip_special_tokens=True))


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds the files that `read_tokenizer` needs."""
    return is_there(path / _TOKENIZER) or all(is_there(path / name) for name in _APPLE_FILES)


def read_tokenizer(path: Path) -> TextTokenizer:
    """Read the tokenizer of a checkpoint or a bundle.

    Args:
        path: Folder with `tokenizer.json`, or with Apple's `vocab.json` and `merges.txt`.

    Raises:
        TokenizerError: Files are missing or damaged, or a token of the prompt format is absent.
    """
    if is_there(path / _TOKENIZER):
        names = [_TOKENIZER]
        backend = _from_tokenizer_json(path / _TOKENIZER)
    else:
        names = list(_APPLE_FILES)
        backend = _from_vocab_and_merges(path)
    names += [name for name in _OPTIONAL_FILES if is_there(path / name)]
    if backend.token_to_id(IMAGE_TOKEN) is None:  # Apple's checkpoints have no such token
        backend.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    backend.encode_special_tokens = True  # `encode_texts` finds those of the format itself
    return TextTokenizer(
        backend=backend,
        files=tuple(path / name for name in names),
        image_token_id=_required(backend, IMAGE_TOKEN, path),
        end_of_turn_id=_required(backend, _END_OF_TURN, path),
        end_of_text_id=_required(backend, _END_OF_TEXT, path),
    )


def _required(backend: Tokenizer, token: str, path: Path) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise TokenizerError(f"the tokenizer has no '{token}'", where=path)
    return int(token_id)


def _from_tokenizer_json(path: Path) -> Tokenizer:
    raw = read_json(path, TokenizerError, MAX_TEXT_BYTES)
    model = raw.get("model")
    # A prefix of subwords is WordPiece's; the library may panic on one.
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("continuing_subword_prefix"):
        raise TokenizerError("not a tokenizer.json of byte-pair encoding", where=path)
    _check_apart(_stated_ids(raw), path)
    try:
        backend = Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise TokenizerError(f"not a tokenizer.json: {error}", where=path) from error
    backend.no_truncation()  # settings of somebody's training batches, not of the model
    backend.no_padding()
    return backend


def _stated_ids(raw: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens and ids of a tokenizer.json; what is malformed is left to the library."""
    vocab = raw["model"].get("vocab")
    if isinstance(vocab, dict):
        yield from ((token, n) for token, n in vocab.items() if type(n) is int)
    added = raw.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        match entry:
            case {"content": str(token), "id": int(token_id)}:
                yield token, token_id


def _from_vocab_and_merges(path: Path) -> Tokenizer:
    for name in _APPLE_FILES:
        if not is_there(path / name):
            raise TokenizerError(
                f"'{name}' is missing",
                where=path,
                hint="a checkpoint needs tokenizer.json, or vocab.json and merges.txt",
            )
    vocab = _ids(read_json(path / "vocab.json", TokenizerError, MAX_TEXT_BYTES), path / "vocab.json")
    merges = _read_merges(path / "merges.txt", vocab)
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=False))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for token_id, token in sorted(_added_tokens(path).items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"added token '{token.content}' should have id {token_id} but follows the vocabulary as "
                f"{backend.token_to_id(token.content)}",
                where=path,
            )
    return backend


def _ids(values: dict[str, Any], path: Path) -> dict[str, int]:
    """Check that a file maps tokens to ids.

    Raises:
        TokenizerError: A token is no text or its id no small number.
    """
    for token, token_id in values.items():
        if type(token_id) is not int or not 0 <= token_id < _MAX_ID or not _is_text(token):
            raise TokenizerError(
                f"it must map tokens to ids, but maps {shown(token)} to {shown(token_id)}", where=path
            )
    _check_apart(values.items(), path)
    return values


def _check_apart(tokens: Iterable[tuple[str, int]], path: Path) -> None:
    """See that no two tokens have one id: one of them could never be said.

    Raises:
        TokenizerError: Two have.
    """
    seen: dict[int, str] = {}
    for token, token_id in tokens:
        if seen.setdefault(token_id, token) != token:
            raise TokenizerError(
                f"the tokens {shown(seen[token_id])} and {shown(token)} both have id {token_id}",
                where=path,
                hint="download the tokenizer again, or save it with the tokenizers library",
            )


def _is_text(token: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in token)  # JSON can hold half a character


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise TokenizerError(f"cannot read: {error.strerror}", where=path, hint=AGAIN) from error
    except ValueError as error:
        raise TokenizerError(f"cannot read: {error}", where=path, hint=AGAIN) from error
    merges = []
    for number, line in enumerate((line.rstrip("\r") for line in lines), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or any(p not in vocab for p in (*parts, "".join(parts))):
            raise TokenizerError(f"line {number} is no merge of two known tokens: {shown(line)}", where=path)
        merges.append((parts[0], parts[1]))
    return merges


def _added_tokens(path: Path) -> dict[int, AddedToken]:
    """Tokens beyond the vocabulary: `added_tokens_decoder` says more than `added_tokens.json`, so it wins."""
    tokens: dict[int, AddedToken] = {}
    if is_there(path / "added_tokens.json"):
        added = read_json(path / "added_tokens.json", TokenizerError)
        for content, token_id in _ids(added, path / "added_tokens.json").items():
            tokens[token_id] = AddedToken(content, special=True, normalized=False)
    config_path = path / "tokenizer_config.json"
    if is_there(config_path):
        decoder = read_json(config_path, TokenizerError).get("added_tokens_decoder", {})
        try:
            _check_apart(((entry["content"], int(n)) for n, entry in decoder.items()), config_path)
            for token_id, entry in decoder.items():
                flags = {k: entry[k] for k in ("lstrip", "rstrip", "single_word", "normalized") if k in entry}
                tokens[int(token_id)] = AddedToken(
                    entry["content"], special=bool(entry.get("special", True)), **flags
                )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError("malformed added_tokens_decoder", where=config_path) from error
    return tokens


def tokenizer_json(tokenizer: TextTokenizer) -> bytes:
    """The content of a `tokenizer.json`; equal tokenizers give equal bytes."""
    content = BytesIO()
    encoder = json.JSONEncoder(ensure_ascii=False, indent=1)
    with TextIOWrapper(content, encoding="utf-8", newline="\n") as file:
        file.writelines(encoder.iterencode(json.loads(tokenizer.backend.to_str())))  # not a million strings
        file.write("\n")
        file.flush()
        return content.getvalue()
