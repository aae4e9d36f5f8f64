"""Questions about the demo's pictures, and their answers by the code that `run` has."""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastvlm_convert.prompt import user_message
from fastvlm_convert.prompt_cache import image_key
from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.serve.engine import Question, Sampling
from fastvlm_convert.serve.served_bundle import open_served_bundle

DEMO = Path(__file__).parents[3] / "checkpoints" / "fastvlm-demo"
IMAGES = DEMO / "check_images"
MAX_TOKENS = 48
ENDLESS = 1900  # tokens of an answer that takes seconds; the context holds few more


@dataclass(frozen=True)
class Asked:
    """A question about one of the demo's pictures."""

    image: str
    text: str


def demo_questions() -> list[Asked]:
    """Those that come with the demo checkpoint."""
    entries = json.loads((IMAGES / "questions.json").read_text())
    return [Asked(entry["image"], entry["question"]) for entry in entries]


def question(bundle: Path, asked: Asked, *, seconds: float = 60, **sampling: object) -> Question:
    """What the server would give an engine."""
    with Image.open(IMAGES / asked.image) as image:
        prompt = open_served_bundle(bundle).prompt([user_message(asked.text, [image.convert("RGB")])])
    settings: dict[str, object] = {"max_tokens": MAX_TOKENS} | sampling
    return Question(
        request_id="test",
        prompt=prompt,
        image_keys=tuple(image_key(pixels) for pixels in prompt.images),
        sampling=Sampling(**settings),  # type: ignore[arg-type]
        deadline=time.monotonic() + seconds,
        cancelled=threading.Event(),
    )


def answers_of_run(bundle: Path, asked: list[Asked]) -> list[str]:
    """The texts that `run` prints."""
    loaded = load_bundle(bundle)
    texts = []
    for one in asked:
        stream = loaded.ask(IMAGES / one.image, one.text, max_new_tokens=MAX_TOKENS)
        stream.finish()
        texts.append(stream.text)
    return texts
