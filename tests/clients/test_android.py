"""`examples/android`: its core, compiled by kotlinc, answers with the tokens that `run` gives.

What it needs that Python's environment does not bring: a JDK, `kotlinc` (1.3 or newer), Debian's `junit4` and
ONNX Runtime's Java API (see `onnxruntime_java`).
"""

import base64
import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.bundle.constants.contract import client_contract
from fastvlm_convert.bundle.constants.languages import render_constants
from fastvlm_convert.bundle.vectors import ODD_TEXTS, golden_case, golden_texts, golden_vectors
from fastvlm_convert.demo import check_samples
from fastvlm_convert.errors import TokenizerError
from fastvlm_convert.manifest import load_manifest, manifest_sha256
from fastvlm_convert.pipeline import export
from fastvlm_convert.preprocess import ImageSettings, pixel_values, square
from fastvlm_convert.progress import ignore_share
from fastvlm_convert.prompt import Text
from fastvlm_convert.recipe import without_data
from fastvlm_convert.runtime.loaded import load_bundle
from tests.bundles import export_bundle, recipe
from tests.checkpoints import GOLDEN, HF, LLAVA
from tests.clients.onnxruntime_java import OnnxRuntimeJava, onnxruntime_java

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "android"
JARS = Path("/usr/share/java")  # where Debian puts them
JUNIT = (JARS / "junit4.jar", JARS / "hamcrest-core.jar")
JDK7 = JARS / "kotlin-stdlib-jdk7.jar"  # of Kotlin before 1.8, which has `use` in a jar of its own
RECIPES = ("android-int4", "int4", "fp16", "fp32", "web-small")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> OnnxRuntimeJava:
    """ONNX Runtime's Java API; skips where anything is not installed."""
    missing = [name for name in ("java", "kotlinc") if shutil.which(name) is None]
    missing += [str(jar) for jar in JUNIT if not jar.is_file()]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install default-jdk kotlin junit4)")
    return onnxruntime_java(tmp_path_factory.mktemp("runtime"))


def class_path(runtime: OnnxRuntimeJava, *jars: Path) -> str:
    """Some jars, and those that every program here needs."""
    old = (JDK7,) if JDK7.is_file() else ()
    return ":".join(map(str, (*jars, runtime.jar, *JUNIT, *old)))


