"""Operators that ONNX Runtime's execution providers have kernels for, from their own lists.

A provider takes fewer: the lists also name conditions (constant weights, two dimensions). So what is not here
is certain to run elsewhere, and what is here may.
"""

from dataclasses import dataclass
from typing import Final

_LISTS: Final = "https://github.com/microsoft/onnxruntime/blob/main"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        title: As its makers call it.
        source: Where its list is.
        supported: Operators with a kernel, with their domain.
    """

    title: str
    source: str
    supported: frozenset[str]


def _onnx(names: str) -> set[str]:
    return {f"ai.onnx:{name}" for name in names.split()}


def _microsoft(names: str) -> set[str]:
    return {f"com.microsoft:{name}" for name in names.split()}


PROVIDERS: Final = {
    "xnnpack": Provider(
        "XNNPACK",
        "https://onnxruntime.ai/docs/execution-providers/Xnnpack-ExecutionProvider.html",
        frozenset(
            _onnx("AveragePool Conv ConvTranspose MaxPool Softmax QLinearConv Resize Gemm MatMul")
            | _microsoft("QLinearAveragePool QLinearSoftmax QLinearConvTranspose")
        ),
    ),
    "nnapi": Provider(
        "NNAPI",
        f"{_LISTS}/tools/ci_build/github/android/nnapi_supported_ops.md",
        frozenset(
            _onnx(
                "Abs Add AveragePool Cast Clip Concat Conv DepthToSpace DequantizeLinear Div Elu Exp Flatten "
                "Floor Gather Gemm GlobalAveragePool GlobalMaxPool Identity Log MatMul MaxPool Max Min Mul "
                "Neg Pad Pow PRelu QLinearConv QLinearMatMul QuantizeLinear Relu Reshape Resize Sigmoid Sin "
                "Slice Softmax Sqrt Squeeze Sub Tanh Transpose Unsqueeze"
            )
            | _microsoft("QLinearAdd QLinearAveragePool QLinearSigmoid")
        ),
    ),
    "coreml": Provider(
        "CoreML",
        f"{_LISTS}/tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md",
        frozenset(
            _onnx(
                "Add ArgMax AveragePool Cast Clip Concat Conv ConvTranspose Cos DepthToSpace Ceil Div Elu "
                "Erf Exp GatherND Gemm Gelu GlobalAveragePool GlobalMaxPool GridSample GroupNormalization "
                "HardSigmoid Identity InstanceNormalization LayerNormalization LeakyRelu MatMul MaxPool Max "
                "Mul Pow PRelu Range Reciprocal ReduceSum ReduceMean ReduceMax Relu Reshape Resize Round "
                "Shape Sin Slice Softplus Split Sub Sigmoid Softmax Sqrt Squeeze Tanh Tile Transpose "
                "Unsqueeze"
            )
            | _microsoft("QuickGelu FusedConv")
        ),
    ),
}

# ONNX Runtime Web's build with WebGPU, which transformers.js loads for the processor too: measured by this
# project's tests in a browser (docs/onnx.md). Its own list leaves out all of com.microsoft.
WEB_LACKS: Final = frozenset({"com.microsoft:GatherBlockQuantized"})

# What this tool writes, run on the CPU by its tests: for these alone ONNX Runtime need not be asked.
RUN_ON_CPU: Final = frozenset(
    _onnx(
        "Abs Add And BitShift BitwiseAnd Cast Concat Conv DequantizeLinear Div Equal Gather Gelu "
        "GlobalAveragePool GreaterOrEqual LayerNormalization Less MatMulInteger Max Min Mod Mul NonZero "
        "QuantizeLinear Range ReduceSum Relu Reshape ScatterND Shape Sigmoid Sign Slice Split Squeeze Sub "
        "Transpose Unsqueeze Where"
    )
    | _microsoft(
        "FusedMatMul GroupQueryAttention MatMulNBits MultiHeadAttention QuickGelu "
        "SkipSimplifiedLayerNormalization"
    )
)
