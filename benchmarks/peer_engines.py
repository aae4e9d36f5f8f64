"""One text decoder in a process of its own, run by one engine; `benchmarks.peers` drives several.

    python -m benchmarks.peer_engines KIND PATH --threads 2

It reads one JSON request a line on standard input and answers with one JSON line. The process is pinned to as
many processors as it has threads. Every engine does the same work: it reads a prompt of token ids, and takes
the likeliest token at each step, whatever it is.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastvlm_convert.peak_memory import peak_memory_bytes
from fastvlm_convert.processors import usable_cpus

CONTEXT = 2048  # tokens, as our recipes have it


class Engine(Protocol):
    """A decoder with one KV cache."""

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        """Start a new sequence; logits of the last position, float32 [vocab]."""
        ...

    def feed(self, token_id: int) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""
        ...

    def greedy(self, logits: np.ndarray, steps: int) -> None:
        """Take the likeliest token and feed it, so many times."""
        ...


class _Stepping(ABC):
    """Greedy decoding for engines that hand their logits out."""

    @abstractmethod
    def feed(self, token_id: int) -> np.ndarray:
        """Append one token; its logits, float32 [vocab]."""

    def greedy(self, logits: np.ndarray, steps: int) -> None:
        for _ in range(steps):
            logits = self.feed(int(np.argmax(logits)))


class Bundle(_Stepping):
    """The decoder and the table of one of our bundles, by the code of `run`; the encoder is not loaded."""

    def __init__(self, path: Path, threads: int) -> None:
        from fastvlm_convert.io_names import ATTENTION_MASK, INPUTS_EMBEDS, LOGITS
        from fastvlm_convert.manifest import load_manifest
        from fastvlm_convert.runtime.onnx_graphs import load_graph
        from fastvlm_convert.runtime.onnx_session import OnnxSequence, OnnxWeights
        from fastvlm_convert.runtime.threads import Threads

        class TextWeights(OnnxWeights):
            """The same without the encoder."""

            def __init__(self) -> None:
                manifest, count = load_manifest(path), Threads(threads)
                decoder = manifest.artifact("onnx", "decoder")
                self.executed_by = "onnxruntime"
                self.context_length = manifest.contract.context_length
                self.num_image_tokens = manifest.contract.num_image_tokens
                self._embed = load_graph(path, manifest, "embed", threads=count)
                self.decoder = load_graph(path, manifest, "decoder", threads=count)
                self.past = [t for t in decoder.inputs if t.name not in (INPUTS_EMBEDS, ATTENTION_MASK)]
                self.present = [t.name for t in decoder.outputs if t.name != LOGITS]
                self.vocabulary = int(next(t.shape[-1] for t in decoder.outputs if t.name == LOGITS))

        self._sequence = OnnxSequence(TextWeights())

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        return self._sequence.prefill(self._sequence.embed(np.asarray(token_ids, np.int64)))

    def feed(self, token_id: int) -> np.ndarray:
        return self._sequence.decode(self._sequence.embed(np.asarray([token_id], np.int64)))


class Genai:
    """onnxruntime-genai with what its builder made."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og = onnxruntime_genai
        self._model = onnxruntime_genai.Model(config)
        self._generator: Any = None

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        params = self._og.GeneratorParams(self._model)
        # A minimum as long as the maximum forbids the end token.
        params.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(np.asarray([token_ids], np.int32))
        return self._logits()

    def feed(self, token_id: int) -> np.ndarray:
        self._generator.append_tokens(np.asarray([[token_id]], np.int32))
        return self._logits()

    def greedy(self, logits: np.ndarray, steps: int) -> None:
        """Its own loop; the first call only chooses, each further one also runs the model."""
        del logits
        for _ in range(steps + 1):
            self._generator.generate_next_token()

    def _logits(self) -> np.ndarray:
        logits = np.array(self._generator.get_logits(), np.float32)
        return logits.reshape(-1, logits.shape[-1])[-1]


