"""Read a conversation from a file, in the form that transformers' chat templates take."""

from pathlib import Path
from typing import Any, Final

from fastvlm_convert.errors import PromptError
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import ROLES, Message, Picture, check_roles

MAX_MESSAGES: Final = 1000

_EXAMPLE: Final = (
    '[{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, '
    '{"type": "text", "text": "What is it?"}]}]'
)


def read_messages(path: Path) -> list[Message]:
    """A conversation that ends with a user.

    The file holds a list of objects with `role` (system, user or assistant) and `content`: a text, or a list
    of parts `{"type": "text", "text": ...}` and `{"type": "image", "image": FILE}`. Pictures are named
    relative to the file.

    Raises:
        PromptError: The file is missing or malformed, or the roles are out of order.
        ImageError: A picture cannot be read.
    """
    value = _read(path)
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise PromptError(
            f"expected a list of at most {MAX_MESSAGES} messages", where=path, hint=f"for example {_EXAMPLE}"
        )
    messages = [_message(entry, number + 1, path) for number, entry in enumerate(value)]
    check_roles(messages)
    return messages


def _read(path: Path) -> Any:  # noqa: ANN401
    try:
        return read_json_file(path)
    except FileNotFoundError as error:
        raise PromptError("there is no such file of messages", where=path, hint="check the path") from error
    except OSError as error:
        raise PromptError(f"cannot read: {error.strerror}", where=path, hint="give a JSON file") from error
    except ValueError as error:
        raise PromptError(f"not valid JSON: {error}", where=path, hint=f"for example {_EXAMPLE}") from error


def _message(entry: object, number: int, path: Path) -> Message:
    if not isinstance(entry, dict) or set(entry) != {"role", "content"} or entry["role"] not in ROLES:
        raise PromptError(
            f"message {number}: expected an object with 'role' ({', '.join(ROLES)}) and 'content'",
            where=path,
            hint=f"for example {_EXAMPLE}",
        )
    content = entry["content"]
    if isinstance(content, str):
        return Message(entry["role"], (content,))
    if not isinstance(content, list) or not content:
        raise _bad_content(number, path)
    return Message(entry["role"], tuple(_part(part, number, path) for part in content))


def _part(part: object, number: int, path: Path) -> str | Picture:
    if isinstance(part, dict):
        match part.get("type"), part.get("text"), part.get("image"):
            case "text", str(text), None:
                return text
            case "image", None, str(file):
                return Picture(load_image(path.parent / file))
    raise _bad_content(number, path)


def _bad_content(number: int, path: Path) -> PromptError:
    return PromptError(
        f"message {number}: content is a text, or a list of parts of type text (with 'text') and image (with "
        "'image', a file)",
        where=path,
        hint=f"for example {_EXAMPLE}",
    )
