"""What quantization did, by component: the table and the document that several commands end with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

from fastvlm_convert.activation_report import ActivationReport
from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.cli.console import plain_table
from fastvlm_convert.errors import printable
from fastvlm_convert.quantization.score import Agreement, AnswerScore
from fastvlm_convert.quantized.layer_report import ComponentReport, LayerReport, component_reports

_NOT_RUN = "no solver ran the model; `verify` measures them"
_FEW = 2  # layers named beside a reason before the rest is counted


@dataclass(frozen=True)
class ScoreFacts:
    """What the integers do to the answers, in documents; see `AnswerScore`.

    Attributes:
        num_held_out: Samples; 0 where layers were solved with the one that there is.
    """

    status: Literal["measured"]
    kl_mean_nats: float
    top1_agreement: float
    num_tokens: int
    num_held_out: int
    with_pictures: Agreement | None
    text_alone: Agreement | None


@dataclass(frozen=True)
class ScoreNotRun:
    """Why it is not known."""

    status: Literal["not_run"]
    reason: str


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """One row for each component, and the total."""
    numbers = ("layers", "bits per weight", "size", "SQNR dB")
    table = plain_table("component", *numbers, "stored as", right=numbers, wrap=("stored as",))
    for report in component_reports(layers):
        is_total = report.name == "total"
        cells = (
            report.name,
            str(report.num_layers),
            f"{report.bits_per_weight:.2f}",
            size_text(report.stored_bytes),
            _sqnr(report),
            "" if is_total else _stored_as(report),
        )
        table.add_row(*cells, style="bold" if is_total else "")
    return table


def score_facts(score: AnswerScore | None) -> ScoreFacts | ScoreNotRun:
    """What the integers do to the answers, or why that is not known."""
    if score is None:
        return ScoreNotRun("not_run", _NOT_RUN)
    total, held_out = score.total, score.total.num_samples if score.is_held_out else 0
    facts = (total.kl_mean_nats, total.top1_agreement, total.num_tokens, held_out)
    return ScoreFacts("measured", *facts, score.with_pictures, score.text_alone)


def activations_text(report: ActivationReport) -> str:
    """What was done to the encoder's activations, in a line."""
    layers, share = count_text(report.num_layers, "layer"), 100 * report.float_share
    return (
        f"activations: int{report.bits} in {layers} of the encoder; {share:.1f} % of its multiplications stay"
        f" float (the manifest names the layers); cosine of image tokens {report.cosine:.4f}"
    )


def score_text(score: AnswerScore | None) -> str:
    """The same in a line, or three where pictures and text are told apart."""
    if score is None:
        return f"answers: not measured, because {_NOT_RUN}"
    samples = count_text(score.total.num_samples, "calibration sample")
    where = f"{samples} held out" if score.is_held_out else "the one sample that layers were solved with"
    told = f"answers: {_agreement(score.total)} of {where}"
    if score.with_pictures is None or score.text_alone is None:
        return told
    parts = ((score.with_pictures, "with pictures"), (score.text_alone, "of text alone"))
    return "\n".join([told, *(f"  {part.num_samples} {kind}: {_agreement(part)}" for part, kind in parts)])


def _agreement(found: Agreement) -> str:
    share = f"{100 * found.top1_agreement:.2f} % of {found.num_tokens} tokens"
    return f"KL {found.kl_mean_nats:.2g} nats, same top token in {share}"


def _sqnr(report: ComponentReport) -> str:
    if report.sqnr_db is not None:
        return f"{report.sqnr_db:.1f}"
    return "-" if len(report.in_float) == report.num_layers else "exact"


def _stored_as(report: ComponentReport) -> str:
    """`24 int4 block 32; 1 float; a.b: why`."""
    parts = [f"{count} {scheme}" for scheme, count in report.schemes.items() if scheme != "float"]
    if report.in_float:
        parts.append(f"{len(report.in_float)} float")
    reasons: dict[str, list[str]] = {}
    for layer, reason in (*report.in_float.items(), *report.fitted.items()):
        if reason is not None:
            reasons.setdefault(reason, []).append(layer)
    for reason, named in reasons.items():
        more = f" and {len(named) - _FEW} more" if len(named) > _FEW else ""
        parts.append(f"{', '.join(named[:_FEW])}{more}: {reason}")
    return escape(printable("; ".join(parts)))