class LlamaCpp(_Stepping):
    """llama.cpp through the C interface that llama-cpp-python wraps, with its default settings."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._llama = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds the pointer
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = CONTEXT, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        return self._append(token_ids)

    def feed(self, token_id: int) -> np.ndarray:
        return self._append([token_id])

    def _append(self, token_ids: Sequence[int]) -> np.ndarray:
        tokens = (ctypes.c_int32 * len(token_ids))(*token_ids)
        code = self._llama.llama_decode(
            self._context, self._llama.llama_batch_get_one(tokens, len(token_ids))
        )
        if code != 0:
            raise SystemExit(f"llama_decode gives {code}")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._size,)).copy()


class Torch(_Stepping):
    """transformers' Qwen2 in float32, not compiled."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from transformers import Qwen2ForCausalLM

        self._torch = torch
        torch.set_num_threads(threads)
        self._model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._cache: Any = None

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        self._cache = None
        return self._append(token_ids)

    def feed(self, token_id: int) -> np.ndarray:
        return self._append([token_id])

    def _append(self, token_ids: Sequence[int]) -> np.ndarray:
        with self._torch.inference_mode():
            done = self._model(
                self._torch.tensor([list(token_ids)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = done.past_key_values
        return done.logits[0, -1].float().numpy()


class Reference(_Stepping):
    """Our torch reference of a checkpoint: what divergence is measured against."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        from fastvlm_convert.checkpoint.checkpoint import open_checkpoint
        from fastvlm_convert.runtime.loaded import load_reference

        torch.set_num_threads(threads)
        self._session = load_reference(open_checkpoint(path), context_length=CONTEXT).session

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        return self._session.prefill(self._session.embed(np.asarray(token_ids, np.int64)))

    def feed(self, token_id: int) -> np.ndarray:
        return self._session.decode(self._session.embed(np.asarray([token_id], np.int64)))


KINDS = {"bundle": Bundle, "genai": Genai, "llama": LlamaCpp, "torch": Torch, "reference": Reference}


def teacher_forced(engine: Engine, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Logits that precede each token of an answer, by the engine's own steps; float32 [tokens, vocab]."""
    rows = [engine.read(prompt)]
    rows += [engine.feed(token) for token in answer[:-1]]
    return np.stack(rows)


def answer(
    engine: Engine, prompt: Sequence[int], eos_token_ids: Sequence[int], limit: int
) -> tuple[list[int], np.ndarray]:
    """The likeliest tokens up to an end token, which is the last; and the logits of each, [tokens, vocab]."""
    rows = [engine.read(prompt)]
    tokens = [int(np.argmax(rows[0]))]
    while len(tokens) < limit and tokens[-1] not in eos_token_ids:
        rows.append(engine.feed(tokens[-1]))
        tokens.append(int(np.argmax(rows[-1])))
    return tokens, np.stack(rows)


def timed(engine: Engine, prompt: Sequence[int], steps: int) -> dict[str, float]:
    """Seconds of wall and processor time of reading a prompt and of decoding."""
    marks = [(time.perf_counter(), time.process_time())]
    logits = engine.read(prompt)
    marks.append((time.perf_counter(), time.process_time()))
    engine.greedy(logits, steps)
    marks.append((time.perf_counter(), time.process_time()))
    (w0, c0), (w1, c1), (w2, c2) = marks
    return {"prefill_s": w1 - w0, "prefill_cpu_s": c1 - c0, "decode_s": w2 - w1, "decode_cpu_s": c2 - c1}


def respond(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    prompt = request["prompt"]
    if request["do"] == "time":
        found: dict[str, Any] = timed(engine, prompt, request["steps"])
    elif request["do"] == "answer":
        tokens, logits = answer(engine, prompt, request["eos_token_ids"], request["limit"])
        np.save(request["file"], logits)
        found = {"answer": tokens}
    else:
        np.save(request["file"], teacher_forced(engine, prompt, request["answer"]))
        found = {}
    return found | {"peak_memory_bytes": peak_memory_bytes()}


def main() -> None:
    """Answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    asked = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    os.sched_setaffinity(0, usable_cpus()[: asked.threads])
    engine: Engine = KINDS[asked.kind](asked.path, asked.threads)
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(respond(engine, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
