"""Every command's `--json` document follows the schema that is published of it; the schemas are strict."""

import copy
import io
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fastvlm_convert.cli.document import documents
from fastvlm_convert.evaluation.journal import JOURNALS
from fastvlm_convert.pipeline import export
from tests.bundles import copy_bundle
from tests.cli.conftest import CHECKPOINT, IMAGE, Cli
from tests.cli.test_flags import COMMANDS
from tests.published_schema import FOLDER, problems_of_document, published, validator_of


class Inputs:
    """What commands are run on; made when a command asks for it."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._request = request
        self._monkeypatch = monkeypatch
        self.folder = folder

    def apart(self, arguments: list[object]) -> list[object]:
        """Arguments of a command that keeps something, which other tests must not find."""
        self._monkeypatch.setenv("FASTVLM_CONVERT_CACHE", str(self.folder / "cache"))
        return arguments

    @cached_property
    def bundle(self) -> Path:
        return copy_bundle(self._request.getfixturevalue("fp32_bundle"), self.folder)

    @property
    def another(self) -> Path:
        return self._request.getfixturevalue("fp16_bundle")

    @property
    def damaged(self) -> Path:
        (self.bundle / "config.json").unlink()
        return self.bundle

    @property
    def pictures(self) -> Path:
        return self._request.getfixturevalue("pictures")

    @property
    def package(self) -> Path:
        export(CHECKPOINT, self.folder / "coreml", recipe="fp16", targets=["coreml"])
        return next((self.folder / "coreml").rglob("*.mlpackage"))

    @property
    def key(self) -> Path:
        pytest.importorskip("model_signing", reason="needs the extra sign")
        from cryptography.hazmat.primitives.asymmetric import ec

        from tests.delivery.test_signature import write_keys

        return write_keys(self.folder, "key", ec.generate_private_key(ec.SECP256R1()))[0]

    @property
    def zip(self) -> Path:
        from fastvlm_convert.delivery.pack import pack

        pack(self.bundle, "zip", self.folder / "packed.zip")
        return self.folder / "packed.zip"

    @property
    def quantized(self) -> Path:
        return self._request.getfixturevalue("golden_quantized")

    def kept(self, arguments: list[object]) -> list[object]:
        """Arguments of a command that finds an unfinished evaluation in the cache."""
        path = JOURNALS.path("0" * JOURNALS.digits)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return arguments

    def out(self, name: str = "out") -> Path:
        return self.folder / name


# One line a command, or more where its document has several forms: command -> its arguments.
RUNS: dict[str, list[Callable[[Inputs], list[object]]]] = {
    "inspect": [lambda i: [CHECKPOINT], lambda i: [i.quantized]],
    "run": [lambda i: [CHECKPOINT, IMAGE, "Describe.", "--max-new-tokens", 2]],
    "chat": [lambda i: [CHECKPOINT, IMAGE, "--max-new-tokens", 1]],
    "plan": [
        lambda i: [CHECKPOINT, "--recipe", "int8", "--target", "onnx", "--target", "coreml"],
        lambda i: [CHECKPOINT, "--recipe", "fp16", "--target", "mlx"],
    ],
    "quantize": [lambda i: [CHECKPOINT, "--recipe", "int8", "--calibration", "none", "-o", i.out()]],
    "export": [
        lambda i: [CHECKPOINT, "--recipe", "fp32", "--target", "onnx", "-o", i.out()],
        lambda i: [
            CHECKPOINT, "--recipe", "int4", "--calibration", i.pictures, "--target", "onnx", "-o", i.out()
        ],
    ],
    "verify": [
        lambda i: [i.bundle, "--reference", CHECKPOINT, "--images", i.pictures],
        lambda i: [i.bundle, "--reference", CHECKPOINT, "--images", i.pictures, "--self-test"],
    ],
    "evaluate": [
        lambda i: [CHECKPOINT, i.bundle, "--dataset", "demo", "--limit", 2, "--max-new-tokens", 2],
    ],
    "bench": [lambda i: [i.bundle, "--trials", 1, "--new-tokens", 2]],
    "lint": [lambda i: [i.bundle], lambda i: ["--explain", "context-beyond-training"]],
    "estimate": [lambda i: [i.bundle]],
    "report": [lambda i: [i.bundle, "-o", i.out("a.html")]],
    "scan": [lambda i: i.apart([CHECKPOINT, "--images", i.pictures, "--max-new-tokens", 1])],
    "mil": [lambda i: [i.package], lambda i: [i.package, "--profile"]],
    "recipes": [lambda i: [], lambda i: ["int4"]],
    "serve": [lambda i: ["--show-settings"]],
    "doctor": [lambda i: [], lambda i: [CHECKPOINT]],
    "bundle check": [lambda i: [i.bundle], lambda i: [i.damaged]],
    "bundle diff": [lambda i: [i.bundle, i.another], lambda i: [i.bundle, i.bundle]],
    "bundle pack": [
        lambda i: [i.bundle, "--for", "zip", "-o", i.out("a.zip")],
        lambda i: [i.bundle, "--for", "play", "-o", i.out()],
    ],
    "bundle unpack": [lambda i: [i.zip, "-o", i.out()]],
    "bundle sign": [lambda i: [i.bundle, "--key", i.key]],
    "bundle constants": [lambda i: [i.bundle, "--language", "kotlin", "-o", i.out("a.kt")]],
    "bundle vectors": [lambda i: [i.bundle, "-o", i.out("a.json")]],
    "cache show": [lambda i: i.kept([])],
    "cache clear": [lambda i: i.kept(["evaluations"])],
}  # fmt: skip
# Documents of a command beside the one that is named after it.
OTHERS = {
    "recipes": ["recipe"],
    "serve": ["serve-settings"],
    "lint": ["lint-rule"],
    "verify": ["verify-self-test"],
}
CASES = [(name, n) for name, runs in RUNS.items() for n in range(len(runs))]


@pytest.fixture
def inputs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setattr("sys.stdin", io.StringIO("Describe.\nAgain.\n"))  # what `chat` is told
    return Inputs(request, tmp_path, monkeypatch)


def names_of(command: str) -> set[str]:
    """Documents of a command."""
    return {command.replace(" ", "-"), *OTHERS.get(command, ())}


def test_every_command_is_run_here():
    assert set(RUNS) == set(COMMANDS)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_documents_follow_their_schemas(cli: Cli, inputs: Inputs, name: str, number: int):
    result = cli(*name.split(), *RUNS[name][number](inputs), "--json")
    document = json.loads(result.out)
    assert problems_of_document(document) == []
    assert document["command"] == name
    assert document["schema"].removeprefix("fastvlm-convert/") in names_of(name)
    validator = validator_of(document)
    wrong = list(damaged(validator.schema, document))
    assert len(wrong) >= 2 * len(document)  # of each key of its own, and of those within
    assert [what for what, changed in wrong if validator.is_valid(changed)] == []


def damaged(schema: dict[str, Any], document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with each key in turn left out, and misspelled; of lists only in the first entry."""
    for path in known_keys(schema, document):
        for what in ("missing", "misspelled"):
            changed = copy.deepcopy(document)
            place: Any = changed
            for key in path[:-1]:
                place = place[key]
            value = place.pop(path[-1])
            if what == "misspelled":
                place[f"{path[-1]}s"] = value
            yield f"{'.'.join(map(str, path))} {what}", changed


