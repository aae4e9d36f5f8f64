"""The one decode loop, over a small protocol that every runtime implements."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.errors import PromptError
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_cache import PromptCache
from fastvlm_convert.prompt_reading import PromptReader
from fastvlm_convert.session import Session

Sampler = Callable[[np.ndarray], int]


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went; seconds.

    Attributes:
        vision_s: Encoding the images whose tokens were not known.
        prefill_s: Embedding and prefilling what was not known of the prompt, and copying what was.
        decode_s: All steps after the first token.
        ttft_s: From the prepared prompt to the first token.
        prompt_tokens: Tokens of the prompt, image tokens included.
        answer_tokens: Tokens generated, the final end token included.
    """

    vision_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    prompt_tokens: int
    answer_tokens: int

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed after the first token, or None when there was only one."""
        steps = self.answer_tokens - 1
        return steps / self.decode_s if steps > 0 else None


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        token_ids: The generated ids without the end token.
        finished: Whether the model ended the answer itself, rather than the token limit.
        timings: Where the time went.
        encoded_images: Images that were encoded for it.
        cached_tokens: Tokens of the prompt whose keys and values came from a cache.
    """

    token_ids: tuple[int, ...]
    finished: bool
    timings: Timings
    encoded_images: int = 0
    cached_tokens: int = 0


def greedy(logits: np.ndarray) -> int:
    """The most likely token; the first of equals."""
    return int(np.argmax(logits))


def sampler(temperature: float, top_p: float, seed: int) -> Sampler:
    """Draw from the smallest set of tokens that holds `top_p` of the probability (nucleus sampling).

    Args:
        temperature: Divides the logits; above 0.
        top_p: Share of the probability kept, in (0, 1].
        seed: Equal seeds draw equal tokens.

    Raises:
        PromptError: The temperature is infinite; or, while drawing, the logits are no numbers.
    """
    if not math.isfinite(temperature):
        raise PromptError(f"temperature is {temperature:g}, expected a finite number", hint="1 is usual")
    rng = np.random.default_rng(seed)

    def draw(logits: np.ndarray) -> int:
        distance = logits.astype(np.float64) - logits.max()
        if not np.isfinite(distance).all():
            hint = "`fastvlm-convert verify` or `scan` tells where they come from"
            raise PromptError("the model's outputs hold NaN or infinity", hint=hint)
        with np.errstate(over="ignore"):  # of a tiny temperature: then only the likeliest is left
            weights = np.exp(distance / temperature)
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order]) / weights.sum()
        kept = order[: int(np.searchsorted(cumulative, top_p)) + 1]
        return int(rng.choice(kept, p=weights[kept] / weights[kept].sum()))

    return draw


def check_fits(prompt_tokens: int, new_tokens: int, context_length: int) -> None:
    """Refuse a prompt and answer that the cache cannot hold.

    Raises:
        PromptError: Says how long both are and how much fits.
    """
    if prompt_tokens + new_tokens > context_length:
        raise PromptError(
            f"a prompt of {prompt_tokens} tokens and an answer of up to {new_tokens} exceed the context "
            f"of {context_length} tokens",
            hint="shorten the question, lower --max-new-tokens, or export with a larger max_context_length",
        )


def generate(
    session: Session,
    prompt: Prompt,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    choose: Sampler = greedy,
    features: Sequence[np.ndarray] | None = None,
) -> Answer:
    """Answer a prompt.

    Args:
        session: The model; its cache is overwritten.
        prompt: The prompt.
        eos_token_ids: Ids at which the answer ends.
        max_new_tokens: Most tokens to generate, the end token included; at least 1.
        choose: Picks a token from logits.
        features: The prompt's images where they are encoded already.

    Raises:
        PromptError: Prompt and answer do not fit into the context.
    """
    tokens = answer_tokens(session, prompt, eos_token_ids, max_new_tokens, choose, features)
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def answer_tokens(
    session: Session,
    prompt: Prompt,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    choose: Sampler = greedy,
    features: Sequence[np.ndarray] | None = None,
    *,
    cache: PromptCache | None = None,
    image_keys: Sequence[str] = (),
) -> Generator[int, None, Answer]:
    """The same, one token after the other as they come, the end token excepted; closing it ends the answer.

    More than six parameters: those of `generate`, and two for those who answer many prompts.

    Args:
        session: The model; its cache is overwritten.
        prompt: The prompt.
        eos_token_ids: Ids at which the answer ends.
        max_new_tokens: Most tokens to generate, the end token included; at least 1.
        choose: Picks a token from logits; may note what it likes of them, such as their `log_probability`.
        features: The prompt's images where they are encoded already; `cache` is left alone then.
        cache: What is known of earlier prompts of this model, and where to put what this one adds. It does
            not change a bit of the answer.
        image_keys: `image_key` of each image where they are known already.

    Returns:
        The whole answer, as the generator's value.
    """
    prompt_tokens = prompt.length(session.num_image_tokens)
    check_fits(prompt_tokens, max_new_tokens, session.context_length)
    start = time.perf_counter()
    reader = PromptReader(session, prompt, cache if features is None else None, image_keys)
    logits = reader.read(features)
    tokens: list[int] = []
    first_token_at = time.perf_counter()
    finished = False
    for token in stream_tokens(session, logits, max_new_tokens, choose):
        if not tokens:
            first_token_at = time.perf_counter()
        finished = token in eos_token_ids
        tokens.append(token)
        if finished:
            break
        yield token
    timings = Timings(
        vision_s=reader.vision_s,
        prefill_s=reader.prefill_s,
        decode_s=time.perf_counter() - first_token_at,
        ttft_s=first_token_at - start,
        prompt_tokens=prompt_tokens,
        answer_tokens=len(tokens),
    )
    said = tuple(tokens[:-1] if finished else tokens)
    return Answer(said, finished, timings, reader.encoded_images, reader.cached_tokens)


def log_probability(logits: np.ndarray, token: int) -> float:
    """Natural log-probability of a token, before any temperature; float32 [vocab].

    It takes an exponential of every logit: 0.4 ms with a vocabulary of 151,936.
    """
    distance = logits.astype(np.float64) - logits.max()
    return float(distance[token] - np.log(np.exp(distance).sum()))


def stream_tokens(
    session: Session, logits: np.ndarray, limit: int, choose: Sampler = greedy
) -> Iterator[int]:
    """Tokens that follow a prefill, one decode step each; ends after `limit`, not at an end token."""
    for step in range(limit):
        token = choose(logits)
        yield token
        if step + 1 < limit:
            logits = session.decode(session.embed(np.asarray([token], np.int64)))


def teacher_forced(session: Session, inputs_embeds: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """Logits that precede each of `token_ids` when the model is fed exactly these; [len(token_ids), vocab].

    Row 0 comes from the prefill, each further row from one decode step of the session itself.
    """
    rows = [session.prefill(inputs_embeds)]
    rows += [session.decode(session.embed(np.asarray([t], np.int64))) for t in token_ids[:-1]]
    return np.stack(rows)
