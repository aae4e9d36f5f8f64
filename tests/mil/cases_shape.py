"""Cases of operations that move values: shapes, slices, gathering, resizing, sorting."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from coremltools.converters.mil import Builder as mb  # noqa: N813

from tests.mil.cases_basic import IMAGE, A, X, integers, normal
from tests.mil.programs import Case

BIG = normal(2, 8, 4, 6)
ROWS = np.array([2, 0, -1, 1], np.int32)
TARGETS = normal(4, 3)
PICKS = integers(0, 3, 2, 3, 4)
STRAIGHT = np.array([[0, 1], [1, 2], [1, 0]], np.int32)


def _grid(n: int, m: int, mode: str) -> np.ndarray:
    """Sampling positions, spelled out from the documentation of `resize_bilinear`."""
    i = np.arange(m, dtype=np.float64)
    spacing = {
        "STRICT_ALIGN_CORNERS": i * (n - 1) / (m - 1),
        "ALIGN_CORNERS": i * (n - 1) / (m - 1),
        "DEFAULT": i * ((n - n / m) / (m - 1)),
        "OFFSET_CORNERS": 0.5 * max(1, n - 1) / m + i * max(1, n - 1) / m,
        "UNALIGN_CORNERS": i * n / m + 0.5 * n / m - 0.5,
    }[mode]
    return np.clip(spacing, 0, n - 1)


def resized(x: torch.Tensor, height: int, width: int, mode: str) -> np.ndarray:
    rows, columns = _grid(x.shape[-2], height, mode), _grid(x.shape[-1], width, mode)
    y = np.apply_along_axis(lambda v: np.interp(rows, np.arange(len(v)), v), -2, x.numpy())
    return np.apply_along_axis(lambda v: np.interp(columns, np.arange(len(v)), v), -1, y)


def _resize(mode):
    return lambda x: mb.resize_bilinear(x=x, target_size_height=7, target_size_width=4, sampling_mode=mode)


def _resized(mode):
    return lambda x: resized(x, 7, 4, mode)


def _scattered(mode):
    names = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    names |= {"max": np.maximum, "min": np.minimum}

    def expected(data, updates):
        y = data.numpy().copy()
        for row, update in zip([2, 0, 2, 1], updates.numpy(), strict=True):
            y[row] = update if mode == "update" else names[mode](y[row], update)
        return y

    return expected


def _scatter(mode):
    return lambda data, updates: mb.scatter(
        data=data, indices=np.array([2, 0, 2, 1], np.int32), updates=updates, axis=0, mode=mode
    )


CASES = [
    Case("reshape", lambda x: mb.reshape(x=x, shape=[2, -1]), (X,), lambda x: x.reshape(2, -1)),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[0, 0, 4]), (X,), lambda x: x, label="zeros"),
    # coremltools' own example: zeros count from the last axis, and what lies beyond the first is 1
    Case(
        "reshape",
        lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]),
        (normal(2, 50),),
        lambda x: x.reshape(1, 1, 2, 50),
        label="zeros-of-a-higher-rank",
    ),
    Case(
        "reshape",
        lambda x: mb.reshape(x=x, shape=[-1, 0]),
        (X,),
        lambda x: x.reshape(6, 4),
        label="zeros-of-a-lower-rank",
    ),
    Case(
        "reshape",
        lambda x: mb.reshape(
            x=x, shape=mb.concat(values=[mb.slice_by_size(x=mb.shape(x=x), begin=[2], size=[1]), [6]], axis=0)
        ),
        (X,),
        lambda x: x.reshape(4, 6),
        label="computed",
    ),
    Case(
        "reshape_like",
        lambda x, y: mb.reshape_like(
            x=x, ref_tensors=(x, y), begins=[0, 1], ends=[1, 2], end_masks=[False, True]
        ),
        (X, normal(5, 3, 4)),
        lambda x, y: x.reshape(2, 3, 4),
    ),
    Case("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, -2]), (X,), lambda x: x.permute(2, 0, 1)),
    Case("expand_dims", lambda x: mb.expand_dims(x=x, axes=[0, -1]), (X,), lambda x: x[None, ..., None]),
    Case("squeeze", lambda x: mb.squeeze(x=x, axes=[1]), (X[:, :1],), lambda x: x.squeeze(1)),
    Case("flatten2d", lambda x: mb.flatten2d(x=x, axis=2), (X,), lambda x: x.reshape(6, 4)),
    Case("shape", lambda x: mb.shape(x=x), (X,), lambda x: torch.tensor(x.shape, dtype=torch.int32)),
    Case("concat", lambda x, y: mb.concat(values=[x, y], axis=1), (X, X), lambda x, y: torch.cat([x, y], 1)),
    Case(
        "concat",
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        (X, X * 2),
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
        label="interleave",
    ),
    Case("stack", lambda x, y: mb.stack(values=[x, y], axis=1), (X, X), lambda x, y: torch.stack([x, y], 1)),
    Case("split", lambda x: mb.split(x=x, num_splits=2, axis=-1), (X,), lambda x: x.chunk(2, -1)),
    Case(
        "split",
        lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1),
        (X,),
        lambda x: x.split([1, 3], -1),
        label="sizes",
    ),
    Case("tile", lambda x: mb.tile(x=x, reps=[2, 1, 3]), (X,), lambda x: x.repeat(2, 1, 3)),
    Case("reverse", lambda x: mb.reverse(x=x, axes=[0, 2]), (X,), lambda x: x.flip(0, 2)),
    Case(
        "reverse_sequence",
        lambda x: mb.reverse_sequence(x=x, lengths=[2, 3], seq_axis=1, batch_axis=0),
        (X,),
        lambda x: torch.stack([torch.cat([x[0, :2].flip(0), x[0, 2:]]), x[1].flip(0)]),
    ),
    Case(
        "pad",
        lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=0.5),
        (X,),
        lambda x: F.pad(x, (0, 3, 1, 2), value=0.5),
    ),
    Case(
        "pad",
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 1], mode="reflect"),
        (IMAGE,),
        lambda x: F.pad(x, (3, 1, 1, 2), "reflect"),
        label="reflect",
    ),
    Case(
        "pad",
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 1], mode="replicate"),
        (IMAGE,),
        lambda x: F.pad(x, (3, 1, 1, 2), "replicate"),
        label="replicate",
    ),
    Case("fill", lambda x: mb.fill(shape=mb.shape(x=x), value=2.5), (X,), lambda x: torch.full_like(x, 2.5)),
    Case("fill_like", lambda x: mb.fill_like(ref_tensor=x, value=3), (X,), lambda x: torch.full(x.shape, 3)),
    Case(
        "range_1d",
        lambda x: mb.range_1d(start=2, end=mb.squeeze(x=mb.slice_by_size(x=x, begin=[0], size=[1])), step=3),
        (np.array([15], np.int32),),
        lambda x: torch.arange(2, 15, 3),
    ),
    Case(
        "band_part",
        lambda x: mb.band_part(x=x, lower=1, upper=0),
        (normal(5, 5),),
        lambda x: x.tril().triu(-1),
    ),
    Case(
        "sliding_windows",
        lambda x: mb.sliding_windows(x=x, axis=1, size=3, stride=2),
        (normal(2, 8, 4),),
        lambda x: x.unfold(1, 3, 2).transpose(2, 3),
    ),
    Case(
        "pixel_shuffle",
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        (BIG,),
        lambda x: F.pixel_shuffle(x, 2),
    ),
    Case(
        "pixel_unshuffle",
        lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        (BIG,),
        lambda x: F.pixel_unshuffle(x, 2),
    ),
    # the formulas of TensorFlow's documentation: [block row, block column, channel] in the depth
    Case(
        "depth_to_space",
        lambda x: mb.depth_to_space(x=x, block_size=2),
        (BIG,),
        lambda x: np.stack(
            [
                [[x[n, 2 * (2 * (i % 2) + j % 2) + c, i // 2, j // 2] for j in range(12)] for i in range(8)]
                for n in range(2)
                for c in range(2)
            ]
        ).reshape(2, 2, 8, 12),
    ),
    Case(
        "space_to_depth",
        lambda x: mb.space_to_depth(x=x, block_size=2),
        (BIG,),
        lambda x: torch.cat([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], 1),
    ),
    Case(
        "space_to_batch",
        lambda x: mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[1, 1], [0, 3]]),
        (BIG,),
        lambda x: torch.cat(
            [F.pad(x, (0, 3, 1, 1))[:, :, i::2, j::3] for i in range(2) for j in range(3)], 0
        ),
    ),
    Case(
        "batch_to_space",
        lambda x: mb.batch_to_space(
            x=mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[1, 1], [0, 3]]),
            block_shape=[2, 3],
            crops=[[1, 1], [0, 3]],
        ),
        (BIG,),
        lambda x: x,
    ),
    Case(
        "slice_by_index",
        lambda x: mb.slice_by_index(
            x=x, begin=[0, -1, 1], end=[1, -3, 4], stride=[1, -1, 2], squeeze_mask=[True, False, False]
        ),
        (X,),
        lambda x: x.numpy()[0, -1:-3:-1, 1:4:2],
    ),
    Case(
        "slice_by_index",
        lambda x: mb.slice_by_index(
            x=x, begin=[1, 1, 1], end=[2, 2, 2], begin_mask=[True, False, False], end_mask=[False, True, True]
        ),
        (X,),
        lambda x: x[:2, 1:, 1:],
        label="masks",
    ),
    Case(
        "slice_by_index",
        lambda x: mb.slice_by_index(
            x=x,
            begin=[0, 0, 0],
            end=[0, 0, 0],
            stride=[-1, 1, -2],
            begin_mask=[True] * 3,
            end_mask=[True] * 3,
        ),
        (X,),
        lambda x: x.numpy()[::-1, :, ::-2],
        label="backwards",
    ),
    Case(
        "slice_by_size",
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, 1], size=[2, -1, 2]),
        (X,),
        lambda x: x[:, 1:, 1:3],
    ),
    Case(
        "slice_update",
        lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]),
        (X, normal(2, 2, 2)),
        lambda x, y: torch.cat(
            [x[:, :1], torch.stack([y[..., 0], x[:, 1:, 1], y[..., 1], x[:, 1:, 3]], -1)], 1
        ),
    ),
    Case(
        "crop",
        lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]),
        (BIG,),
        lambda x: x[:, :, 1:2, :3],
    ),
    # gathering and scattering
    Case("gather", lambda x: mb.gather(x=x, indices=ROWS, axis=1), (X,), lambda x: x[:, [2, 0, 2, 1]]),
    Case(
        "gather",
        lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        (X, np.array([[0, 3], [2, 2]], np.int32)),
        lambda x, i: torch.stack([x[b][:, i[b].long()] for b in range(2)]),
        label="batch",
    ),
    Case(
        "gather_along_axis",
        lambda x: mb.gather_along_axis(x=x, indices=PICKS, axis=1),
        (X,),
        lambda x: x.gather(1, torch.from_numpy(PICKS).long()),
    ),
    Case("gather_nd", lambda x: mb.gather_nd(x=x, indices=STRAIGHT), (X,), lambda x: x[[0, 1, 1], [1, 2, 0]]),
    Case(
        "gather_nd",
        lambda x: mb.gather_nd(x=x, indices=np.array([[[2, 3]], [[0, 1]]], np.int32), batch_dims=1),
        (X,),
        lambda x: torch.stack([x[0, 2, 3], x[1, 0, 1]])[:, None],
        label="batch",
    ),
    *(
        Case("scatter", _scatter(mode), (normal(3, 3), TARGETS), _scattered(mode), label=mode, tolerance=2e-4)
        for mode in ("add", "sub", "mul", "div", "max", "min", "update")
    ),
    Case(
        "scatter_along_axis",
        lambda x, y: mb.scatter_along_axis(data=x, indices=PICKS[:, :1], updates=y, axis=1, mode="update"),
        (X, X[:, :1] + 9),
        lambda x, y: x.scatter(1, torch.from_numpy(PICKS[:, :1]).long(), y),
    ),
    Case(
        "scatter_nd",
        lambda x, y: mb.scatter_nd(data=x, indices=STRAIGHT, updates=y, mode="add"),
        (X, normal(3, 4)),
        lambda x, y: x.index_put(tuple(torch.from_numpy(STRAIGHT).long().T), y, accumulate=True),
    ),
    # sorting and choosing
    Case("argsort", lambda x: mb.argsort(x=x, axis=-1, ascending=True), (X,), lambda x: x.argsort(-1).int()),
    Case("topk", lambda x: mb.topk(x=x, k=2, axis=-1), (X,), lambda x: tuple(x.topk(2, -1))),
    Case(
        "topk",
        lambda x: mb.topk(x=x, k=2, axis=1, ascending=True),
        (X,),
        lambda x: tuple(x.topk(2, 1, largest=False)),
        label="smallest",
    ),
    Case("non_zero", lambda x: mb.non_zero(x=x), (np.maximum(A, 0).reshape(3, 4),), torch.nonzero),
    Case(
        "one_hot",
        lambda i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=0, on_value=2.0, off_value=-1.0),
        (np.array([1, 3, 0], np.int32),),
        lambda i: F.one_hot(i.long(), 4).T * 3.0 - 1,
    ),
    # resizing
    *(
        Case("resize_bilinear", _resize(mode), (IMAGE,), _resized(mode), label=mode)
        for mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")
    ),
    Case(
        "resize_bilinear",
        lambda x: mb.resize_bilinear(
            x=x, target_size_height=1, target_size_width=1, sampling_mode="ALIGN_CORNERS"
        ),
        (IMAGE,),
        lambda x: (x[..., 2:3, 2:3] + x[..., 2:3, 3:4]) / 2,
        label="to-one",
    ),
    Case(
        "upsample_bilinear",
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
        (IMAGE,),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=False),
    ),
    Case(
        "upsample_bilinear",
        lambda x: mb.upsample_bilinear(
            x=x, scale_factor_height=2.5, scale_factor_width=2.0, align_corners=True
        ),
        (IMAGE,),
        lambda x: F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=True),
        label="corners",
    ),
    Case(
        "resize_nearest_neighbor",
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=7, target_size_width=4),
        (IMAGE,),
        lambda x: F.interpolate(x, size=(7, 4), mode="nearest"),
    ),
    Case(
        "upsample_nearest_neighbor",
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        (IMAGE,),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
    ),
    Case(
        "resize",
        lambda x: mb.resize(x=x, shape=[3, 0, 9], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS"),
        (IMAGE,),
        lambda x: F.interpolate(x, size=(5, 9), mode="bilinear", align_corners=False),
    ),
    Case(
        "resize",
        lambda x: mb.resize(
            x=x, shape=[10, 3], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"
        ),
        (IMAGE,),
        lambda x: F.interpolate(x, size=(10, 3), mode="nearest"),
        label="nearest",
    ),
]
