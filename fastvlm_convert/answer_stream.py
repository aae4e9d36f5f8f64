"""An answer as text, while it comes."""

from collections.abc import Callable, Generator, Iterator

from fastvlm_convert.generate import Answer


class AnswerStream(Iterator[str]):
    """The pieces of text of an answer, as they come; half a character waits for the rest.

    Args:
        tokens: The answer's tokens (`generate.answer_tokens`).
        decode: The tokenizer's.

    Attributes:
        text: All pieces so far.
        answer: Tokens and timings, once the last piece has come; None before.
    """

    def __init__(self, tokens: Generator[int, None, Answer], decode: Callable[[list[int]], str]) -> None:
        self.text = ""
        self.answer: Answer | None = None
        self._tokens = tokens
        self._decode = decode
        self._ids: list[int] = []

    def __next__(self) -> str:
        """The next piece."""
        while self.answer is None:
            try:
                self._ids.append(next(self._tokens))
            except StopIteration as end:
                self.answer = end.value
            text = self._decode(self._ids)
            if self.answer is None and text.endswith("\ufffd"):
                continue
            piece, self.text = text[len(self.text) :], text
            if piece:
                return piece
        raise StopIteration

    def finish(self) -> Answer:
        """Run to the end; the whole answer, whose text is in `text`."""
        for _ in self:
            pass
        assert self.answer is not None
        return self.answer
