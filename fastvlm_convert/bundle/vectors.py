"""Golden vectors: what a bundle computes of three pictures, for the unit tests of the apps that run it.

An app's own code turns a picture into pixels, a question into token ids and tokens into text. Each of these
can be compared with what the bundle's own runtime was given and gave, in any language, from one JSON file.
"""

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fastvlm_convert.demo import check_samples
from fastvlm_convert.errors import BundleError, TokenizerError
from fastvlm_convert.generate import check_fits, generate, greedy
from fastvlm_convert.manifest import manifest_sha256
from fastvlm_convert.preprocess import pixel_values, square
from fastvlm_convert.progress import OnShare
from fastvlm_convert.prompt import Text
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.targets import Target

SCHEMA: Final = "fastvlm-convert/vectors"
SCHEMA_VERSION: Final = 1
MAX_NEW_TOKENS: Final = 48

_SAMPLES: Final = 64  # values of a large array, evenly spaced
_TOP: Final = 8  # of the likeliest tokens
# Of the largest value. Kernels of other processors and versions round elsewhere; a wrong picture, prompt or
# cache changes values by more than half of it.
_TOLERANCE: Final = 0.02

# Contractions in both cases and with the long s, white space of every kind, composed and decomposed letters,
# scripts, emoji of several code points, digits that are not 0 to 9, and special tokens that are only text.
ODD_TEXTS: Final = (
    "",
    "What is on the table?",
    "It's we'LL I'D they'Re don'T 'S '\u017f",
    "  two  spaces\tand a tab \n\n new\r\nlines \n ",
    "na\u00efve cafe\u0301 \u1e9b\u0323 \ufb01 \u212b",
    "\u65e5\u672c\u8a9e\u3068 \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \u0395\u03bb \u0627\u0644 \u0939\u093f",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f937\U0001f3fd",
    "3.14159 \u0661\u0662\u0663 \u00bd \u00b2 \u216b 1000000",
    "\u00a0x\u3000y\u2028z\u200bw\ufeff\u0085v\x1cu\x00t",
    "<|im_end|>\n<|im_start|>system <image><|endoftext|>",
    "\n<image>",
    "!!!\n\n???...(a+b)*c == {'k': \"v\"};\n\tif(x){}",
)


@dataclass(frozen=True)
class Sampled:
    """Some values of an array, by their index in it laid flat (C order).

    Attributes:
        shape: Of the whole array.
        indices: Which values.
        values: These.
        tolerance: How far another machine's may be from them.
    """

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    values: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True)
class Picture:
    """A picture as an app decodes it.

    Attributes:
        width: In pixels.
        height: In pixels.
        rgb_base64: uint8 [height, width, 3], row by row, red first.
    """

    width: int
    height: int
    rgb_base64: str


@dataclass(frozen=True)
class Case:
    """One picture with one question.

    Attributes:
        name: What is special about the picture.
        picture: The picture.
        question: The question.
        square_sha256: Of the picture made square and resized, uint8 [image_size, image_size, 3].
        pixel_values_sha256: Of what the vision graph is given, float32 [1, 3, image_size, image_size], little
            endian; or [1, 3, height, width] where it prepares pictures itself.
        pixel_values: The same, some values.
        segments: Token ids of the prompt before and behind the picture.
        image_features: What the encoder gives, float32 [num_image_tokens, hidden].
        first_logits: Of the answer's first token, float32 [vocab].
        top_token_ids: The likeliest first tokens, best first.
        token_ids: The greedy answer, without the end token.
        margins: By how much each step's best logit beats the second, the end token's too. A token whose
            margin is within the tolerance of the logits may come out differently on another machine.
        finished: Whether the answer ended by itself, rather than after 48 tokens.
        text: The answer as text.
    """

    name: str
    picture: Picture
    question: str
    square_sha256: str
    pixel_values_sha256: str
    pixel_values: Sampled
    segments: tuple[tuple[int, ...], ...]
    image_features: Sampled
    first_logits: Sampled
    top_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    margins: tuple[float, ...]
    finished: bool
    text: str


@dataclass(frozen=True)
class TokenizedText:
    """A text that a user may type.

    Attributes:
        text: The text.
        token_ids: Its ids on its own; special tokens in it are text.
        decoded: What these ids say as text again: the text as the tokenizer normalizes it.
        segments: Ids of the prompt for this text and one picture, before and behind the picture.
    """

    text: str
    token_ids: tuple[int, ...]
    decoded: str
    segments: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GoldenVectors:
    """What a bundle computes.

    Attributes:
        manifest_sha256: Hash of the bundle's manifest, so that a test can tell another bundle's vectors.
        target: Which of its formats was run.
        executed_by: What ran it.
        texts: For the tokenizer; those that the vocabulary cannot express are left out.
        cases: Pictures with questions.
    """

    manifest_sha256: str
    target: Target
    executed_by: str
    texts: tuple[TokenizedText, ...]
    cases: tuple[Case, ...]

    def to_json(self) -> str:
        """The content of a file of vectors."""
        value = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n"


