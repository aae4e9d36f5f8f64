"""What stands on a page, and what can never get onto it."""

import re

import pytest
from PIL import Image

from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.report.page import SECTIONS
from fastvlm_convert.report.report import make_report
from fastvlm_convert.report.sources.lint import About, sorted_lint
from fastvlm_convert.report.sources.verification import LayerNoise
from fastvlm_convert.verification.check import at_least, at_most, not_run
from tests.bundles import copy_bundle, edit_manifest
from tests.report.pages import BY, HOSTILE, Elements, answer, page, verification


def test_it_is_whole_without_any_findings(fp32_bundle):
    made = make_report(fp32_bundle)
    elements = Elements(made.html)
    assert [section.id for section in made.sections] == list(SECTIONS)
    assert [attributes["id"] for attributes in elements.named("section")] == list(SECTIONS)
    assert "fp32 has not been verified." in elements.text
    missing = [section for section in made.sections if section.status == "not_run"]
    assert {section.id for section in missing} >= {"targets", "answers", "divergence", "layers", "latency"}
    for section in missing:
        commands = [s.command for s in missing].count(section.command)
        assert section.command is not None
        assert elements.text.count(section.command) == commands + 1  # and once among what was not run


def test_the_same_input_gives_the_same_bytes(fp32_bundle, tmp_path):
    copy = copy_bundle(fp32_bundle, tmp_path).rename(tmp_path / fp32_bundle.name)
    assert make_report(copy).html == make_report(fp32_bundle).html


