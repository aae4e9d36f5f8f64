"""Compressed weights, against coremltools' own decompression of the same package."""

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from coremltools.optimize import _utils as oracle  # coremltools' own decoders

from fastvlm_convert.mil import Interpreter
from fastvlm_convert.mil.ops.table import CONSTEXPRS
from fastvlm_convert.mil.package import open_package
from tests.mil.programs import write_package

RNG = np.random.default_rng(3)
F16 = np.float16


def integers(low, high, shape, dtype):
    return RNG.integers(low, high, shape).astype(dtype)


def half(*shape):
    return RNG.standard_normal(shape).astype(F16)


INT4, UINT4 = types.np_int4_dtype, types.np_uint4_dtype
NARROW = {
    1: types.np_uint1_dtype,
    2: types.np_uint2_dtype,
    3: types.np_uint3_dtype,
    4: UINT4,
    6: types.np_uint6_dtype,
    8: np.uint8,
}
PACKED_MASK = np.packbits(np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1], np.uint8), bitorder="little")
MASK = integers(0, 2, (6, 8), np.int8)
HITS = int(MASK.sum())


def blockwise(data, scale, offset=None):
    given = {"data": data, "scale": scale} | ({} if offset is None else {"offset": offset})
    return lambda: mb.constexpr_blockwise_shift_scale(**given)


def palette(bits, groups=(1, 1), vector=1, axis=None, shape=(6, 8), lut=None):
    indices = integers(0, 1 << bits, shape, np.uint8).view(NARROW[bits])
    lut = half(*groups, 1 << bits, vector) if lut is None else lut
    given = {"indices": indices, "lut": lut} | ({} if axis is None else {"vector_axis": np.int32(axis)})
    return lambda: mb.constexpr_lut_to_dense(**given)


def sparse_of(mask, data):
    return lambda: mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask.view(NARROW[1]))


def joint(*made):
    mask, data = made
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


MODERN = {
    "int4-block": blockwise(integers(-8, 8, (6, 8), np.int8).view(INT4), half(6, 2)),
    "uint4-zero-point": blockwise(
        integers(0, 16, (6, 8), np.uint8).view(UINT4),
        half(6, 4),
        integers(0, 16, (6, 4), np.uint8).view(UINT4),
    ),
    "int8-channel": blockwise(integers(-128, 128, (6, 8), np.int8), half(6, 1)),
    "uint8-tensor": blockwise(
        integers(0, 256, (6, 8), np.uint8), half(1, 1), integers(0, 256, (1, 1), np.uint8)
    ),
    "int8-rows-and-columns": blockwise(
        integers(-128, 128, (6, 8), np.int8), half(3, 2), integers(-128, 128, (3, 2), np.int8)
    ),
    "float-offset": blockwise(integers(-128, 128, (6, 8), np.int8), half(6, 1), half(6, 1)),
    "conv": blockwise(integers(-8, 8, (6, 8, 1, 1), np.int8).view(INT4), half(6, 2, 1, 1)),
    **{f"palette-{bits}": palette(bits) for bits in NARROW},
    "palette-grouped": palette(2, (3, 1)),
    "palette-grouped-both": palette(4, (3, 4)),
    "palette-vector-0": palette(2, vector=3, axis=0),
    "palette-vector-last": palette(3, (3, 2), vector=2, axis=-1),
    "sparse": sparse_of(MASK, half(HITS)),
    "lut-to-sparse": lambda: joint(
        *mb.constexpr_lut_to_sparse(
            indices_mask=MASK.view(NARROW[1]),
            indices_nonzero_data=integers(0, 4, HITS, np.uint8).view(NARROW[2]),
            lut=half(3, 1, 4, 1),
        )
    ),
    "lut-to-sparse-vector": lambda: joint(
        *mb.constexpr_lut_to_sparse(
            indices_mask=MASK.view(NARROW[1]),
            indices_nonzero_data=integers(0, 4, HITS, np.uint8).view(NARROW[2]),
            lut=half(3, 1, 4, 2),
            vector_axis=np.int32(0),
        )
    ),
    "sparse-shift-scale": lambda: joint(
        *mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=MASK.view(NARROW[1]),
            nonzero_data=integers(-8, 8, HITS, np.int8).view(INT4),
            scale=half(6, 2),
            offset=integers(-8, 8, (6, 2), np.int8).view(INT4),
        )
    ),
    "cast": lambda: mb.constexpr_cast(source_val=half(6, 8), output_dtype="fp32"),
}  # fmt: skip

OLD = {
    "affine": lambda: mb.constexpr_affine_dequantize(
        quantized_data=integers(-128, 128, (6, 8), np.int8),
        zero_point=integers(-128, 128, 8, np.int8),
        scale=half(8),
        axis=np.int32(1),
    ),
    "affine-scalar": lambda: mb.constexpr_affine_dequantize(
        quantized_data=integers(0, 256, (6, 8), np.uint8),
        zero_point=np.uint8(7),
        scale=F16(0.3),
        axis=np.int32(0),
    ),
    **{
        f"lut-{bits}": lambda bits=bits: mb.constexpr_lut_to_dense(
            indices=oracle.pack_elements_into_bits(integers(0, 1 << bits, 30, np.uint8), bits),
            lut=half(1 << bits),
            shape=np.array([5, 6], np.uint32),
        )
        for bits in (1, 2, 4, 6, 8)
    },
    "sparse": lambda: mb.constexpr_sparse_to_dense(
        nonzero_data=half(7), mask=PACKED_MASK, shape=np.array([3, 4], np.uint32)
    ),
    "cast": lambda: mb.constexpr_cast(source_val=half(6, 8), output_dtype="fp32"),
}  # fmt: skip


