"""Cases of convolution and pooling, with every type of padding."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from coremltools.converters.mil import Builder as mb  # noqa: N813

from tests.mil.cases_basic import normal
from tests.mil.programs import Case

# Sizes, kernels and strides that leave an odd number of pixels to pad.
SIGNAL, PICTURE, VOLUME = normal(2, 4, 10), normal(2, 4, 9, 8), normal(1, 4, 5, 6, 7)
KERNEL1, KERNEL2, KERNEL3 = normal(6, 2, 3), normal(6, 2, 4, 3), normal(6, 4, 2, 3, 3)
DEPTHWISE = normal(4, 1, 3, 3)
BIAS = normal(6)


def _same(n: int, k: int, s: int, d: int, lower: bool) -> tuple[int, int]:
    """TensorFlow's SAME: ceil(n / s) windows; an odd pixel goes to the end, for same_lower to the start."""
    total = max((int(np.ceil(n / s)) - 1) * s + (k - 1) * d + 1 - n, 0)
    small = total // 2
    return (total - small, small) if lower else (small, total - small)


def same_padded(x, kernel, strides, dilations, lower, value=0.0):
    pads = [_same(*v, lower) for v in zip(x.shape[2:], kernel, strides, dilations, strict=True)]
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


def _conv(weight, **settings):
    return lambda x: mb.conv(x=x, weight=weight, bias=BIAS[: len(weight)], **settings)


def _conv_same(pad_type, strides, dilations=(1, 1)):
    def expected(x):
        wide = same_padded(x, KERNEL2.shape[2:], strides, dilations, pad_type == "same_lower")
        return F.conv2d(wide, torch.from_numpy(KERNEL2), torch.from_numpy(BIAS), strides, 0, dilations, 2)

    return Case(
        "conv",
        _conv(KERNEL2, pad_type=pad_type, strides=strides, dilations=dilations, groups=2),
        (PICTURE,),
        expected,
        label=f"{pad_type}-{strides}-{dilations}",
    )


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


CONVS = [
    Case(
        "conv",
        _conv(KERNEL1, groups=2),
        (SIGNAL,),
        lambda x: F.conv1d(x, t(KERNEL1), t(BIAS), groups=2),
        label="1d",
    ),
    Case(
        "conv",
        _conv(KERNEL3),
        (VOLUME,),
        lambda x: F.conv3d(x, t(KERNEL3), t(BIAS)),
        label="3d",
        tolerance=1e-4,
    ),
    Case(
        "conv",
        lambda x: mb.conv(
            x=x, weight=DEPTHWISE, pad_type="custom", pad=[1, 1, 1, 1], strides=[2, 2], groups=4
        ),
        (PICTURE,),
        lambda x: F.conv2d(x, t(DEPTHWISE), None, 2, 1, 1, 4),
        label="depthwise",
    ),
    Case(
        "conv",
        _conv(KERNEL2, pad_type="custom", pad=[1, 2, 0, 3], groups=2),
        (PICTURE,),
        lambda x: F.conv2d(F.pad(x, (0, 3, 1, 2)), t(KERNEL2), t(BIAS), groups=2),
        label="custom-uneven",
    ),
    *(_conv_same(kind, strides) for kind in ("same", "same_lower") for strides in ((1, 1), (2, 3))),
    _conv_same("same", (1, 1), (2, 2)),
]

UP1, UP2, UP3 = normal(4, 3, 3), normal(4, 3, 4, 3), normal(4, 2, 2, 3, 2)


def _up(weight, **settings):
    return lambda x: mb.conv_transpose(x=x, weight=weight, **settings)


CONVS += [
    Case(
        "conv_transpose",
        _up(UP1, strides=[2]),
        (SIGNAL,),
        lambda x: F.conv_transpose1d(x, t(UP1), stride=2),
        label="1d",
    ),
    Case(
        "conv_transpose",
        _up(UP3, strides=[2, 1, 2]),
        (VOLUME,),
        lambda x: F.conv_transpose3d(x, t(UP3), stride=(2, 1, 2)),
        label="3d",
    ),
    Case(
        "conv_transpose",
        _up(UP2, strides=[2, 3], pad_type="custom", pad=[1, 1, 1, 1], groups=2, bias=BIAS),
        (PICTURE,),
        lambda x: F.conv_transpose2d(x, t(UP2), t(BIAS), (2, 3), 1, 0, 2),
        label="custom",
    ),
    Case(
        "conv_transpose",
        _up(UP2, strides=[2, 2], dilations=[2, 1], pad_type="custom", pad=[2, 0, 1, 0]),
        (PICTURE,),
        lambda x: F.conv_transpose2d(x, t(UP2), None, 2, 0, 0, 1, (2, 1))[:, :, 2:, 1:],
        label="custom-uneven",
    ),
    Case(
        "conv_transpose",
        _up(UP2, strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], output_shape=[2, 3, 19, 16]),
        (PICTURE,),
        lambda x: F.conv_transpose2d(x, t(UP2), None, 2, 1, 1),
        label="output_padding",
    ),
    # the gradient of a convolution with SAME padding, which is how TensorFlow defines it
    Case(
        "conv_transpose",
        _up(UP2, strides=[2, 2], pad_type="same"),
        (PICTURE,),
        lambda x: F.conv_transpose2d(x, t(UP2), None, 2)[:, :, 1:19, :16],
        label="same",
    ),
]