def test_nothing_is_loaded_from_anywhere(fp32_bundle):
    text = page(fp32_bundle, verification(answers=[answer("The star is red.")]))
    elements = Elements(text)
    (policy,) = [
        m["content"] for m in elements.named("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    addresses = [
        a[key] for _, a in elements.tags for key in ("src", "href", "srcset", "data", "action") if key in a
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)


class TestWhatOthersWrote:
    """Texts of models, files and users are texts, wherever they stand."""

    @pytest.fixture
    def elements(self, fp32_bundle, tmp_path):
        bundle = copy_bundle(fp32_bundle, tmp_path)
        edit_manifest(bundle, lambda m: m["recipe"].update(name=HOSTILE, description=HOSTILE))
        found = verification(
            checks=[not_run(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
            answers=[
                answer(HOSTILE, picture=HOSTILE, question=HOSTILE),
                answer("The star is red.", executed_by=HOSTILE, question=HOSTILE, picture=None),
            ],
            layers=[LayerNoise(HOSTILE, HOSTILE, 12.0, False, HOSTILE)],
        )
        rules = sorted_lint(
            (Outcome(HOSTILE, "error", "failed", HOSTILE, HOSTILE),),
            {HOSTILE: About(HOSTILE, HOSTILE, HOSTILE)},
        )
        return Elements(page(bundle, found, lint=rules))

    def test_nothing_becomes_an_element(self, elements):
        assert elements.named("script") == []
        assert [a for _, a in elements.tags if any(key.startswith("on") for key in a)] == []
        assert all(a["src"].startswith("data:") for a in elements.named("img"))
        assert {tag for tag, _ in elements.tags} <= {
            "html", "head", "meta", "title", "link", "style", "body", "header", "nav", "main", "section",
            "footer", "h1", "h2", "h3", "p", "div", "span", "ul", "ol", "li", "dl", "dt", "dd", "a", "strong",
            "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure",
            "figcaption", "ins", "del", "svg", "g", "path", "text", "desc", "defs", "clippath", "rect", "use",
            "br",
        }  # fmt: skip

    def test_it_can_be_read(self, elements):
        assert elements.text.count("<script>alert(1)</script>") > 10
        assert "{{ 7 * 7 }}" in elements.text
        assert "$x_1$" in elements.text


class TestTheVerdict:
    def test_passed(self, fp32_bundle):
        text = Elements(page(fp32_bundle, verification())).text
        assert "fp32 answers like its checkpoint. All 2 checks passed on 16 questions, for ONNX." in text

    def test_failed_names_where(self, fp32_bundle):
        checks = [
            at_least("onnx", "decode_logits", "sqnr_db", 12.0, 50.0, BY),
            not_run("onnx", "x", "y", "why"),
        ]
        text = Elements(page(fp32_bundle, verification(checks))).text
        assert "fp32 does not answer like its checkpoint." in text
        assert "1 of 2 checks failed on 16 questions, the first of them in decode logits (ONNX)." in text
        assert "12.0 is below 50" in text

    def test_what_was_not_run_is_not_passed(self, fp32_bundle):
        checks = [
            at_most("onnx", "end_to_end", "kl_mean_nats", 0.0, 0.02, BY),
            not_run("onnx", "x", "y", "no Mac"),
        ]
        text = Elements(page(fp32_bundle, verification(checks))).text
        assert "It is not proven that fp32 answers like its checkpoint." in text
        assert "no Mac" in text

    def test_an_interpreter_is_no_device(self, fp32_bundle):
        checks = [at_least("coreml", "decode_logits", "sqnr_db", 72.0, 50.0, "interpreter (exact)")]
        assert "cannot test Apple's kernels" in Elements(page(fp32_bundle, verification(checks))).text

    def test_the_check_nearest_to_its_gate_is_named(self, fp32_bundle):
        checks = [
            at_least("onnx", "prefill_logits", "sqnr_db", 90.0, 50.0, BY),
            at_least("onnx", "decode_logits", "sqnr_db", 51.0, 50.0, BY),
            at_most("onnx", "end_to_end", "kl_mean_nats", 0.001, 0.02, BY),
        ]
        text = Elements(page(fp32_bundle, verification(checks))).text
        assert "decode logits: 51 SQNR dB, gate \u2265 50" in text


class TestAnswers:
    def test_what_differs_is_marked_on_both_sides(self, fp32_bundle):
        text = page(fp32_bundle, verification(answers=[answer("The star is blue.")]))
        assert "The star is <del>red</del>." in text
        assert "The star is <ins>blue</ins>." in text
        assert "from token 3 on" in text

    def test_those_that_differ_come_first(self, fp32_bundle):
        same = answer("It is red.", "It is red.", question="First?")
        other = answer("The star is blue.", question="Second?")
        text = Elements(page(fp32_bundle, verification(answers=[same, other]))).text
        assert text.index("Second?") < text.index("First?")
        assert "1 of 2 questions is answered in other words" in text
        assert "1 answer the same" in text

    def test_a_picture_of_the_folder_is_embedded(self, fp32_bundle, tmp_path):
        Image.new("RGB", (600, 300), "red").save(tmp_path / "00.png")
        text = page(fp32_bundle, verification(answers=[answer("The star is red.")]), images=tmp_path)
        (picture,) = Elements(text).named("img")
        assert picture["src"].startswith("data:image/jpeg;base64,")
        assert (picture["width"], picture["height"]) == ("144", "72")

    @pytest.mark.parametrize("label", ["../secret.png", "/etc/passwd", "none.png", "text.png", "a\0b"])
    def test_one_that_is_not_there_is_said(self, fp32_bundle, tmp_path, label):
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        folder = tmp_path / "photos"
        folder.mkdir()
        (folder / "text.png").write_text("no picture")
        elements = Elements(
            page(fp32_bundle, verification(answers=[answer("A", picture=label)]), images=folder)
        )
        assert elements.named("img") == []
        assert "not in the folder" in elements.text or "not an image" in elements.text

    def test_several_pictures_of_one_question(self, fp32_bundle, tmp_path):
        for name in ("a.png", "b.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        found = verification(answers=[answer("A", picture="a.png, b.png")])
        assert len(Elements(page(fp32_bundle, found, images=tmp_path)).named("img")) == 2

    def test_without_a_folder_the_page_says_how(self, fp32_bundle):
        text = page(fp32_bundle, verification(answers=[answer("The star is red.")]))
        assert "give the folder of the pictures with --images" in text


def test_findings_of_lint_stand_with_their_severity(fp32_bundle):
    outcomes = (
        Outcome("quiet", "error", "passed", "nothing", None),
        Outcome("later", "info", "failed", "it is so", None),
        Outcome("first", "error", "failed", "it breaks", "onnx/decoder.onnx"),
        Outcome("open", "error", "not_run", "no header", None),
    )
    text = Elements(
        page(
            fp32_bundle, lint=sorted_lint(outcomes, {"first": About("why", "where it is said", "what to do")})
        )
    ).text
    assert text.index(
        "error first Why. What to do. where it is said onnx/decoder.onnx: it breaks"
    ) < text.index("info later it is so")
    assert "2 findings; 1 rule found nothing; 1 could not be applied." in text
    assert "not run lint open : no header" in text
