"""One contender in a process of its own, so that its peak memory is its own.

Started by `bench.run` as `python -m fastvlm_convert.bench.worker`. It reads one JSON request a line on
standard input and answers with one JSON line on standard output.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm_convert.bench.calibration import Calibration
from fastvlm_convert.bench.energy import Meter, open_meter
from fastvlm_convert.bench.result import CALIBRATION, ENERGY
from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.generate import check_fits, stream_tokens
from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.runtime.loaded import LoadedModel, load_bundle, load_reference


def load(request: dict[str, Any]) -> LoadedModel:
    """Load the contender that a request names."""
    path = Path(request["path"])
    if request["kind"] == "bundle":
        return load_bundle(path, request["target"])
    size = request["image_size"]
    opened = open_checkpoint(path)
    images = replace(opened.pictures.image, size=size)
    return load_reference(opened, images, context_length=request["context_length"])


def trial(model: LoadedModel, question: str, new_tokens: int) -> dict[str, float]:
    """Answer once, ignoring end tokens so that every trial does the same work.

    Returns:
        Milliseconds: of preparing picture and prompt, of the image encoder, of the prefill (embedding
        included), from the prepared prompt to the first token, of each token after it, and from picture and
        question to the text of the whole answer. Tokens per second of prefill and decode.
    """
    session = model.session
    picture = Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    asked = time.perf_counter()
    prompt = model.prompt(question, [picture])
    check_fits(prompt.length(session.num_image_tokens), new_tokens, session.context_length)
    start = time.perf_counter()
    features = [session.encode_image(image) for image in prompt.images]
    encoded = time.perf_counter()
    embeds = embed_prompt(session, prompt, features)
    tokens = stream_tokens(session, session.prefill(embeds), new_tokens)
    answer = [next(tokens)]
    first = time.perf_counter()
    answer += tokens
    last = time.perf_counter()
    model.tokenizer.decode(answer)
    end = time.perf_counter()
    return {
        "prepare_ms": 1e3 * (start - asked),
        "vision_ms": 1e3 * (encoded - start),
        "prefill_ms": 1e3 * (first - encoded),
        "ttft_ms": 1e3 * (first - start),
        "decode_ms": 1e3 * (last - first) / (new_tokens - 1),
        "end_to_end_ms": 1e3 * (end - asked),
        "prefill_tokens_per_s": len(embeds) / (first - encoded),
        "decode_tokens_per_s": (new_tokens - 1) / (last - first),
    }


class _Worker:
    """What is loaded, and the answers to requests about it."""

    def __init__(self) -> None:
        self._model: LoadedModel | None = None
        self._calibration: Calibration | None = None
        self._meter: Meter | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "load":
            return self._load(request)
        if self._calibration is not None:
            return {CALIBRATION: self._calibration.run()}
        assert self._model is not None
        before = None if self._meter is None else self._meter.read()
        found = trial(self._model, request["question"], request["new_tokens"])
        if self._meter is not None and before is not None:
            found[ENERGY] = self._meter.joules(before, self._meter.read())
        return found

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["kind"] == "calibration":
            self._calibration = Calibration()
            return {"load_ms": 0.0, "executed_by": Calibration.executed_by}
        start = time.perf_counter()
        self._model = load(request)
        load_ms = 1e3 * (time.perf_counter() - start)
        self._meter, reason = open_meter()
        return {
            "load_ms": load_ms,
            "executed_by": self._model.session.executed_by,
            "energy_not_run": reason,
        }


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    worker = _Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
            answer["peak_memory_bytes"] = peak_memory_bytes()
        except ConversionError as error:
            answer = {"code": error.code, "error": str(error), "hint": error.hint}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
