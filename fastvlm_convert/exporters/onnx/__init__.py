"""Lower to ONNX: graphs with external data, as transformers.js and onnxruntime-genai read them."""
