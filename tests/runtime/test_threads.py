from importlib import import_module

import pytest

from fastvlm_convert.errors import BundleError
from fastvlm_convert.runtime.sessions import SESSIONS, open_session
from fastvlm_convert.runtime.threads import DEFAULT_THREADS, Threads, refuse_threads
from tests.bundles import manifest_of


@pytest.mark.parametrize("target", [target for target in SESSIONS if target != "onnx"])
def test_a_runtime_that_chooses_its_threads_refuses_a_number(fp32_bundle, target):
    pytest.importorskip("mlx.core" if target == "mlx" else "coremltools")
    import_module(SESSIONS[target])
    with pytest.raises(BundleError, match=f"runtime of {target} chooses its threads itself, and 2") as caught:
        open_session(fp32_bundle, manifest_of(fp32_bundle), target, None, Threads(2))
    assert "onnx" in str(caught.value.hint)


def test_nothing_is_refused_where_nothing_is_asked():
    refuse_threads("coreml", DEFAULT_THREADS)
    refuse_threads("mlx", Threads(spinning=False))
