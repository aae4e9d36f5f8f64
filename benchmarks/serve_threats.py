"""What the rules for threats find, beside the five regular expressions that the project began with.

    python -m benchmarks.serve_threats

Prints a table for docs/serve.md: how many of 200 ordinary questions that look odd are flagged (fewer is
better), and how many of 100 attacks (more is better); with `--misses` also which.
"""

import re
import sys
import time
from pathlib import Path
from typing import Final

from fastvlm_convert.serve.threats import scan

DATA: Final = Path(__file__).parent.parent / "tests" / "data" / "serve"
FIRST: Final = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"<script[^>]*>.*?</script>",
        r"eval\s*\(|setTimeout\s*\(",
        r"document\.|window\.|location\.",
        r"(?:'|\"|`|;).*(?:union|select|insert)",
        r"[;&|`$].*(?:rm|cat|ls|ps|kill)",
    )
)


def lines(name: str) -> list[str]:
    """The examples of a file, one a line."""
    return (DATA / name).read_text(encoding="utf-8").splitlines()


def first_flags(text: str) -> bool:
    """Whether one of the first five expressions is in a text."""
    return any(pattern.search(text) for pattern in FIRST)


def rules_flag(text: str) -> bool:
    """Whether one of the sixteen rules finds something in a text."""
    return bool(scan([text]))


def milliseconds(length: int) -> float:
    """Time of scanning a text of a length that suits no pattern and begins many."""
    text = ("ignore all the <img '; $(cat ../ " * (length // 32 + 1))[:length]
    start = time.process_time()
    scan([text])
    return 1000 * (time.process_time() - start)


def main() -> None:
    """Print the table."""
    benign, hostile = lines("hard_negatives.txt"), lines("hostile.txt")
    print("| | ordinary questions flagged | attacks flagged |")
    print("|---|---|---|")
    for name, flags in (
        ("five expressions of the first description", first_flags),
        ("sixteen rules", rules_flag),
    ):
        wrong, right = (sum(map(flags, texts)) for texts in (benign, hostile))
        print(f"| {name} | {wrong} of {len(benign)} | {right} of {len(hostile)} |")
    short, long = milliseconds(4096), milliseconds(409_600)
    print(f"\nA text of 4,096 characters takes {short:.1f} ms, one of 409,600 {long:.0f} ms.")
    if "--misses" in sys.argv[1:]:
        for text in filter(rules_flag, benign):
            print("flagged:", ", ".join(finding.rule for finding in scan([text])), "|", text)
        for text in hostile:
            if not rules_flag(text):
                print("missed:", text)


if __name__ == "__main__":
    main()
