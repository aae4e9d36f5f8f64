"""What the reference makes of a question: everything that a candidate is compared with."""

from dataclasses import dataclass

import numpy as np

from fastvlm_convert.generate import check_fits, greedy
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_reading import embed_prompt
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

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, its end included if it ended."""
        return len(self.token_ids) + self.finished

    def differences(self, logits: np.ndarray, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of the answer, its end included if it ended, that another model would not have said.

        None, exactly where greedy decoding gives the same answer: as long as every token is the same, feeding
        the reference's answer and feeding one's own is the same.

        Args:
            logits: The other model's, given the fed tokens, float32 [fed + 1, vocab].
            eos_token_ids: Ids at which it ends an answer.
        """
        said = [greedy(row) for row in logits]
        ends = [token in eos_token_ids for token in said]
        pairs = enumerate(zip(said, self.token_ids, strict=False))
        differing = [n for n, (ours, theirs) in pairs if ours != theirs or ends[n]]
        if self.finished and not ends[len(self.token_ids)]:
            differing.append(len(self.token_ids))
        return tuple(differing)


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