def known_keys(schema: dict[str, Any], value: Any) -> Iterator[tuple[Any, ...]]:
    """Paths of keys that a schema knows by name; not those of mappings."""
    for alternative in schema.get("anyOf", [schema]):
        if not jsonschema.Draft202012Validator(alternative).is_valid(value):
            continue
        if isinstance(value, list) and value and "items" in alternative:
            yield from ((0, *rest) for rest in known_keys(alternative["items"], value[0]))
        elif isinstance(value, dict) and "properties" in alternative:
            for key, inner in alternative["properties"].items():
                yield (key,)
                yield from ((key, *rest) for rest in known_keys(inner, value[key]))
        elif isinstance(value, dict) and value:
            key, inner = next(iter(value)), alternative["additionalProperties"]
            yield from ((key, *rest) for rest in known_keys(inner, value[key]))
        return


def test_every_document_is_one_that_a_command_prints():
    """Errors apart, which tests/cli/test_errors.py makes."""
    assert set(documents()) == {"error", *(name for command in RUNS for name in names_of(command))}


def test_the_published_files_are_what_the_code_says():
    files = {path: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert files == published(), "docs/schemas is out of date: run `make docs`"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_each_is_a_schema(path: Path):
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {"schema", "schema_version"} <= set(schema["required"])
    assert schema["additionalProperties"] is False


def test_null_stands_only_where_a_type_allows_it(cli: Cli, fp32_bundle: Path):
    """JSON has no NaN and no infinity; a field that may have none says so in its type."""
    document = cli("bundle", "check", fp32_bundle, "--json").document
    assert document["checks"][0]["value"] is None
    document["total_bytes"] = None
    assert problems_of_document(document) == ["$.total_bytes: None is not of type 'integer'"]


def test_a_document_of_another_version_is_refused(cli: Cli):
    document = cli("recipes", "int4", "--json").document
    document["schema_version"] += 1
    assert problems_of_document(document) == ["$.schema_version: 2 is not one of [1]"]
    assert problems_of_document({**document, "schema_version": 1, "status": "failed"}) == [
        "$.status: 'failed' is not one of ['passed']"
    ]
