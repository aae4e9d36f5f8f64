"""What a bundle's manifest must say of its artifacts, so that a session can feed them.

A manifest may have been edited, or belong to other files: names, dtypes and shapes are compared with what a
session relies on before anything is run, and the graphs themselves with the manifest.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from fastvlm_convert.errors import BundleError, shortened, shown
from fastvlm_convert.io_names import TensorSpec
from fastvlm_convert.manifest import Artifact, Manifest

AGAIN: Final = "copy the bundle again, or export the bundle again"

# A dimension that must be the same number wherever its letter stands; None is free.
Shape = tuple[int | str | None, ...]
Specs = Mapping[str, tuple[tuple[str, ...], Shape]]
# By component and function, "" where there is but one: inputs and outputs.
Rules = Mapping[tuple[str, str], tuple[Specs, Specs]]
Artifacts = Mapping[tuple[str, str], Artifact]

FLOATS: Final = ("float16", "float32")
_MAX_ROWS: Final = 1 << 24  # of a vocabulary whose size no shape states


def check_artifacts(manifest: Manifest, target: str, artifacts: Artifacts, rules: Rules) -> None:
    """See that the artifacts of a target are those that its session runs.

    Args:
        manifest: The bundle's manifest.
        target: The target.
        artifacts: Its artifacts by component and function.
        rules: What each must take and give.

    Raises:
        BundleError: One is missing, or has other inputs or outputs.
    """
    if len(artifacts) < sum(a.target == target for a in manifest.artifacts):
        raise malformed(f"it lists a {target} artifact twice")
    known: dict[str, int] = {"S": manifest.contract.image_size, "N": manifest.contract.num_image_tokens}
    for (component, function), (inputs, outputs) in rules.items():
        what = f"{target} {component} {function}".strip()
        if (component, function) not in artifacts:
            raise malformed(f"it has no {what}")
        artifact = artifacts[component, function]
        _check(f"the inputs of {what}", artifact.inputs, inputs, known)
        _check(f"the outputs of {what}", artifact.outputs, outputs, known)
    vocabulary = known.get("V", _MAX_ROWS)
    if not all(0 <= token < vocabulary for token in manifest.contract.eos_token_ids):
        raise malformed(
            f"eos_token_ids is {shown(manifest.contract.eos_token_ids)}, expected below {vocabulary}"
        )


def check_graph(what: str, listed: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """See that a graph has the inputs or outputs that the manifest lists.

    Args:
        what: Which they are, for the message.
        listed: By the manifest.
        found: In the graph.

    Raises:
        BundleError: They differ.
    """
    graph = {spec.name: spec for spec in found}
    for spec in listed:
        if graph.get(spec.name) != spec:
            there = _text(graph[spec.name]) if spec.name in graph else "nothing"
            raise BundleError(
                f"{what} are not what the manifest says: it lists {_text(spec)}, the graph has {there}",
                hint=AGAIN,
            )
    if len(found) != len(listed):
        raise BundleError(f"{what} are {len(found)}, the manifest lists {len(listed)}", hint=AGAIN)


def _check(what: str, specs: Sequence[TensorSpec], expected: Specs, known: dict[str, int]) -> None:
    names = [spec.name for spec in specs]
    if sorted(names) != sorted(expected):
        few = shortened(", ".join(names), 100) or "none"
        raise malformed(f"{what} are {few}; expected {shortened(', '.join(expected), 100)}")
    for spec in specs:
        dtypes, shape = expected[spec.name]
        if spec.dtype not in dtypes or not _fits(spec.shape, shape, known):
            axes = ", ".join(
                "any" if n is None else str(known.get(n, n) if isinstance(n, str) else n) for n in shape
            )
            raise malformed(f"{what}: {_text(spec)}, expected {' or '.join(dtypes)} [{axes}]")


def _fits(given: Sequence[int | str], shape: Shape, known: dict[str, int]) -> bool:
    if not given and shape[:1] == (1,):  # Core ML states no shape of what depends on a flexible input
        return True
    if len(given) != len(shape):
        return False
    for there, expected in zip(given, shape, strict=True):
        if isinstance(there, int) and there < 1:
            return False
        if isinstance(expected, str):
            if not isinstance(there, int) or known.setdefault(expected, there) != there:
                return False
        elif expected is not None and there != expected:
            return False
    return True


def _text(spec: TensorSpec) -> str:
    axes = shortened(", ".join("?" if n is None else str(n) for n in spec.shape), 80)
    return f"{shortened(spec.name, 60)}: {shortened(spec.dtype, 20)} [{axes}]"


def malformed(problem: str) -> BundleError:
    """The error of a manifest that no session can follow."""
    return BundleError(f"malformed manifest: {problem}", hint=AGAIN)
