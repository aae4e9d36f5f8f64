"""Sampling images at computed coordinates."""

from typing import Final

import torch
from torch.nn import functional

from fastvlm_convert.mil.ops.resize import sample_points
from fastvlm_convert.mil.ops.table import Limit, Tensor, op

_PADDING: Final = ("constant", "border", "reflection", "symmetric")


@op("crop_resize")
def crop_resize(
    x: Tensor,
    limit: Limit,
    boxes: Tensor | None = None,
    roi: Tensor | None = None,
    box_indices: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """Parts of images, each resized linearly to one size.

    Args:
        x: float32 [images, channels, height, width].
        limit: Bounds the result.
        boxes: [n, 4], since iOS 17.
        roi: Up to iOS 16: [n, 1, 4, 1, 1], each box in all images, or [n, 1, 5, 1, 1] with the image first.
        box_indices: [n]: the image of each box; box i is in image i by default.
        target_height: Height of each result.
        target_width: Width of each result.
        normalized_coordinates: Whether 1 is the last row or column.
        spatial_scale: Multiplies the coordinates.
        box_coordinate_mode: What the four numbers are.
        sampling_mode: As for `resize_bilinear`, within the box.
        pad_value: What lies outside of the image.

    Returns:
        [n, channels, target_height, target_width] for `boxes`; with an axis for the images after n for `roi`.
    """
    limit.check([1 if boxes is None else len(boxes), x.shape[1], target_height, target_width])
    if boxes is not None:
        which = torch.arange(len(boxes)) if box_indices is None else box_indices.long()
        corners = _corners(boxes.float(), x, normalized_coordinates, spatial_scale, box_coordinate_mode)
        return _crops(x, corners, which, (target_height, target_width), sampling_mode, pad_value)
    if roi is None or roi.ndim != 5 or roi.shape[2] not in (4, 5):
        raise ValueError("crop_resize needs boxes, or a roi of shape [n, 1, 4 or 5, 1, 1]")
    flat = roi[:, 0, :, 0, 0]
    corners = _corners(flat[:, -4:], x, normalized_coordinates, spatial_scale, box_coordinate_mode)
    size = (target_height, target_width)
    if flat.shape[1] == 5:
        return _crops(x, corners, flat[:, 0].long(), size, sampling_mode, pad_value)[:, None]
    images = range(x.shape[0])
    limit.check([len(flat), x.shape[0], x.shape[1], *size])
    each = [_crops(x, corners, torch.full((len(flat),), i), size, sampling_mode, pad_value) for i in images]
    return torch.stack(each, 1)


def _corners(boxes: Tensor, x: Tensor, normalized: bool, scale: float, mode: str) -> Tensor:
    """[n, 4] in pixels: first row, first column, last row, last column."""
    kind, _, order = mode.rpartition("_")[0].rpartition("_")
    if kind not in ("CORNERS", "CENTER_SIZE") or order not in ("HEIGHT", "WIDTH"):
        raise ValueError(f"unknown box_coordinate_mode '{mode}'")
    if order == "WIDTH":
        boxes = boxes[:, [1, 0, 3, 2]]
    if kind == "CENTER_SIZE":
        half = boxes[:, 2:] / 2
        boxes = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1)
    boxes = boxes * scale
    height, width = x.shape[-2:]
    size = torch.tensor([height - 1, width - 1] * 2)
    return boxes * size if normalized else boxes


def _crops(
    x: Tensor, corners: Tensor, which: Tensor, size: tuple[int, int], mode: str, outside: float
) -> Tensor:
    images = len(x)
    if which.shape != corners.shape[:1] or (
        which.numel() and not 0 <= int(which.min()) <= int(which.max()) < images
    ):
        raise IndexError(f"boxes in images {which.tolist()[:8]} of {images}")
    rows = sample_points(corners[:, 0], corners[:, 2], size[0], mode)
    columns = sample_points(corners[:, 1], corners[:, 3], size[1], mode)
    made = [_bilinear(x[i], r, c, outside) for i, r, c in zip(which.tolist(), rows, columns, strict=True)]
    return torch.stack(made) if made else x.new_zeros(0, x.shape[1], *size)


