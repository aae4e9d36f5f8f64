"""The interface that users of coremltools know: predict, states, pictures, defaults, labels, pipelines."""

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from PIL import Image

import fastvlm_convert.mil
from fastvlm_convert.errors import BundleError
from fastvlm_convert.mil import InputError, Interpreter
from fastvlm_convert.mil.proto import model
from fastvlm_convert.mil.survey import survey_package
from tests.mil.mutations import MODEL
from tests.mil.programs import write_package

ROW = np.arange(3, dtype=np.float32)[None]


def convert(module, example, path, inputs, **settings):
    traced = torch.jit.trace(module, example, check_trace=False)
    made = ct.convert(
        traced,
        convert_to="mlprogram",
        inputs=inputs,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
        **settings,
    )
    made.save(str(path))
    return made


@pytest.fixture(scope="module")
def accumulator(tmp_path_factory):
    """coremltools' own example of a stateful model."""

    def accumulate(state_sum, x):
        total = mb.add(x=mb.read_state(input=state_sum), y=x)
        return mb.identity(x=mb.coreml_update_state(state=state_sum, value=total), name="total")

    path = tmp_path_factory.mktemp("predict") / "m.mlpackage"
    half = np.zeros((1, 3), np.float16)
    return write_package({"main": (accumulate, (half, half)), "double": (double, (half,))}, path)


def double(x):
    return mb.mul(x=x, y=np.float16(2), name="twice")


def test_a_state_is_written_read_and_reset(accumulator):
    interpreter = Interpreter(accumulator)
    state = interpreter.make_state()
    value = np.array([[1, 1 / 3, 7]], np.float32)
    state.write_state("state_sum", value)
    value[:] = 0  # a copy was taken
    assert state.read_state("state_sum").dtype == np.float16
    np.testing.assert_array_equal(state.read_state("state_sum"), np.array([[1, 1 / 3, 7]], np.float16))
    (found,) = interpreter.predict({"x": ROW}, state).values()
    np.testing.assert_array_equal(found, state.read_state("state_sum"))
    assert found[0, 2] == 9
    state.read_state("state_sum")[:] = 5
    assert state.read_state("state_sum")[0, 2] == 9
    state.reset()
    assert not state.read_state("state_sum").any()
    assert repr(state) == "State(state_sum: float16 [1, 3])"


def test_a_state_takes_only_what_fits(accumulator):
    state = Interpreter(accumulator).make_state()
    with pytest.raises(InputError, match=r"state 'state_sum' has shape \[3\], expected float16 \[1, 3\]"):
        state.write_state("state_sum", ROW[0])
    with pytest.raises(InputError, match="there is no state 'k'; there are \\['state_sum'\\]"):
        state.write_state("k", ROW)
    assert Interpreter(accumulator).make_state("double").specs == ()


def test_a_list_of_inputs_gives_a_list_of_outputs(accumulator):
    interpreter = Interpreter(accumulator)
    found = interpreter.predict([{"x": ROW}, {"x": ROW + 1}], function="double")
    assert [f["twice"].tolist() for f in found] == [[[0, 2, 4]], [[2, 4, 6]]]
    assert interpreter.predict([], function="double") == []
    with pytest.raises(InputError, match="a list of inputs cannot be run with a state"):
        interpreter.predict([{"x": ROW}], interpreter.make_state())


@pytest.mark.parametrize("kind", ["list", "int", "torch", "bfloat16", "gradient", "strided"])
def test_what_becomes_an_array(accumulator, kind):
    tensor = torch.tensor(ROW)
    given = {
        "list": ROW.tolist(),
        "int": ROW.astype(np.int64),
        "torch": tensor,
        "bfloat16": tensor.bfloat16(),
        "gradient": tensor.clone().requires_grad_(),
        "strided": np.ascontiguousarray(np.repeat(ROW, 2, 1))[:, ::2],
    }[kind]
    found = Interpreter(accumulator).predict({"x": given}, function="double")["twice"]
    assert (found.dtype, found.tolist()) == (np.float32, [[0, 2, 4]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "the inputs are given as NoneType, expected a dict"),
        (ROW, "the inputs are given as ndarray, expected a dict"),
        ([ROW], "the inputs are given as ndarray, expected a dict"),
        ({"x": None}, r"input 'x' is NoneType, expected float16 \[1, 3\]"),
        ({"x": [[1, 2], [3]]}, "input 'x' is no array"),
        ({"x": "text"}, r"input 'x' has shape \[\], expected"),
        ({"x": [["a", "b", "c"]]}, "input 'x' is <U1, expected"),
        ({"x": {"y": 1}}, "input 'x' is dict, expected"),
        ({1: ROW}, "lacks x and takes no 1"),
    ],
)
def test_what_is_no_input(accumulator, given, message):
    with pytest.raises(InputError, match=message):
        Interpreter(accumulator).predict(given, function="double")


def test_the_spec_is_a_copy(accumulator):
    interpreter = Interpreter(accumulator)
    spec = interpreter.get_spec()
    assert spec == model.Model.FromString((accumulator / MODEL).read_bytes())
    spec.description.Clear()
    assert interpreter.get_spec() != spec


