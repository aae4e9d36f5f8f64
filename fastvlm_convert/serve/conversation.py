"""A request as a question to a bundle: its messages, how to answer them, and what equal ones share."""

import hashlib
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastvlm_convert.errors import ImageError, PromptError, TokenizerError
from fastvlm_convert.prompt import Message, Picture, Role, check_roles
from fastvlm_convert.prompt_cache import image_key
from fastvlm_convert.runtime.loaded import DEFAULT_NEW_TOKENS
from fastvlm_convert.serve.answers import Asked
from fastvlm_convert.serve.caches import cache_key
from fastvlm_convert.serve.engine import Question, Sampling
from fastvlm_convert.serve.errors import InvalidRequestError
from fastvlm_convert.serve.schema import ChatRequest, ImagePart, TextPart
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.validate import (
    DecodedPicture,
    EncodedPicture,
    Pictures,
    check_number,
    check_text,
    check_url,
)


@dataclass(frozen=True)
class Turn:
    """A message, its pictures not decoded yet."""

    role: Role
    content: tuple[str | EncodedPicture, ...]


@dataclass(frozen=True)
class Conversation:
    """What a request says and how it wants to be answered.

    Attributes:
        turns: The messages.
        sampling: How the answer is chosen.
        has_limit: Whether the request itself says how many tokens it wants; else they are fewer if they must.
        scope: Who shares what is kept of it; "" for all.
    """

    turns: tuple[Turn, ...]
    sampling: Sampling
    has_limit: bool
    scope: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that somebody wrote."""
        return tuple(part for turn in self.turns for part in turn.content if isinstance(part, str))

    @property
    def pictures(self) -> tuple[EncodedPicture, ...]:
        """All pictures in their order."""
        return tuple(part for turn in self.turns for part in turn.content if not isinstance(part, str))


def read_conversation(request: ChatRequest, settings: Settings, scope: str = "") -> Conversation:
    """The conversation of a request, as far as it can be checked without decoding pictures.

    Raises:
        InvalidRequestError: Roles are out of order; a text is too long or no text; there are too many
            pictures, or one is no data URL; it asks for more tokens than the server gives.
        UnsupportedMediaError: A picture is of a format that is not taken.
        TooLargeError: A picture's file is too large.
    """
    turns = tuple(
        Turn(message.role, _content(message.content, f"messages[{i}].content"))
        for i, message in enumerate(request.messages)
    )
    try:
        check_roles([Message(turn.role, ()) for turn in turns])
    except PromptError as error:
        raise InvalidRequestError(f"{error.args[0]}; {error.hint}", "messages", "bad_roles") from error
    has_limit = request.token_limit is not None
    conversation = Conversation(turns, read_sampling(request, settings), has_limit, scope)
    _check_texts(request, settings)
    check_number(conversation.pictures, settings)
    for picture in conversation.pictures:
        check_url(picture.url, picture.param, settings)
    return conversation


def read_sampling(request: ChatRequest, settings: Settings) -> Sampling:
    """How a request is to be answered; without a limit of its own, with as many tokens as are allowed.

    Raises:
        InvalidRequestError: It asks for more tokens than the server gives.
    """
    limit = request.token_limit
    if limit is not None and limit > settings.max_tokens:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequestError(
            f"{name} is {limit}, and this server answers with at most {settings.max_tokens} tokens", name
        )
    return Sampling(
        max_tokens=limit or min(DEFAULT_NEW_TOKENS, settings.max_tokens),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        stop=request.stops,
        is_seeded=request.seed is not None,
    )


def _content(content: str | Sequence[TextPart | ImagePart], param: str) -> tuple[str | EncodedPicture, ...]:
    if isinstance(content, str):
        return (content,)
    return tuple(
        part.text
        if isinstance(part, TextPart)
        else EncodedPicture(part.image_url.url, f"{param}[{i}].image_url.url")
        for i, part in enumerate(content)
    )


def _check_texts(request: ChatRequest, settings: Settings) -> None:
    """See that the texts can have been typed, and that they are not too long together."""
    left = settings.max_question_chars
    for i, message in enumerate(request.messages):
        parts = message.content
        texts = (
            {"": parts}
            if isinstance(parts, str)
            else {f"[{j}].text": part.text for j, part in enumerate(parts) if isinstance(part, TextPart)}
        )
        for place, text in texts.items():
            check_text(text, f"messages[{i}].content{place}", left)
            left -= len(text)


def key_of(
    bundle: ServedBundle, conversation: Conversation, settings: Settings, kind: str = ""
) -> str | None:
    """A word that requests with equal answers share; None where chance decides.

    Args:
        bundle: Who is asked.
        conversation: The conversation.
        settings: What else decides how pictures are seen.
        kind: What else sets a reply apart.
    """
    sampling = conversation.sampling
    if not sampling.is_repeatable:
        return None
    chance = () if sampling.is_greedy else (sampling.temperature, sampling.top_p, sampling.seed)
    how = (sampling.max_tokens, conversation.has_limit, *chance, settings.exif_orientation)
    parts: list[str | bytes] = [bundle.sha256, bundle.target, conversation.scope, kind, repr(how)]
    parts += [str(len(sampling.stop)), *sampling.stop]
    for turn in conversation.turns:
        parts += [turn.role, str(len(turn.content))]
        # A picture is bytes, and so is never the same as a text; there is one encoding for every file.
        parts += [p if isinstance(p, str) else hashlib.sha256(p.url.encode()).digest() for p in turn.content]
    return cache_key(*parts)


@dataclass(frozen=True)
class Preparing:
    """What makes questions of conversations.

    Attributes:
        bundle: Who is asked.
        settings: The server's.
        pictures: Decodes pictures.
    """

    bundle: ServedBundle
    settings: Settings
    pictures: Pictures

    def asked(
        self, conversation: Conversation, request_id: str, deadline: float, wants_logprob: bool = False
    ) -> Asked:
        """What `Answers` gets of a request; its pictures are decoded when its turn has come."""

        async def prepare(cancelled: threading.Event) -> Question:
            def build(decoded: Sequence[DecodedPicture]) -> Question:
                return self._question(conversation, decoded, request_id, cancelled, wants_logprob)

            return await self.pictures.use(conversation.pictures, build)

        key = key_of(self.bundle, conversation, self.settings, "logprob" if wants_logprob else "")
        return Asked(request_id, key, prepare, deadline)

    def _question(
        self,
        conversation: Conversation,
        decoded: Sequence[DecodedPicture],
        request_id: str,
        cancelled: threading.Event,
        wants_logprob: bool,
    ) -> Question:
        """Build the prompt, as `run` does.

        Raises:
            InvalidRequestError: Prompt and answer do not fit into the context, or the bundle cannot take it.
        """
        images = iter(decoded)
        messages = [
            Message(
                turn.role,
                tuple(
                    part if isinstance(part, str) else Picture(next(images).image) for part in turn.content
                ),
            )
            for turn in conversation.turns
        ]
        try:
            prompt = self.bundle.prompt(messages)
        except (PromptError, TokenizerError, ImageError) as error:
            what = "; ".join(filter(None, (error.args[0], error.hint)))
            raise InvalidRequestError(what, "messages", "bad_prompt") from error
        length = prompt.length(self.bundle.manifest.contract.num_image_tokens)
        sampling = self._fitted(conversation, length)
        keys = tuple(image_key(image) for image in prompt.images)
        return Question(
            request_id,
            prompt,
            keys,
            sampling,
            float("inf"),  # those who wait have deadlines, and tell by `cancelled` when nobody does
            cancelled,
            wants_logprob,
            conversation.scope,
        )

    def _fitted(self, conversation: Conversation, prompt_tokens: int) -> Sampling:
        """The sampling with a limit that fits: as many tokens as `run` gives where none is asked for.

        Raises:
            InvalidRequestError: Prompt and answer do not fit into the context.
        """
        context = self.bundle.manifest.contract.context_length
        limit = conversation.sampling.max_tokens
        if not conversation.has_limit:
            limit = max(1, min(limit, context - prompt_tokens))
        if prompt_tokens + limit > context:
            raise InvalidRequestError(
                f"a prompt of {prompt_tokens} tokens and an answer of up to {limit} exceed the context of "
                f"{context} tokens; shorten the messages, or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return replace(conversation.sampling, max_tokens=limit)
