"""Results as Markdown, as docs/quality.md shows them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.quality.figures import Figure, better, ends_of_a_check, figures, ratio, verdict
from benchmarks.quality.schemes import RECIPES
from fastvlm_convert.recipe import load_recipe

COREML: Final = ("coremltools RTN, symmetric", "coremltools RTN, asymmetric")
ORT: Final = ("ONNX Runtime RTN, symmetric", "ONNX Runtime RTN, asymmetric")
TEXTBOOK: Final = ("textbook GPTQ",)
BESIDE: Final = {"coremltools": COREML, "ONNX Runtime": ORT, "textbook GPTQ": TEXTBOOK}


@dataclass(frozen=True)
class Aim:
    """What a scheme should cost at most beside another, or by itself."""

    scheme: str
    beside: tuple[str, ...]
    limit: float
    what: str = "ratio"


AIMS: Final[Mapping[str, tuple[Aim, ...]]] = {
    "unseen": (
        Aim("ours, blocks of 32", COREML, 0.12),
        Aim("ours, blocks of 32", ORT, 0.14),
        Aim("ours, blocks of 32", TEXTBOOK, 0.65),
        Aim("ours, blocks of 128", ORT, 0.45),
        Aim("palettes", ("ours, blocks of 32",), 1.3),
        Aim("int8", (), 5e-5, "kl"),
        Aim("int8", (), 0.999, "top1"),
    ),
    "real": (
        Aim("int4", ORT, 0.30),
        Aim("int4", (), 0.88, "top1"),
        Aim("int4", (), -0.02, "gained"),
    ),
    "noisy": (
        Aim("ours, blocks of 32", ORT, 0.22),
        Aim("ours, blocks of 32", COREML, 0.12),
        Aim("ours, blocks of 32", TEXTBOOK, 0.65),
    ),
}  # fmt: skip


def tables(results: Mapping[str, Any]) -> str:
    """Everything that was measured on some models, as Markdown.

    Args:
        results: Model -> what `python -m benchmarks.quality` writes of it.
    """
    lines: list[str] = []
    for model, result in results.items():
        for name, asked in result["sets"].items():
            if not _of_set(result["schemes"], name):
                continue
            lines += [*_costs(model, name, asked, result["schemes"]), ""]
            lines += [*_ratios(asked, _of_set(result["schemes"], name)), ""]
    return "\n".join([*lines, *_aims(results), "", *_gates(results)])


def _costs(model: str, name: str, asked: Mapping[str, Any], schemes: Mapping[str, Any]) -> Iterator[str]:
    clusters, noun = asked["clusters"], "pictures" if asked["has_pictures"] else "prompts"
    tokens = sum(map(len, asked["answers"]))
    entropy = next(iter(_of_set(schemes, name).values()))["entropy"]
    right = [r for r in asked["right"] if r is not None]
    exact = f"; {sum(right)} of {len(right)} answers right ({sum(right) / len(right):.1%})" if right else ""
    yield (
        f"**{model}, {name}**: {len(set(clusters))} {noun}, {len(clusters)} questions, {tokens} tokens, "
        f"{entropy:.3g} nats of entropy a token{exact}."
    )
    yield ""
    yield "| weights | KL, nats | without the worst 1 % | top-1 | answers change | right, to float | score |"
    yield "|---|---|---|---|---|---|---|"
    for scheme, found in _of_set(schemes, name).items():
        f = figures(found, asked, clusters)
        cells = [
            number(f.kl), number(f.trimmed), percent(f.top1), percent(f.flips),
            "-" if f.accuracy is None else f"{f.accuracy.value:.1%}, {difference(f.gained)}",
            _score(schemes[scheme]["score"], asked["has_pictures"]),
        ]  # fmt: skip
        yield f"| {scheme} | {' | '.join(cells)} |"


def _of_set(schemes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What was measured on a set, by scheme."""
    return {s: found["sets"][name] for s, found in schemes.items() if name in found["sets"]}


def _score(score: Mapping[str, Any] | None, has_pictures: bool) -> str:
    """Of the held-out samples of the set's own kind."""
    found = None if score is None else score["with_pictures" if has_pictures else "text_alone"]
    return "-" if found is None else f"{found['kl_mean_nats']:.2g}, {found['top1_agreement']:.1%}"


