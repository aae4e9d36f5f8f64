"""What people write by hand: thirty lines of FastAPI around ONNX Runtime, the peer of `serve_load`.

    python -m benchmarks.plain_server BUNDLE PORT

Default session options, threads of the framework's pool, no queue, no cache, no validation, one message with
a picture and a question.
"""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from PIL import Image
from tokenizers import Tokenizer

from fastvlm_convert.manifest import load_manifest
from fastvlm_convert.preprocess import pixel_values


def app_of(bundle: Path) -> FastAPI:
    """The server of a bundle, whose graphs are loaded here."""
    contract = load_manifest(bundle).contract
    graphs = {
        artifact["component"]: artifact
        for artifact in json.loads((bundle / "fastvlm_manifest.json").read_text())["artifacts"]
        if (artifact["target"], artifact["function"]) == ("onnx", "main")
    }
    vision, embed, decoder = (
        onnxruntime.InferenceSession(bundle / graphs[part]["files"][0])
        for part in ("vision", "embed", "decoder")
    )
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    empty_cache = {
        value["name"]: np.zeros((1, value["shape"][1], 0, value["shape"][3]), value["dtype"])
        for value in graphs["decoder"]["inputs"]
        if value["name"].startswith("past_key_values")
    }
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(request: dict[str, Any]) -> dict[str, Any]:
        """Answer a question about a picture."""
        (picture, question) = request["messages"][0]["content"]
        encoded = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        pixels = pixel_values(Image.open(io.BytesIO(encoded)).convert("RGB"), contract.images)
        features = vision.run(None, {"pixel_values": pixels})[0]
        texts = contract.prompt.replace("{question}", question["text"]).split(contract.image_token)
        ids = [np.array([tokenizer.encode(text, add_special_tokens=False).ids]) for text in texts]
        before, behind = (embed.run(None, {"input_ids": part})[0] for part in ids)
        inputs, cache = np.concatenate([before, features[None], behind], axis=1), empty_cache
        length, tokens = 0, []
        while len(tokens) < request["max_tokens"]:
            length += inputs.shape[1]
            mask = np.ones((1, length), np.int64)
            logits, *present = decoder.run(None, {"inputs_embeds": inputs, "attention_mask": mask, **cache})
            cache = dict(zip(cache, present, strict=True))
            token = int(logits[0, -1].argmax())
            if token in contract.eos_token_ids:
                break
            tokens.append(token)
            inputs = embed.run(None, {"input_ids": np.array([[token]])})[0]
        return {"choices": [{"message": {"role": "assistant", "content": tokenizer.decode(tokens)}}]}

    return app


if __name__ == "__main__":
    uvicorn.run(app_of(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