JOINT_LUT = integers(-128, 128, (2, 1, 16, 1), np.int8), half(1, 1, 1, 1)
JOINT_INDICES = integers(0, 16, (6, 8), np.uint8)
MODERN["joint-palette"] = lambda: mb.constexpr_lut_to_dense(
    indices=JOINT_INDICES.view(UINT4),
    lut=mb.constexpr_blockwise_shift_scale(data=JOINT_LUT[0], scale=JOINT_LUT[1]),
)
FORMULA = integers(-8, 8, (64, 96), np.int8), half(64, 3), integers(-8, 8, (64, 3), np.int8)
MODERN["formula"] = blockwise(FORMULA[0].view(INT4), FORMULA[1], FORMULA[2].view(INT4))


def decode(builders, path, target):
    """All weights in one function: what the interpreter makes of each in both precisions, and coremltools."""
    wanted = {}

    def function(x):
        outputs = []
        for name, build in builders.items():
            weight = build()
            if name == "joint-palette":  # coremltools cannot decode this one in one go
                wanted[name] = oracle.lut_to_dense(JOINT_INDICES, JOINT_LUT[0] * JOINT_LUT[1], None)
            else:
                wanted[name] = np.asarray(weight.op.materialized_val_inference())
            outputs.append(
                mb.add(x=mb.cast(x=x, dtype="fp32" if weight.dtype == types.fp32 else "fp16"), y=weight)
            )
        return outputs

    write_package({"f": (function, (np.zeros(1, np.float32),))}, path, target)
    inputs = {"x": np.zeros(1, np.float32)}
    exact, device = (
        dict(zip(builders, Interpreter(path, precision).predict(inputs).values(), strict=True))
        for precision in ("exact", "device")
    )
    return exact, device, wanted, open_package(path)


@pytest.fixture(scope="module")
def modern(tmp_path_factory):
    return decode(MODERN, tmp_path_factory.mktemp("modern") / "m.mlpackage", ct.target.iOS18)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return decode(OLD, tmp_path_factory.mktemp("old") / "m.mlpackage", ct.target.iOS16)


def agree(made, name):
    """Palettes and masks are equal; coremltools rounds to float16 between its two operations, we do not."""
    exact, device, wanted, _ = made
    np.testing.assert_allclose(exact[name], wanted[name].astype(np.float32), rtol=2e-3, atol=2e-2)
    np.testing.assert_array_equal(exact[name].astype(F16), device[name].astype(F16))
    if name.startswith(("palette", "lut", "cast")) or name == "sparse":
        np.testing.assert_array_equal(exact[name], wanted[name].astype(np.float32))


@pytest.mark.parametrize("name", MODERN)
def test_ios18(modern, name):
    agree(modern, name)


@pytest.mark.parametrize("name", OLD)
def test_ios16(old, name):
    agree(old, name)


def test_blocks_are_bit_equal_to_the_formula(modern):
    """`float32(q - z) * float32(s)`, which the ONNX files hold too."""
    q, s, z = FORMULA
    wide = [np.repeat(v.astype(np.float32), 32, 1) for v in (z, s)]
    np.testing.assert_array_equal(modern[0]["formula"], (q.astype(np.float32) - wide[0]) * wide[1])


def test_every_kind_is_tested(modern, old):
    seen = set()
    for package in (modern[3], old[3]):
        for function in package.spec.mlProgram.functions.values():
            for block in function.block_specializations.values():
                seen |= {o.type for o in block.operations if o.type in CONSTEXPRS}
    assert seen == set(CONSTEXPRS)


@pytest.mark.parametrize(("mode", "dtype"), [("linear_symmetric", "int4"), ("linear", "int8")])
def test_a_network_compressed_by_coremltools(mode, dtype, tmp_path):
    """Weights compressed by coremltools' optimizer, decompressed by it, give the same outputs."""
    weight = RNG.standard_normal((32, 64)).astype(np.float32)
    path = tmp_path / "m.mlpackage"
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    write_package({"main": (lambda x: mb.linear(x=x, weight=weight), (x,))}, path)
    config = ct.optimize.coreml.OptimizationConfig(
        ct.optimize.coreml.OpLinearQuantizerConfig(
            mode=mode, dtype=dtype, granularity="per_block", block_size=16, weight_threshold=0
        )
    )
    small = ct.optimize.coreml.linear_quantize_weights(
        ct.models.MLModel(str(path), skip_model_load=True), config
    )
    small.save(str(tmp_path / "small.mlpackage"))
    ct.optimize.coreml.decompress_weights(small).save(str(tmp_path / "large.mlpackage"))
    (found,) = Interpreter(tmp_path / "small.mlpackage").predict({"x": x}).values()
    (wanted,) = Interpreter(tmp_path / "large.mlpackage").predict({"x": x}).values()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
