"""Networks converted by coremltools' own torch front end, against torch."""

import coremltools as ct
import numpy as np
import pytest
import torch

from fastvlm_convert.mil import Interpreter
from tests.mil import modules

TOLERANCE = 1e-4

NETWORKS = {
    "ResNetBlock": (torch.randn(1, 3, 32, 32),),
    "MobileNetBlock": (torch.randn(1, 4, 12, 12),),
    "ViTBlock": (torch.randn(1, 3, 16, 16),),
    "UNetBlock": (torch.randn(1, 3, 16, 16),),
    "DetectionHead": (torch.randn(1, 3, 12, 12),),
    "Recurrent": (torch.randint(0, 9, (2, 7), dtype=torch.int32),),
    "Arithmetic": (torch.randn(2, 4, 6), torch.randn(2, 4, 6)),
}


def convert(module, example, path, target, precision=ct.precision.FLOAT32, **settings):
    traced = torch.jit.trace(module, example, check_trace=False)
    ct.convert(
        traced,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=precision,
        skip_model_load=True,
        package_dir=str(path),
        **settings,
    )
    return Interpreter(path)


def network(name):
    torch.manual_seed(0)
    module = getattr(modules, name)().eval()
    for part in module.modules():  # normalizations that do something
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, tmp_path):
    module, inputs = network(name), NETWORKS[name]
    types = [
        ct.TensorType(
            name=f"input{i}", shape=x.shape, dtype=np.int32 if x.dtype == torch.int32 else np.float32
        )
        for i, x in enumerate(inputs)
    ]
    interpreter = convert(module, inputs, tmp_path / "m.mlpackage", ct.target.iOS18, inputs=types)
    with torch.no_grad():
        wanted = module(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = interpreter.predict({f"input{i}": x.numpy() for i, x in enumerate(inputs)})
    assert len(found) == len(wanted)
    for value, want in zip(found.values(), wanted, strict=True):
        np.testing.assert_allclose(value, want.numpy(), atol=TOLERANCE, rtol=1e-5)
    assert not interpreter.nonfinite


@pytest.mark.parametrize(
    "target",
    ["iOS15", pytest.param("iOS16", marks=pytest.mark.slow), pytest.param("iOS17", marks=pytest.mark.slow)],
)
def test_network_for_older_systems(target, tmp_path):
    module, inputs = network("ViTBlock"), NETWORKS["ViTBlock"]
    types = [ct.TensorType(name="x", shape=inputs[0].shape)]
    interpreter = convert(module, inputs, tmp_path / "m.mlpackage", ct.target[target], inputs=types)
    (found,) = interpreter.predict({"x": inputs[0].numpy()}).values()
    np.testing.assert_allclose(found, module(*inputs).detach().numpy(), atol=TOLERANCE)


def test_network_in_float16(tmp_path):
    """Weights are stored as float16: `exact` differs by their rounding, `device` by that of every result."""
    module, inputs = network("ResNetBlock"), NETWORKS["ResNetBlock"]
    types = [ct.TensorType(name="x", shape=inputs[0].shape)]
    path = tmp_path / "m.mlpackage"
    exact = convert(module, inputs, path, ct.target.iOS18, ct.precision.FLOAT16, inputs=types)
    wanted = module(*inputs).detach().numpy()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())
    (found,) = exact.predict({"x": inputs[0].numpy()}).values()
    (rounded,) = Interpreter(path, "device").predict({"x": inputs[0].numpy()}).values()
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    np.testing.assert_allclose(rounded, wanted, atol=2e-2)
    assert 0 < np.abs(found - wanted).max() < np.abs(rounded - wanted).max()


def test_gpt_block_with_state(tmp_path):
    module = network("GPTBlock")
    states = [
        ct.StateType(ct.TensorType(shape=(1, 4, 8, 4), dtype=np.float16), name=name)
        for name in ("keys", "values")
    ]
    end = ct.RangeDim(1, 8, default=1)
    interpreter = convert(
        module,
        (torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 3)),
        tmp_path / "m.mlpackage",
        ct.target.iOS18,
        inputs=[
            ct.TensorType(name="token", shape=(1, 1), dtype=np.int32),
            ct.TensorType(name="mask", shape=(1, 1, 1, end)),
        ],
        states=states,
    )
    # coremltools traced with a state of its own; the cache that it stores is float16.
    module.keys.zero_()
    module.values.zero_()
    state = interpreter.make_state()
    with torch.no_grad():
        for step, token in enumerate([3, 7, 1, 10, 0]):
            inputs = (torch.tensor([[token]], dtype=torch.int32), torch.zeros(1, 1, 1, step + 1))
            wanted = module(*inputs).numpy()
            module.keys.copy_(module.keys.half().float())
            module.values.copy_(module.values.half().float())
            (found,) = interpreter.predict(
                {"token": inputs[0].numpy(), "mask": inputs[1].numpy()}, state=state
            ).values()
            # torch attends to the newest key before it is rounded, the program after
            np.testing.assert_allclose(found, wanted, atol=1e-3)
            np.testing.assert_allclose(state.read_state("keys"), module.keys.numpy(), atol=1e-3)
