"""When `verify` warns that pictures are unlike those that calibrated: shares of channels, and false alarms.

    python -m benchmarks.calibration_coverage

Of the demo checkpoint and the one of the unseen style (`training/unseen`): for each way to calibrate the
share of the image tokens' channels that sets of 32 other pictures drive beyond the calibrated range, and in
how many sets that makes a warning. Half of the pictures of a style are blurred and noisy.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from benchmarks.calibration_mix import CHECKPOINTS, JUDGED_SEED, OWN_SEED, drawn, style_of
from fastvlm_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_convert.demo.samples import calibration_samples
from fastvlm_convert.mix import mixed_samples
from fastvlm_convert.model.block_streamer import BlockStreamer
from fastvlm_convert.preprocess import pixel_values
from fastvlm_convert.quantization.coverage import LIMIT, coverage_of, share_beyond
from fastvlm_convert.quantization.limits import MAX_PIXELS
from fastvlm_convert.weights.fold import fold

SET = 32  # pictures
SAMPLES = 64  # that calibrate


def mix(first: int, count: int) -> list[Image.Image]:
    """Pictures of the default mix."""
    found = (sample.image for sample in mixed_samples(2 * (first + count)))
    return [image for image in found if image is not None][first : first + count]


def own(style: str, first: int, count: int) -> list[Image.Image]:
    """Pictures of a checkpoint's style, every second one badly taken."""
    look = style_of(style)
    return [image for n in range(count) for image, _ in drawn(look, first + n, 1, bad=n % 2 == 1)]


def noise(count: int) -> list[Image.Image]:
    """Black, white and color at random."""
    values = np.random.default_rng(0).integers(0, 2, (count, 256, 256, 3), np.uint8)
    return [Image.fromarray(255 * picture) for picture in values]


@torch.no_grad()
def image_tokens(checkpoint: Checkpoint, images: list[Image.Image]) -> np.ndarray:
    """What the float encoder makes of pictures, float32 [pictures, num_image_tokens, hidden]."""
    model = BlockStreamer(checkpoint.config, fold(checkpoint.weights))
    blocks = [model.load(block) for block in model.vision_blocks()]
    pixels = torch.from_numpy(np.concatenate([pixel_values(i, checkpoint.pictures.image) for i in images]))
    parts = []
    for part in torch.split(pixels, max(1, MAX_PIXELS // pixels[0, 0].numel())):
        x = part
        for block in blocks:
            x = model.run(block, x)
        parts.append(x)
    return torch.cat(parts).numpy()


def rows(name: str, sets: int) -> Iterator[str]:
    """Rows of a checkpoint."""
    checkpoint = open_checkpoint(CHECKPOINTS[name])
    calibrated = {
        f"default mix, {SAMPLES}": mix(0, SAMPLES * 6 // 7),
        "default mix, 14": mix(0, 12),
        f"scenes alone, {SAMPLES}": [image for image, _ in calibration_samples(SAMPLES)],
        **{f"pictures of {s}, {SAMPLES}": own(s, OWN_SEED, SAMPLES) for s in CHECKPOINTS},
        "one photograph": mix(1, 1),
    }
    verified = {
        "more of the mix": mix(SAMPLES, sets * SET),
        **{f"pictures of {s}": own(s, JUDGED_SEED, sets * SET) for s in CHECKPOINTS},
        "noise": noise(SET),
    }
    features = {kind: image_tokens(checkpoint, images) for kind, images in verified.items()}
    for label, images in calibrated.items():
        coverage = coverage_of(image_tokens(checkpoint, images))
        for kind, found in features.items():
            parts = [found[start : start + SET] for start in range(0, len(found), SET)]
            shares = [share_beyond(coverage, part) for part in parts]
            warned = sum(share > LIMIT for share in shares)
            cells = (name, label, kind, f"{min(shares):.2f}-{max(shares):.2f}", f"{warned} of {len(shares)}")
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=5, help="of 32 pictures of each kind")
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    arguments = parser.parse_args()
    print("| checkpoint | calibrated on | verified on | share of channels | warns |")
    print("|---|---|---|---|---|")
    for name in arguments.checkpoints:
        for row in rows(name, arguments.sets):
            print(row, flush=True)


if __name__ == "__main__":
    main()
