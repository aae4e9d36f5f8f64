"""README.md of a bundle: a model card as Hugging Face reads it, with code for every platform in it."""

import json
from typing import Final

from fastvlm_convert.bundle.license import NO_LICENSE, NOTICE, is_apples
from fastvlm_convert.bundle.mlbom import MLBOM_FILE
from fastvlm_convert.exporters.backends import backend_of
from fastvlm_convert.manifest import FILE_NAME, VERIFICATION_FILE, Manifest
from fastvlm_convert.weights.model_config import ModelConfig
from fastvlm_convert.weights.published import DECODERS, published_config

CARD_FILE: Final = "README.md"
_OWNER: Final = "apple"


def base_model(config: ModelConfig) -> str | None:
    """Id on Hugging Face of the published model that one has the dimensions of, or None."""
    for size in DECODERS:
        published = published_config(size)
        if config.vision.stages == published.vision.stages and _shape(config) == _shape(published):
            return f"{_OWNER}/FastVLM-{size.upper()}"
    return None


def _shape(config: ModelConfig) -> tuple[int, ...]:
    """What fine-tuning does not change; the vocabulary it may."""
    decoder = config.decoder
    return (
        decoder.hidden_size, decoder.num_layers, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim,
        decoder.intermediate_size,
    )  # fmt: skip


def model_card(manifest: Manifest, base: str | None, license_text: str | None) -> bytes:
    """The content of a bundle's README.md.

    Its length does not depend on the size of any file, so that a plan can predict it.

    Args:
        manifest: The bundle's, but for this file and the bill of materials.
        base: Id on Hugging Face of the model it is based on, or None.
        license_text: The model's license, or None where there is none.
    """
    title = "FastVLM" if base is None else base.rpartition("/")[2]
    parts = [
        _front_matter(manifest, base, license_text),
        f"# {title} ({manifest.recipe.name})\n",
        f"{_introduction(manifest, base)}\n",
        "## Use it\n",
        *(f"{section.rstrip()}\n" for section in _sections(manifest)),
        "## Files\n",
        _files(manifest),
        "## How it was made\n",
        _making(manifest),
        "## What was verified\n",
        _verification(),
        "## License\n",
        _license(manifest, license_text),
    ]
    return "\n".join(parts).encode()


def _sections(manifest: Manifest) -> list[str]:
    found = [backend_of(target).card_section(manifest, target) for target in manifest.targets]
    return [section for section in found if section]


def _front_matter(manifest: Manifest, base: str | None, license_text: str | None) -> str:
    """YAML between dashes; texts are written as JSON, which YAML is."""
    fields: dict[str, str | list[str]] = {}
    if license_text is None:
        fields["license"] = "unknown"
    elif is_apples(license_text):
        fields |= {"license": "apple-amlr", "license_link": manifest.source.license}
    else:
        fields |= {
            "license": "other",
            "license_name": "see-license-file",
            "license_link": manifest.source.license,
        }
    if base is not None:
        fields["base_model"] = [base]
        if manifest.recipe.quantize:
            fields["base_model_relation"] = "quantized"
    libraries = (backend_of(target).card_library for target in manifest.targets)
    if (library := next((name for name in libraries if name is not None), None)) is not None:
        fields["library_name"] = library
    fields["pipeline_tag"] = "image-text-to-text"
    fields["tags"] = ["fastvlm", *manifest.targets]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _introduction(manifest: Manifest, base: str | None) -> str:
    contract = manifest.contract
    made_of = (
        "a FastVLM checkpoint"
        if base is None
        else f"[{base}](https://huggingface.co/{base}), or a model trained from it"
    )
    return (
        f"A vision language model, converted from {made_of}. It takes pictures of "
        f"{contract.image_size} x {contract.image_size} pixels, which become "
        f"{contract.num_image_tokens} tokens each, and conversations of up to "
        f"{contract.context_length} tokens."
    )


def _files(manifest: Manifest) -> str:
    rows = ["| file | MB |", "|---|---:|"]
    for artifact_file in dict.fromkeys(file for a in manifest.artifacts for file in a.files):
        rows.append(f"| `{artifact_file}` | {_megabytes(manifest.files[artifact_file].size)} |")
    total = sum(entry.size for entry in manifest.files.values())
    rows.append(f"| everything, with what clients read beside these | {_megabytes(total)} |")
    rows += [
        "",
        f"`{FILE_NAME}` has the size and the SHA-256 of every file, and everything an app must know.",
        "",
    ]
    return "\n".join(rows)


def _megabytes(size: int) -> str:
    """Always as long, whatever the size: a plan knows some sizes only to within some hundred bytes."""
    return f"{size / 1e6:9.2f}"


def _making(manifest: Manifest) -> str:
    recipe, source = manifest.recipe, manifest.source
    rules = [f"- `{r}`: {r.scheme}, {r.solver}" for r in recipe.quantize if r.scheme != "float"]
    stored = (
        f"{recipe.vision.storage} (image encoder, projector), {recipe.embed.storage} (embedding), "
        f"{recipe.decoder.storage} (decoder)"
    )
    lines = [
        f"Made by fastvlm-convert {manifest.tool} with the recipe `{recipe.name}`. Weights are stored as "
        + stored
        + (", but for these layers, which are quantized:" if rules else "."),
        "",
        *rules,
        *([""] if rules else []),
        f"- checkpoint: SHA-256 `{source.sha256}`",
        f"- calibration data: {f'SHA-256 `{source.calibration}`' if source.calibration else 'none'}",
        f"- bill of materials: [{MLBOM_FILE}]({MLBOM_FILE}) (CycloneDX)",
        "",
    ]
    return "\n".join(lines)


def _verification() -> str:
    return (
        f"[{VERIFICATION_FILE}]({VERIFICATION_FILE}) has every check and figure, if it is there: "
        "`fastvlm-convert verify BUNDLE --reference CHECKPOINT --record` writes it. Without it, nothing "
        "about this bundle's answers was recorded.\n\n"
        "`fastvlm-convert bundle check BUNDLE` sees that every file is what the manifest says.\n"
    )


def _license(manifest: Manifest, license_text: str | None) -> str:
    if license_text is None or manifest.source.license == NO_LICENSE:
        return "The checkpoint brought no license; see that you may use it.\n"
    license = manifest.source.license
    return f"The model's license is in [{license}]({license}), what was changed in [{NOTICE}]({NOTICE}).\n"
