"""What an expression asks for, against what the server has."""

import re

from fastvlm_convert.serve.metrics import Metrics

_NAME = re.compile(r"\b(?:fastvlm|process)_\w+")
_SELECTOR = re.compile(r"\b((?:fastvlm|process)_\w+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
FROM_SCRAPING = {"job", "instance"}


def served():
    """Values of labels by name of a series, as a server with one bundle has them at its start."""
    samples = [s for family in Metrics("1", ["int4"], ["rule"]).registry.collect() for s in family.samples]
    found = {}
    for sample in samples:
        labels = found.setdefault(sample.name, {})
        for name, value in sample.labels.items():
            labels.setdefault(name, set()).add(value)
    return found


def faults(expression, known):
    """Series, labels and values of labels in an expression that the server does not have."""
    found = [name for name in _NAME.findall(expression) if name not in known]
    for name, matchers in _SELECTOR.findall(expression):
        for label, operator, value in _MATCHER.findall(matchers):
            if label in FROM_SCRAPING or "$" in value or name not in known:
                continue
            values = known[name].get(label, set())
            matches = [v for v in values if v == value or ("~" in operator and re.fullmatch(value, v))]
            if not matches:
                found.append(f"{name}{{{label}{operator}{value}}}")
    return found
