"""Cases of operations on images: resampling, cropping, choosing boxes; and what iOS 17 changed."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from coremltools.converters.mil import Builder as mb  # noqa: N813

from tests.mil.cases_basic import IMAGE, X, uniform
from tests.mil.cases_conv import CONVS
from tests.mil.programs import Case

GRID = uniform(-1.2, 1.2, 2, 4, 3, 2)
THETA = uniform(-1, 1, 2, 6)
BOXES = np.array([[0.5, 1, 3, 4], [1, 0, 4, 5]], np.float32)
NEAR = np.array([[[2, 2, 2, 2], [2.1, 2, 2, 2], [6, 6, 2, 2], [2, 2.2, 2, 2]]], np.float32)
SCORES = np.array([[[0.9, 0.1], [0.2, 0.8], [0.3, 0.4], [0.6, 0.1]]], np.float32)


def _cropped(x, boxes):
    """torch's own sampling at the documented positions: `count` points from one corner to the other."""
    made = []
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        rows = torch.linspace(top, bottom, 3) * 2 / (x.shape[2] - 1) - 1
        columns = torch.linspace(left, right, 4) * 2 / (x.shape[3] - 1) - 1
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
        made.append(F.grid_sample(x[i : i + 1], grid[None], align_corners=True)[0])
    return torch.stack(made)


FAR = uniform(-2.5, 2.5, 2, 4, 3, 2)  # beyond the second mirror image
PADDINGS = {
    "constant": {"mode": "constant", "constant_values": 0.7},
    "border": {"mode": "edge"},
    "reflection": {"mode": "reflect"},
    "symmetric": {"mode": "symmetric"},
}
REACH = 24


def _padded_and_sampled(x, points, sampling, padding):
    """numpy's own padding, then one pixel or a mean of four at coordinates in pixels, one after the other."""
    around = ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH))
    wide = np.pad(np.asarray(x), around, **PADDINGS[padding])
    made = np.zeros((*x.shape[:2], *points.shape[1:3]), np.float32)
    for n, row, column in np.ndindex(points.shape[:3]):
        across, down = points[n, row, column].double().numpy() + REACH
        if sampling == "nearest":
            made[n, :, row, column] = wide[n, :, int(np.rint(down)), int(np.rint(across))]
            continue
        top, left = int(np.floor(down)), int(np.floor(across))
        rows, columns = np.array([top + 1 - down, down - top]), np.array([left + 1 - across, across - left])
        made[n, :, row, column] = rows @ wide[n, :, top : top + 2, left : left + 2] @ columns
    return made


def _resample(sampling, padding, coordinates, align):
    return lambda x, g: mb.resample(
        x=x,
        coordinates=g,
        sampling_mode=sampling,
        padding_mode=padding,
        padding_value=0.7 if padding == "constant" and coordinates == "unnormalized" else 0.0,
        coordinates_mode=coordinates,
        align_corners=align,
    )


# torch mirrors at the outer edge where corners are not aligned, else at the center of the last pixel
RESAMPLED_AS_TORCH = [
    Case(
        "resample",
        _resample(sampling, padding, "normalized_minus_one_to_one", align),
        (IMAGE, GRID),
        lambda x, g, sampling=sampling, torch_padding=torch_padding, align=align: F.grid_sample(
            x, g, sampling, torch_padding, align_corners=align
        ),
        label=f"{sampling}-{padding}-{align}",
    )
    for sampling in ("bilinear", "nearest")
    for padding, torch_padding, align in (
        ("constant", "zeros", False),
        ("border", "border", False),
        ("symmetric", "reflection", False),
        ("reflection", "reflection", True),
    )
]
RESAMPLED_AS_NUMPY = [
    Case(
        "resample",
        _resample(sampling, padding, "unnormalized", True),
        (IMAGE, FAR * np.array([6, 5], np.float32)),
        lambda x, g, sampling=sampling, padding=padding: _padded_and_sampled(x, g, sampling, padding),
        label=f"{sampling}-{padding}-pixels",
    )
    for sampling in ("bilinear", "nearest")
    for padding in PADDINGS
] + [
    Case(
        "resample",
        _resample("bilinear", "symmetric", "normalized_zero_to_one", align),
        (IMAGE, FAR),
        lambda x, g, align=align: _padded_and_sampled(
            x,
            g * torch.tensor([5.0, 4.0]) if align else g * torch.tensor([6.0, 5.0]) - 0.5,
            "bilinear",
            "symmetric",
        ),
        label=f"zero-to-one-{align}",
    )
    for align in (True, False)
]

