"""Constants in every language: the compilers take them, and they say what the manifest says."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_convert.bundle.constants.contract import client_contract
from fastvlm_convert.bundle.constants.languages import LANGUAGES, render_constants
from fastvlm_convert.errors import BundleError, TargetError
from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pipeline import export
from tests.bundles import recipe
from tests.checkpoints import GOLDEN, LLAVA

HASH = "ab" * 32
# What a language may take for something else: quotes, interpolation, escapes, comments, and beyond ASCII.
NASTY = "\\u0041 \\\\ \"q\" 'a' $x ${y} \\(z) `${w}` */ // \n\r\t\b\x00\x7f\u2028\u00e9\u6f22\U0001f600 "


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("constants") / "both"
    export(GOLDEN / LLAVA / "checkpoint", output, recipe=recipe("fp16"), targets=["onnx", "coreml"])
    return output


@pytest.fixture
def nasty(bundle):
    """The contract of a model whose prompt holds everything that must be escaped."""
    return replace(client_contract(load_manifest(bundle), HASH, "onnx"), opening=NASTY)


def test_the_contract_says_what_the_manifest_says(bundle):
    manifest = load_manifest(bundle)
    contract = client_contract(manifest, HASH, "onnx")
    decoder = manifest.artifact("onnx", "decoder")
    assert contract.manifest_sha256 == HASH
    assert contract.prompt == manifest.contract.prompt
    assert contract.eos_token_ids == manifest.contract.eos_token_ids
    assert contract.decoder.path == decoder.files[0]
    assert [t.name for t in contract.decoder.inputs] == [t.name for t in decoder.inputs]
    assert contract.vision.inputs[0].shape == (-1, 3, contract.image_size, contract.image_size)
    assert contract.cache_dtype == "float16"
    past = next(t for t in decoder.inputs if t.name == "past_key_values.0.key")
    assert contract.cache_shape == (1, past.shape[1], 0, past.shape[3])
    assert set(contract.cache_inputs) < {t.name for t in decoder.inputs}
    assert len(contract.cache_outputs) == len(contract.cache_inputs)
    assert contract.vocab_size == next(t for t in decoder.outputs if t.name == "logits").shape[2]
    assert (contract.prefill_chunk, contract.prefill) == (0, None)


def test_core_ml_has_functions_and_states(bundle):
    manifest = load_manifest(bundle)
    contract = client_contract(manifest, HASH, "coreml")
    assert contract.decoder.path == "coreml/decoder.mlpackage"
    assert (contract.decoder.function, contract.embed.function) == ("decode", "embed")
    assert contract.prefill is not None
    assert contract.prefill.function == "prefill"
    assert contract.prefill_chunk == manifest.recipe.coreml.prefill_chunk
    assert contract.cache_is_state
    assert contract.cache_dtype == "float16"
    assert contract.cache_shape[2] == contract.context_length
    assert contract.cache_outputs == ()


def test_another_target_has_none(bundle):
    with pytest.raises(TargetError, match="no constants for target 'mlx'"):
        client_contract(load_manifest(bundle), HASH, "mlx")


def test_half_a_character_fits_no_language(bundle):
    manifest = load_manifest(bundle)
    contract = replace(manifest.contract, image_token="\ud800")
    with pytest.raises(BundleError, match="half of a character"):
        client_contract(replace(manifest, contract=contract), HASH, "onnx")


def test_a_number_beyond_32_bits_fits_not_every_language(bundle):
    manifest = load_manifest(bundle)
    contract = replace(manifest.contract, image_token_id=1 << 31)
    with pytest.raises(BundleError, match="beyond 32 bits"):
        client_contract(replace(manifest, contract=contract), HASH, "onnx")


@pytest.mark.parametrize("language", LANGUAGES)
def test_sources_are_ascii_and_the_same_every_time(nasty, language):
    text = render_constants(nasty, language)
    assert text == render_constants(nasty, language)
    assert text.isascii()
    assert text.endswith("\n")
    assert not set(text) & {"\r", "\t", "\x00", "\x7f"}


def needs(*programs: str) -> None:
    """Skip where a program is not installed."""
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(*command: object, cwd: Path) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Prints the constants that a test compares, a line each: texts by their UTF-16 units.
JAVA = """
package fastvlm;
public class Show {
    public static void main(String[] a) {
        StringBuilder units = new StringBuilder();
        for (char c : BundleConstants.OPENING.toCharArray()) units.append((int) c).append(' ');
        System.out.println(units.toString().trim());
        System.out.println(BundleConstants.EOS_TOKEN_IDS);
        System.out.println(BundleConstants.RESCALE_FACTOR);
        System.out.println(BundleConstants.CACHE_SHAPE + BundleConstants.CACHE_DTYPE);
        System.out.println(BundleConstants.DECODER.inputs.get(0).name + BundleConstants.DECODER.files);
        System.out.println(BundleConstants.PREFILL == null);
    }
}
"""
KOTLIN = """
package fastvlm
fun main() {
    println(BundleConstants.OPENING.map { it.code() }.joinToString(" "))
    println(BundleConstants.EOS_TOKEN_IDS)
    println(BundleConstants.RESCALE_FACTOR)
    println(BundleConstants.CACHE_SHAPE.toString() + BundleConstants.CACHE_DTYPE)
    println(BundleConstants.DECODER.inputs[0].name + BundleConstants.DECODER.files)
    println(BundleConstants.PREFILL == null)
}
fun Char.code(): Int = this - '\\u0000'
"""
JAVASCRIPT = """
import * as c from "./BundleConstants.mjs";
console.log([...Array(c.opening.length).keys()].map((i) => c.opening.charCodeAt(i)).join(" "));
console.log(`[${c.eosTokenIds.join(", ")}]`);
console.log(c.rescaleFactor);
console.log(`[${c.cacheShape.join(", ")}]${c.cacheDtype}`);
console.log(`${c.decoder.inputs[0].name}[${c.decoder.files.join(", ")}]`);
console.log(c.prefill === null);
"""


def expected(contract) -> list[str]:
    """What these programs print."""
    units = contract.opening.encode("utf-16-le")
    return [
        " ".join(str(units[i] + 256 * units[i + 1]) for i in range(0, len(units), 2)),
        str(list(contract.eos_token_ids)),
        repr(contract.rescale_factor),
        f"{list(contract.cache_shape)}{contract.cache_dtype}",
        f"{contract.decoder.inputs[0].name}[{', '.join(contract.decoder.files)}]",
        "true",
    ]


def test_java_compiles_and_holds_the_values(nasty, tmp_path):
    needs("javac", "java")
    (tmp_path / "BundleConstants.java").write_text(render_constants(nasty, "java"))
    (tmp_path / "Show.java").write_text(JAVA)
    run("javac", "-Xlint:all", "-Werror", "-d", ".", "BundleConstants.java", "Show.java", cwd=tmp_path)
    shown = run("java", "-cp", ".", "fastvlm.Show", cwd=tmp_path)
    wanted = expected(nasty)
    wanted[2] = "0.00392156862745098"
    assert shown.splitlines() == wanted


@pytest.mark.slow
def test_kotlin_compiles_and_holds_the_values(nasty, tmp_path):
    needs("kotlinc", "java")
    (tmp_path / "BundleConstants.kt").write_text(render_constants(nasty, "kotlin"))
    (tmp_path / "Show.kt").write_text(KOTLIN)
    run("kotlinc", "BundleConstants.kt", "Show.kt", "-include-runtime", "-d", "show.jar", cwd=tmp_path)
    assert run("java", "-cp", "show.jar", "fastvlm.ShowKt", cwd=tmp_path).splitlines() == expected(nasty)


def test_javascript_runs_and_holds_the_values(nasty, tmp_path):
    needs("node")
    (tmp_path / "BundleConstants.mjs").write_text(render_constants(nasty, "javascript"))
    (tmp_path / "show.mjs").write_text(JAVASCRIPT)
    assert run("node", "show.mjs", cwd=tmp_path).splitlines() == expected(nasty)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_swift_compiles(bundle, tmp_path, target):
    needs("swiftc")
    contract = replace(client_contract(load_manifest(bundle), HASH, target), opening=NASTY)
    (tmp_path / "BundleConstants.swift").write_text(render_constants(contract, "swift"))
    units = 'BundleConstants.opening.utf16.map(String.init).joined(separator: " ")'
    (tmp_path / "main.swift").write_text(f"print({units})\n")
    run("swiftc", "BundleConstants.swift", "main.swift", "-o", "show", cwd=tmp_path)
    assert run("./show", cwd=tmp_path).splitlines() == expected(contract)[:1]


def test_swift_escapes_by_code_point(nasty):
    """Where there is no compiler: the literal as Swift's grammar has it."""
    line = next(n for n in render_constants(nasty, "swift").splitlines() if "let opening" in n)
    literal = line.partition(" = ")[2]
    for escaped, char in (("\\u{1f600}", "\U0001f600"), ("\\u{0}", "\x00"), ("\\u{2028}", "\u2028")):
        literal = literal.replace(escaped, json.dumps(char)[1:-1])
    for code in (8, 0x7F, 0xE9, 0x6F22):
        literal = literal.replace(f"\\u{{{code:x}}}", json.dumps(chr(code))[1:-1])
    assert json.loads(literal) == NASTY