def _bilinear(image: Tensor, rows: Tensor, columns: Tensor, outside: float) -> Tensor:
    height, width = image.shape[-2:]
    inside = ((rows >= 0) & (rows <= height - 1))[:, None] & ((columns >= 0) & (columns <= width - 1))
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    top, left = rows.floor().long(), columns.floor().long()
    down, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    dy, dx = (rows - top)[:, None], columns - left
    upper = image[:, top][:, :, left] * (1 - dx) + image[:, top][:, :, right] * dx
    lower = image[:, down][:, :, left] * (1 - dx) + image[:, down][:, :, right] * dx
    return torch.where(inside, upper * (1 - dy) + lower * dy, outside)


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    limit: Limit,
    sampling_mode: str = "bilinear",
    padding_mode: str = "constant",
    padding_value: float = 0.0,
    coordinates_mode: str = "normalized_minus_one_to_one",
    align_corners: bool = True,
) -> Tensor:
    """Images sampled where an affine map, [a0, a1, a2, b0, b1, b2], takes each pixel's coordinates."""
    if padding_mode != "constant" or padding_value or coordinates_mode != "normalized_minus_one_to_one":
        raise ValueError(f"padding_mode '{padding_mode}' with coordinates_mode '{coordinates_mode}'")
    limit.check([*x.shape[:2], output_height, output_width])
    matrix = transform_matrix.reshape(-1, 2, 3).expand(x.shape[0], 2, 3)
    size = [*x.shape[:2], output_height, output_width]
    grid = functional.affine_grid(matrix, size, align_corners=align_corners)
    return functional.grid_sample(
        x, grid, mode=sampling_mode, padding_mode="zeros", align_corners=align_corners
    )


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
    limit: Limit,
) -> Tensor:
    """Images sampled at given coordinates: [n, channels, *size], [n, rows, columns, 2 (x, y)].

    Outside the image `border` repeats its edge, `reflection` mirrors it at the center of the last pixel
    (2 1 | 0 1 2 | 1 0), and `symmetric` at its outer edge (1 0 | 0 1 2 | 2 1).
    """
    if padding_mode not in _PADDING:
        raise ValueError(f"unknown padding_mode '{padding_mode}'")
    if x.ndim != 4 or coordinates.ndim != 4 or coordinates.shape[-1] != 2 or len(x) != len(coordinates):
        raise ValueError(f"coordinates of shape {list(coordinates.shape)} for {list(x.shape)}")
    limit.check([*x.shape[:2], *coordinates.shape[1:3]])
    size = torch.tensor([x.shape[-1], x.shape[-2]])
    points = _pixels(coordinates.float(), size, coordinates_mode, align_corners)
    if sampling_mode == "nearest":
        return _picked(x, torch.round(points), padding_mode, padding_value)
    if sampling_mode != "bilinear":
        raise ValueError(f"unknown sampling_mode '{sampling_mode}'")
    first = torch.floor(points)
    share = (points - first)[:, None]  # broadcasts over the channels
    right, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    corners = [
        _picked(x, first + step, padding_mode, padding_value) for step in (0, right, down, right + down)
    ]
    upper = corners[0] + (corners[1] - corners[0]) * share[..., 0]
    lower = corners[2] + (corners[3] - corners[2]) * share[..., 0]
    return upper + (lower - upper) * share[..., 1]


def _pixels(points: Tensor, size: Tensor, mode: str, align_corners: bool) -> Tensor:
    """Coordinates in pixels: 0 is the center of the first one."""
    if mode == "unnormalized":
        return points
    if mode == "normalized_minus_one_to_one":
        points = (points + 1) / 2
    elif mode != "normalized_zero_to_one":
        raise ValueError(f"unknown coordinates_mode '{mode}'")
    return points * (size - 1) if align_corners else points * size - 0.5


def _picked(x: Tensor, points: Tensor, padding: str, outside: float) -> Tensor:
    """Pixels of x [n, c, h, w] at whole coordinates [n, rows, columns, 2]: [n, c, rows, columns]."""
    height, width = x.shape[-2:]
    size = torch.tensor([width, height])
    # Far outside, what is exact does not matter, but it must fit an integer.
    places = torch.nan_to_num(points).clamp(-(2.0**30), 2.0**30).long()
    inside = ((places >= 0) & (places < size)).all(-1)
    if padding == "reflection":
        period = (2 * (size - 1)).clamp(min=1)
        places = places.remainder(period)
        places = torch.minimum(places, period - places)
    elif padding == "symmetric":
        places = places.remainder(2 * size)
        places = torch.minimum(places, 2 * size - 1 - places)
    places = torch.minimum(places.clamp(min=0), size - 1)
    flat = (places[..., 1] * width + places[..., 0]).flatten(1)
    picked = x.flatten(2).gather(2, flat[:, None].expand(-1, x.shape[1], -1))
    picked = picked.view(*x.shape[:2], *points.shape[1:3])
    return torch.where(inside[:, None], picked, outside) if padding == "constant" else picked
