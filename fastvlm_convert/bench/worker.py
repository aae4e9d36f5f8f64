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

from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_convert.errors import ConversionError
from fastvlm_convert.generate import check_fits, embed_prompt, stream_tokens
from fastvlm_convert.peak_memory import peak_memory_bytes
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
        Milliseconds of the image encoder, of the prefill (embedding included) and up to the first token;
        tokens per second of prefill and decode.
    """
    session = model.session
    picture = Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    prompt = model.prompt(question, [picture])
    check_fits(prompt.length(session.num_image_tokens), new_tokens, session.context_length)
    start = time.perf_counter()
    features = [session.encode_image(image) for image in prompt.images]
    encoded = time.perf_counter()
    embeds = embed_prompt(session, prompt, features)
    tokens = stream_tokens(session, session.prefill(embeds), new_tokens)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    end = time.perf_counter()
    return {
        "vision_ms": 1e3 * (encoded - start),
        "prefill_ms": 1e3 * (first - encoded),
        "ttft_ms": 1e3 * (first - start),
        "prefill_tokens_per_s": len(embeds) / (first - encoded),
        "decode_tokens_per_s": (new_tokens - 1) / (end - first),
    }


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    model: LoadedModel | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                start = time.perf_counter()
                model = load(request)
                answer: dict[str, Any] = {
                    "load_ms": 1e3 * (time.perf_counter() - start),
                    "executed_by": model.session.executed_by,
                }
            else:
                assert model is not None
                answer = dict(trial(model, request["question"], request["new_tokens"]))
            answer["peak_memory_bytes"] = peak_memory_bytes()
        except ConversionError as error:
            answer = {"code": error.code, "error": str(error), "hint": error.hint}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
