"""A checkpoint's Jinja chat template -> the prompt format that writes the same text.

The template is rendered as transformers does (`utils/chat_template_utils.py`) on small conversations; the
texts between known messages are the format. It is then held against the template on conversations of many
shapes, and a template that does more than a format can say is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.io_names import IMAGE_TOKEN
from fastvlm_convert.prompt import (
    Message,
    Picture,
    PromptFormat,
    Role,
    Text,
    conversation_pieces,
)

MAX_TEMPLATE_LENGTH: Final = 1 << 16
_MAX_FACTOR: Final = 1000

# What a template can make Python raise, by adding a text and a list, for example.
_PYTHON_ERRORS: Final = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

# Texts that no template holds, to find again in what it writes.
_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "SystemText0", "QuestionText1", "AnswerText2", "QuestionText3"
_PIXEL: Final = Image.new("RGB", (1, 1))
_PROBE_TEXTS: Final = ("What is this?", "  two  spaces\n\nand {{ braces }} \n", "<b>Grüße</b> 'quoted' \\n")


class TemplateError(Exception):
    """The template refuses a conversation, or fails on it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what its tokens are called.

    Attributes:
        source: Jinja.
        tokens: Special tokens that it may write, by name: `bos_token`, `eos_token`.
    """

    source: str
    tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        """What transformers' `apply_chat_template` gives.

        Raises:
            TemplateError: The template does not take this.
        """
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _date, "range": _range}
        try:
            template = environment.from_string(self.source)
            return template.render(
                messages=messages, add_generation_prompt=generation, tools=None, documents=None, **self.tokens
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise TemplateError(str(error)) from error
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise TemplateError(f"it is too deep: {error}") from error


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which by itself bounds neither the length of a text nor that of nested loops."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Multiply small numbers; templates have no use for more."""
        if not all(isinstance(x, int | float) and abs(x) <= _MAX_FACTOR for x in (left, right)):
            raise TemplateError("it multiplies texts or large numbers")
        if operator == "**":
            raise TemplateError("it raises to a power")
        return left * right


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > _MAX_FACTOR:
        raise TemplateError("it counts too far")
    return numbers


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _date(layout: str) -> NoReturn:
    raise TemplateError("it writes the current date, so the prompt would change from day to day")


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def prompt_format_of(template: ChatTemplate, where: object) -> PromptFormat:
    """The format that writes what a template writes.

    Args:
        template: The template.
        where: The file it stands in, for errors.

    Raises:
        CheckpointError: The template cannot be followed exactly; says why.
    """
    if len(template.source) > MAX_TEMPLATE_LENGTH:
        raise _unfollowed(f"it has {len(template.source)} characters", where)
    try:
        takes_parts = _takes_parts(template)
        found = _derived(template, takes_parts)
        _check(template, found, takes_parts)
    except TemplateError as error:
        raise _unfollowed(str(error), where) from error
    return found


def writes_as(template: ChatTemplate, form: PromptFormat) -> bool:
    """Whether a template writes what a format does; a template that fails does not."""
    try:
        return _derived(template, _takes_parts(template)) == form
    except TemplateError:
        return False


def _unfollowed(why: str, where: object) -> CheckpointError:
    return CheckpointError(
        f"the chat template cannot be followed exactly: {why[:300]}",
        where=where,
        hint="simplify the template; without one, FastVLM's own prompt is used",
    )


def _takes_parts(template: ChatTemplate) -> bool:
    """Whether the template takes content as a list of parts; else it takes text with `<image>` in it."""
    parts = [{"type": "image"}, {"type": "text", "text": _ASKED}]
    try:
        text = template.render([{"role": "user", "content": parts}], True)
    except TemplateError:
        return False
    return text.count(IMAGE_TOKEN) == 1 and text.count(_ASKED) == 1


