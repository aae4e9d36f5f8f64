"""Conversations -> token ids, in the format a model was trained on.

A format is data: the texts around each turn. It is known for Apple's layout (ml-fastvlm
`llava/conversation.py`, `qwen_2`) and derived from the chat template of others (`checkpoint.chat_template`),
so that neither a bundle nor an app needs a template engine.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Literal, Protocol

import numpy as np
from PIL import Image

from fastvlm_convert.errors import PromptError
from fastvlm_convert.io_names import IMAGE_TOKEN, SYSTEM_PROMPT
from fastvlm_convert.preprocess import ImageSettings, pixel_values

Role = Literal["system", "user", "assistant"]
ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptFormat:
    """The texts around the turns of a conversation.

    Attributes:
        opening: What begins a conversation without a system message; a default system turn, often.
        system_before: What stands before a system message; None where the format has no system turn.
        system_after: What stands behind it.
        user_before: What stands before a user's message.
        user_after: What stands behind it.
        assistant_before: What stands before the model's message.
        assistant_after: What stands behind it, in a conversation that goes on.
        generation: What stands last and makes the model answer.
        image: What a picture becomes: the placeholder and what follows it.
        images_first: Whether a message's pictures come before its text wherever they stand in it.
    """

    opening: str
    system_before: str | None
    system_after: str | None
    user_before: str
    user_after: str
    assistant_before: str
    assistant_after: str
    generation: str
    image: str = f"{IMAGE_TOKEN}\n"
    images_first: bool = False

    @property
    def default_system(self) -> str | None:
        """The system message of a conversation that brings none; None where it then has no system turn."""
        before, after = self.system_before, self.system_after
        if before is None or after is None or len(self.opening) < len(before) + len(after):
            return None
        if not (self.opening.startswith(before) and self.opening.endswith(after)):
            return None
        return self.opening[len(before) : len(self.opening) - len(after)]

    @property
    def single_turn(self) -> str:
        """One picture and one question, with `{question}` where the user's text goes."""
        return f"{self.opening}{self.user_before}{self.image}{{question}}{self.user_after}{self.generation}"


def chatml(before: str, after: str) -> PromptFormat:
    """A format whose turns are alike but for the name of the role, which follows `before`."""

    def head(role: Role) -> str:
        return f"{before}{role}\n"

    return PromptFormat(
        opening=f"{head('system')}{SYSTEM_PROMPT}{after}",
        system_before=head("system"),
        system_after=after,
        user_before=head("user"),
        user_after=after,
        assistant_before=head("assistant"),
        assistant_after=after,
        generation=head("assistant"),
    )


QWEN_2: Final = chatml("<|im_start|>", "<|im_end|>\n")


def with_system_prompt(prompt_format: PromptFormat, text: str) -> PromptFormat:
    """The same format with another default system message.

    Raises:
        PromptError: The format has no system turn.
    """
    before, after = prompt_format.system_before, prompt_format.system_after
    if before is None or after is None:
        raise PromptError(
            "this model's chat template has no system turn",
            hint="leave the system prompt out, or put it into the question",
        )
    return replace(prompt_format, opening=f"{before}{text}{after}")


