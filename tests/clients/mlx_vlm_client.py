"""Runs in the environment of `make clients-mlx`: what mlx-vlm itself answers from a folder.

    python mlx_vlm_client.py JOB.json    -> a JSON document on standard output

The job has `folder`, `layers` and `widths` of the encoder (class constants in mlx-vlm, for the published
encoder), and `questions`: `image`, `question`, `max_tokens`, and whether `text` is wanted, which mlx-vlm can
give only of ids that the tokenizer has.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx_vlm.models.fastvlm.config as fastvlm
from mlx.utils import tree_flatten
from mlx_vlm import apply_chat_template, load, stream_generate
from mlx_vlm.generate import generate_step
from PIL import Image


def answer(model, processor, asked: dict) -> dict:
    prompt = apply_chat_template(processor, model.config, asked["question"], num_images=1)
    if asked["text"]:
        pieces = list(
            stream_generate(
                model,
                processor,
                prompt,
                image=[asked["image"]],
                max_tokens=asked["max_tokens"],
                temperature=0.0,
            )
        )
        said = "".join(piece.text for piece in pieces)
        return {"token_ids": [piece.token for piece in pieces], "text": said}
    picture = Image.open(asked["image"]).convert("RGB")
    given = processor(images=picture, text=prompt, return_tensors="np")
    ids, pixels = (mx.array(given[name]) for name in ("input_ids", "pixel_values"))
    steps = generate_step(ids, model, pixels, None, max_tokens=asked["max_tokens"], temperature=0.0)
    tokens = [int(token) for token, _ in islice(steps, asked["max_tokens"])]
    return {"token_ids": tokens, "text": None}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    fastvlm.VisionConfig.layers = job["layers"]
    fastvlm.VisionConfig.embed_dims = job["widths"]
    model, processor = load(job["folder"])
    parameters = {name: str(value.dtype) for name, value in tree_flatten(model.parameters())}
    answers = [answer(model, processor, asked) for asked in job["questions"]]
    # A line of its own: mlx-vlm prints, too.
    sys.stdout.write(f"\n{json.dumps({'parameters': parameters, 'answers': answers})}\n")


if __name__ == "__main__":
    main()
