"""Lower to ONNX: three graphs with external data, as transformers.js and onnxruntime-genai read them."""
