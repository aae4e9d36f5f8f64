"""fastvlm-convert: FastVLM checkpoints to verified ONNX and Core ML bundles."""

__version__ = "0.1.0"
