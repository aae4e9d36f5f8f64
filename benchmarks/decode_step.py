"""One decoder of `benchmarks.decode_levers` in a process of its own, which loads nothing but ONNX Runtime."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

POSITION = 288
NEXT_TOKEN = "next_token"
EMBEDS, MASK, LOGITS = "inputs_embeds", "attention_mask", "logits"


class Decoder:
    """A graph with its cache bound, as the package's own session has it."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._binding, self._cache = self._session.io_binding(), []
        self._ones = np.ones((1, 2 * POSITION), np.int64)
        for spec in self._session.get_inputs():
            if spec.name == EMBEDS:
                self._hidden = int(spec.shape[2])
            elif spec.name != MASK:
                dtype = np.float16 if "float16" in spec.type else np.float32
                values = np.zeros((1, spec.shape[1], 2 * POSITION, spec.shape[3]), dtype)
                self._cache.append(values)
                value = onnxruntime.OrtValue.ortvalue_from_numpy(values)
                self._binding.bind_ortvalue_input(spec.name, value)
                self._binding.bind_ortvalue_output(spec.name.replace("past_key_values", "present"), value)
        outputs = {spec.name: spec for spec in self._session.get_outputs()}
        self._picks = NEXT_TOKEN in outputs
        self._result: np.ndarray = np.zeros((1, 1), np.int64)
        if not self._picks:
            self._result = np.zeros((1, 1, outputs[LOGITS].shape[2]), np.float32)
        name = NEXT_TOKEN if self._picks else LOGITS
        self._binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(self._result))

    def append(self, tokens: int, length: int) -> int:
        """Read some tokens, after which the sequence is so long; the likeliest next one."""
        given, mask = np.full((1, tokens, self._hidden), 0.02, np.float32), self._ones[:, :length]
        for name, array in ((EMBEDS, given), (MASK, mask)):
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return int(self._result[0, 0]) if self._picks else int(np.argmax(self._result[0, 0].copy()))


def serve(path: Path, threads: int) -> None:
    """Take a step for every line of standard input; wall and CPU milliseconds, one JSON line each."""
    decoder = Decoder(path, threads)
    decoder.append(POSITION, POSITION)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        decoder.append(1, POSITION + 1)
        spent = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps([1e3 * seconds for seconds in spent]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