def test_repr(accumulator):
    assert repr(Interpreter(accumulator)).splitlines() == [
        f"Interpreter('{accumulator}', precision='exact')",
        "  double(x: float16 [1, 3]) -> twice: float16 [1, 3]",
        "  main(x: float16 [1, 3]) -> total: float16 [1, 3]; states state_sum: float16 [1, 3] (default)",
    ]


def test_the_package_gives_its_public_names():
    assert set(fastvlm_convert.mil.__all__) <= set(dir(fastvlm_convert.mil)) | set(fastvlm_convert.mil._HOMES)
    assert fastvlm_convert.mil.State.__name__ == "State"
    with pytest.raises(AttributeError, match="no attribute 'run'"):
        fastvlm_convert.mil.run  # noqa: B018


class Halve(torch.nn.Module):
    def forward(self, x):
        return x * 0.5 + 3


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_an_image_output_is_a_picture(layout, tmp_path):
    """Rounded, clipped to 0 to 255, and RGBA with an opaque last channel, as coremltools gives them."""
    color = ct.colorlayout[layout]
    convert(
        Halve(),
        torch.zeros(1, 3, 4, 6),
        tmp_path / "m.mlpackage",
        [ct.ImageType("x", (1, 3, 4, 6), color_layout=ct.colorlayout.RGB, scale=4.0)],
        outputs=[ct.ImageType("y", color_layout=color)],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    found = Interpreter(tmp_path / "m.mlpackage").predict({"x": Image.fromarray(pixels)})["y"]
    wanted = np.clip(pixels.astype(float) * 2 + 3, 0, 255)
    assert (found.mode, found.size) == ("RGBA", (6, 4))
    shown = np.asarray(found)
    np.testing.assert_array_equal(shown[..., :3], wanted if layout == "RGB" else wanted[..., ::-1])
    assert (shown[..., 3] == 255).all()


@pytest.mark.parametrize("layout", ["GRAYSCALE", "GRAYSCALE_FLOAT16"])
def test_gray_pictures(layout, tmp_path):
    color = ct.colorlayout[layout]
    convert(
        Halve(),
        torch.zeros(1, 1, 4, 6),
        tmp_path / "m.mlpackage",
        [ct.ImageType("x", (1, 1, 4, 6), color_layout=color)],
        outputs=[ct.ImageType("y", color_layout=color)],
    )
    is_half = layout == "GRAYSCALE_FLOAT16"
    pixels = np.arange(24).reshape(4, 6).astype(np.float32 if is_half else np.uint8)
    found = Interpreter(tmp_path / "m.mlpackage").predict(
        {"x": Image.fromarray(pixels + pixels.dtype.type(0))}
    )["y"]
    assert found.mode == ("F" if is_half else "L")
    wanted = np.arange(24).reshape(4, 6) / 2 + 3
    np.testing.assert_array_equal(np.asarray(found), wanted if is_half else np.rint(wanted))


class Add(torch.nn.Module):
    def forward(self, x, y):
        return x + y


def test_optional_inputs_have_defaults(tmp_path):
    path = tmp_path / "m.mlpackage"
    default = np.full((1, 3), 2.5, np.float32)
    inputs = [ct.TensorType("x", (1, 3)), ct.TensorType("y", (1, 3), default_value=default)]
    convert(Add(), (torch.zeros(1, 3),) * 2, path, inputs, outputs=[ct.TensorType("z")])
    interpreter = Interpreter(path)
    assert str(interpreter.functions["main"].inputs[1]) == "float32 [1, 3], 2.5 by default"
    assert interpreter.predict({"x": ROW})["z"].tolist() == [[2.5, 3.5, 4.5]]
    assert interpreter.predict({"x": ROW, "y": ROW})["z"].tolist() == [[0, 2, 4]]
    with pytest.raises(InputError, match="lacks x"):
        interpreter.predict({"y": ROW})


def classifier(labels, path, **settings):
    x = torch.zeros(1, len(labels))
    settings = {"classifier_config": ct.ClassifierConfig(labels, **settings)}
    return convert(torch.nn.Softmax(-1), x, path, [ct.TensorType("x", tuple(x.shape))], **settings)


@pytest.mark.parametrize("labels", [["cat", "dog", "ant"], [7, 1 << 40, -2]])
def test_a_classifier_gives_a_label_and_probabilities(labels, tmp_path):
    path = tmp_path / "m.mlpackage"
    classifier(labels, path, predicted_feature_name="kind")
    interpreter = Interpreter(path)
    assert [v.name for v in interpreter.functions["main"].outputs] == ["kind", "kind_probs"]
    found = interpreter.predict({"x": ROW})
    assert found["kind"] == labels[2]
    assert type(found["kind"]) is type(labels[0])
    wanted = torch.softmax(torch.tensor(ROW[0]), 0).tolist()
    assert found["kind_probs"] == pytest.approx(dict(zip(labels, wanted, strict=True)), abs=1e-6)
    # the first of equals
    assert interpreter.predict({"x": np.array([[1, 1, 0]], np.float32)})["kind"] == labels[0]
    kind = "string" if isinstance(labels[0], str) else "int64"
    assert f"kind_probs: dictionary, {kind} to float64" in repr(interpreter)


def test_a_classifier_with_other_labels_than_probabilities(tmp_path):
    path = tmp_path / "m.mlpackage"
    classifier(["a", "b", "c"], path)
    spec = model.Model.FromString((path / MODEL).read_bytes())
    (function,) = spec.mlProgram.functions.values()
    classify = function.block_specializations[function.opset].operations[-1]
    labels = classify.inputs["classes"].arguments[0].value.immediateValue.list.values
    del labels[2]
    (path / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(
        BundleError, match=r"\(classify\) of function 'main' cannot run: 3 probabilities for 2"
    ):
        Interpreter(path).predict({"x": ROW})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A picture halved, brightened by a network with weights in a file, and classified."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    image = torch.zeros(1, 3, 4, 6)
    stages = [
        convert(
            Halve(),
            image,
            folder / "0.mlpackage",
            [ct.ImageType("picture", tuple(image.shape))],
            outputs=[ct.TensorType("dark")],
        ),
        convert(
            network, image, folder / "1.mlpackage", [ct.TensorType("dark", tuple(image.shape))],
            outputs=[ct.TensorType("x")],
        ),
        classifier(["cat", "dog", "ant"], folder / "2.mlpackage"),
    ]  # fmt: skip
    ct.utils.make_pipeline(*stages).save(str(folder / "m.mlpackage"))
    return folder / "m.mlpackage", network


def test_a_pipeline_runs_its_stages_in_turn(pipeline):
    path, network = pipeline
    interpreter = Interpreter(path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    found = interpreter.predict({"picture": Image.fromarray(pixels)})
    dark = torch.tensor(pixels).permute(2, 0, 1)[None] * 0.5 + 3
    with torch.no_grad():
        logits = network(dark)
    wanted = torch.softmax(logits, -1)[0].tolist()
    assert found["classLabel_probs"] == pytest.approx(
        dict(zip(["cat", "dog", "ant"], wanted, strict=True)), abs=1e-5
    )
    assert found["classLabel"] == ["cat", "dog", "ant"][int(np.argmax(wanted))]
    assert interpreter.decoded_bytes > 0
    # one stage alone
    np.testing.assert_allclose(interpreter.stages[1].predict({"dark": dark})["x"], logits, atol=1e-4)
    assert Interpreter(path, "device").predict({"picture": pixels})["classLabel"] == found["classLabel"]


def test_a_pipeline_says_where_something_happens(pipeline):
    path, network = pipeline
    interpreter, seen = Interpreter(path), []
    interpreter.predict({"picture": np.zeros((4, 6, 3), np.uint8)}, on_op=seen.append)
    assert {r.stage for r in seen} == {0, 1, 2}
    assert (
        repr(interpreter).splitlines()[1].startswith("  main(picture: RGB image, float32 [1, 3, 4, 6]) -> ")
    )
    assert "  stage 1: main(dark: float32 [1, 3, 4, 6]) -> x: float32 [1, 3]" in repr(interpreter)
    with pytest.raises(InputError, match="function 'main' lacks picture and takes no x"):
        interpreter.predict({"x": ROW})
    overflowing = np.zeros((1, 3, 4, 6), np.float32)
    overflowing[..., :3, :3] = np.finfo(np.float32).max * network[0].weight[:1].detach().sign().numpy()
    interpreter.predict({"picture": overflowing})
    assert [(n.stage, n.kind) for n in interpreter.nonfinite][:1] == [(1, "inf")]
    assert "of stage 1" in str(interpreter.nonfinite[0])


def test_the_survey_of_a_pipeline(pipeline):
    path, network = pipeline
    survey = survey_package(path)
    assert list(survey.functions) == ["stage 0, main", "stage 1, main", "stage 2, main"]
    assert survey.functions["stage 2, main"].operations == {"softmax": 1, "classify": 1}
    stored = sum(p.numel() for p in network.parameters() if p.numel() >= 10)
    assert survey.weight_bytes["float32"] >= 4 * stored


def test_a_stage_that_cannot_be_run(pipeline, tmp_path):
    path, _ = pipeline
    spec = model.Model.FromString((path / MODEL).read_bytes())
    broken = tmp_path / "m.mlpackage"
    (broken / MODEL).parent.mkdir(parents=True)
    (broken / "Manifest.json").write_bytes((path / "Manifest.json").read_bytes())
    spec.pipeline.models[1].neuralNetwork.SetInParent()
    (broken / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(
        BundleError, match="stage 1 of the pipeline is of type neuralNetwork; only ML programs"
    ):
        Interpreter(broken)
    spec.pipeline.models[1].CopyFrom(spec.pipeline.models[0])
    (broken / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(InputError, match="function 'main' lacks x"):
        Interpreter(broken).predict({"picture": np.zeros((4, 6, 3), np.uint8)})
    del spec.pipeline.models[:]
    (broken / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(BundleError, match="the pipeline has 0 stages"):
        Interpreter(broken)
