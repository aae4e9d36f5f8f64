"""Every core operation of coremltools, in every version, is run or listed with the reason why not."""

import pytest
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from fastvlm_convert.mil.ops.table import CONSTEXPRS, OPS, UNSUPPORTED
from fastvlm_convert.mil.plan import CONTROL, knows
from tests.mil.test_interpreter import RANDOM
from tests.mil.test_ops import CASES, OLD_CASES

CORE = SSAOpRegistry.core_ops
LOWERED = {"read_state", "write_state"}  # coremltools writes `coreml_update_state` as these


def test_every_core_operation_is_run_or_listed():
    assert len(CORE) >= 168
    assert {name for name in CORE if not knows(name)} == set(UNSUPPORTED)
    assert not any(knows(name) for name in UNSUPPORTED)
    assert all(len(reason) > 20 for reason in UNSUPPORTED.values())


def test_we_know_nothing_that_coremltools_does_not():
    assert (OPS.keys() | CONSTEXPRS.keys() | CONTROL) - CORE.keys() <= LOWERED


@pytest.mark.parametrize("name", sorted(OPS.keys() & CORE.keys()))
def test_the_inputs_are_those_of_every_version(name):
    for version, operation in CORE[name].items():
        known = operation.input_spec.input_types
        assert set(known) <= set(OPS[name].inputs), version
        required = {p.name for p in OPS[name].inputs.values() if p.required}
        assert required <= {key for key, value in known.items() if not value.optional}, version


def test_every_operation_is_tested():
    elsewhere = {"read_state", "classify", *RANDOM}
    assert set(OPS) - {case.op for case in [*CASES, *OLD_CASES]} - elsewhere == set()