def _pool(name, **settings):
    return lambda x: getattr(mb, name)(x=x, **settings)


def _pooled(kind, pad_type, strides):
    """SAME pooling spelled out over windows."""

    def expected(x):
        lower = pad_type == "same_lower"
        fill = -torch.inf if kind == "max" else 0.0
        wide = same_padded(x, (3, 2), strides, (1, 1), lower, fill)
        windows = wide.unfold(2, 3, strides[0]).unfold(3, 2, strides[1]).flatten(4)
        if kind == "max":
            return windows.amax(-1)
        if kind == "l2":
            return windows.square().sum(-1).sqrt()
        if kind == "avg":
            return windows.mean(-1)
        ones = same_padded(torch.ones_like(x), (3, 2), strides, (1, 1), lower)
        return windows.sum(-1) / ones.unfold(2, 3, strides[0]).unfold(3, 2, strides[1]).flatten(4).sum(-1)

    name = "avg_pool" if kind.startswith("avg") else f"{kind}_pool"
    settings = {"exclude_padding_from_average": True} if kind == "avg-own" else {}
    build = _pool(name, kernel_sizes=[3, 2], strides=strides, pad_type=pad_type, **settings)
    return Case(name, build, (PICTURE,), expected, label=f"{kind}-{pad_type}")


POOLS = [
    _pooled(kind, pad_type, (2, 3))
    for kind in ("max", "avg", "avg-own", "l2")
    for pad_type in ("valid", "same", "same_lower")
    if pad_type != "valid"
]
POOLS += [
    Case(
        "max_pool",
        _pool("max_pool", kernel_sizes=[3], pad_type="valid"),
        (SIGNAL,),
        lambda x: F.max_pool1d(x, 3, 1),
        label="1d",
    ),
    Case(
        "max_pool",
        _pool(
            "max_pool",
            kernel_sizes=[3, 3],
            strides=[2, 2],
            pad_type="custom",
            pad=[1, 1, 1, 1],
            ceil_mode=True,
        ),
        (PICTURE,),
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        label="ceil",
    ),
    Case(
        "max_pool",
        _pool("max_pool", kernel_sizes=[2, 2, 2], strides=[2, 2, 2], pad_type="valid"),
        (VOLUME,),
        lambda x: F.max_pool3d(x, 2),
        label="3d",
    ),
    *(
        Case(
            "avg_pool",
            _pool(
                "avg_pool",
                kernel_sizes=[3, 3],
                strides=[2, 2],
                pad_type="custom",
                pad=[1, 1, 1, 1],
                exclude_padding_from_average=own,
                ceil_mode=ceil,
            ),
            (PICTURE,),
            lambda x, own=own, ceil=ceil: F.avg_pool2d(x, 3, 2, 1, ceil_mode=ceil, count_include_pad=not own),
            label=f"custom-own={own}-ceil={ceil}",
        )
        for own in (False, True)
        for ceil in (False, True)
    ),
    Case(
        "avg_pool",
        _pool("avg_pool", kernel_sizes=[4], strides=[2], pad_type="valid"),
        (SIGNAL,),
        lambda x: F.avg_pool1d(x, 4, 2),
        label="1d",
    ),
    Case(
        "avg_pool",
        _pool("avg_pool", kernel_sizes=[2, 2, 3], pad_type="valid"),
        (VOLUME,),
        lambda x: F.avg_pool3d(x, (2, 2, 3), 1),
        label="3d",
    ),
    Case(
        "l2_pool",
        _pool("l2_pool", kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"),
        (PICTURE,),
        lambda x: F.lp_pool2d(x.abs(), 2.0, 2),
        label="valid",
    ),
]

CASES = [*CONVS, *POOLS]
