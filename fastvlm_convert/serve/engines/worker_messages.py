"""What the server and its workers say to each other, as frames.

The server sends `load` once, then `question` and `cancel`. A worker sends `ready` or `failed` once, then
`piece`s and, at the end of each question, a `reply` or an `error`, both with the state of its caches.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from fastvlm_convert.errors import ConversionError, error_class
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.serve import errors
from fastvlm_convert.serve.engine import Piece, Question, Reply, Sampling, StageTimings
from fastvlm_convert.serve.engines.frames import Frame
from fastvlm_convert.serve.errors import RequestError

_ERRORS: dict[str, type[RequestError]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, RequestError)
}


@dataclass(frozen=True)
class Load:
    """What a worker runs.

    Attributes:
        bundle: Folder of the bundle.
        target: Which of its formats.
        threads: That compute one operation; None leaves it to the runtime.
        feature_cache_bytes: Most bytes of image features that it keeps.
        prefix_cache_bytes: Most bytes of prompts' keys and values that it keeps.
    """

    bundle: str
    target: str
    threads: int | None
    feature_cache_bytes: int
    prefix_cache_bytes: int


@dataclass(frozen=True)
class CacheState:
    """How a worker's caches are; counts are since its start.

    Attributes:
        bytes_held: By cache: `feature`, `prefix`.
        lookups: By (cache, `hit` or `miss`).
    """

    bytes_held: dict[str, int]
    lookups: dict[tuple[str, str], int]


NO_CACHES: Final = CacheState({}, {})


def load_frame(load: Load) -> Frame:
    """The first message to a worker."""
    return Frame("load", asdict(load))


def load_of(frame: Frame) -> Load:
    """What a worker is told to run."""
    return Load(**frame.fields)


def question_frame(question: Question, clock: Callable[[], float] = time.monotonic) -> Frame:
    """A question; what remains of its time goes with it, as clocks of processes may differ."""
    prompt = question.prompt
    fields = {
        "request_id": question.request_id,
        "num_segments": len(prompt.segments),
        "answers_at": prompt.answers_at,
        "image_keys": question.image_keys,
        "sampling": asdict(question.sampling),
        "remaining_s": question.deadline - clock(),
        "wants_logprob": question.wants_logprob,
        "scope": question.scope,
    }
    return Frame("question", fields, (*prompt.segments, *prompt.images))


def question_of(
    frame: Frame, cancelled: threading.Event, clock: Callable[[], float] = time.monotonic
) -> Question:
    """The question of a frame.

    Args:
        frame: The frame.
        cancelled: Set when the client left.
        clock: What the question's deadline is of.
    """
    fields = frame.fields
    count = fields["num_segments"]
    sampling = fields["sampling"]
    answers_at = tuple((segment, place) for segment, place in fields["answers_at"])
    return Question(
        request_id=fields["request_id"],
        prompt=Prompt(frame.arrays[:count], frame.arrays[count:], answers_at),
        image_keys=tuple(fields["image_keys"]),
        sampling=Sampling(**(sampling | {"stop": tuple(sampling["stop"])})),
        deadline=clock() + fields["remaining_s"],
        cancelled=cancelled,
        wants_logprob=fields["wants_logprob"],
        scope=fields["scope"],
    )


def item_frame(item: Piece | Reply, caches: CacheState) -> Frame:
    """What a question gives."""
    if isinstance(item, Piece):
        return Frame("piece", asdict(item))
    return Frame("reply", {"reply": asdict(item), "caches": _plain(caches)})


def error_frame(error: RequestError, caches: CacheState) -> Frame:
    """What a question ended with instead of a reply."""
    fields = {
        "error": type(error).__name__,
        "message": error.message,
        "param": error.param,
        "code": error.code,
        "retry_after_s": error.retry_after_s,
        "caches": _plain(caches),
    }
    return Frame("error", fields)


def item_of(frame: Frame) -> Piece | Reply | RequestError:
    """What a worker says about a question: the opposite of `item_frame` and `error_frame`."""
    fields = dict(frame.fields)
    if frame.kind == "piece":
        return Piece(**fields)
    if frame.kind == "reply":
        reply: dict[str, Any] = fields["reply"]
        return Reply(**(reply | {"timings": StageTimings(**reply["timings"])}))
    fields.pop("caches")
    return _ERRORS[fields.pop("error")](**fields)


def caches_of(frame: Frame) -> CacheState:
    """The state of a worker's caches, at the end of a question."""
    held, lookups = frame.fields["caches"]
    return CacheState(held, {(cache, result): count for cache, result, count in lookups})


def _plain(caches: CacheState) -> list[Any]:
    return [caches.bytes_held, [[*key, count] for key, count in caches.lookups.items()]]


def ready_frame(executed_by: str) -> Frame:
    """The bundle is loaded."""
    return Frame("ready", {"executed_by": executed_by})


def failed_frame(error: ConversionError) -> Frame:
    """The bundle cannot be loaded."""
    message = str(error.args[0]) if error.args else ""
    return Frame(
        "failed", {"code": error.code, "message": message, "where": error.where, "hint": error.given_hint}
    )


def failure_of(frame: Frame) -> ConversionError:
    """Why a worker could not load the bundle."""
    fields = frame.fields
    return error_class(fields["code"])(fields["message"], where=fields["where"], hint=fields["hint"])