CASES = [
    Case(
        "affine",
        lambda x, m: mb.affine(
            x=x,
            transform_matrix=m,
            output_height=4,
            output_width=7,
            sampling_mode="bilinear",
            padding_mode="constant",
            padding_value=0.0,
            coordinates_mode="normalized_minus_one_to_one",
            align_corners=True,
        ),
        (IMAGE, THETA),
        lambda x, m: F.grid_sample(
            x, F.affine_grid(m.view(2, 2, 3), [2, 3, 4, 7], align_corners=True), align_corners=True
        ),
    ),
    *RESAMPLED_AS_TORCH,
    *RESAMPLED_AS_NUMPY,
    Case(
        "crop_resize",
        lambda x, b: mb.crop_resize(
            x=x, boxes=b, target_height=3, target_width=4, sampling_mode="STRICT_ALIGN_CORNERS"
        ),
        (IMAGE, BOXES),
        _cropped,
    ),
    # boxes 0 and 2 of the first class, box 1 overlaps 0 but is of the other class
    Case(
        "non_maximum_suppression",
        lambda b, s: mb.non_maximum_suppression(
            boxes=b, scores=s, iou_threshold=0.5, max_boxes=3, per_class_suppression=True
        ),
        (NEAR.transpose(0, 2, 1).copy(), SCORES.transpose(0, 2, 1).copy()),
        lambda b, s: (b[..., [0, 1, 2]], s[..., [0, 1, 2]], np.array([[0, 1, 2]])),
    ),
    Case(
        "non_maximum_suppression",
        lambda b, s: mb.non_maximum_suppression(boxes=b, scores=s, iou_threshold=0.5, max_boxes=3),
        (NEAR.transpose(0, 2, 1).copy(), SCORES.transpose(0, 2, 1).copy()),
        lambda b, s: (F.pad(b[..., [0, 2]], (0, 1)), F.pad(s[..., [0, 2]], (0, 1)), np.array([[0, 2, -1]])),
        label="all-classes",
    ),
]


# what iOS 17 changed
OLD_CASES = [
    Case(
        "crop_resize",
        lambda x, b: mb.crop_resize(
            x=x,
            roi=mb.reshape(x=b, shape=[1, 1, 5, 1, 1]),
            target_height=3,
            target_width=4,
            normalized_coordinates=True,
            box_coordinate_mode="CORNERS_WIDTH_FIRST",
            sampling_mode="STRICT_ALIGN_CORNERS",
        ),
        (IMAGE[:1], np.array([[0, 0.2, 0.125, 0.8, 0.75]], np.float32)),
        lambda x, b: _cropped(x, torch.tensor([[0.5, 1, 3, 4]]))[:, None],
        label="roi-5",
    ),
    Case(
        "crop_resize",
        lambda x, b: mb.crop_resize(
            x=x,
            roi=mb.reshape(x=b, shape=[1, 1, 4, 1, 1]),
            target_height=3,
            target_width=4,
            box_coordinate_mode="CENTER_SIZE_HEIGHT_FIRST",
            sampling_mode="STRICT_ALIGN_CORNERS",
        ),
        (IMAGE, np.array([[2, 3, 2, 4]], np.float32)),
        lambda x, b: _cropped(x, torch.tensor([[1.0, 1, 3, 5]] * 2))[None],
        label="roi-4",
    ),
    Case(
        "non_maximum_suppression",
        lambda b, s: mb.non_maximum_suppression(
            boxes=b, scores=s, iou_threshold=0.95, score_threshold=0.7, max_boxes=3
        ),
        (NEAR, SCORES),
        lambda b, s: (
            F.pad(b[:, [0, 1]], (0, 0, 0, 1)),
            F.pad(s[:, [0, 1]], (0, 0, 0, 1)),
            np.array([[0, 1, -1]]),
            np.array([2]),
        ),
        label="score-threshold",
    ),
    Case("topk", lambda x: mb.topk(x=x, k=2, axis=-1), (X,), lambda x: tuple(x.topk(2, -1))),
    Case("squeeze", lambda x: mb.squeeze(x=x), (X[:, :1],), lambda x: x.squeeze()),
    CONVS[0],
]
