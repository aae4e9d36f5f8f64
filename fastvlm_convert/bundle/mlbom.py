"""mlbom.cdx.json: the bundle's bill of materials in CycloneDX 1.6, for those who audit what they ship.

Like everything that is hashed it depends on inputs alone: no time stamp and no serial number.
"""

import json
from typing import Any, Final

from fastvlm_convert.bundle.license import NO_LICENSE
from fastvlm_convert.manifest import Manifest, Source

MLBOM_FILE: Final = "mlbom.cdx.json"
_HASH_NOTE: Final = (
    "SHA-256 of the names and contents of the checkpoint's files, as fastvlm-convert computes it"
)


def mlbom(manifest: Manifest, base_model: str | None) -> bytes:
    """The bill of materials of a bundle.

    Args:
        manifest: The bundle's; its files are listed, and it lists all but this one.
        base_model: Id on Hugging Face of the published model that this one has the dimensions of, or None.
    """
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [{"type": "application", "name": "fastvlm-convert", "version": manifest.tool}]
            },
            "component": _model(manifest, base_model),
        },
        "components": [
            {"type": "file", "name": name, "hashes": [_sha256(entry.sha256)]}
            for name, entry in manifest.files.items()
        ],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _model(manifest: Manifest, base_model: str | None) -> dict[str, Any]:
    recipe, contract, source = manifest.recipe, manifest.contract, manifest.source
    name = "FastVLM" if base_model is None else base_model.rpartition("/")[2]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": f"{name} {recipe.name}",
        "description": f"FastVLM for {' and '.join(manifest.targets)}, converted with recipe {recipe.name}",
    }
    if source.license != NO_LICENSE:
        component["licenses"] = [{"license": {"name": f"see the file {source.license}"}}]
    ancestor: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "checkpoint",
        "name": "FastVLM checkpoint" if base_model is None else f"{base_model}, or trained from it",
        "description": f"checkpoint in the layout {source.layout}; {_HASH_NOTE}",
        "hashes": [_sha256(source.sha256)],
    }
    return {
        **component,
        "pedigree": {"ancestors": [ancestor], "notes": _notes(source)},
        "modelCard": {
            "modelParameters": {
                "task": "image-text-to-text",
                "architectureFamily": "FastVLM",
                "modelArchitecture": "LlavaQwen2ForCausalLM",
                "inputs": [{"format": "image"}, {"format": "text"}],
                "outputs": [{"format": "text"}],
            }
        },
        "properties": [
            {"name": f"fastvlm-convert:{key}", "value": str(value)}
            for key, value in (
                ("recipe", recipe.name),
                ("targets", " ".join(manifest.targets)),
                ("image_size", contract.image_size),
                ("context_length", contract.context_length),
                ("vision.storage", recipe.vision.storage),
                ("embed.storage", recipe.embed.storage),
                ("decoder.storage", recipe.decoder.storage),
                *((f"quantize.{n}", f"{rule}: {rule.scheme}") for n, rule in enumerate(recipe.quantize)),
            )
        ],
    }


def _notes(source: Source) -> str:
    if source.calibration is None:
        return "Converted without calibration data."
    return f"Calibrated on data with the SHA-256 {source.calibration}."


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}
