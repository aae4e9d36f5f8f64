"""Guesses of what an answer goes on with: a pass over several tokens costs little more than one over one.

While few answers are decoded, reading the weights takes the time. So tokens that may follow are read in the
same pass, and those that the model itself says are kept (speculative decoding, arXiv:2211.17192, with guesses
that are copied as in arXiv:2304.04487). A wrong guess costs a little time and changes nothing.
"""

from collections.abc import Sequence
from typing import Final

_LONGEST: Final = 3  # tokens that are looked up
_BORDER: Final = -1  # no token


def guessed_tokens(said: Sequence[int], hint: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that may follow.

    The last tokens are looked up in what was said and in the hint: more of them before fewer, and later
    places before earlier ones. What repeats itself is guessed to go on.

    Args:
        said: The answer so far.
        hint: What it may be like, such as another model's answer to the same question.
        count: Most tokens to guess.
    """
    text = [*hint, _BORDER, *said]
    for length in range(min(_LONGEST, len(said)), 0, -1):
        last = text[-length:]
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == last and text[end] != _BORDER:
                return _copied(text, end, count)
    return []


def _copied(text: Sequence[int], start: int, count: int) -> list[int]:
    """Up to `count` tokens from a place on; behind the text's end, what was copied is copied again."""
    copied: list[int] = []
    for place in range(start, start + count):
        token = text[place] if place < len(text) else copied[place - len(text)]
        if token == _BORDER:
            break
        copied.append(token)
    return copied
