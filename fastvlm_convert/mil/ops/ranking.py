"""Sorting, choosing and marking elements."""

import torch

from fastvlm_convert.mil.ops.table import Limit, Scalar, Target, Tensor, axis_of, held_dtype, op

_MAX_BOXES = 1 << 16


@op("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """Positions of the elements in order; equal ones keep theirs."""
    return torch.argsort(x, dim=axis_of(axis, x.ndim), descending=not ascending, stable=True).int()


@op("topk", moves=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The k largest elements, or the smallest, and their positions; always in order."""
    del sort, output_indices_dtype
    axis = axis_of(axis, x.ndim)
    if k == -1:
        k = x.shape[axis]
    order = torch.argsort(x, dim=axis, descending=not ascending, stable=True).narrow(axis, 0, k)
    values = torch.take_along_dim(x, order, axis)
    return (values, order.int()) if return_indices else (values,)


@op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """Positions of all elements that are not zero, one a row."""
    return torch.nonzero(x).int()


@op("one_hot", moves=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    target: Target,
    limit: Limit,
    axis: int = -1,
    on_value: Scalar = 1,
    off_value: Scalar = 0,
) -> Tensor:
    """A new axis that is `on_value` at the index and `off_value` elsewhere."""
    axis = axis_of(axis, indices.ndim + 1)
    limit.check([*indices.shape, one_hot_vector_size])
    hit = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    dtype = held_dtype(target)
    on, off = torch.tensor(on_value, dtype=dtype), torch.tensor(off_value, dtype=dtype)
    return torch.where(hit, on, off).movedim(-1, axis)


@op("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    limit: Limit,
    score_threshold: float | None = None,
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """Boxes in the order of their best score, without those that overlap an earlier one too much.

    Args:
        boxes: float32 [n, boxes, 4]: center x, center y, width, height; [n, 4, boxes] since iOS 17.
        scores: float32 [n, boxes, classes]; [n, classes, boxes] since iOS 17.
        iou_threshold: Boxes that overlap a chosen one (intersection over union) more are dropped.
        max_boxes: Most boxes to choose; results are padded to it with zeros, indices with -1.
        limit: Bounds the results.
        score_threshold: Boxes whose best score is not above it are not considered; None since iOS 17.
        per_class_suppression: A box only drops boxes of its own best class.

    Returns:
        Chosen boxes [n, max_boxes, 4] and their scores [n, max_boxes, classes], since iOS 17 transposed as
        the inputs are; their indices [n, max_boxes], and how many there are [n].
    """
    since_17 = score_threshold is None
    if since_17:
        boxes, scores = boxes.mT, scores.mT
    floor = -torch.inf if score_threshold is None else score_threshold
    n, count, classes = scores.shape
    if boxes.shape != (n, count, 4) or count > _MAX_BOXES:
        raise ValueError(f"boxes of shape {list(boxes.shape)} with scores of {list(scores.shape)}")
    limit.check([n, max_boxes, max(4, classes)])
    kept_boxes = torch.zeros(n, max_boxes, 4)
    kept_scores = torch.zeros(n, max_boxes, classes)
    kept = torch.full((n, max_boxes), -1, dtype=torch.int32)
    numbers = torch.zeros(n, dtype=torch.int32)
    for i in range(n):
        best, kind = scores[i].max(-1)
        chosen = _suppress(
            boxes[i], best, kind if per_class_suppression else None, iou_threshold, max_boxes, floor
        )
        numbers[i] = len(chosen)
        kept[i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        kept_boxes[i, : len(chosen)] = boxes[i, chosen]
        kept_scores[i, : len(chosen)] = scores[i, chosen]
    if since_17:
        kept_boxes, kept_scores = kept_boxes.mT, kept_scores.mT
    return kept_boxes, kept_scores, kept, numbers


def _suppress(
    boxes: Tensor, scores: Tensor, kind: Tensor | None, overlap: float, limit: int, floor: float
) -> list[int]:
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    area = boxes[:, 2] * boxes[:, 3]
    order = torch.argsort(scores, descending=True, stable=True)
    alive = scores > floor
    chosen: list[int] = []
    for i in order.tolist():
        if len(chosen) >= limit:
            break
        if not alive[i]:
            continue
        chosen.append(i)
        sides = (torch.minimum(high, high[i]) - torch.maximum(low, low[i])).clamp(min=0)
        shared = sides[:, 0] * sides[:, 1]
        too_close = shared > overlap * (area + area[i] - shared)
        alive &= ~(too_close if kind is None else too_close & (kind == kind[i]))
    return chosen
