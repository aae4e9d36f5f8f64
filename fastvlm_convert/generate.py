"""The one decode loop, over a small protocol that every runtime implements."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastvlm_convert.errors import PromptError
from fastvlm_convert.prompt import Prompt
from fastvlm_convert.prompt_cache import (
    KvPrefix,
    PromptCache,
    ReusesPrefixes,
    image_key,
    prefix_keys,
    split_prompt,
)

Sampler = Callable[[np.ndarray], int]


class Session(Protocol):
    """A model that can be run, holding one KV cache.

    Attributes:
        executed_by: What executes it, for reports: `torch 2.13.0`, `onnxruntime 1.32.0`.
        context_length: Tokens the cache holds, prompt and answer together.
        num_image_tokens: Tokens one image becomes.
    """

    executed_by: str
    context_length: int
    num_image_tokens: int

    @property
    def trouble(self) -> str | None:
        """The operation that first gave NaN or infinity, in words, where the runtime can tell."""
        ...

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> projected image tokens, float32 [num_image_tokens, hidden]."""
        ...

    def prepare(self, pictures: np.ndarray) -> np.ndarray:
        """What the encoder gets of what `encode_image` is given, float32 [1, 3, S, S].

        The same, but for a graph that prepares pictures itself.
        """
        ...

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [n] -> float32 [n, hidden]."""
        ...

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Start a new sequence with float32 [n, hidden]; logits of the last position, float32 [vocab]."""
        ...

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append one token, float32 [1, hidden]; its logits, float32 [vocab]."""
        ...

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Append float32 [n, hidden] from a position on; logits of the last, float32 [vocab].

        Keys and values of the positions that are skipped are zero. Where a runtime takes tokens in chunks,
        both the tokens before and the position must be a multiple of the chunk.
        """
        ...


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
        mean_logprob: Mean natural log-probability of the generated tokens, the end token included; None where
            it was not asked for.
    """

    token_ids: tuple[int, ...]
    finished: bool
    timings: Timings
    encoded_images: int = 0
    cached_tokens: int = 0
    mean_logprob: float | None = None


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


def embed_prompt(session: Session, prompt: Prompt, features: Sequence[np.ndarray]) -> np.ndarray:
    """Embeddings of a whole prompt, image features spliced in; float32 [tokens, hidden]."""
    parts = []
    for i, segment in enumerate(prompt.segments):
        if i:
            parts.append(features[i - 1])
        if len(segment):
            parts.append(session.embed(segment))
    return np.concatenate(parts)


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
    logprobs: bool = False,
) -> Generator[int, None, Answer]:
    """The same, one token after the other as they come, the end token excepted; closing it ends the answer.

    More than six parameters: the last three are for servers.

    Args:
        session: The model; its cache is overwritten.
        prompt: The prompt.
        eos_token_ids: Ids at which the answer ends.
        max_new_tokens: Most tokens to generate, the end token included; at least 1.
        choose: Picks a token from logits.
        features: The prompt's images where they are encoded already.
        cache: What is known of earlier prompts of this model; what this one adds is put into it. The answer
            is the same, bit for bit, whatever it holds.
        image_keys: `prompt_cache.image_key` of the prompt's images where they are known already.
        logprobs: Whether `Answer.mean_logprob` is wanted; takes an exponential of every logit a token.

    Returns:
        The whole answer, as the generator's value.
    """
    prompt_tokens = prompt.length(session.num_image_tokens)
    check_fits(prompt_tokens, max_new_tokens, session.context_length)
    start = time.perf_counter()
    beginning = _Beginning(session, prompt, cache, image_keys)
    images = beginning.encode(features)
    encoded = time.perf_counter()
    logits = beginning.prefill(images)
    prefilled = time.perf_counter()
    tokens: list[int] = []
    chosen: list[float] = []
    first_token_at = prefilled
    finished = False

    def noting(logits: np.ndarray) -> int:
        token = choose(logits)
        chosen.append(log_probability(logits, token))
        return token

    for token in stream_tokens(session, logits, max_new_tokens, noting if logprobs else choose):
        if not tokens:
            first_token_at = time.perf_counter()
        finished = token in eos_token_ids
        tokens.append(token)
        if finished:
            break
        yield token
    timings = Timings(
        vision_s=encoded - start,
        prefill_s=prefilled - encoded,
        decode_s=time.perf_counter() - first_token_at,
        ttft_s=first_token_at - start,
        prompt_tokens=prompt_tokens,
        answer_tokens=len(tokens),
    )
    return Answer(
        tuple(tokens[:-1] if finished else tokens),
        finished,
        timings,
        encoded_images=beginning.encoded_images,
        cached_tokens=beginning.cached_tokens,
        mean_logprob=sum(chosen) / len(chosen) if chosen else None,
    )


class _Beginning:
    """How a prompt gets into a session's cache, and what is known of it already.

    Args:
        session: The model.
        prompt: The prompt.
        cache: What is known of earlier prompts, if anything is kept.
        image_keys: Keys of the images where they are known.
    """

    def __init__(
        self, session: Session, prompt: Prompt, cache: PromptCache | None, image_keys: Sequence[str]
    ) -> None:
        self.encoded_images = 0
        self._session = session
        self._cache = cache
        # A runtime that cannot begin in the middle takes the prompt whole.
        self._chunks = split_prompt(prompt) if isinstance(session, ReusesPrefixes) else [prompt]
        self._image_keys: Sequence[str] = ()
        self._prefix_keys: list[str] = []
        self._known: list[KvPrefix] = []
        if cache is None:
            return
        self._image_keys = image_keys or [image_key(image) for image in prompt.images]
        if isinstance(session, ReusesPrefixes):
            self._prefix_keys = prefix_keys(self._chunks, self._image_keys)
            for key in self._prefix_keys[:-1]:  # the last chunk's logits are needed
                prefix = cache.get_prefix(key)
                if prefix is None:
                    break
                self._known.append(prefix)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that need not be read."""
        return self._known[-1].stop if self._known else 0

    def encode(self, features: Sequence[np.ndarray] | None) -> list[Sequence[np.ndarray]]:
        """Features of the images of each chunk that must be read, where they are not given."""
        found = []
        first = sum(len(chunk.images) for chunk in self._chunks[: len(self._known)])
        for chunk in self._chunks[len(self._known) :]:
            numbers = range(first, first + len(chunk.images))
            found.append(
                [features[n] for n in numbers]
                if features is not None
                else [self._encoded(image, n) for image, n in zip(chunk.images, numbers, strict=True)]
            )
            first = numbers.stop
        return found

    def prefill(self, images: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Read what is not known; logits of the last position, float32 [vocab]."""
        session = self._session
        chunks = self._chunks[len(self._known) :]
        if not isinstance(session, ReusesPrefixes):
            return session.prefill(embed_prompt(session, chunks[0], images[0]))
        session.start_from(self._known)
        position = self.cached_tokens
        logits = np.zeros(0, np.float32)
        for number, (chunk, features) in enumerate(zip(chunks, images, strict=True), len(self._known)):
            logits = session.append(embed_prompt(session, chunk, features))
            start, position = position, position + chunk.length(session.num_image_tokens)
            if self._cache is not None:
                self._cache.put_prefix(self._prefix_keys[number], session.copy_prefix(position, start))
        return logits

    def _encoded(self, image: np.ndarray, number: int) -> np.ndarray:
        key = self._image_keys[number] if self._cache is not None else ""
        known = self._cache.get_features(key) if self._cache is not None else None
        if known is not None:
            return known
        self.encoded_images += 1
        features = self._session.encode_image(image)
        if self._cache is not None:
            self._cache.put_features(key, features)
        return features


def log_probability(logits: np.ndarray, token: int) -> float:
    """Natural log-probability of a token, before any temperature."""
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