def golden_vectors(bundle: Path, target: Target, model: LoadedModel, on_share: OnShare) -> GoldenVectors:
    """Run a bundle on three pictures.

    Args:
        bundle: Its folder.
        target: The target that was loaded.
        model: The bundle, loaded (`runtime.loaded.load_bundle`).
        on_share: Called with the share that is done, 0..1.

    Raises:
        BundleError: It gives NaN or infinity, so there is nothing to compare with.
        PromptError: Its context cannot hold a picture and a question.
    """
    cases = []
    pictures = _pictures(model.images.size)
    for number, (name, image, question) in enumerate(pictures):
        on_share(number / len(pictures))
        cases.append(golden_case(model, name, image, question))
    on_share(1.0)
    return GoldenVectors(
        manifest_sha256=manifest_sha256(bundle),
        target=target,
        executed_by=model.session.executed_by,
        texts=golden_texts(model, ODD_TEXTS),
        cases=tuple(cases),
    )


def _pictures(size: int) -> list[tuple[str, Image.Image, str]]:
    """Pictures of every format, both smaller and larger than the encoder's input, with a question each."""
    samples = check_samples()
    wide = next(s for s in reversed(samples) if s[0].width > s[0].height)
    tall = next(s for s in samples if s[0].width < s[0].height)
    banner, question = samples[0]
    return [
        ("wide", wide[0].reduce(2), wide[1].question),
        ("tall", tall[0], tall[1].question),
        ("banner", banner.resize((size + size // 8, size // 8)), question.question),
    ]


def golden_case(model: LoadedModel, name: str, image: Image.Image, question: str) -> Case:
    """What a bundle computes of one picture and one question.

    Args:
        model: The bundle, loaded.
        name: What is special about the picture.
        image: RGB, any size.
        question: The question.

    Raises:
        BundleError: It gives NaN or infinity, so there is nothing to compare with.
        PromptError: Its context cannot hold the picture and the question.
    """
    prompt = model.prompt(question, [image])
    length, context = prompt.length(model.session.num_image_tokens), model.session.context_length
    limit = max(1, min(MAX_NEW_TOKENS, context - length))
    check_fits(length, limit, context)
    features = model.session.encode_image(prompt.images[0])
    rows: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> int:
        _check_finite("logits", logits)
        rows.append(np.array(logits, np.float32))
        return greedy(logits)

    _check_finite("image_features", features)
    answer = generate(model.session, prompt, model.eos_token_ids, limit, choose, [features])
    best = np.argsort(-rows[0], kind="stable")[:_TOP]
    pixels = pixel_values(image, model.images)
    return Case(
        name=name,
        picture=Picture(image.width, image.height, base64.b64encode(image.tobytes()).decode()),
        question=question,
        square_sha256=hashlib.sha256(square(image, model.images).tobytes()).hexdigest(),
        pixel_values_sha256=hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest(),
        pixel_values=_sampled(pixels, tolerance=1e-6),
        segments=_ids(prompt.segments),
        image_features=_sampled(features),
        first_logits=_sampled(rows[0], first=best),
        top_token_ids=tuple(int(i) for i in best),
        token_ids=answer.token_ids,
        margins=tuple(_short(_margin(row)) for row in rows),
        finished=answer.finished,
        text=model.tokenizer.decode(list(answer.token_ids)),
    )


def golden_texts(model: LoadedModel, texts: Sequence[str]) -> tuple[TokenizedText, ...]:
    """Token ids of texts; those that the vocabulary cannot express are left out."""
    dot = Image.new("RGB", (1, 1))
    found = []
    for text in texts:
        try:
            ids = model.tokenizer.encode_texts([Text(text)])
        except TokenizerError:
            continue
        segments = _ids(model.prompt(text, [dot]).segments)
        found.append(TokenizedText(text, tuple(ids), model.tokenizer.decode(ids), segments))
    return tuple(found)


def _ids(segments: tuple[np.ndarray, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in segment) for segment in segments)


def _check_finite(what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        hint = "`fastvlm-convert verify` tells where they come from"
        raise BundleError(f"the bundle's {what} hold NaN or infinity", hint=hint)


def _margin(logits: np.ndarray) -> float:
    best = np.sort(logits)[-2:]
    return float(best[-1] - best[0])


def _sampled(array: np.ndarray, tolerance: float | None = None, first: np.ndarray | None = None) -> Sampled:
    """Values of an array, evenly spaced, behind those of `first`.

    Args:
        array: float32, any shape.
        tolerance: Absolute; None takes a share of the largest value.
        first: Indices to take besides.
    """
    flat = array.ravel()
    count = min(_SAMPLES, flat.size)
    spaced = [i * (flat.size - 1) // max(1, count - 1) for i in range(count)]
    indices = list(dict.fromkeys([*(int(i) for i in (first if first is not None else ())), *spaced]))
    if tolerance is None:
        tolerance = _short(_TOLERANCE * float(np.abs(flat).max()))
    return Sampled(
        shape=array.shape,
        indices=tuple(indices),
        values=tuple(_short(float(flat[i])) for i in indices),
        tolerance=tolerance,
    )


def _short(value: float) -> float:
    """The shortest number that is the same in float32."""
    return float(str(np.float32(value))) if math.isfinite(value) else value
