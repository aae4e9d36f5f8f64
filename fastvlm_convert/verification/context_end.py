"""The end of the context: do the last positions of the cache give what the reference gives?

Answers of a few hundred tokens never reach them, so rotary tables, masks and caches could be wrong there.
Some tokens are put at the beginning and some at the very end; what lies between stays empty, on both sides,
so that the longest context costs as little as a short one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.session import Session
from fastvlm_convert.verification.check import Check, Measurement, at_least
from fastvlm_convert.verification.compare import Comparison, StageGates

CONTEXT_END = "context_end"
_TOKENS = 64  # on either side
_EARLIER = 2  # times as many tokens in the sequence before


@dataclass(frozen=True)
class ContextEnd:
    """What the reference computes at the end of its context.

    Attributes:
        first: Embeddings at the beginning, float32 [n, hidden].
        last: Embeddings at the end, the last position included, float32 [m, hidden].
        logits: At the last two positions, float32 [2, vocab].
    """

    first: np.ndarray
    last: np.ndarray
    logits: np.ndarray


def context_end(reference: LoadedModel, questions: Sequence[Question], chunk: int) -> ContextEnd:
    """Run the reference at the end of its context.

    Args:
        reference: The reference, at the candidates' context length.
        questions: Their text is what is asked.
        chunk: Tokens of one prefill call of the candidates; the context length is a multiple of it.
    """
    session = reference.session
    half = session.context_length // 2
    # Whole chunks before the gap; where the context has room for one chunk only, there is no gap.
    size = min(-(-_TOKENS // chunk), half // chunk) * chunk or half
    texts = [ids for q in questions for ids in reference.conversation(q.messages).segments]
    embeds = session.embed(np.resize(np.concatenate(texts), 2 * size))
    first, last = embeds[:size], embeds[size:]
    return ContextEnd(first, last, _last_logits(session, first, last))


def check_context_end(target: str, candidate: LoadedModel, end: ContextEnd, gates: StageGates) -> Comparison:
    """Compare a candidate there, with the gate of its decode logits."""
    session = candidate.session
    # What an earlier sequence leaves between the beginning and the end shows if the cache is not cleared.
    earlier = np.concatenate([end.first, end.last] * _EARLIER)[: session.context_length]
    session.prefill(earlier)
    logits, runs = _last_logits(session, end.first, end.last), session.executed_by
    pairs = list(zip(end.logits, logits, strict=True))
    values = [v for r, c in pairs if (v := metrics.sqnr_db(r, c)) is not None]
    worst = float(np.min(values)) if values else None
    gate = gates.min_sqnr_db.get("decode_logits")
    if gate is not None:
        return Comparison((_at_least(target, worst, gate, runs),), ())
    shown = worst if worst is not None and np.isfinite(worst) else None
    return Comparison((), (Measurement(target, CONTEXT_END, "sqnr_db", shown, worst is None, runs),))


def _at_least(target: str, value: float | None, gate: float, executed_by: str) -> Check:
    return at_least(target, CONTEXT_END, "sqnr_db", value, gate, executed_by)


def _last_logits(session: Session, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Logits at the last two positions, by the function for many tokens and by that for one."""
    start = session.context_length - len(last)
    if start == len(first):
        rows = [session.prefill(np.concatenate([first, last[:-1]]))]
    else:
        session.prefill(first)
        rows = [session.extend(last[:-1], start)]
    return np.stack([*rows, session.decode(last[-1:])])
