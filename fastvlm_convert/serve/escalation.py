"""A small bundle answers; where it is unsure, a large one answers instead.

How sure an answer is: the mean log-probability of its tokens, its end token included. What a client gets is
one answer, never the beginning of one and the end of another. So the small bundle's answer is held back
until it is whole, and its client waits for the first token as long as for the last. What the large bundle
says is streamed.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel

from fastvlm_convert.errors import UsageError, did_you_mean
from fastvlm_convert.serve.engine import Piece, Reply, Sampling
from fastvlm_convert.serve.errors import EngineFailedError
from fastvlm_convert.serve.router import Router

Answer = AsyncGenerator[Piece | Reply, None]
Ask = Callable[[str, bool], Answer]
"""Asks a bundle by its name for an answer, with its mean log-probability or without.

Both of a request's asks share its deadline and the event that says that its client left.
"""
Outcome = Literal["kept", "escalated"]
MODEL_HEADER: Final = "x-fastvlm-model"
OUTCOME_HEADER: Final = "x-fastvlm-escalation"


@dataclass(frozen=True)
class Escalation:
    """When another bundle is asked.

    Attributes:
        large: The bundle that is asked then.
        threshold: Mean log-probability below which an answer is not kept; at most 0.
    """

    large: str
    threshold: float

    def keeps(self, reply: Reply, bundle: str) -> bool:
        """Whether a bundle's reply is sure enough.

        Raises:
            EngineFailedError: Its engine does not say how sure it is.
        """
        if reply.mean_logprob is None:
            raise EngineFailedError(
                f"the engine of '{bundle}' gives no log-probabilities", code="no_logprobs"
            )
        return reply.mean_logprob >= self.threshold  # False for NaN

    def concerns(self, router: Router, requested: str | None, bundle: str, sampling: Sampling) -> bool:
        """Whether an answer may be escalated: one to the group, by likelihood alone, not the large bundle's.

        A request that names a bundle wants that bundle. Of a sampled answer the log-probability says how
        the dice fell, and not how sure the bundle is.

        Args:
            router: Knows the group.
            requested: The request's `model`.
            bundle: Which bundle the router chose.
            sampling: How the answer is chosen.
        """
        return router.is_group(requested) and sampling.is_greedy and bundle != self.large


class EscalationUsage(BaseModel):
    """A bundle was asked first, and its answer kept, or given up for that of another one."""

    outcome: Outcome
    first_model: str
    first_mean_logprob: float | None
    first_prompt_tokens: int
    first_completion_tokens: int


@dataclass(frozen=True)
class FirstAnswer:
    """What the small bundle said.

    Attributes:
        bundle: Its name.
        reply: Its answer.
        outcome: What became of it.
    """

    bundle: str
    reply: Reply
    outcome: Outcome

    @property
    def usage(self) -> EscalationUsage:
        """What the reply's `usage` says about it; its tokens are not in the sums there."""
        return EscalationUsage(
            outcome=self.outcome,
            first_model=self.bundle,
            first_mean_logprob=self.reply.mean_logprob,
            first_prompt_tokens=self.reply.prompt_tokens,
            first_completion_tokens=self.reply.answer_tokens,
        )


@dataclass(frozen=True)
class Decided:
    """Who answers a request, and the answer; all of it from one bundle.

    Attributes:
        bundle: The name of the bundle.
        pieces: Pieces of text, a `Reply` last. It is the caller's to close.
        first: The small bundle's answer where there was one to judge; None without escalation.
    """

    bundle: str
    pieces: Answer
    first: FirstAnswer | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply that say who answered."""
        outcome = {} if self.first is None else {OUTCOME_HEADER: self.first.outcome}
        return {MODEL_HEADER: self.bundle, **outcome}


async def decide(escalation: Escalation, bundle: str, ask: Ask) -> Decided:
    """Let a bundle answer, and another one where it is unsure; returns once it is clear who answers.

    An error of either is the request's: the same question gets the same answer or none, whatever the load.

    Args:
        escalation: When to ask which other bundle.
        bundle: The one that answers first.
        ask: Asks a bundle.

    Raises:
        RequestError: What the first bundle's ask raises; the second's comes while iterating over `pieces`.
    """
    pieces: list[Piece] = []
    reply: Reply | None = None
    async with aclosing(ask(bundle, True)) as answer:
        async for item in answer:
            if isinstance(item, Reply):
                reply = item
            else:
                pieces.append(item)
    if reply is None:
        raise EngineFailedError(f"the engine of '{bundle}' gave no reply", code="no_reply")
    if escalation.keeps(reply, bundle):
        return Decided(bundle, _replayed([*pieces, reply]), FirstAnswer(bundle, reply, "kept"))
    return Decided(escalation.large, ask(escalation.large, False), FirstAnswer(bundle, reply, "escalated"))


async def _replayed(items: Sequence[Piece | Reply]) -> Answer:
    for item in items:
        yield item


def make_escalation(large: str | None, threshold: float | None, router: Router) -> Escalation | None:
    """The escalation that settings ask for; None where they ask for none.

    Args:
        large: FAST_VLM_ESCALATION_TO.
        threshold: FAST_VLM_ESCALATION_THRESHOLD, which is given with it.
        router: Over all bundles that are served.

    Raises:
        UsageError: There is no such bundle, or no other that could be unsure.
    """
    if large is None or threshold is None:
        return None
    where = "FAST_VLM_ESCALATION_TO"
    if large not in router.weights:
        raise UsageError(
            f"there is no bundle '{large}' to escalate to",
            where=where,
            hint=f"{did_you_mean(large, router.weights)}bundles: {', '.join(router.weights)}",
        )
    if not any(weight for name, weight in router.weights.items() if name != large):
        raise UsageError(
            f"every request goes to '{large}' at once, so that nothing can be escalated to it",
            where=where,
            hint="serve another bundle beside it, with a weight above 0",
        )
    return Escalation(large, threshold)
