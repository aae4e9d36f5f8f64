"""How a checkpoint writes conversations, and where that stands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.checkpoint.chat_template import ChatTemplate, prompt_format_of, writes_as
from fastvlm_convert.checkpoint.files import read_json, read_text
from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.prompt import QWEN_2, PromptFormat
from fastvlm_convert.regular_file import is_there

_JINJA, _JSON, _CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
_APPLE: Final = "built into Apple's code (qwen_2)"


@dataclass(frozen=True)
class PromptSettings:
    """How the original code writes a conversation.

    Attributes:
        format: The texts around its turns.
        origin: Where that was found.
        notes: What the checkpoint says and this tool does otherwise.
    """

    format: PromptFormat
    origin: str
    notes: tuple[str, ...] = ()


def prompt_settings(layout: Layout, path: Path) -> PromptSettings:
    """The prompt format of a checkpoint.

    Apple's code has it built in and reads no template; where the files hold one that writes something else,
    that is said.

    Raises:
        CheckpointError: The chat template is malformed or cannot be followed exactly.
    """
    found = _find_template(path)
    if found is None:
        return PromptSettings(QWEN_2, _APPLE)
    template, file = found
    if layout == "fast_vlm":
        return PromptSettings(prompt_format_of(template, path / file), file)
    if writes_as(template, QWEN_2):
        return PromptSettings(QWEN_2, _APPLE)
    note = f"the chat template in {file} is not used: Apple's code never reads it and has qwen_2 built in"
    return PromptSettings(QWEN_2, _APPLE, (note,))


def _find_template(path: Path) -> tuple[ChatTemplate, str] | None:
    """The chat template and the file it stands in, in the order in which transformers looks."""
    config = read_json(path / _CONFIG) if is_there(path / _CONFIG) else {}
    tokens = {key: _token(value) for key, value in config.items() if key.endswith("_token")}
    known = {key: token for key, token in tokens.items() if token is not None}
    if is_there(path / _JINJA):
        return ChatTemplate(read_text(path / _JINJA), known), _JINJA
    for file, values in ((_JSON, None), (_CONFIG, config)):
        if values is None:
            values = read_json(path / file) if is_there(path / file) else {}
        source = values.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source = named.get("default")
        if source is None:
            continue
        if not isinstance(source, str):
            raise CheckpointError("chat_template is not a text", where=path / file)
        return ChatTemplate(source, known), file
    return None


def _token(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
