"""Check a bundle against all rules."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.errors import BundleError, ConversionError, MissingDependencyError
from fastvlm_convert.json_file import read_json_file
from fastvlm_convert.lint.duplicates import duplicates
from fastvlm_convert.lint.facts import CoreMLProgram, Facts, OnnxGraph
from fastvlm_convert.lint.platform import ANYWHERE, Platform
from fastvlm_convert.lint.read_onnx import read_graphs
from fastvlm_convert.lint.rule import Hit, NotCheckedError, Rule
from fastvlm_convert.lint.table import RULES
from fastvlm_convert.manifest import Manifest, Status, load_manifest
from fastvlm_convert.outcomes import Outcome, Severity
from fastvlm_convert.targets import Target
from fastvlm_convert.verification.compare import END_TO_END
from fastvlm_convert.verification.record import read_record


@dataclass(frozen=True)
class LintResult:
    """What was found about a bundle.

    Attributes:
        bundle: Its folder.
        outcomes: One for each place that breaks a rule, and one for each rule that nothing breaks.
        not_applicable: Rules about other targets or platforms.
    """

    bundle: Path
    outcomes: tuple[Outcome, ...]
    not_applicable: tuple[str, ...]

    @property
    def findings(self) -> tuple[Outcome, ...]:
        """What breaks a rule, errors first."""
        failed = [o for o in self.outcomes if o.status == "failed"]
        order: tuple[Severity, ...] = ("error", "warning", "info")
        return tuple(sorted(failed, key=lambda o: order.index(o.severity)))

    def status(self, strict: bool = False) -> Status:
        """`failed` for an error, or with `strict` a warning; else `not_run` if a rule was not checked."""
        bad = {"error", "warning"} if strict else {"error"}
        if any(o.severity in bad for o in self.findings):
            return "failed"
        return "not_run" if any(o.status == "not_run" for o in self.outcomes) else "passed"


def lint(bundle: str | Path, platform: Platform = ANYWHERE) -> LintResult:
    """Check a finished bundle against every rule that applies to it; reads graphs, programs and the manifest.

    Args:
        bundle: Its folder.
        platform: Where it is going to run; rules about what this leaves open are warnings at most.

    Raises:
        BundleError: It is no bundle, or a graph or a package in it is damaged.
    """
    folder = Path(bundle)
    facts = read_facts(folder)
    outcomes: list[Outcome] = []
    others: list[str] = []
    for rule in RULES.values():
        applies = rule.applies(platform)
        own = [t for t in rule.targets if t in facts.manifest.targets]
        if applies is False or (rule.targets and not own):
            others.append(rule.id)
            continue
        severity = "warning" if applies is None and rule.severity == "error" else rule.severity
        outcomes += _outcomes(rule, severity, own, facts, platform)
    return LintResult(folder, tuple(outcomes), tuple(others))


def _outcomes(
    rule: Rule, severity: Severity, targets: list[Target], facts: Facts, platform: Platform
) -> Iterator[Outcome]:
    unread = {target: facts.unread[target] for target in targets if target in facts.unread}
    for target, why in unread.items():
        yield Outcome(rule.id, severity, "not_run", why, target)
    if targets and len(unread) == len(targets):
        return
    try:
        hits: list[Hit] = list(rule.check(facts, platform))
    except NotCheckedError as error:
        yield Outcome(rule.id, severity, "not_run", str(error))
        return
    for hit in hits:
        yield Outcome(rule.id, severity, "failed", hit.message, hit.where)
    if not hits:
        yield Outcome(rule.id, severity, "passed", rule.reason)


def read_facts(bundle: Path) -> Facts:
    """Everything that rules look at.

    Raises:
        BundleError: It is no bundle, or a graph or a package in it is damaged.
    """
    manifest = load_manifest(bundle)
    unread: dict[Target, str] = {}
    graphs: tuple[OnnxGraph, ...] = ()
    programs: tuple[CoreMLProgram, ...] = ()
    try:
        graphs = read_graphs(bundle, manifest)
    except MissingDependencyError as error:
        unread["onnx"] = str(error)
    try:
        programs = _read_programs(bundle, manifest)
    except MissingDependencyError as error:
        unread["coreml"] = str(error)
    try:
        found = {
            "onnx": duplicates(bundle, (t for g in graphs for t in g.tensors)),
            # A package cannot read another's weights, so only a copy within one is more than is needed.
            "coreml": tuple(group for p in programs for group in duplicates(bundle, p.tensors)),
        }
    except OSError as error:
        raise BundleError(f"cannot read: {error.strerror}", where=error.filename) from error
    return Facts(
        bundle=bundle,
        manifest=manifest,
        graphs=graphs,
        programs=programs,
        unread=unread,
        duplicates={target: groups for target, groups in found.items() if groups},
        max_positions=_max_positions(bundle),
        int8_activations=_int8_activations(bundle),
    )


def _read_programs(bundle: Path, manifest: Manifest) -> tuple[CoreMLProgram, ...]:
    if "coreml" not in manifest.targets:
        return ()
    from fastvlm_convert.lint.read_coreml import read_programs  # needs coremltools' protobuf classes

    return read_programs(bundle, manifest)


def _max_positions(bundle: Path) -> int | None:
    try:
        value = read_json_file(bundle / "config.json")
    except (OSError, ValueError):
        return None  # an app's own; nothing else of a bundle depends on it
    positions = value.get("max_position_embeddings") if isinstance(value, dict) else None
    return positions if isinstance(positions, int) else None


def _int8_activations(bundle: Path) -> Status:
    """What a record of `verify` says of the answers that ONNX Runtime gives as it is shipped."""
    try:
        record = read_record(bundle)
    except ConversionError:
        return "not_run"  # about another manifest, or of another version: it proves nothing
    if record is None:
        return "not_run"
    found = {
        check.status
        for check in record.checks
        if (check.target, check.stage) == ("onnx", END_TO_END) and check.metric.startswith("kl_mean")
    }
    return "failed" if "failed" in found else "passed" if "passed" in found else "not_run"
