"""An engine that does what its questions say, for a browser that can say nothing else."""

import asyncio
from collections.abc import AsyncIterator

from fastvlm_convert.checkpoint.tokenizer import TextTokenizer
from fastvlm_convert.serve.engine import EngineStatus, Piece, Question, Reply, StageTimings
from fastvlm_convert.serve.errors import CancelledError, EngineFailedError, UnavailableError

PAUSE_S = 0.03
WORDS = ("Six ", "words ", "come ", "one ", "by ", "one.")
HOSTILE = ("<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "</p><b>", " &lt; **bold** ")
TIMINGS = StageTimings(vision_ms=22, prefill_ms=5, decode_ms=12)


class ObedientEngine:
    """Obeys a word of the question (hostile, endless, fail, break, busy), else answers with six words."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    async def start(self) -> None:
        """Nothing is loaded."""

    async def stop(self) -> None:
        """Nothing runs on."""

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        text = self._tokenizer.decode([int(token) for token in question.prompt.segments[-1]])
        failure = EngineFailedError("the bundle's runtime raised an error", code="engine_failed")
        if "busy" in text:
            raise UnavailableError("many requests wait already", code="queue_full", retry_after_s=7)
        if "fail" in text:
            raise failure
        pieces = HOSTILE if "hostile" in text else WORDS * (1000 if "endless" in text else 1)
        for count, piece in enumerate(pieces, 1):
            if question.cancelled.is_set():
                raise CancelledError("the client left", code="cancelled")
            if "break" in text and count == 4:
                raise failure
            yield Piece(piece, count)
            await asyncio.sleep(PAUSE_S)
        yield Reply("".join(pieces), "stop", 48, 0, len(pieces), TIMINGS, "miss")

    def status(self) -> EngineStatus:
        return EngineStatus(True, 2, 0, {"ready": 1}, 0, "a script", {}, {})