@dataclass(frozen=True)
class Picture:
    """A picture in a message.

    Attributes:
        image: RGB, any size.
        inline: Whether it stands within a text: then only the placeholder is written, without the line break
            that the format puts behind a picture.
    """

    image: Image.Image
    inline: bool = False


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: Texts and pictures in their order. Text is only ever text: `<image>` or `<|im_end|>` in it
            is no placeholder and no token.
    """

    role: Role
    content: tuple[str | Picture, ...]


def user_message(question: str, images: Sequence[Image.Image]) -> Message:
    """A question about pictures, which come first."""
    return Message("user", (*(Picture(image) for image in images), question))


def marked_message(question: str, images: Sequence[Image.Image]) -> Message:
    """A question whose `<image>` marks say where pictures go, if it marks as many places as there are.

    With another number of marks they are text, and the pictures come first.
    """
    texts = question.split(IMAGE_TOKEN)
    if len(images) == 0 or len(texts) != len(images) + 1:
        return user_message(question, images)
    content: list[str | Picture] = [texts[0]]
    for image, text in zip(images, texts[1:], strict=True):
        content += [Picture(image, inline=True), text]
    return Message("user", tuple(part for part in content if part != ""))


@dataclass(frozen=True)
class Text:
    """A piece of a prompt.

    Attributes:
        content: The text.
        is_format: Whether the format wrote it, so that special tokens in it are tokens.
        is_answer: Whether an earlier answer begins with it.
    """

    content: str
    is_format: bool = False
    is_answer: bool = False


class TextEncoder(Protocol):
    """What a prompt needs of a tokenizer."""

    def encode_texts(self, texts: Sequence[Text]) -> list[int]:
        """Token ids of texts that stand side by side."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for a model.

    Attributes:
        segments: Token ids of the text, int64; an image stands between consecutive segments.
        images: float32 [1, 3, S, S] each; one fewer than segments.
        answers_at: Where earlier answers begin: a segment's number and a place in it, in order. What stands
            before each was a prompt of its own.
    """

    segments: tuple[np.ndarray, ...]
    images: tuple[np.ndarray, ...]
    answers_at: tuple[tuple[int, int], ...] = ()

    def length(self, tokens_per_image: int) -> int:
        """Tokens the prompt takes in the context."""
        return sum(len(s) for s in self.segments) + tokens_per_image * (len(self.segments) - 1)


def build_prompt(
    messages: Sequence[Message], prompt_format: PromptFormat, encoder: TextEncoder, settings: ImageSettings
) -> Prompt:
    """Put a conversation into the format the model was trained on.

    Args:
        messages: A system message first, if any; then user and assistant, the last of a user.
        prompt_format: The texts around them.
        encoder: The model's tokenizer.
        settings: How pictures become pixel values.

    Raises:
        PromptError: The roles do not follow each other like that.
        TokenizerError: The tokenizer cannot express a text.
        ImageError: A picture is too narrow to crop.
    """
    prompt, images = prompt_and_pictures(messages, prompt_format, encoder)
    return replace(prompt, images=tuple(pixel_values(image, settings) for image in images))


def prompt_and_pictures(
    messages: Sequence[Message], prompt_format: PromptFormat, encoder: TextEncoder
) -> tuple[Prompt, tuple[Image.Image, ...]]:
    """The same without `images`; and the pictures that they are made of, which take far less memory.

    Raises:
        PromptError: The roles do not follow each other like that.
        TokenizerError: The tokenizer cannot express a text.
    """
    # The text around an image is tokenized piece by piece, as the reference does.
    segments: list[list[Text]] = [[]]
    images: list[Image.Image] = []
    for piece in conversation_pieces(messages, prompt_format):
        if isinstance(piece, Text):
            segments[-1].append(piece)
        else:
            images.append(piece)
            segments.append([])
    ids = tuple(np.asarray(encoder.encode_texts(texts), np.int64) for texts in segments)
    answers_at = tuple(
        (number, place)
        for number, texts in enumerate(segments)
        for place in _answer_places(texts, ids[number], encoder)
    )
    return Prompt(ids, (), answers_at), tuple(images)


def _answer_places(texts: Sequence[Text], ids: np.ndarray, encoder: TextEncoder) -> list[int]:
    """Where answers begin in a segment; nowhere if byte-pair encoding joins one with what is before."""
    runs: list[list[Text]] = [[]]
    for text in texts:
        if text.is_answer:
            runs.append([])
        runs[-1].append(text)
    if len(runs) == 1:
        return []
    parts = [encoder.encode_texts(run) for run in runs]
    if [token for part in parts for token in part] != ids.tolist():
        return []
    return list(accumulate(len(part) for part in parts[:-1]))


def conversation_pieces(
    messages: Sequence[Message], prompt_format: PromptFormat
) -> Iterator[Text | Image.Image]:
    """Texts and pictures of a whole prompt, in order.

    Raises:
        PromptError: See `build_prompt`.
    """
    check_roles(messages)
    form = prompt_format
    turns = list(messages)
    if turns[0].role == "system":
        if form.system_before is None or form.system_after is None:
            with_system_prompt(form, "")  # raises
        yield from _turn(form.system_before or "", turns.pop(0), form.system_after or "", form)
    else:
        yield _format(form.opening)
    for message in turns:
        if message.role == "user":
            yield from _turn(form.user_before, message, form.user_after, form)
        else:
            before, *said, after = _turn(form.assistant_before, message, form.assistant_after, form)
            if said and isinstance(said[0], Text) and form.assistant_before == form.generation:
                said[0] = replace(said[0], is_answer=True)
            yield from (before, *said, after)
    yield _format(form.generation)


def check_roles(messages: Sequence[Message]) -> None:
    """See that a conversation can be answered.

    Raises:
        PromptError: It is empty, does not end with a user, or roles are out of order.
    """
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * (len(spoken) // 2) + ["user"]
    if spoken != expected:
        raise PromptError(
            f"the roles of the messages are {', '.join(roles) or 'none'}",
            hint="begin with system or user, alternate user and assistant, and end with user",
        )


def _turn(before: str, message: Message, after: str, form: PromptFormat) -> Iterator[Text | Image.Image]:
    yield _format(before)
    yield from _content(message.content, form)
    yield _format(after)


def _content(content: Iterable[str | Picture], form: PromptFormat) -> Iterator[Text | Image.Image]:
    placeholder, _, behind = form.image.partition(IMAGE_TOKEN)
    parts = list(content)
    if form.images_first:  # a stable sort; what stands within a text stays there
        parts.sort(key=lambda part: not (isinstance(part, Picture) and not part.inline))
    for part in parts:
        if isinstance(part, str):
            yield Text(part)
        elif part.inline:
            yield part.image
        else:
            yield _format(placeholder)
            yield part.image
            yield _format(behind)


def _format(text: str) -> Text:
    return Text(text, is_format=True)


def chat_template(prompt_format: PromptFormat) -> str:
    """A format as a Jinja chat template, for transformers and transformers.js.

    It takes content as a string, and as a list of parts.
    """
    form = prompt_format
    if form.system_before is None:
        opening = f"{{% if loop.first %}}{_shown(form.opening)}{{% endif %}}"
    else:
        opening = f"{{% if loop.first and message['role'] != 'system' %}}{_shown(form.opening)}{{% endif %}}"
    return (
        f"{{% for message in messages %}}{opening}{_turn_template(form)}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{_shown(form.generation)}{{% endif %}}"
    )


def _turn_template(form: PromptFormat) -> str:
    content = _content_template(form)
    texts: dict[Role, tuple[str, str]] = {
        "user": (form.user_before, form.user_after),
        "assistant": (form.assistant_before, form.assistant_after),
    }
    if form.system_before is not None and form.system_after is not None:
        texts["system"] = (form.system_before, form.system_after)
    head, role, tail = form.user_before.partition("user")
    if role and texts == {name: (f"{head}{name}{tail}", form.user_after) for name in ROLES}:
        before = f"{{{{ {_quoted(head)} + message['role'] + {_quoted(tail)} }}}}"
        return f"{before}{content}{_shown(form.user_after)}"
    choices = "".join(
        f"{{% {'elif' if n else 'if'} message['role'] == '{role}' %}}{_shown(before)}{content}{_shown(after)}"
        for n, (role, (before, after)) in enumerate(texts.items())
    )
    return f"{choices}{{% else %}}{{{{ raise_exception('unknown role: ' + message['role']) }}}}{{% endif %}}"


def _content_template(form: PromptFormat) -> str:
    each, end = "{% for part in message['content'] %}", "{% endfor %}"
    image = f"{{% if part['type'] == 'image' %}}{_shown(form.image)}"
    text = "{{ part['text'] }}{% endif %}"
    if form.images_first:
        parts = f"{each}{image}{{% endif %}}{end}{each}{{% if part['type'] != 'image' %}}{text}{end}"
    else:
        parts = f"{each}{image}{{% else %}}{text}{end}"
    return (
        f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}{parts}{{% endif %}}"
    )


def _shown(text: str) -> str:
    """A Jinja expression that writes a text; nothing for none."""
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"'{escaped}'"
