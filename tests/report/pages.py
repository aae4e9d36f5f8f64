"""Pages of made-up findings about a real bundle, and what is in them."""

import html.parser
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fastvlm_convert.outcomes import Outcome
from fastvlm_convert.report.answers import by_question
from fastvlm_convert.report.page import Sources, render, sections_of
from fastvlm_convert.report.pictures import embedded
from fastvlm_convert.report.sources.bench import read_bench
from fastvlm_convert.report.sources.bundle import read_bundle
from fastvlm_convert.report.sources.estimates import read_estimates
from fastvlm_convert.report.sources.evaluation import read_evaluation
from fastvlm_convert.report.sources.lint import About, sorted_lint
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.report.sources.verification import LayerNoise, Verification, verdicts
from fastvlm_convert.report.verdict import verdict_of
from fastvlm_convert.verification.answers import Answer, figures_of
from fastvlm_convert.verification.check import Check, at_least, at_most, not_run, status_of
from tests.report import documents

BY = "onnxruntime 1.32.0"
ABSENT = NotRun("not part of this test", None)
# Whatever can come from a model, a file or a user.
HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;{{ 7 * 7 }}$x_1$\x07"


def verification(
    checks: Sequence[Check] = (), answers: Sequence[Answer] = (), layers: Sequence[LayerNoise] = ()
) -> Verification:
    """A record with some checks, answers and layers."""
    given = tuple(checks) or (
        at_least("onnx", "decode_logits", "sqnr_db", 63.2, 50.0, BY),
        at_most("onnx", "end_to_end", "kl_mean_nats", 0.0125, 0.02, BY),
    )
    figures = (figures_of(answers),) if answers else ()
    return Verification(
        tool="0.1.0",
        reference_sha256="ab" * 32,
        num_questions=16,
        status=status_of(given),
        checks=given,
        measurements=(),
        warnings=(),
        targets=verdicts(given),
        answers=tuple(answers),
        figures=figures,
        layers=tuple(layers),
        faults=(),
    )


def answer(text: str, reference: str = "The star is red.", **changes: object) -> Answer:
    """An answer to a question about a picture."""
    values: dict[str, object] = {
        "target": "onnx", "executed_by": BY, "picture": "00.png", "question": "What is red?",
        "reference_text": reference, "bundle_text": text,
        "first_difference": None if text == reference else 2, "kl_nats": (1e-7, 0.002, 0.4),
        "differing_tokens": (2,),
    }  # fmt: skip
    return Answer(**(values | changes))


def page(
    bundle: Path, verified: Verification | NotRun = ABSENT, images: Path | None = None, **sources: object
) -> str:
    """The page about a bundle, of which this was found."""
    given: dict[str, object] = dict.fromkeys(("evaluation", "bench", "estimates", "lint"), ABSENT)
    found = Sources(bundle=read_bundle(bundle), verification=verified, **(given | sources))
    questions = () if isinstance(verified, NotRun) else by_question(verified.answers)
    pictures = embedded((q.picture for q in questions if q.picture is not None), {}, images)
    verdict = verdict_of(found.bundle, verified)
    return render(found, verdict, questions, pictures, sections_of(found, questions))


def full_page(bundle: Path, folder: Path) -> str:
    """A page with something in every section.

    Args:
        bundle: The bundle.
        folder: For what the page is made from.
    """
    paths = {}
    for name, document in (("evaluation", documents.evaluation()), ("bench", documents.bench())):
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(document))
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (640, 480), color).save(folder / f"{number:02d}.png")
    answers = [
        answer("The star is blue."), answer("The star is red.", target="coreml"),
        answer("Yes.", "Yes.", picture="01.png", question="Is it blue?"),
        answer(HOSTILE, picture=None, question="Text alone?"), answer("No.", picture="lost.png"),
    ]  # fmt: skip
    layers = [LayerNoise("ONNX", f"l{n}_{op}", 70.0 - 8 * n, False, None) for n in range(8) for op in "qkvo"]
    layers += [LayerNoise("ONNX", f"s1b{n}_fc1", None, n == 1, "not run" if n else None) for n in range(3)]
    checks = [
        at_least("onnx", "decode_logits", "sqnr_db", 12.0, 50.0, BY),
        at_most("onnx", "end_to_end", "kl_mean_nats", 0.0125, 0.02, BY),
        not_run("coreml", "end_to_end", "kl_mean_nats", "needs a Mac"),
    ]
    rule = Outcome("some-rule", "warning", "failed", "it breaks", "onnx/decoder.onnx")
    return page(
        bundle,
        verification(checks, answers, layers),
        folder,
        evaluation=read_evaluation(paths["evaluation"], bundle),
        bench=read_bench(paths["bench"]),
        estimates=read_estimates(bundle, ""),
        lint=sorted_lint([rule], {"some-rule": About("so it is said", "https://example.com", "change it")}),
    )


class Elements(html.parser.HTMLParser):
    """The elements and texts of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """What a person can read, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]
