"""What requests and replies look like: OpenAI's chat completions, as far as a bundle can follow them.

A field that would change the answer and is not offered is refused by name; one that changes nothing is taken.
Fields that nobody knows are refused too, for they may be misspelled.
"""

from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from fastvlm_convert.errors import shown
from fastvlm_convert.serve.errors import InvalidRequestError
from fastvlm_convert.serve.escalation import EscalationUsage

MAX_MESSAGES: Final = 1000
MAX_PARTS: Final = 1000
MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 100
MAX_SEED: Final = (1 << 63) - 1

_NOT_OFFERED: Final = {
    "n": "one answer is given to a question",
    "tools": "the model cannot call tools",
    "tool_choice": "the model cannot call tools",
    "functions": "the model cannot call functions",
    "function_call": "the model cannot call functions",
    "response_format": "answers are text, in no form that could be asked for",
    "logprobs": "log-probabilities are not returned",
    "top_logprobs": "log-probabilities are not returned",
    "logit_bias": "logits are used as they are",
    "presence_penalty": "tokens are not penalized",
    "frequency_penalty": "tokens are not penalized",
    "modalities": "answers are text",
    "audio": "answers are text",
    "store": "nothing is stored",
    "detail": "the bundle decides the size of pictures",
    "reasoning_effort": "the model does not reason before it answers",
    "verbosity": "the question decides how long the answer is",
    "prediction": "answers are not predicted",
    "web_search_options": "nothing is looked up",
}


class _Strict(BaseModel):
    """No unknown fields, no value taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


_TAGS: Final = ("one_text", "several", "system", "user", "assistant", "text", "image_url")
"""What pydantic's path to an error has beside fields: the alternative that was taken."""


def _kind(value: object) -> str:
    """Which of the two: so that an error is about the one that was meant."""
    return "several" if isinstance(value, list) else "one_text"


_OneOrSeveral: Final = Discriminator(_kind)


class TextPart(_Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """A picture, in the request itself; nothing is fetched."""

    url: str = Field(description="data:image/png;base64,... (PNG, JPEG or WebP).")
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_OneText = Annotated[str, Tag("one_text")]
_TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS), Tag("several")]
_Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS), Tag("several")]


class SystemMessage(_Strict):
    """What the model is told before the conversation, in place of the bundle's own words."""

    role: Literal["system"]
    content: Annotated[_OneText | _TextParts, _OneOrSeveral]


class UserMessage(_Strict):
    """What a user says and shows."""

    role: Literal["user"]
    content: Annotated[_OneText | _Parts, _OneOrSeveral]


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Annotated[_OneText | _TextParts, _OneOrSeveral]
    # Clients send earlier replies back as they got them.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """What a stream brings beside the answer."""

    include_usage: bool | None = Field(None, description="Whether a last chunk has the usage.")
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    """The only form of answers."""

    type: Literal["text"]


_Zero = Annotated[float, Field(ge=0, le=0)]
_Nothing = Annotated[list[JsonValue], Field(max_length=0)]
_Tokens = Annotated[int, Field(ge=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_OneStop = Annotated[_Stop, Tag("one_text")]
_Stops = Annotated[list[_Stop], Field(max_length=MAX_STOPS), Tag("several")]
_Label = Annotated[str, Field(max_length=512)]


class ChatRequest(_Strict):
    """A conversation that ends with a user, and how to answer it."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A system message first, if any; then user and assistant in turn, the last of a user.",
    )
    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="One of `/v1/models`; where it is omitted, the server chooses."
    )
    max_completion_tokens: _Tokens | None = Field(
        None, description="Most tokens to answer with; by default 256, or what fits the context."
    )
    max_tokens: _Tokens | None = Field(None, description="An older name of max_completion_tokens.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the likeliest token, and is the default; above 0 samples."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Sample from this share of the probability; 1 by default."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Equal seeds sample equal tokens."
    )
    stop: Annotated[_OneStop | _Stops, _OneOrSeveral] | None = Field(
        None, description="Texts at which the answer ends, without them."
    )
    stream: bool | None = Field(
        None, description="Whether the answer comes in pieces, as server-sent events."
    )
    stream_options: StreamOptions | None = Field(None, description="With `stream` alone.")

    # Taken, for they change nothing.
    user: _Label | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None

    # Taken where they ask for what is done anyway.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    response_format: TextFormat | None = None
    tools: _Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: _Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError(
                "max_tokens", "max_tokens and max_completion_tokens are the same and have two values"
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options go with stream: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to answer with, as far as the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class PromptTokensDetails(BaseModel):
    """Where the keys and values of the prompt's tokens came from."""

    cached_tokens: int = Field(description="Tokens that were not computed again.")


class Usage(BaseModel):
    """Tokens of a question and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EscalatedUsage(Usage):
    """The same, where an answer may be escalated; the first one's tokens are not in the sums."""

    escalation: EscalationUsage


class ReplyTimings(BaseModel):
    """Where the time went."""

    queue_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: float


class ReplyMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: EscalatedUsage | Usage
    timings: ReplyTimings


class Delta(BaseModel):
    """Some more of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only choice of a piece."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: EscalatedUsage | Usage | None = None
    timings: ReplyTimings | None = None


class ModelCard(BaseModel):
    """A bundle that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fastvlm-convert"] = "fastvlm-convert"


class ModelList(BaseModel):
    """The bundles that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorFacts(BaseModel):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """An error, in OpenAI's form."""

    error: ErrorFacts


def read_request(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        InvalidRequestError: It is no JSON, or no request; says which field is wrong.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_context=False)[0]) from None


def _invalid(error: ErrorDetails) -> InvalidRequestError:
    """The error for the first thing that is wrong with a request."""
    kind, path = error["type"], _fields(error["loc"])
    if kind == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {error['msg']}", code="invalid_json")
    param = _shown(path)
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"there is no field {shown(path[-1])} here; leave it out", param, code="unknown_field"
        )
    if kind in ("max_tokens", "stream_options"):
        return InvalidRequestError(error["msg"], kind)
    if kind == "missing":
        return InvalidRequestError(f"{param} is missing", param, code="missing_field")
    what = f"{param or 'the body'} is {shown(error['input'])}"
    reason = next((_NOT_OFFERED[step] for step in path if step in _NOT_OFFERED), None)
    if reason is not None:
        return InvalidRequestError(f"{what}: {reason}; leave it out", param, code="unsupported_value")
    return InvalidRequestError(f"{what}: {error['msg'][:1].lower()}{error['msg'][1:]}", param or None)


def _fields(path: tuple[int | str, ...]) -> list[int | str]:
    """A path without the alternatives that were taken; a field that is called like one of them stays."""
    fields: list[int | str] = []
    for at, step in enumerate(path):
        follows_union = at > 0 and (isinstance(path[at - 1], int) or path[at - 1] in ("content", "stop"))
        if not (follows_union and step in _TAGS):
            fields.append(step)
    return fields


def _shown(path: list[int | str]) -> str:
    """`messages[0].content[1].image_url.url`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")