def compile_kotlin(runtime: OnnxRuntimeJava, output: Path, *sources: Path):
    """Compile sources to a jar, Kotlin's own classes included."""
    command = ["kotlinc", "-jvm-target", "1.8", "-cp", class_path(runtime), *sources, "-include-runtime"]
    command += ["-d", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def constants(bundle: Path, folder: Path) -> Path:
    """`BundleConstants.kt` of a bundle."""
    contract = client_contract(load_manifest(bundle), manifest_sha256(bundle), "onnx")
    file = folder / "BundleConstants.kt"
    file.write_text(render_constants(contract, "kotlin"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """A bundle of the demo checkpoint in each recipe, and one that crops."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in (*RECIPES, "crop"):
        settings = recipe("fp16", common={"image_mode": "crop"}) if name == "crop" else recipe(name)
        export(
            ROOT / "checkpoints" / "fastvlm-demo",
            folder / name,
            recipe=without_data(settings),
            targets=["onnx"],
        )
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def core(runtime, bundles, tmp_path_factory) -> Path:
    """The example and its tests, compiled."""
    folder = tmp_path_factory.mktemp("core")
    sources = (EXAMPLE / "core/src/main", EXAMPLE / "core/src/test", EXAMPLE / "desktop/src/main")
    compile_kotlin(runtime, folder / "core.jar", *sources, constants(bundles["fp16"], folder))
    return folder / "core.jar"


def java(runtime: OnnxRuntimeJava, classes: tuple[Path, ...], *arguments: object) -> str:
    """What a Java program prints; it must succeed."""
    command = ["java", *runtime.options, "-cp", class_path(runtime, *classes), *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, encoding="utf-8", env=runtime.environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(runtime, classes, bundle, vectors, *names, **properties):
    """Run test classes of the example."""
    facts = {"bundle": bundle, "vectors": vectors, **properties}
    options = [f"-Dfastvlm.{name}={value}" for name, value in facts.items()]
    return java(runtime, classes, *options, "org.junit.runner.JUnitCore", *(f"fastvlm.{n}" for n in names))


def odd_texts(count: int) -> list[str]:
    """Texts of pieces that meet in odd ways: the same ones every time."""
    pieces = (
        "a", "B", "the", " the", "'s", "'S", "'\u017f", "'lL", "'re", "1", "23", "\u0661", "\u00bd", " ",
        "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u0085", "\x1c", "\u200b", "\ufeff",
        "\x00", "\u00e9",
        "e\u0301", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u212b", "\u2126", "\ufb01", "\u0f43", "\U0001d15e",
        "\U0001f600", "\u200d", "\ufe0f", "\u6f22", "\u0928\u093f", "!", "...", "<|im_end|>", "<image>",
        "<|im_start|>", "<", "|", "_", "-", "\u0130", "\u01c5", "\u02b0", "\u0300", "\U000e0001", "\ue000",
    )  # fmt: skip
    draw = random.Random(11)
    return ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(count)]


def many_vectors(bundle: Path) -> str:
    """Vectors with every check picture of the demo, and many odd texts."""
    model = load_bundle(bundle)
    vectors = golden_vectors(bundle, "onnx", model, ignore_share)
    cases = [
        golden_case(model, f"check {n}", image, question.question)
        for n, (image, question) in enumerate(check_samples())
    ]
    return replace(vectors, cases=(*vectors.cases, *cases)).to_json()


def test_the_unit_tests_pass_with_the_vectors_of_the_command(runtime, core, bundles, tmp_path):
    model = load_bundle(bundles["fp16"])
    (tmp_path / "v.json").write_text(golden_vectors(bundles["fp16"], "onnx", model, ignore_share).to_json())
    out = run_tests(runtime, (core,), bundles["fp16"], tmp_path / "v.json", "GoldenTest", "TokenizerTest")
    assert "OK (11 tests)" in out


@pytest.mark.parametrize("name", [*RECIPES, "crop"])
def test_answers_have_the_tokens_of_run(runtime, core, bundles, tmp_path, name):
    vectors = many_vectors(bundles[name])
    (tmp_path / "v.json").write_text(vectors)
    compile_kotlin(runtime, tmp_path / "constants.jar", constants(bundles[name], tmp_path))
    classes = (tmp_path / "constants.jar", core)
    out = run_tests(runtime, classes, bundles[name], tmp_path / "v.json", "GoldenTest")
    tokens = sum(len(case["token_ids"]) for case in json.loads(vectors)["cases"])
    assert f"tokens equal: {tokens} of {tokens} in 19 answers" in out
    assert "OK (9 tests)" in out


def test_a_wrong_vector_is_noticed(runtime, core, bundles, tmp_path):
    """So that the tests above cannot pass by comparing nothing."""
    value = json.loads(
        golden_vectors(bundles["fp16"], "onnx", load_bundle(bundles["fp16"]), ignore_share).to_json()
    )
    case = value["cases"][1]
    case["square_sha256"] = hashlib.sha256(b"").hexdigest()
    case["segments"][1][3] += 1
    case["token_ids"][-1] += 1
    case["first_logits"]["values"][5] += 2 * case["first_logits"]["tolerance"]
    value["texts"][2]["token_ids"][-1] += 1
    (tmp_path / "v.json").write_text(json.dumps(value))
    with pytest.raises(AssertionError) as caught:
        run_tests(runtime, (core,), bundles["fp16"], tmp_path / "v.json", "GoldenTest", "TokenizerTest")
    for test in ("picturesAreResized", "textsHave", "promptsHave", "featuresAndFirst", "answersHave"):
        assert f") {test}" in str(caught.value)


def test_constants_of_another_bundle_are_refused(runtime, core, bundles, tmp_path):
    image = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(image)
    with pytest.raises(AssertionError, match="belongs to another bundle"):
        java(runtime, (core,), "fastvlm.desktop.MainKt", bundles["fp32"], image, "Hi")


def test_the_desktop_program_answers(runtime, core, bundles):
    image = ROOT / "checkpoints" / "fastvlm-demo" / "check_images" / "14.png"
    question = "What color is the square?"
    stream = load_bundle(bundles["fp16"]).ask(image, question)
    stream.finish()
    out = java(runtime, (core,), "fastvlm.desktop.MainKt", bundles["fp16"], image, question)
    assert out == f"{stream.text}\n"


def resized_cases(folder: Path) -> Path:
    """Pictures of many shapes in every mode with every filter, as Pillow has them."""
    draw = np.random.default_rng(11)
    cases = []
    for mode in ("pad", "crop"):
        for resampling in ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest"):
            for width, height in (
                (1, 1),
                (64, 64),
                (64, 20),
                (37, 64),
                (200, 31),
                (13, 300),
                (127, 129),
                (640, 480),
            ):
                image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
                std = (0.5, 0.25, 0.3) if width == 37 else (1.0, 1.0, 1.0)
                mean = (0.4, 0.5, 0.6) if width in (37, 200) else (0.0, 0.0, 0.0)
                settings = ImageSettings(64, mode, resampling, 1 / 255, mean, std)
                pixels = pixel_values(image, settings)
                picture = {"width": width, "height": height}
                cases.append(
                    {
                        "name": f"{mode} {resampling} {width} x {height}",
                        **dataclasses.asdict(settings),
                        "ground": settings.ground,
                        "picture": {**picture, "rgb_base64": base64.b64encode(image.tobytes()).decode()},
                        "square_sha256": hashlib.sha256(square(image, settings).tobytes()).hexdigest(),
                        "pixel_values_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
                    }
                )
    path = folder / "resized.json"
    path.write_text(json.dumps(cases))
    return path


def test_every_shape_mode_and_filter_is_pillows(runtime, core, bundles, tmp_path):
    (tmp_path / "v.json").write_text('{"cases": [], "texts": []}')
    file = resized_cases(tmp_path)
    out = run_tests(runtime, (core,), bundles["fp16"], tmp_path / "v.json", "ResizeTest", resized=file)
    assert "pictures equal: 96" in out
    assert "OK (1 test)" in out


@pytest.mark.parametrize("name", [LLAVA, HF])
def test_odd_texts_have_the_same_tokens(runtime, core, bundles, tmp_path, name):
    """With tokenizers that have every byte, as the released one does; the demo's is of English alone."""
    bundle = export_bundle(GOLDEN / name / "checkpoint", tmp_path / "bundle")
    model = load_bundle(bundle)
    assert model.prompt_format == load_bundle(bundles["fp16"]).prompt_format  # that of the core's constants
    texts = golden_texts(model, [*ODD_TEXTS, *odd_texts(600)])
    assert len(texts) == len(ODD_TEXTS) + 600
    value = {"cases": [], "texts": [dataclasses.asdict(text) for text in texts]}
    (tmp_path / "v.json").write_text(json.dumps(value))
    out = run_tests(runtime, (core,), bundle, tmp_path / "v.json", "TokenizerTest")
    assert f"texts equal: {len(texts)}" in out
    assert "OK (2 tests)" in out


def test_texts_that_the_vocabulary_cannot_express_are_left_out(bundles):
    """So that a count of texts says something."""
    model = load_bundle(bundles["fp16"])
    with pytest.raises(TokenizerError):
        model.tokenizer.encode_texts([Text("\ud800")])
    assert golden_texts(model, ["\ud800", "a"])[0].text == "a"
