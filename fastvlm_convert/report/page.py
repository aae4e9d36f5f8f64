"""The page: everything that is known about a bundle, in one file of HTML that needs nothing else."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastvlm_convert import __version__
from fastvlm_convert.amounts import count_text, size_text
from fastvlm_convert.report.answers import MAX_SHOWN, Question
from fastvlm_convert.report.figures.divergence import draw_divergence
from fastvlm_convert.report.figures.heat_map import BORDERS, Cell, draw_grid, grids_of
from fastvlm_convert.report.figures.latency import draw_latency
from fastvlm_convert.report.figures.sizes import draw_sizes
from fastvlm_convert.report.pictures import Picture
from fastvlm_convert.report.sources.bench import Bench
from fastvlm_convert.report.sources.bundle import BundleFacts
from fastvlm_convert.report.sources.estimates import Estimates
from fastvlm_convert.report.sources.evaluation import Evaluation
from fastvlm_convert.report.sources.lint import Lint
from fastvlm_convert.report.sources.not_run import NotRun
from fastvlm_convert.report.sources.verification import LayerNoise, Verification, is_at_most
from fastvlm_convert.report.texts import metric_text, number_text, sentence, target_name
from fastvlm_convert.report.verdict import Verdict, tiles_of

SECTIONS: Final = {  # name and heading
    "targets": ("Targets", "Verdict by target"),
    "answers": ("Answers", "Answers side by side"),
    "evaluation": ("Scores", "Scores on a dataset"),
    "divergence": ("Divergence", "How far answers move"),
    "layers": ("Layers", "Where noise comes from"),
    "sizes": ("Size", "What it weighs"),
    "latency": ("Latency", "How fast it is here"),
    "phones": ("Phones", "What phones may do"),
    "lint": ("Lint", "What is known to go wrong"),
    "open": ("Not run", "Skipped, or not run"),
    "making": ("Making", "How it was made"),
}
_TEMPLATE: Final = "page.html"
_LACKS: Final = NotRun("the record of the verification has none", None)


@dataclass(frozen=True)
class Sources:
    """What a page is made from.

    Attributes:
        bundle: What the bundle says of itself.
        verification: What `verify --record` wrote into it.
        evaluation: What `evaluate --json` printed.
        bench: What `bench --json` printed.
        estimates: What phones may do.
        lint: What is known to go wrong.
    """

    bundle: BundleFacts
    verification: Verification | NotRun
    evaluation: Evaluation | NotRun
    bench: Bench | NotRun
    estimates: Estimates | NotRun
    lint: Lint


@dataclass(frozen=True)
class Section:
    """A section of the page, and whether there was anything to show in it.

    Attributes:
        id: Its anchor.
        name: In the list of sections.
        title: Its heading.
        status: Whether there was.
        reason: Why there was not, else None.
        command: What makes what is missing, or None.
    """

    id: str
    name: str
    title: str
    status: Literal["shown", "not_run"]
    reason: str | None
    command: str | None


def sections_of(sources: Sources, questions: tuple[Question, ...]) -> tuple[Section, ...]:
    """The sections of a page, in order."""
    verified = sources.verification
    missing: dict[str, object] = {
        "targets": verified,
        "answers": verified if isinstance(verified, NotRun) or questions else _LACKS,
        "divergence": verified if isinstance(verified, NotRun) or _divergences(verified) else _LACKS,
        "layers": verified if isinstance(verified, NotRun) or verified.layers else _LACKS,
        "evaluation": sources.evaluation,
        "sizes": sources.bundle.parts,
        "latency": sources.bench,
        "phones": sources.estimates,
        "lint": sources.lint,
    }
    return tuple(_section(id_, *names, missing.get(id_)) for id_, names in SECTIONS.items())


def _section(id_: str, name: str, title: str, source: object) -> Section:
    if isinstance(source, NotRun):
        return Section(id_, name, title, "not_run", source.reason, source.command)
    return Section(id_, name, title, "shown", None, None)


def render(
    sources: Sources,
    verdict: Verdict,
    questions: tuple[Question, ...],
    pictures: Mapping[str, tuple[Picture, ...]],
    sections: tuple[Section, ...],
) -> str:
    """The HTML of a page.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    verified = None if isinstance(sources.verification, NotRun) else sources.verification
    environment = Environment(
        loader=PackageLoader("fastvlm_convert.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size_text, "number": number_text, "count": count_text, "target": target_name,
        "metric": metric_text,
        "sentence": sentence,
        "sign": lambda check: "\u2264" if is_at_most(check) else "\u2265",
    }  # fmt: skip
    css = environment.get_template("page.css").render()
    html: str = environment.get_template(_TEMPLATE).render(
        css=Markup(css),
        tool=__version__,
        verdict=verdict,
        tiles=tiles_of(sources.bundle, sources.verification, questions, sources.bench),
        sections={section.id: section for section in sections},
        bundle=sources.bundle,
        verification=verified,
        evaluation=sources.evaluation,
        bench=sources.bench,
        estimates=sources.estimates,
        lint=sources.lint,
        differing=[question for question in questions[:MAX_SHOWN] if question.variants],
        same=[question for question in questions[:MAX_SHOWN] if not question.variants],
        left_out=max(0, len(questions) - MAX_SHOWN),
        pictures=pictures,
        figures=_figures(sources),
        absent=_absent(sections),
        operations=_operations(() if verified is None else verified.layers),
        levels=_levels(),
        recipe=json.dumps(dataclasses.asdict(sources.bundle.manifest.recipe), indent=2, ensure_ascii=False),
    )
    return html


def _absent(sections: tuple[Section, ...]) -> list[tuple[NotRun, list[Section]]]:
    """What is missing, each with the sections that miss it."""
    found: dict[NotRun, list[Section]] = {}
    for section in sections:
        if section.reason is not None:
            found.setdefault(NotRun(section.reason, section.command), []).append(section)
    return list(found.items())


def _figures(sources: Sources) -> dict[str, Any]:
    """Everything that is drawn, by section."""
    drawn: dict[str, Any] = {}
    if not isinstance(sources.bundle.parts, NotRun):
        drawn["sizes"] = draw_sizes({part.name: part.stored_bytes for part in sources.bundle.parts})
    if not isinstance(sources.verification, NotRun):
        if divergences := _divergences(sources.verification):
            drawn["divergence"] = [draw_divergence(n, *item) for n, item in enumerate(divergences.items())]
        drawn["layers"] = _grids(sources.verification.layers)
    if not isinstance(sources.bench, NotRun) and sources.bench.panels:
        drawn["latency"] = draw_latency(sources.bench.panels)
    return drawn


def _divergences(verification: Verification) -> dict[str, list[float]]:
    """Divergence of every token by what answered; empty where none was measured."""
    found: dict[str, list[float]] = {}
    for answer in verification.answers:
        if finite := [kl for kl in answer.kl_nats if kl is not None]:
            name = f"{target_name(answer.target)}, {answer.executed_by}"
            found.setdefault(name, []).extend(finite)
    return found


def _grids(layers: tuple[LayerNoise, ...]) -> dict[str, list[tuple[str, Markup]]]:
    """By execution: a figure for each part of the model, with its name."""
    found: dict[str, list[tuple[str, Markup]]] = {}
    for by in dict.fromkeys(layer.by for layer in layers):
        cells = [Cell(layer.name, layer.sqnr_db, layer.is_equal) for layer in layers if layer.by == by]
        found[by] = [
            (grid.title, draw_grid(f"layers-{len(found)}-{n}", grid, by))
            for n, grid in enumerate(grids_of(cells))
        ]
    return found


def _operations(layers: tuple[LayerNoise, ...]) -> dict[str, Any]:
    """The grids in figures: columns are executions, rows operations; and why figures are missing."""
    rows: dict[str, dict[str, str]] = {}
    for layer in layers:
        figure = "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
        rows.setdefault(layer.name, {})[layer.by] = "equal" if layer.is_equal else figure
    return {
        "columns": list(dict.fromkeys(layer.by for layer in layers)),
        "rows": rows,
        "reasons": list(dict.fromkeys(layer.reason for layer in layers if layer.reason is not None)),
    }


def _levels() -> list[tuple[int, str]]:
    """The legend of the grids: level and text."""
    edges = [f"{border:.0f}" for border in BORDERS]
    inner = [f"{low} to {high} dB" for low, high in pairwise(edges)]
    return list(enumerate([f"below {edges[0]} dB", *inner, f"{edges[-1]} dB and more, or equal (=)"]))