def _derived(template: ChatTemplate, takes_parts: bool) -> PromptFormat:
    """Cut the texts around known messages out of small conversations."""

    def rendered(*messages: Message, generation: bool = False) -> str:
        return template.render([_as_transformers(m, takes_parts) for m in messages], generation)

    asked, again = Message("user", (_ASKED,)), Message("user", (_AGAIN,))
    answered, system = Message("assistant", (_ANSWERED,)), Message("system", (_SYSTEM,))
    first, user_after = _around(rendered(asked), _ASKED)
    generation = _without_head(rendered(asked, generation=True), rendered(asked))
    assistant_before, assistant_after = _around(
        _without_head(rendered(asked, answered), first + _ASKED + user_after), _ANSWERED
    )
    so_far = rendered(asked, answered)
    user_before, _ = _around(_without_head(rendered(asked, answered, again), so_far), _AGAIN)
    opening = _without_tail(first, user_before)
    try:
        before, rest = _around(rendered(system, asked), _SYSTEM)
        after = _without_tail(_around(rest, _ASKED)[0], user_before)
        system_texts = (before, after)
    except TemplateError:  # no system turn
        system_texts = None
    image, images_first = _image_text(template, first, user_after) if takes_parts else (None, False)
    return PromptFormat(
        opening=opening,
        system_before=None if system_texts is None else system_texts[0],
        system_after=None if system_texts is None else system_texts[1],
        user_before=user_before,
        user_after=user_after,
        assistant_before=assistant_before,
        assistant_after=assistant_after,
        generation=generation,
        image=f"{IMAGE_TOKEN}\n" if image is None else image,
        images_first=images_first,
    )


def _image_text(template: ChatTemplate, first: str, user_after: str) -> tuple[str, bool]:
    """What a picture becomes, and whether it moves ahead of the text."""
    picture, text = {"type": "image"}, {"type": "text", "text": _ASKED}

    def inside(parts: list[dict[str, str]]) -> str:
        shown = template.render([{"role": "user", "content": parts}], False)
        return _without_tail(_without_head(shown, first), user_after)

    image = _without_tail(inside([picture, text]), _ASKED)
    return image, inside([text, picture]) == image + _ASKED


def _around(text: str, message: str) -> tuple[str, str]:
    """What stands before and behind a message.

    Raises:
        TemplateError: The message is not there once.
    """
    if text.count(message) != 1:
        raise TemplateError("it leaves a message out, changes it, or writes it twice")
    before, _, after = text.partition(message)
    return before, after


def _without_head(text: str, head: str) -> str:
    if not text.startswith(head):
        raise TemplateError("what it writes of a message depends on the messages that follow")
    return text.removeprefix(head)


def _without_tail(text: str, tail: str) -> str:
    if not text.endswith(tail):
        raise TemplateError("it writes the first message in another way than later ones")
    return text.removesuffix(tail)


def _as_transformers(message: Message, takes_parts: bool) -> dict[str, Any]:
    """A message as `apply_chat_template` takes it; text goes as parts, too, where parts are taken."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in message.content
    ]
    if takes_parts:
        return {"role": message.role, "content": parts}
    return {
        "role": message.role,
        "content": "".join(p.get("text", f"{IMAGE_TOKEN}\n") for p in parts),
    }


def _conversations(takes_parts: bool) -> Iterator[list[Message]]:
    """Conversations of the shapes that people have."""
    picture = Picture(_PIXEL)
    pictures: tuple[tuple[Picture, ...], ...] = ((), (picture,), (picture, picture))
    for shown in pictures:
        for text in _PROBE_TEXTS:
            yield [Message("user", (*shown, text))]
            yield [Message("system", (text,)), Message("user", (*shown, text))]
    if takes_parts:
        yield [Message("user", (_PROBE_TEXTS[0], picture, _PROBE_TEXTS[1]))]
    roles: tuple[Role, ...] = ("user", "assistant") * 3
    turns = [Message(role, (_PROBE_TEXTS[n % 3],)) for n, role in enumerate((*roles, "user"))]
    yield turns
    yield [Message("system", ("Be brief.",)), *turns]
    yield [Message("user", (picture, "One?")), Message("assistant", ("Yes.",)), Message("user", ("Two?",))]


def _check(template: ChatTemplate, form: PromptFormat, takes_parts: bool) -> None:
    """See that a format writes conversations of many shapes as the template does.

    Raises:
        TemplateError: It does not.
    """
    for messages in _conversations(takes_parts):
        _compare(template, form, messages, takes_parts)


def _compare(template: ChatTemplate, form: PromptFormat, messages: list[Message], takes_parts: bool) -> None:
    """See that a format writes a conversation as the template does.

    Raises:
        TemplateError: It does not.
    """
    if messages[0].role == "system" and form.system_before is None:
        return
    pieces = conversation_pieces(messages, form)
    ours = "".join(piece.content if isinstance(piece, Text) else IMAGE_TOKEN for piece in pieces)
    theirs = template.render([_as_transformers(m, takes_parts) for m in messages], True)
    if ours != theirs:
        at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
        at = min(len(ours), len(theirs)) if at < 0 else at
        raise TemplateError(
            f"for the roles {', '.join(m.role for m in messages)} it writes {theirs[at : at + 40]!r} "
            f"where its other turns suggest {ours[at : at + 40]!r}"
        )
