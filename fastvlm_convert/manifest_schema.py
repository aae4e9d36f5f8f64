"""The JSON schema of fastvlm_manifest.json."""

from typing import Any

from fastvlm_convert.dataclass_io import schema_of
from fastvlm_convert.manifest import SCHEMA, SCHEMA_VERSION, Manifest
from fastvlm_convert.targets import BACKENDS


def manifest_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of manifests, for those who read them in other languages.

    It knows every key, type and choice; rules between values only the loader knows.
    """
    schema = schema_of(Manifest)
    head = {"schema": {"enum": [SCHEMA]}, "schema_version": {"enum": [SCHEMA_VERSION]}}
    schema["properties"] = {**head, **schema["properties"]}
    schema["required"] = [*head, *schema["required"]]
    artifact = schema["properties"]["artifacts"]["items"]
    artifact["properties"]["target"] = {"enum": list(BACKENDS)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of a bundle of fastvlm-convert",
        **schema,
    }
