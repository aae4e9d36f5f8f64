import random
import re
import time

import pytest

from fastvlm_convert.checkpoint.module_patterns import matching_key

MODULE = "model.language_model.layers.11.self_attn.q_proj"


def peft_key(keys, module):
    """PEFT 0.21's `get_pattern_key`, which gives the module's own name where no key fits."""
    for key in keys:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return module if module in keys else None


@pytest.mark.parametrize(
    "key",
    [
        "q_proj", "proj", "self_attn.q_proj", r"layers\.11\..*", r"layers\.1\..*", "^q_proj", f"^{MODULE}",
        r".*\.layers\.(0|1|11)\.self_attn\.[qk]_proj", r"layers\.\d{1,2}\.\w+\.q_proj", "Q_PROJ", "",
        r".*layers\.[0-9]+\..*(q|v)_proj", "(?:language_model.)?layers.[^0]+.self_attn.q_pro?j",
        "q_proj|k_proj",
        r"layers\.\D+", r"q_proj\Z", r"\Aq_proj", "[^a-z]+", r"(.)*?", r"q{1}_(proj){1,3}", r"\S+\s*",
    ],
)  # fmt: skip
def test_keys_fit_as_in_peft(key):
    for module in (MODULE, "q_proj", "model.vision_tower.stages.0.mlp.fc1", "a q_proj"):
        assert matching_key(["no such", key], module) == peft_key(["no such", key], module), module


def test_the_first_key_that_fits_counts():
    assert matching_key(["k_proj", "self_attn.q_proj", "q_proj"], MODULE) == "self_attn.q_proj"
    assert matching_key([], MODULE) is None
    assert matching_key(["k_proj"], MODULE) is None


def random_key(rng, depth=0):
    kind = rng.randrange(9) if depth < 4 else 0
    if kind < 3:
        return rng.choice(["a", "b", r"\.", "0", ".", "[ab]", "[^a]", r"\d", r"\w", "_"])
    if kind < 5:
        return random_key(rng, depth + 1) + random_key(rng, depth + 1)
    if kind == 5:
        return f"({random_key(rng, depth + 1)}|{random_key(rng, depth + 1)})"
    if kind == 6:
        return f"({random_key(rng, depth + 1)})" + rng.choice(["*", "+", "?", "{1,2}", "*?", "{2}"])
    if kind == 7:
        return rng.choice(["a", "[ab]", "."]) + rng.choice(["*", "+", "?", "{0,3}"])
    return rng.choice(["^", "$", ""]) + random_key(rng, depth + 1)


def test_any_key_fits_what_pythons_engine_says():
    rng = random.Random(0)
    fits = 0
    for _ in range(2000):
        key = random_key(rng)
        module = "".join(rng.choice("ab.0_") for _ in range(rng.randrange(8)))
        found = matching_key([key], module)
        assert found == peft_key([key], module), (key, module)
        fits += found is not None
    assert 200 < fits < 1800


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+b", "(a|aa)+$x", "((((a*)*)*)*)*b", "(.*a){30}b", "(a?){400}a{400}b", "((a?){300}){300}b",
        "(((.?){2,300}.?){2,300}.?){2,300}b", ".*" * 400 + "b", "((a{1,9999}){1,9999}){1,9999}b",
    ],
)  # fmt: skip
def test_no_key_takes_long(key):
    start = time.process_time()
    assert matching_key([key], "a" * 300) is None
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("(q", r"'\(q': missing \)"),
        ("*", "'\\*': nothing to repeat"),
        (r"(.*)\1", "groupref is not supported"),
        ("(?=a)", "assert is not supported"),
        (r"\bq", "at is not supported"),
        ("(?i:q)", "subpattern is not supported"),
        ("a" * 1001, "longer than 1000 characters"),
        ("(" * 490 + ")" * 490, "nested too deeply"),
    ],
)
def test_what_is_no_pattern_is_said(key, why):
    with pytest.raises(ValueError, match=why):
        matching_key([key], MODULE)
