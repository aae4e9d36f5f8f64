"""All rules."""

from typing import Final

from fastvlm_convert.errors import UsageError, did_you_mean
from fastvlm_convert.lint import bundle_rules, coreml_rules, onnx_rules
from fastvlm_convert.lint.rule import Rule

RULES: Final[dict[str, Rule]] = {
    rule.id: rule for rule in (*coreml_rules.RULES, *onnx_rules.RULES, *bundle_rules.RULES)
}


def rule_named(name: str) -> Rule:
    """A rule by its id.

    Raises:
        UsageError: There is no such rule.
    """
    if name not in RULES:
        hint = f"{did_you_mean(name, RULES)}rules: {', '.join(RULES)}"
        raise UsageError(f"there is no rule '{name}'", hint=hint)
    return RULES[name]
