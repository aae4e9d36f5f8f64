"""What quantization costs the answers of several models, with intervals, beside how others quantize."""
