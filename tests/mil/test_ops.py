"""Every operation against torch or numpy."""

from collections import Counter

import coremltools as ct
import numpy as np
import pytest

from fastvlm_convert.mil import Interpreter
from fastvlm_convert.mil.package import open_package
from tests.mil import cases_basic, cases_conv, cases_image, cases_layers, cases_shape
from tests.mil.programs import Case, write_cases, write_merged

CASES: list[Case] = [
    *cases_basic.CASES,
    *cases_shape.CASES,
    *cases_conv.CASES,
    *cases_layers.CASES,
    *cases_image.CASES,
]


OLD_CASES = cases_image.OLD_CASES


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    path = tmp_path_factory.mktemp("ops") / "ops.mlpackage"
    write_cases(CASES, path, ct.target.iOS18)
    return Interpreter(path)


@pytest.mark.parametrize("target", ["iOS15", "iOS16"])
def test_operations_of_older_systems(target, tmp_path):
    write_merged(OLD_CASES, tmp_path / "old.mlpackage", ct.target[target])
    inputs = {
        f"c{i}_{a}": x for i, c in enumerate(OLD_CASES) for a, x in zip(c.arguments, c.inputs, strict=True)
    }
    found = list(Interpreter(tmp_path / "old.mlpackage").predict(inputs).values())
    for case in OLD_CASES:
        for want in case.wanted():
            agree(found.pop(0), want, case)
    assert not found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_operation(interpreter, number):
    case = CASES[number]
    inputs = [x.astype(np.int32) if x.dtype == np.bool_ else x for x in case.inputs]
    found = interpreter.predict(dict(zip(case.arguments, inputs, strict=True)), function=f"f{number}")
    wanted = case.wanted()
    assert len(found) == len(wanted)
    for value, want in zip(found.values(), wanted, strict=True):
        agree(value, want, case)


def agree(value, want, case):
    assert value.shape == want.shape, case.id
    assert (value.dtype.kind == "f") == (want.dtype.kind == "f"), case.id
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=case.tolerance, err_msg=case.id)


def test_each_case_holds_its_operation(interpreter):
    functions = open_package(interpreter.path).spec.mlProgram.functions
    for number, case in enumerate(CASES):
        (block,) = functions[f"f{number}"].block_specializations.values()
        assert case.op in Counter(o.type for o in block.operations), case.id
