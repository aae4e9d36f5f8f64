"""Runs what the toy backend exported, and says how to verify it."""

import json

import numpy as np

from fastvlm_convert.dataclass_io import from_plain
from fastvlm_convert.model.fastvlm import load_model
from fastvlm_convert.model.session import TorchSession
from fastvlm_convert.verification.execution import Execution, full_gates
from fastvlm_convert.weights.fold import folded_shapes
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.shapes import weight_shapes
from fastvlm_convert.weights.source import Weight
from tests.toy.exporter import CONFIG, WEIGHTS


def open_session(bundle, manifest, precision, threads, in_turn) -> TorchSession:
    config = from_plain(ModelConfig, json.loads((bundle / CONFIG).read_text()))
    numbers = np.fromfile(bundle / WEIGHTS, np.float32)
    weights, start = {}, 0
    for name, shape in sorted(folded_shapes(weight_shapes(config)).items()):
        stop = start + int(np.prod(shape))
        values = numbers[start:stop].reshape(shape)
        weights[name] = Weight(shape, "float32", lambda first, last, values=values: values[first:last])
        start = stop
    assert start == len(numbers)
    return TorchSession(load_model(config, weights, True), manifest.contract.context_length)


def executions(manifest, interpret) -> list[Execution]:
    return [Execution("toy", None, full_gates(manifest.recipe))]
