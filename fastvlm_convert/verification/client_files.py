"""What clients read of a bundle, against what an export of the checkpoint would write today.

Nothing is taken from the bundle under test but its recipe: preprocessing, prompt, tokenizer and end tokens
are the checkpoint's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fastvlm_convert.errors import shown
from fastvlm_convert.json_file import parse_json
from fastvlm_convert.manifest import FILE_NAME, Contract, Manifest
from fastvlm_convert.predict.export_plan import ExportPlan, files_beside, predicted_artifacts
from fastvlm_convert.regular_file import read_file
from fastvlm_convert.verification.check import Check, equal

_TARGET: Final = "bundle"
_NAMED: Final = 3  # differences in a reason
_ABSENT: Final = object()
_BEFORE, _AFTER = 8, 20  # characters beside the first that differs
# transformers, transformers.js and onnxruntime-genai open these beside or instead of what a bundle has.
_FOREIGN: Final = (
    "chat_template.jinja", "chat_template.json", "additional_chat_templates", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "image_processor_config.json",
    "video_preprocessor_config.json", "genai_config.json",
)  # fmt: skip


def check_clients(bundle: Path, manifest: Manifest, plan: ExportPlan) -> list[Check]:
    """A check of the contract, of the artifacts' interfaces, and of each file.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        plan: What an export of the checkpoint with the manifest's recipe would do.
    """
    predicted = predicted_artifacts(plan).artifacts
    checks = [_check(FILE_NAME, "contract", differences(_plain(plan.contract), _plain(manifest.contract)))]
    known = {a.target for a in predicted}
    artifacts = [_as_json(asdict(a)) for a in manifest.artifacts if a.target in known]
    expected = [_as_json(asdict(a)) for a in predicted]
    checks.append(_check(FILE_NAME, "artifacts", differences(expected, artifacts)))
    beside = files_beside(plan, predicted)
    for name, content in beside.items():
        checks.append(_check(name, "content", _file_differences(content, bundle / name)))
    foreign = [name for name in _FOREIGN if name not in beside and (bundle / name).exists()]
    reason = f"clients would read {', '.join(foreign)}, which no export writes"
    return [*checks, equal(_TARGET, "client files", "foreign", len(foreign), reason, None)]


def check_interface(target: str, name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    """A check that what an artifact says of itself is what an export would write."""
    pairs = list(differences(dict(expected), dict(found)))
    return equal(target, name, "interface", len(pairs), "; ".join(pairs[:_NAMED]), None)


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
    """Where two values of JSON differ, in words: the path of the key, and both values."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys((*expected, *found)):
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(expected.get(key, _ABSENT), found.get(key, _ABSENT), inner)
    elif isinstance(expected, list) and isinstance(found, list):
        for number in range(max(len(expected), len(found))):
            want, have = (values[number] if number < len(values) else _ABSENT for values in (expected, found))
            if (difference := next(differences(want, have, f"{path}[{number}]"), None)) is not None:
                yield difference
                if len(expected) != len(found):  # all that follow have moved
                    return
    elif type(expected) is not type(found) or expected != found:
        yield f"{path or 'it'} is {_shown(found, expected)}, expected {_shown(expected, found)}"


def _shown(value: object, other: object) -> str:
    """A value in a few words; of a long text what stands where another begins to differ."""
    if value is _ABSENT:
        return "absent"
    if isinstance(value, str) and isinstance(other, str) and len(value) > _BEFORE + _AFTER:
        pairs = enumerate(zip(value, other, strict=False))
        at = next((n for n, (a, b) in pairs if a != b), min(len(value), len(other)))
        start, end = max(0, at - _BEFORE), at + _AFTER
        head, tail = "\u2026" if start else "", "\u2026" if end < len(value) else ""
        return shown(f"{head}{value[start:end]}{tail}")
    return shown(value)


def _check(stage: str, metric: str, found: Iterator[str]) -> Check:
    lines: Sequence[str] = list(found)
    more = f"; {len(lines) - _NAMED} more differ" if len(lines) > _NAMED else ""
    return equal(_TARGET, stage, metric, len(lines), "; ".join(lines[:_NAMED]) + more, None)


def _file_differences(expected: bytes, path: Path) -> Iterator[str]:
    try:
        content = read_file(path)
    except OSError as error:
        yield f"cannot read it: {error.strerror}"
        return
    if content == expected:
        return
    if path.suffix != ".json":
        yield "its content is not the checkpoint's"
        return
    try:
        found = parse_json(content.decode())
    except ValueError as error:
        yield f"not valid JSON: {error}"
        return
    yield from differences(json.loads(expected), found)


def _plain(contract: Contract) -> dict[str, Any]:
    plain: dict[str, Any] = _as_json(asdict(contract))
    return plain


def _as_json(value: object) -> Any:  # noqa: ANN401
    return json.loads(json.dumps(value))
