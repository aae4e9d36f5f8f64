"""A request as a question to a bundle: its messages, how to answer them, and what equal ones share."""

import asyncio
import base64
import binascii
import hashlib
import io
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from fastvlm_convert.errors import ImageError, PromptError, TokenizerError
from fastvlm_convert.pictures import as_seen
from fastvlm_convert.prompt import Message, Picture, check_roles
from fastvlm_convert.prompt_cache import image_key
from fastvlm_convert.runtime.loaded import DEFAULT_NEW_TOKENS
from fastvlm_convert.serve.answers import Asked
from fastvlm_convert.serve.caches import cache_key
from fastvlm_convert.serve.engine import Question, Sampling
from fastvlm_convert.serve.errors import InvalidRequestError, UnprocessableError
from fastvlm_convert.serve.schema import ChatRequest, ImagePart, TextPart
from fastvlm_convert.serve.served_bundle import ServedBundle
from fastvlm_convert.serve.settings import Settings


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as it was sent.

    Attributes:
        data: The file.
        sha256: Of it.
        param: Where in the request it stands.
    """

    data: bytes
    sha256: str
    param: str


@dataclass(frozen=True)
class Turn:
    """A message, its pictures not decoded yet."""

    role: str
    content: tuple[str | EncodedPicture, ...]


def read_turns(request: ChatRequest) -> tuple[Turn, ...]:
    """The messages of a request.

    Raises:
        InvalidRequestError: A picture is no data URL, or the roles are out of order.
    """
    turns = tuple(
        Turn(message.role, _content(message.content, f"messages[{i}].content"))
        for i, message in enumerate(request.messages)
    )
    try:
        check_roles([Message(turn.role, ()) for turn in turns])  # type: ignore[arg-type]
    except PromptError as error:
        raise InvalidRequestError(f"{error}; {error.hint}", "messages") from error
    return turns


def _content(content: str | Sequence[TextPart | ImagePart], param: str) -> tuple[str | EncodedPicture, ...]:
    if isinstance(content, str):
        return (content,)
    return tuple(
        part.text
        if isinstance(part, TextPart)
        else _picture(part.image_url.url, f"{param}[{i}].image_url.url")
        for i, part in enumerate(content)
    )


def _picture(url: str, param: str) -> EncodedPicture:
    head, found, data = url.partition(";base64,")
    if not found or not head.startswith("data:image/"):
        raise InvalidRequestError("a picture is given as data:image/png;base64,...", param)
    try:
        encoded = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(f"not base64: {error}", param) from error
    return EncodedPicture(encoded, hashlib.sha256(encoded).hexdigest(), param)


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


def key_of(
    bundle: ServedBundle, turns: Sequence[Turn], sampling: Sampling, settings: Settings, scope: str
) -> str | None:
    """A word that requests with equal answers share; None where chance decides.

    Args:
        bundle: Who is asked.
        turns: The messages.
        sampling: How the answer is chosen.
        settings: What else decides how pictures are seen.
        scope: Requests of different scopes share nothing.
    """
    if not sampling.is_repeatable:
        return None
    chance = () if sampling.is_greedy else (sampling.temperature, sampling.top_p, sampling.seed)
    how = (sampling.max_tokens, *chance, settings.exif_orientation)
    parts: list[str | bytes] = [bundle.sha256, bundle.target, scope, repr(how)]
    parts += [str(len(sampling.stop)), *sampling.stop]
    for turn in turns:
        parts += [turn.role, str(len(turn.content))]
        # A picture's hash is bytes, and so is never the same as a text.
        parts += [p if isinstance(p, str) else bytes.fromhex(p.sha256) for p in turn.content]
    return cache_key(*parts)


def asked(
    bundle: ServedBundle,
    turns: Sequence[Turn],
    sampling: Sampling,
    request_id: str,
    deadline: float,
    key: str | None,
) -> Asked:
    """What `Answers` gets of a request."""

    async def prepare(cancelled: threading.Event) -> Question:
        return await asyncio.to_thread(_question, bundle, turns, sampling, request_id, cancelled)

    return Asked(request_id, key, prepare, deadline)


def _question(
    bundle: ServedBundle,
    turns: Sequence[Turn],
    sampling: Sampling,
    request_id: str,
    cancelled: threading.Event,
) -> Question:
    """Decode the pictures and build the prompt, as `run` does.

    Raises:
        InvalidRequestError: Prompt and answer do not fit into the context, or a text cannot be expressed.
        UnprocessableError: A picture cannot be decoded.
    """
    messages = [
        Message(turn.role, tuple(p if isinstance(p, str) else Picture(_decoded(p)) for p in turn.content))  # type: ignore[arg-type]
        for turn in turns
    ]
    try:
        prompt = bundle.prompt(messages)
    except (PromptError, TokenizerError, ImageError) as error:
        raise InvalidRequestError(" ".join(filter(None, (error.args[0], error.hint))), "messages") from error
    contract = bundle.manifest.contract
    length = prompt.length(contract.num_image_tokens)
    if length + sampling.max_tokens > contract.context_length:
        raise InvalidRequestError(
            f"a prompt of {length} tokens and an answer of up to {sampling.max_tokens} exceed the context of "
            f"{contract.context_length} tokens; shorten the messages, or lower max_tokens",
            "messages",
            code="context_length_exceeded",
        )
    keys = tuple(image_key(image) for image in prompt.images)
    return Question(request_id, prompt, keys, sampling, float("inf"), cancelled)


def _decoded(picture: EncodedPicture) -> Image.Image:
    try:
        with Image.open(io.BytesIO(picture.data), formats=("PNG", "JPEG", "WEBP")) as image:
            return as_seen(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UnprocessableError(f"the picture cannot be decoded: {error}", picture.param) from error
