"""A worker: a process that loads a bundle and answers one question at a time (`worker_messages`).

    python -m fastvlm_convert.serve.engines.worker_process

It reads frames from standard input and writes them to standard output; what libraries print goes to standard
error. It ends when standard input does, so no worker outlives its server.
"""

import faulthandler
import os
import queue
import signal
import sys
import threading
from dataclasses import replace
from typing import BinaryIO, Final

from fastvlm_convert.errors import ConversionError
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle
from fastvlm_convert.serve.engine import Question
from fastvlm_convert.serve.engines.frames import receive_frame, send_frame
from fastvlm_convert.serve.engines.sequence import answer_question
from fastvlm_convert.serve.engines.worker_messages import (
    CacheState,
    Load,
    error_frame,
    failed_frame,
    item_frame,
    load_of,
    question_of,
    ready_frame,
)
from fastvlm_convert.serve.errors import CancelledError, EngineFailedError, RequestError
from fastvlm_convert.serve.prompt_caches import PromptCaches
from fastvlm_convert.targets import known_target

# A terminal's Ctrl-C and a service manager's SIGTERM reach all processes; the server drains, then ends us.
_IGNORED: Final = ("SIGINT", "SIGTERM", "SIGHUP")


def main() -> None:
    """Answer questions until there are no more."""
    for name in _IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    faulthandler.enable()
    frames, replies = _take_pipes()
    inbox = _Inbox(frames)
    try:
        _serve(inbox, replies)
    except BrokenPipeError:  # the server is gone
        os._exit(0)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes of the server; nothing else can read or write them from here on."""
    frames = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)
    return frames, replies


class _Inbox:
    """Reads frames in a thread of its own, so that a question can be cancelled while it is answered."""

    def __init__(self, frames: BinaryIO) -> None:
        self._frames = frames
        self._load: queue.SimpleQueue[Load] = queue.SimpleQueue()
        self._questions: queue.SimpleQueue[Question] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def load(self) -> Load:
        """What to run."""
        return self._load.get()

    def question(self) -> Question:
        """The next question."""
        return self._questions.get()

    def _read(self) -> None:
        cancelled = threading.Event()
        while (frame := receive_frame(self._frames)) is not None:
            if frame.kind == "load":
                self._load.put(load_of(frame))
            elif frame.kind == "question":
                cancelled = threading.Event()
                self._questions.put(question_of(frame, cancelled))
            else:  # `cancel`, of the question before it
                cancelled.set()
        os._exit(0)  # whatever the other thread does


def _serve(inbox: _Inbox, replies: BinaryIO) -> None:
    load = inbox.load()
    try:
        # A busy loop would take cores from the other workers, and from the server.
        loaded = load_bundle(load.bundle, known_target(load.target), threads=load.threads, spinning=False)
    except ConversionError as error:
        send_frame(replies, failed_frame(error))
        return
    caches = PromptCaches(load.feature_cache_bytes, load.prefix_cache_bytes)
    model = replace(loaded, cache=caches.of_model(load.bundle))
    send_frame(replies, ready_frame(loaded.session.executed_by))
    while True:
        _answer(model, inbox.question(), caches, replies)


def _answer(model: LoadedModel, question: Question, caches: PromptCaches, replies: BinaryIO) -> None:
    """Send what a question gives, and how it ended."""
    try:
        if question.cancelled.is_set():
            raise _left()
        for item in answer_question(model, question):
            send_frame(replies, item_frame(item, _state(caches)))
    except RequestError as error:
        send_frame(replies, error_frame(error, _state(caches)))
    except ConversionError as error:
        failed = EngineFailedError(f"the bundle's runtime raised an error: {error}", code="engine_failed")
        send_frame(replies, error_frame(failed, _state(caches)))


def _state(caches: PromptCaches) -> CacheState:
    return CacheState(caches.bytes, caches.lookups)


def _left() -> CancelledError:
    return CancelledError("the client left", code="cancelled")


if __name__ == "__main__":
    main()