def _ratios(asked: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[str]:
    best = {label: found for label, names in BESIDE.items() if (found := better(measured, names)) is not None}
    if not best:
        return
    yield f"| KL beside | {' | '.join(f'{label} ({name})' for label, name in best.items())} |"
    yield "|---|" + "---|" * len(best)
    for scheme, found in measured.items():
        if all(scheme not in names for names in BESIDE.values()):
            cells = [factor(ratio(found, measured[name], asked["clusters"])) for name in best.values()]
            yield f"| {scheme} | {' | '.join(cells)} |"


def _aims(results: Mapping[str, Any]) -> Iterator[str]:
    yield "| model, set | aim | reached | |"
    yield "|---|---|---|---|"
    for model, result in results.items():
        for aim in AIMS.get(model, ()):
            for name, asked in result["sets"].items():
                row = _aim(aim, name, asked, result["schemes"])
                if row is not None:
                    yield f"| {model}, {name} | {row} |"


def _gates(results: Mapping[str, Any]) -> Iterator[str]:
    """Where figures of sound conversions end when `verify` asks its questions, and each recipe's gates."""
    sets = [
        (model, name)
        for model, result in results.items()
        for name in result["sets"]
        if _of_set(result["schemes"], name)
    ]
    yield f"| recipe | gates | {' | '.join(f'{model}, {name}' for model, name in sets)} |"
    yield "|---|---|" + "---|" * len(sets)
    for recipe in RECIPES:
        cells = []
        for model, name in sets:
            measured = _of_set(results[model]["schemes"], name)
            ends = ends_of_a_check(measured[recipe]) if recipe in measured else None
            cells.append("-" if ends is None else f"{ends[0]:.2g}, {ends[1]:.1%}")
        gates = load_recipe(recipe).gates
        limits = f"{gates.quantizer_max_kl_nats:g}, {gates.quantizer_min_top1:.1%}"
        if any(cell != "-" for cell in cells):
            yield f"| {recipe} | {limits} | {' | '.join(cells)} |"


def _aim(aim: Aim, name: str, asked: Mapping[str, Any], schemes: Mapping[str, Any]) -> str | None:
    measured = _of_set(schemes, name)
    if aim.scheme not in measured:
        return None
    ours = measured[aim.scheme]
    if aim.what == "ratio":
        peer = better(measured, aim.beside)
        if peer is None:
            return None
        found: Figure | None = ratio(ours, measured[peer], asked["clusters"])
        label = f"{aim.scheme}: <= {aim.limit}x {peer}"
    else:
        found = getattr(figures(ours, asked, asked["clusters"]), aim.what)
        sign = "<=" if aim.what == "kl" else ">="
        label = f"{aim.scheme}: {LABELS[aim.what]} {sign} {aim.limit:g}"
    if found is None:
        return None
    shown = {"ratio": factor, "kl": number}.get(aim.what, percent)(found)
    return f"{label} | {shown} | {verdict(found, aim.limit, aim.what in ('ratio', 'kl'))}"


LABELS: Final = {"kl": "KL", "top1": "top-1", "gained": "right answers beside float"}


def number(figure: Figure, digits: int = 2) -> str:
    """A number with its interval."""
    low, high = figure.interval.low, figure.interval.high
    return f"{figure.value:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


def percent(figure: Figure) -> str:
    """A share with its interval, in percent."""
    low, high = 100 * figure.interval.low, 100 * figure.interval.high
    return f"{figure.value:.2%} [{low:.2f}, {high:.2f}]"


def factor(figure: Figure) -> str:
    """A ratio with its interval; `none` where the interval holds 1."""
    low, high = figure.interval.low, figure.interval.high
    word = "none" if low <= 1 <= high else f"{figure.value:.2g}"
    return f"{word} [{low:.2g}, {high:.2g}]"


def difference(figure: Figure) -> str:
    """A difference of shares in points with its interval; `none` where the interval holds 0."""
    low, high = 100 * figure.interval.low, 100 * figure.interval.high
    word = "none" if low <= 0 <= high else f"{100 * figure.value:+.1f}"
    return f"{word} [{low:+.1f}, {high:+.1f}]"
