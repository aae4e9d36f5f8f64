"""What the reference makes of a question: everything that a candidate is compared with."""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.generate import check_fits, embed_prompt, greedy
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel


@dataclass(frozen=True)
class ReferenceRun:
    """One answered question.

    Attributes:
        prompt: The prompt, with its pictures.
        features: Image tokens of each picture, float32 [tokens, hidden].
        embeds: Embeddings of the whole prompt, float32 [tokens, hidden].
        token_ids: The greedy answer without its end token.
        finished: Whether the model ended the answer itself.
        fed: What was fed after the prompt: the answer, or the end token where the answer is empty, so that
            at least one decode step is compared.
        logits: Before each of the fed tokens and after the last, float32 [fed + 1, vocab].
    """

    prompt: Prompt
    features: tuple[np.ndarray, ...]
    embeds: np.ndarray
    token_ids: tuple[int, ...]
    finished: bool
    fed: tuple[int, ...]
    logits: np.ndarray

    def is_answered_by(self, logits: np.ndarray, eos_token_ids: tuple[int, ...]) -> bool:
        """Whether greedy decoding by these logits, given the fed tokens, gives the same answer.

        As long as every token is the same, feeding the reference's answer and feeding one's own is the same.

        Args:
            logits: A candidate's, float32 [fed + 1, vocab].
            eos_token_ids: Ids at which the candidate ends an answer.
        """
        said = [greedy(row) for row in logits]
        answer = self.token_ids
        if tuple(said[: len(answer)]) != answer or any(token in eos_token_ids for token in answer):
            return False
        return not self.finished or said[len(answer)] in eos_token_ids


def run_reference(reference: LoadedModel, question: Question, max_new_tokens: int) -> ReferenceRun:
    """Answer a question greedily and keep what was computed on the way; pictures are encoded once.

    Args:
        reference: The reference.
        question: The question.
        max_new_tokens: Longest answer; fewer where the context ends before.

    Raises:
        PromptError: The prompt leaves no room for an answer.
    """
    session, ends = reference.session, reference.eos_token_ids
    prompt = reference.conversation(question.messages)
    features = tuple(session.encode_image(image) for image in prompt.images)
    embeds = embed_prompt(session, prompt, features)
    limit = max(1, min(max_new_tokens, session.context_length - len(embeds)))
    check_fits(len(embeds), limit, session.context_length)
    rows = [session.prefill(embeds)]
    answer: list[int] = []
    finished = False
    while len(answer) < limit and not finished:
        token = greedy(rows[-1])
        finished = token in ends
        if not finished:
            answer.append(token)
            rows.append(_decode(reference, token))
    fed = answer or [*ends[:1]]
    if not answer:
        rows += [_decode(reference, token) for token in fed]
    return ReferenceRun(prompt, features, embeds, tuple(answer), finished, tuple(fed), np.stack(rows))


def _decode(model: LoadedModel, token: int) -> np.ndarray:
    return model.session.decode(model.session.embed(np.asarray([token], np.int64)))
