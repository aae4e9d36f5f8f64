"""The gates can fail: each fault is seen by the stage it belongs to."""

from dataclasses import replace

import numpy as np
import pytest

from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.pictures import load_image
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel, load_reference
from fastvlm_convert.session import Session
from fastvlm_convert.verification import compare as comparing
from fastvlm_convert.verification.answers import Candidate
from fastvlm_convert.verification.check import Check
from fastvlm_convert.verification.compare import Comparison
from fastvlm_convert.verification.executions import executions
from fastvlm_convert.verification.reference_run import run_questions
from tests.bundles import open_bundle
from tests.checkpoints import LLAVA, golden_cases, golden_checkpoint

QUESTIONS = [Question((load_image(c.image),), c.question) for c in golden_cases() if c.name == LLAVA]
STAGES = ["preprocessing", "image_features", "inputs_embeds", "prefill_logits", "decode_logits"]


@pytest.fixture(scope="module")
def reference():
    return load_reference(golden_checkpoint(LLAVA))


@pytest.fixture(scope="module")
def gates(fp32_bundle):
    (execution,) = executions(load_manifest(fp32_bundle), "onnx", False)
    return replace(execution.gates, max_new_tokens=16)


@pytest.fixture
def candidate(fp32_bundle):
    return open_bundle(fp32_bundle)


class Changed:
    """A session some of whose outputs are altered on the way."""

    def __init__(self, session: Session, **changes) -> None:
        self._session = session
        self._changes = changes

    def __getattr__(self, name: str):
        value = getattr(self._session, name)
        change = self._changes.get(name)
        return value if change is None else lambda *arguments: change(value(*arguments))


def compare(target, candidate, reference, questions, gates, *more) -> Comparison:
    runs = run_questions(reference, questions, gates.max_new_tokens)
    return comparing.compare(Candidate(target, candidate), runs, questions, gates, *more)


def failed(found: Comparison) -> dict[tuple[str, str], Check]:
    return {(c.stage, c.metric): c for c in found.checks if c.status != "passed"}


def stages_of(found: Comparison) -> set[str]:
    return {stage for stage, _ in failed(found)}


def test_the_bundle_passes_on_the_golden_pictures(candidate, reference, gates):
    shares: list[float] = []
    found = compare("onnx", candidate, reference, QUESTIONS, gates, shares.append)
    assert failed(found) == {}
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    by_stage = {(c.stage, c.metric): c for c in found.checks}
    assert list(by_stage) == [
        ("preprocessing", "token_ids"),
        *((stage, "sqnr_db") for stage in STAGES),
        ("greedy_text", "token_ids"),
    ]
    for stage in ("image_features", "prefill_logits", "decode_logits"):
        check = by_stage[stage, "sqnr_db"]
        assert check.exact or check.value >= 100
        assert check.threshold == 100
        assert check.executed_by == candidate.session.executed_by
    for key in (("preprocessing", "sqnr_db"), ("inputs_embeds", "sqnr_db"), ("greedy_text", "token_ids")):
        assert by_stage[key].exact
        assert by_stage[key].value is None


def test_every_stage_is_measured_as_well(candidate, reference, gates):
    found = compare("onnx", candidate, reference, QUESTIONS[:1], gates)
    metrics = {"psnr_db", "max_abs_error", "cosine_similarity"}
    logits = metrics | {"kl_mean_nats", "kl_p99_nats", "top1_agreement"}
    for stage in STAGES:
        measured = {m.metric: m for m in found.measurements if m.stage == stage}
        assert set(measured) == (logits if stage.endswith("logits") else metrics)
        assert measured["max_abs_error"].value <= 1e-4
        assert measured["cosine_similarity"].value == pytest.approx(1)
    measured = {m.metric: m.value for m in found.measurements if m.stage == "decode_logits"}
    assert measured["top1_agreement"] == 1
    assert 0 <= measured["kl_mean_nats"] <= measured["kl_p99_nats"] < 1e-6


def test_cropping_instead_of_padding_fails(candidate, reference, gates):
    found = compare(
        "onnx",
        replace(candidate, images=replace(candidate.images, mode="crop")),
        reference,
        QUESTIONS[:2],
        gates,
    )
    assert stages_of(found) == {"preprocessing", "greedy_text"}
    check = failed(found)["preprocessing", "sqnr_db"]
    assert check.value < 20
    assert check.reason.endswith("is below 100")


