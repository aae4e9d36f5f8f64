"""Scores of one answer against the answers that people gave, each 0..1."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

Metric = Literal["exact_match", "vqa_accuracy", "anls"]

MIN_ANNOTATORS: Final = 4  # with fewer, no answer at all could reach 1
ANLS_THRESHOLD: Final = 0.5


def exact_match(response: str, answers: Sequence[str]) -> float:
    """1 where the response is one of the answers, but for case and white space; else 0."""
    return float(_folded(response) in {_folded(answer) for answer in answers})


def vqa_accuracy(response: str, answers: Sequence[str]) -> float | None:
    """The accuracy of VQA (visualqa.org/evaluation.html), which TextVQA uses too.

    min(agreeing annotators / 3, 1), averaged over all subsets that leave one annotator out: over subsets of
    9 of the usual 10. Response and answers are normalized first, as the site describes it. (The script there
    does not where all annotators gave the same text: it takes "Yes" for wrong if all of them said "yes".)

    Returns:
        None where there are fewer than four annotators.
    """
    if len(answers) < MIN_ANNOTATORS:
        return None
    given = normalized(response)
    agreeing = sum(normalized(answer) == given for answer in answers)
    left_out_agrees, left_out_differs = min((agreeing - 1) / 3, 1), min(agreeing / 3, 1)
    total = agreeing * left_out_agrees + (len(answers) - agreeing) * left_out_differs
    return total / len(answers)


def anls(response: str, answers: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest answer, 0 below a half: DocVQA's score.

    As the competition's script computes it: case and repeated white space do not count, the distance is
    divided by the length of the longer text as it was given, and a similarity of exactly 0.5 still counts.
    """
    similarity = max(_similarity(response, answer) for answer in answers)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


SCORES: Final[Mapping[Metric, Callable[[str, Sequence[str]], float | None]]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
}


def scores_of(response: str, answers: Sequence[str]) -> dict[Metric, float | None]:
    """Every score of a response; None for what these answers do not allow."""
    return {metric: score(response, answers) for metric, score in SCORES.items()}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _similarity(response: str, answer: str) -> float:
    longer = max(len(response), len(answer))
    if longer == 0:
        return 1.0
    a, b = (" ".join(text.lower().split()) for text in (response, answer))
    return 1 - edit_distance(a, b) / longer


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: how many characters to insert, remove or replace to make one text of the other."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return row[-1]


# What VQA's annotations went through, and answers go through before they are compared with them.
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_MAX_PERIODS: Final = 32  # the published script hands a flag, re.UNICODE, to the parameter that counts
_ARTICLES: Final = ("a", "an", "the")
_NUMBERS: Final = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

_CONTRACTIONS: Final = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _spellings() -> dict[str, str]:
    """Every contraction with one of its apostrophes forgotten -> the contraction."""
    # The published table has this one the other way round.
    found = {"somebody'd": "somebodyd"}
    for right in _CONTRACTIONS.split():
        for place, char in enumerate(right):
            if char == "'":
                found[right[:place] + right[place + 1 :]] = right
    # Both "im" and "ive" stand there with a capital, which lowered words never have.
    return found


_WITH_APOSTROPHE: Final = _spellings()


def normalized(text: str) -> str:
    """A text as VQA compares it: lower case, without punctuation and articles, numbers as digits.

    Whether punctuation is dropped or becomes a space depends on the whole text, as in the published script.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        is_dropped = has_number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_dropped else " ")
    plain = _PERIOD.sub("", plain, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)
