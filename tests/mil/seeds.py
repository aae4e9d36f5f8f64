"""The packages that are damaged: an image network, a quantized decoder with state, loops, an old one, a list,
a classifier with an optional input, and a pipeline of an image network and the classifier."""

from collections.abc import Callable
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types

from tests.mil.programs import write_package, write_pipeline


def _vision(image):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 3, 3, 3)).astype(np.float16)
    x = mb.cast(x=mb.mul(x=image, y=np.float32(1 / 255)), dtype="fp16")
    x = mb.gelu(x=mb.conv(x=x, weight=weight, pad_type="same", strides=[2, 2]), mode="EXACT")
    x = mb.conv_transpose(x=x, weight=rng.standard_normal((8, 4, 2, 2)).astype(np.float16), strides=[2, 2])
    x = mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
    x = mb.layer_norm(x=mb.reshape(x=x, shape=[1, 4, -1]), axes=[-1], epsilon=np.float16(1e-5))
    x = mb.pad(x=mb.tile(x=x, reps=[1, 1, 2]), pad=[1, 1], mode="reflect")
    return mb.softmax(x=mb.topk(x=x, k=3, axis=-1)[0], axis=-1)


def _decoder(x, position, state_k):
    rng = np.random.default_rng(1)
    q = rng.integers(-8, 8, (16, 32)).astype(np.int8).view(types.np_int4_dtype)
    w1 = mb.constexpr_blockwise_shift_scale(data=q, scale=rng.random((16, 2)).astype(np.float16))
    indices = rng.integers(0, 4, (32, 16)).astype(np.uint8).view(types.np_uint2_dtype)
    w2 = mb.constexpr_lut_to_dense(indices=indices, lut=rng.random((1, 1, 4, 1)).astype(np.float16))
    h = mb.silu(x=mb.linear(x=x, weight=w1, bias=rng.random(16).astype(np.float16)))
    begin = mb.concat(values=[[0], position, [0]], axis=0)
    end = mb.concat(values=[[1], mb.add(x=position, y=1), [16]], axis=0)
    k = mb.slice_update(x=mb.read_state(input=state_k), update=h, begin=begin, end=end)
    k = mb.coreml_update_state(state=state_k, value=k)
    a = mb.scaled_dot_product_attention(query=h, key=k, value=k)
    return mb.linear(x=a, weight=w2, bias=rng.random(32).astype(np.float16))


def _loop(x, n):
    def body(i, y):
        return mb.add(x=i, y=1), mb.gather(x=mb.matmul(x=y, y=y), indices=[0, 1], axis=0)

    picked = mb.while_loop(_cond=lambda i, y: mb.less(x=i, y=n), _body=body, loop_vars=(mb.identity(x=n), x))[
        1
    ]
    return mb.cond(
        pred=mb.squeeze(x=mb.greater(x=n, y=0)),
        _true_fn=lambda: mb.mul(x=picked, y=2.0),
        _false_fn=lambda: mb.squeeze(
            x=mb.resize_bilinear(
                x=mb.expand_dims(x=picked, axes=[0]), target_size_height=2, target_size_width=2
            ),
            axes=[0],
        ),
    )


def _list(x):
    """Three tensors of a shape that is known only when it runs, written in a loop."""

    def body(i, ls):
        return mb.add(x=i, y=1), mb.list_write(ls=ls, index=mb.squeeze(x=i), value=mb.mul(x=x, y=2.0))

    empty = mb.make_list(init_length=3, elem_shape=("rows", np.int32(4)))
    zero = mb.fill(shape=[1], value=0)
    ls = mb.while_loop(_cond=lambda i, ls: mb.less(x=i, y=3), _body=body, loop_vars=(zero, empty))[1]
    return mb.list_gather(ls=ls, indices=[0, 1, 2]), mb.list_length(ls=ls)


def _classifier(x, bias):
    weight = np.random.default_rng(2).standard_normal((3, 8)).astype(np.float32)
    return mb.softmax(x=mb.add(x=mb.linear(x=x, weight=weight), y=bias), axis=-1)


def _features(image):
    pooled = mb.avg_pool(x=image, kernel_sizes=[2, 4], strides=[2, 4], pad_type="valid")
    rows = mb.reshape(x=pooled, shape=[1, -1])
    return mb.slice_by_size(x=rows, begin=[0, 0], size=[1, 8], name="x")


def write_seeds(folder: Path) -> list[Path]:
    """Write all of them into a folder."""
    half, single = np.float16, np.float32
    makers: dict[str, tuple[Callable[..., object], tuple[np.ndarray, ...], object]] = {
        "vision": (_vision, (np.zeros((1, 3, 8, 8), single),), ct.target.iOS18),
        "decoder": (
            _decoder,
            (np.zeros((1, 1, 32), half), np.zeros(1, np.int32), np.zeros((1, 4, 16), half)),
            ct.target.iOS18,
        ),
        "loop": (_loop, (np.ones((2, 2), single), np.ones(1, np.int32)), ct.target.iOS18),
        "old": (
            lambda x: mb.linear(
                x=x,
                weight=mb.constexpr_lut_to_dense(
                    indices=np.arange(32, dtype=np.uint8),
                    lut=np.arange(16, dtype=half),
                    shape=np.array([8, 8], np.uint32),
                ),
            ),
            (np.zeros((2, 8), half),),
            ct.target.iOS16,
        ),
        "list": (_list, (np.ones((2, 4), single),), ct.target.iOS18),
    }  # fmt: skip
    for name, (build, inputs, target) in makers.items():
        write_package({"main": (build, inputs)}, folder / f"{name}.mlpackage", target)
    row, picture = (1, 3), (1, 3, 4, 8)
    write_package(
        {"main": (_classifier, (np.zeros((1, 8), single), np.zeros(row, single)))},
        folder / "classifier.mlpackage",
        input_types=(
            ct.TensorType("x", (1, 8)),
            ct.TensorType("bias", row, default_value=np.ones(row, single)),
        ),
        classifier_config=ct.ClassifierConfig(["a", "b", "c"]),
    )
    write_package(
        {"main": (_features, (np.zeros(picture, single),))},
        folder / "features.mlpackage",
        input_types=(ct.ImageType("image", picture, channel_first=True),),
    )
    stages = [folder / "features.mlpackage", folder / "classifier.mlpackage"]
    write_pipeline(stages, folder / "pipeline.mlpackage")
    return [folder / f"{name}.mlpackage" for name in (*makers, "classifier", "pipeline")]