def test_swapped_channels_fail(candidate, reference, gates, monkeypatch):
    conversation = LoadedModel.conversation

    def swapped(self, messages) -> Prompt:
        prompt = conversation(self, messages)
        return (
            replace(prompt, images=tuple(i[:, ::-1] for i in prompt.images)) if self is candidate else prompt
        )

    monkeypatch.setattr(LoadedModel, "conversation", swapped)
    found = compare("onnx", candidate, reference, QUESTIONS[:2], gates)
    assert stages_of(found) == {"preprocessing", "greedy_text"}


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("encode_image", {"image_features", "greedy_text"}),
        ("embed", {"inputs_embeds", "decode_logits", "greedy_text"}),
        ("prefill", {"prefill_logits", "greedy_text"}),
        ("decode", {"decode_logits", "greedy_text"}),
    ],
)
def test_a_fault_is_seen_by_its_own_stage(candidate, reference, gates, method, stages):
    faulty = replace(candidate, session=Changed(candidate.session, **{method: lambda out: out[..., ::-1]}))
    assert stages_of(compare("onnx", faulty, reference, QUESTIONS[:1], gates)) == stages


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("method", "stage"),
    [("encode_image", "image_features"), ("embed", "inputs_embeds"), ("prefill", "prefill_logits")],
)
def test_nan_and_infinity_fail(candidate, reference, gates, method, stage, value):
    def spoil(out):
        out = out.copy()
        out.flat[3] = value
        return out

    faulty = replace(candidate, session=Changed(candidate.session, **{method: spoil}))
    found = compare("onnx", faulty, reference, QUESTIONS[:1], gates)
    check = failed(found)[stage, "sqnr_db"]
    assert (check.value, check.exact, check.reason) == (None, False, "the outputs hold NaN or infinity")
    assert all(m.value is None or np.isfinite(m.value) for m in found.measurements)
    spoiled = next(m for m in found.measurements if (m.stage, m.metric) == (stage, "max_abs_error"))
    assert (spoiled.value, spoiled.exact) == (None, False)


def test_one_bad_picture_among_good_ones_fails(candidate, reference, gates):
    """The worst picture counts, not the mean."""
    calls: list[int] = []

    def last_is_wrong(out):
        calls.append(1)
        return out + 1 if len(calls) == 2 else out  # features of the second picture

    faulty = replace(candidate, session=Changed(candidate.session, encode_image=last_is_wrong))
    found = compare("onnx", faulty, reference, QUESTIONS[:2], gates)
    assert ("image_features", "sqnr_db") in failed(found)


def test_an_answer_that_goes_on_where_the_references_ends_fails(candidate, reference, gates):
    """The end token counts: the same tokens and then more are another answer."""
    first = compare("onnx", candidate, reference, QUESTIONS[:1], gates)
    assert failed(first) == {}
    case = next(c for c in golden_cases() if c.name == LLAVA)
    end = case.greedy_token_ids[5]
    ended = replace(reference, eos_token_ids=(end,))
    found = compare("onnx", candidate, ended, QUESTIONS[:1], gates)
    assert stages_of(found) == {"greedy_text"}
    assert failed(found)["greedy_text", "token_ids"].reason == "1 of 1 answers differ: [0]"


def test_an_empty_answer_still_compares_a_decode_step(candidate, reference, gates):
    case = next(c for c in golden_cases() if c.name == LLAVA)
    end = (case.greedy_token_ids[0],)
    models = [replace(m, eos_token_ids=end) for m in (candidate, reference)]
    assert failed(compare("onnx", *models, QUESTIONS[:1], gates)) == {}
    faulty = replace(models[0], session=Changed(candidate.session, decode=lambda out: out * 1.001))
    found = compare("onnx", faulty, models[1], QUESTIONS[:1], gates)
    assert stages_of(found) == {"decode_logits"}


def test_text_is_measured_where_it_is_not_gated(candidate, reference, gates):
    loose = replace(gates, identical_text=False)
    faulty = replace(candidate, session=Changed(candidate.session, decode=lambda out: -out))
    found = compare("onnx", faulty, reference, QUESTIONS[:1], loose)
    assert stages_of(found) == {"decode_logits"}
    (share,) = (m for m in found.measurements if m.metric == "identical_share")
    assert (share.value, share.exact) == (0.0, False)


def test_each_model_encodes_a_picture_once(candidate, reference, gates):
    """At 1024 pixels that takes it seconds."""
    calls: list[str] = []

    def count(name):
        return lambda out: calls.append(name) or out

    models = [
        replace(m, session=Changed(m.session, encode_image=count(name)))
        for m, name in ((candidate, "candidate"), (reference, "reference"))
    ]
    assert failed(compare("onnx", *models, QUESTIONS[:2], gates)) == {}
    assert calls.count("reference") == 2
    assert calls.count("candidate") == 2  # its own pixels are the reference's
