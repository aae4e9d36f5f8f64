"""Every operation against torch or numpy."""

from collections import Counter

import coremltools as ct
import numpy as np
import pytest

from fastvlm_convert.runtime.mil.interpreter import Interpreter
from fastvlm_convert.runtime.mil.package import open_package
from tests.runtime.mil import cases_basic, cases_conv, cases_layers, cases_shape
from tests.runtime.mil.programs import Case, write_cases

CASES: list[Case] = [*cases_basic.CASES, *cases_shape.CASES, *cases_conv.CASES, *cases_layers.CASES]


OLD_CASES = cases_layers.OLD_CASES


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    path = tmp_path_factory.mktemp("ops") / "ops.mlpackage"
    write_cases(CASES, path, ct.target.iOS18)
    return Interpreter(path)


@pytest.fixture(scope="module", params=["iOS15"])
def old_package(request, tmp_path_factory):
    """One function a package: several are new in iOS 18."""
    folder = tmp_path_factory.mktemp(request.param)
    for number, case in enumerate(OLD_CASES):
        write_cases([case], folder / f"{number}.mlpackage", ct.target[request.param])
    return folder


@pytest.mark.parametrize("number", range(len(OLD_CASES)), ids=[case.id for case in OLD_CASES])
def test_operation_of_older_systems(old_package, number):
    compare(Interpreter(old_package / f"{number}.mlpackage"), OLD_CASES[number], None)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_operation(interpreter, number):
    compare(interpreter, CASES[number], f"f{number}")


def compare(interpreter, case, function):
    inputs = [x.astype(np.int32) if x.dtype == np.bool_ else x for x in case.inputs]
    found = interpreter.run(dict(zip(case.arguments, inputs, strict=True)), function)
    wanted = case.wanted()
    assert len(found) == len(wanted)
    for value, want in zip(found.values(), wanted, strict=True):
        assert value.shape == want.shape
        assert (value.dtype.kind == "f") == (want.dtype.kind == "f")
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=case.tolerance)


def test_each_case_holds_its_operation(interpreter):
    functions = open_package(interpreter.path).spec.mlProgram.functions
    for number, case in enumerate(CASES):
        (block,) = functions[f"f{number}"].block_specializations.values()
        assert case.op in Counter(o.type for o in block.operations), case.id
